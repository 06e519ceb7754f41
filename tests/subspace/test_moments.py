import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moments_rows import assert_same, rows_of
from scipy.stats import moment
from sklearn.covariance import ledoit_wolf, oas
from subspace_rows import unchecked

from care_lens.subspace import Moments, NonFiniteError, RowsNeededError, TooFewRowsError, WidthError, shrink
from care_lens.subspace.fitting import fit_moments

F64 = torch.float64


def test_a_worked_example():
    """x = 0, 0, 3 in one coordinate and twice that in the other: about the mean -1, -1, 2 and -2, -2, 4."""
    moments = Moments.from_rows(torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 6.0]])).without_rows()
    assert moments.mean.tolist() == [1.0, 2.0]
    assert moments.sums.scatter.tolist() == [[6.0, 12.0], [12.0, 24.0]]
    assert moments.sums.third.tolist() == [30.0, 60.0]  # squared lengths 5, 5, 20
    assert moments.sums.fourth == 450.0
    assert moments.sums.cubes.tolist() == [6.0, 48.0]
    assert moments.sums.quartics.tolist() == [18.0, 288.0]


def test_coordinate_moments_are_scipys():
    rows = rows_of(40, 5, shift=7)
    sums = Moments.from_rows(rows).sums
    for order, found in ((3, sums.cubes), (4, sums.quartics)):
        torch.testing.assert_close(found / 40, torch.from_numpy(moment(rows.numpy(), order)), rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    width=st.integers(1, 9),
    shift=st.floats(-50, 50),
    drift=st.floats(-20, 20),
    form=st.sampled_from(["rows", "sums", "mixed"]),
    seed=st.integers(0, 1000),
)
def test_a_stream_gives_what_its_rows_together_would(sizes, width, shift, drift, form, seed):
    parts = [rows_of(n, width, seed + i, shift=shift / 10 + drift / 10 * i) for i, n in enumerate(sizes)]
    whole = Moments.from_rows(torch.cat(parts), least=1)
    stream = Moments.from_rows(parts[0], least=1)
    if form == "sums":
        stream = stream.without_rows()
    for i, part in enumerate(parts[1:]):
        stream = stream.update(part)
        if form == "mixed" and i == 1:
            stream = stream.without_rows()
    assert_same(stream, whole)
    assert_same(stream.without_rows(), whole)


def test_merging_is_exact_far_from_the_origin():
    """Sums of raw powers would lose every digit of the variance here."""
    rows = rows_of(60, 4, shift=1e6)
    merged = Moments.from_rows(rows[:17]).without_rows().merge(Moments.from_rows(rows[17:]))
    torch.testing.assert_close(merged.covariance(), torch.cov(rows.T, correction=0), rtol=1e-8, atol=1e-9)


def test_merging_does_not_depend_on_the_order():
    parts = [Moments.from_rows(rows_of(n, 5, n)).without_rows() for n in (3, 8, 5)]
    assert_same(parts[0].merge(parts[1]).merge(parts[2]), parts[0].merge(parts[2].merge(parts[1])))


@pytest.mark.parametrize("shape", [(2, 3), (7, 7), (30, 6), (6, 30), (120, 40)])
@pytest.mark.parametrize(("rule", "oracle"), [("ledoit-wolf", ledoit_wolf), ("oas", oas)])
def test_shrinkage_from_a_stream_of_sums_is_scikit_learns(shape, rule, oracle):
    rows = rows_of(*shape, shift=5)
    half = max(1, shape[0] // 3)
    sums = Moments.from_rows(rows[:half], least=1).without_rows().update(rows[half:])
    covariance, weight = oracle(rows.numpy())
    shrunk = shrink(sums, rule)
    assert shrunk.weight == pytest.approx(weight, abs=1e-10)
    torch.testing.assert_close(shrunk.dense(), torch.from_numpy(covariance), rtol=1e-10, atol=1e-10)


def test_what_needs_rows_says_so():
    sums = Moments.from_rows(rows_of(9, 3)).without_rows()
    with pytest.raises(RowsNeededError, match=r"rows must be kept .* got the sums of 9 rows alone"):
        _ = sums.centred
    assert torch.equal(Moments.from_rows(rows_of(9, 3)).centred, Moments.from_rows(rows_of(9, 3)).rows)


def test_no_rows_to_add_change_nothing_and_bad_rows_are_named():
    moments = Moments.from_rows(rows_of(9, 3))
    assert moments.update(torch.zeros(0, 3)) is moments
    with unchecked():
        with pytest.raises(WidthError, match="equally wide, got 3 and 4"):
            moments.update(rows_of(2, 4))
        with pytest.raises(NonFiniteError, match="first: row 1"):
            moments.update(torch.tensor([[1.0, 1, 1], [1, float("nan"), 1]]))
        with pytest.raises(TooFewRowsError, match="benign must have 1 rows or more, got 0"):
            Moments.from_rows(torch.zeros(0, 3), name="benign", least=0)


def test_infinities_of_both_signs_in_one_column_are_found():
    rows = rows_of(4, 3)
    rows[0, 1], rows[2, 1] = float("inf"), -float("inf")
    with pytest.raises(NonFiniteError, match="in 2 of 4 rows"):
        Moments.from_rows(rows)


def test_finite_rows_whose_sum_overflows_are_named():
    with pytest.raises(NonFiniteError, match="sum overflows"):
        Moments.from_rows(torch.full((4, 2), 1e308, dtype=F64))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_rows_are_widened_first(dtype):
    rows = (rows_of(50, 4) * 200).to(dtype)  # squares overflow float16
    assert_same(Moments.from_rows(rows), Moments.from_rows(rows.double()))


@pytest.mark.parametrize("contrast", ["covariance", "second_moment", "mean"])
@pytest.mark.parametrize("shrinkage", ["ledoit-wolf", "oas", 0.2, "diagonal"])
@pytest.mark.parametrize("shape", [(60, 50, 12), (20, 15, 40)])
def test_a_fit_from_sums_is_the_fit_from_rows(contrast, shrinkage, shape):
    benign, malicious = (Moments.from_rows(rows_of(n, shape[2], i, shift=i)) for i, n in enumerate(shape[:2]))
    options = {
        "rank": 1 if contrast == "mean" else 3,
        "contrast": contrast,
        "shrinkage": shrinkage,
        "projection": "oblique",
        "solver": "auto",
        "metric": "benign",
    }
    rows, notes = fit_moments(benign, malicious, **options)
    sums, notes_of_sums = fit_moments(benign.without_rows(), malicious.without_rows(), **options)
    for name, tensor in rows.items():
        torch.testing.assert_close(sums[name], tensor, rtol=1e-4, atol=1e-5)
    assert notes_of_sums["shrinkage_benign"] == pytest.approx(notes["shrinkage_benign"])
    assert notes["solver"] == ("dual" if shape[2] == 40 and shrinkage != "diagonal" else "dense")


def test_moments_of_too_few_rows_or_other_widths_are_refused_by_the_fit():
    options = {
        "rank": 1,
        "contrast": "covariance",
        "shrinkage": 0.1,
        "projection": "oblique",
        "solver": "auto",
        "metric": "benign",
    }
    one = Moments.from_rows(rows_of(1, 4), least=1).without_rows()
    with pytest.raises(TooFewRowsError, match="malicious must have 2 rows or more, got 1"):
        fit_moments(Moments.from_rows(rows_of(9, 4)), one, **options)
    with unchecked(), pytest.raises(WidthError, match="4 and 5"):
        fit_moments(Moments.from_rows(rows_of(9, 4)), Moments.from_rows(rows_of(9, 5)), **options)
