"""Rows that no fit can use: a named error for each; and rows that look hopeless but have a defined answer."""

import pytest
import torch
from subspace_rows import unchecked

from care_lens.subspace import (
    NonFiniteError,
    RankError,
    SafetySubspace,
    SingularCovarianceError,
    SubspaceError,
    TooFewRowsError,
    WidthError,
)


@pytest.fixture(autouse=True)
def as_users_run():
    with unchecked():
        yield


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["benign", "malicious"])
def test_values_that_are_not_finite(value, side):
    rows = {"benign": normal(20, 5), "malicious": normal(20, 5, 1)}
    rows[side][7, 2] = value
    with pytest.raises(NonFiniteError, match=rf"{side} must be finite.* in 1 of 20 rows \(first: row 7\)"):
        SafetySubspace.fit(**rows, rank=1)


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("side", ["benign", "malicious"])
def test_too_few_rows(count, side):
    rows = {"benign": normal(20, 5), "malicious": normal(20, 5, 1)}
    rows[side] = rows[side][:count]
    with pytest.raises(TooFewRowsError, match=f"{side} must have 2 rows or more, got {count}"):
        SafetySubspace.fit(**rows, rank=1)


def test_one_row_is_enough_for_a_mean():
    benign, malicious = normal(20, 5), normal(1, 5, 1)
    assert SafetySubspace.fit(benign, malicious, contrast="mean").rank == 1
    plain = SafetySubspace.fit(benign[:1], malicious, contrast="mean", metric="identity")
    delta = (malicious - benign[:1])[0]
    torch.testing.assert_close(plain.read[:, 0], delta / delta.norm())


@pytest.mark.parametrize(
    ("benign", "malicious"),
    [
        (normal(20, 5), normal(20, 6)),
        (normal(20, 5), normal(20, 5)[0]),
        (normal(20, 5)[None], normal(20, 5)),
        (normal(20, 0), normal(20, 0)),
        (normal(20, 5).long(), normal(20, 5)),
    ],
)
def test_rows_of_the_wrong_form(benign, malicious):
    with pytest.raises(WidthError):
        SafetySubspace.fit(benign, malicious, rank=1)


def test_no_shrinkage_with_fewer_rows_than_dimensions():
    with pytest.raises(SingularCovarianceError, match="larger shrinkage"):
        SafetySubspace.fit(normal(10, 12), normal(30, 12, 1), rank=1, shrinkage=None)


@pytest.mark.parametrize("shrinkage", ["ledoit-wolf", "oas", 0.5, None])
def test_benign_rows_that_are_all_the_same(shrinkage):
    with pytest.raises(SingularCovarianceError):
        SafetySubspace.fit(torch.ones(10, 4), normal(30, 4), rank=1, shrinkage=shrinkage)


def test_malicious_rows_that_are_all_the_same():
    same = torch.full((10, 4), 3.0)
    with pytest.raises(RankError, match="at most 0"):
        SafetySubspace.fit(normal(50, 4), same, rank=1, contrast="covariance")
    assert SafetySubspace.fit(normal(50, 4), same, rank=1).rank == 1
    with pytest.raises(RankError, match="at most 1"):
        SafetySubspace.fit(normal(50, 4), same, rank=2)


def test_classes_with_the_same_mean_have_no_mean_contrast():
    rows = normal(50, 4)
    with pytest.raises(RankError, match="at most 0"):
        SafetySubspace.fit(rows, rows, contrast="mean")


def test_constant_columns_are_harmless():
    benign, malicious = normal(50, 6), 3 * normal(50, 6, 1)
    benign[:, 2] = malicious[:, 2] = 7.0
    fitted = SafetySubspace.fit(benign, malicious, rank=2)
    assert bool((fitted.read[2].abs() < 1e-6).all())


@pytest.mark.parametrize(("rank", "error"), [(0, RankError), (-1, RankError), (10, RankError), (True, SubspaceError)])
def test_ranks_that_cannot_be(rank, error):
    with pytest.raises(error, match="rank must be"):
        SafetySubspace.fit(normal(50, 12), normal(6, 12, 1), rank=rank)


def test_the_rank_error_says_the_largest():
    with pytest.raises(RankError, match="at most 6 for these rows, got 10") as caught:
        SafetySubspace.fit(normal(50, 12), normal(6, 12, 1), rank=10, shrinkage=0.1)
    assert caught.value.largest == 6


@pytest.mark.parametrize("option", ["contrast", "metric", "projection", "solver", "shrinkage"])
def test_unknown_options_are_named(option):
    with pytest.raises(SubspaceError, match=f"{option} must be .*'nonsense'"):
        SafetySubspace.fit(normal(20, 5), normal(20, 5, 1), rank=1, **{option: "nonsense"})


def test_groups_of_the_wrong_length_are_named():
    with pytest.raises(SubspaceError, match="groups must be as long as the rows"):
        SafetySubspace.fit(normal(20, 5), normal(20, 5, 1), rank=1, groups=(["a"] * 20, ["b"] * 19))
