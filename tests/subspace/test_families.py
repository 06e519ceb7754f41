import math

import pytest
import torch
from scipy.linalg import subspace_angles

from care_lens.subspace import (
    Moments,
    SafetySubspace,
    SubspaceError,
    TooFewRowsError,
    WidthError,
    compare_references,
    fit_families,
    overlaps,
    pool,
    shared_subspace,
)

F64 = torch.float64


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)


def along(n, d, axes, seed):
    rows = normal(n, d, seed)
    rows[:, axes] *= 6
    return rows


def test_a_common_axis_is_found_and_private_ones_are_not():
    eye = torch.eye(10, dtype=F64)
    found = shared_subspace({"a": eye[:, :3], "b": eye[:, [0, 4, 5]] * 7, "c": eye[:, [6, 0]]})
    torch.testing.assert_close(found.basis.abs(), eye[:, :1])
    torch.testing.assert_close(found.agreement, torch.tensor([1] + [1 / 3] * 5, dtype=F64))
    torch.testing.assert_close(found.cosines, torch.ones(1, 3, dtype=F64))
    frame = found.to_dataframe()
    assert frame.family.tolist() == ["a", "b", "c"]
    assert 1 / 3 < found.chance < 1


def test_two_families_agree_by_their_principal_angles():
    """The mean squared cosine of a bisector is (1 + cos theta) / 2, scipy's angles being the oracle."""
    first, second = normal(12, 3), normal(12, 2, 1)
    found = shared_subspace({"a": first, "b": second}, threshold=0.01, draws=0)
    angles = torch.from_numpy(subspace_angles(first.numpy(), second.numpy())).flip(0)
    expected = torch.cat([(1 + angles.cos()) / 2, torch.tensor([0.5], dtype=F64), (1 - angles.cos().flip(0)) / 2])
    torch.testing.assert_close(found.agreement, expected)
    torch.testing.assert_close(found.cosines[:2], (angles / 2).cos()[:, None].expand(2, 2))
    assert math.isnan(found.chance)


def test_the_threshold_decides_and_none_may_be_shared():
    eye = torch.eye(4, dtype=F64)
    tilted = math.cos(1.0) * eye[:, :1] + math.sin(1.0) * eye[:, 1:2]
    squared = math.cos(0.5) ** 2
    for threshold, rank in ((squared - 1e-6, 1), (squared + 1e-6, 0)):
        assert shared_subspace({"a": eye[:, :1], "b": tilted}, threshold=threshold).rank == rank
    nothing = shared_subspace({"a": eye[:, :1], "b": eye[:, 1:2]}, threshold=0.6)
    assert nothing.rank == 0
    assert nothing.to_dataframe().empty


def test_identical_subspaces_share_all_of_themselves():
    basis = normal(9, 4)
    turned = basis @ normal(4, 4, 1)
    found = shared_subspace({"a": basis, "b": turned, "c": -basis})
    assert found.rank == 4
    assert subspace_angles(found.basis.numpy(), basis.numpy()).max() < 1e-6


def test_chance_says_what_unrelated_subspaces_give():
    """Unrelated ones exceed a 95 % point about one time in twenty; 60 draws, seeds 100 to 159."""
    reference = shared_subspace({"a": normal(40, 3), "b": normal(40, 3, 1)}, draws=200)
    above = [
        float(shared_subspace({"a": normal(40, 3, 2 * s), "b": normal(40, 3, 2 * s + 1)}, draws=0).agreement[0])
        > reference.chance
        for s in range(100, 160)
    ]
    assert 0 < sum(above) < 10


@pytest.mark.parametrize(
    ("bases", "error", "message"),
    [
        ({"a": normal(4, 1)}, SubspaceError, "two subspaces or more"),
        ({"a": normal(4, 1), "b": normal(5, 1)}, WidthError, "equally wide"),
        ({"a": normal(4, 1), "b": torch.zeros(4, 1, dtype=F64)}, SubspaceError, "b must have full column rank"),
        ({"a": normal(4, 1), "b": normal(4, 0)}, SubspaceError, "b must have full column rank"),
    ],
)
def test_bases_that_cannot_be_compared_are_named(bases, error, message):
    with pytest.raises(error, match=message):
        shared_subspace(bases)
    with pytest.raises(SubspaceError, match="threshold must be"):
        shared_subspace({"a": normal(4, 1), "b": normal(4, 1)}, threshold=0.0)


@pytest.mark.parametrize("rows", [True, False])
def test_pooling_with_and_without_the_differences_of_means(rows):
    parts = {"a": normal(30, 4), "b": normal(20, 4, 1) + 5}
    moments = {name: Moments.from_rows(part) for name, part in parts.items()}
    if not rows:
        moments = {name: part.without_rows() for name, part in moments.items()}
    whole, within = pool(moments), pool(moments, between=False)
    together = torch.cat(list(parts.values()))
    torch.testing.assert_close(whole.covariance(), torch.cov(together.T, correction=0))
    centred = torch.cat([part - part.mean(0) for part in parts.values()])
    torch.testing.assert_close(within.covariance(), centred.T @ centred / 50)
    torch.testing.assert_close(within.mean, together.mean(0))
    with pytest.raises(TooFewRowsError, match="one set of moments or more"):
        pool({})


def test_families_share_the_direction_that_all_have():
    benign = normal(400, 12)
    families = {"typographic": along(300, 12, [0, 3], 1), "gradient": along(300, 12, [0, 7], 2)}
    found = fit_families(benign, families, rank=2, contrast="covariance", threshold=0.8)
    assert found.shared.rank == 1
    assert int(found.shared.basis[:, 0].abs().argmax()) == 0
    assert float(found.shared.agreement[0]) > max(0.95, found.shared.chance)
    pooled = torch.cat(list(families.values()))
    direct = SafetySubspace.fit(benign, pooled, rank=2, contrast="covariance")
    torch.testing.assert_close(found.pooled.basis, direct.basis)
    frame = found.to_dataframe()
    assert frame[["first", "second"]].values.tolist() == [
        ["typographic", "gradient"],
        ["typographic", "pooled"],
        ["gradient", "pooled"],
    ]
    assert 0.3 < frame.normalized[0] < 0.7  # one of two directions


def test_the_reference_changes_what_is_found():
    """Refusals vary along axis 1 themselves, so that against them malicious rows do not stand out there."""
    answers, refusals = normal(400, 8), along(400, 8, [1], 1)
    malicious = along(400, 8, [1, 2], 2)
    fits = compare_references({"answers": answers, "refusals": refusals}, malicious, rank=1, contrast="covariance")
    against_refusals = fits["refusals"].basis[:, 0].abs()
    assert float(against_refusals[2]) > 0.95
    two = compare_references({"answers": answers, "refusals": refusals}, malicious, rank=2, contrast="covariance")
    assert float(two["answers"].basis[1].norm()) > 0.95
    assert float(two["refusals"].basis[1].norm()) < 0.5
    assert overlaps(two).normalized[0] < 0.8


def test_an_empty_family_and_options_that_cannot_be_are_named():
    benign, rows = normal(40, 4), normal(30, 4, 1)
    with pytest.raises(TooFewRowsError, match="gradient: malicious must have 2 rows or more, got 0"):
        fit_families(benign, {"text": rows, "gradient": rows[:0]}, rank=1)
    with pytest.raises(TooFewRowsError, match="refusals: benign must have 2 rows or more, got 1"):
        compare_references({"refusals": benign[:1]}, rows, rank=1)
    with pytest.raises(SubspaceError, match="two families or more"):
        fit_families(benign, {"text": rows}, rank=1)
    with pytest.raises(SubspaceError, match="groups must not be given"):
        compare_references({"a": benign}, rows, rank=1, groups=([], []))
