import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh
from subspace_rows import unchecked

from care_lens.subspace import (
    Moments,
    RankError,
    ShrunkCovariance,
    SingularCovarianceError,
    SubspaceError,
    WidthError,
    shrink,
    solve_pencil,
)

F64 = torch.float64


def smallest_cosine(first, second):
    bases = [torch.linalg.qr(one).Q for one in (first, second)]
    return float(torch.linalg.svdvals(bases[0].T @ bases[1]).min())


def random_pencil(width, n_benign, n_malicious, *, seed, decades=1.0, weights=(0.1, 0.1), shift=True, dtype=F64):
    generator = torch.Generator().manual_seed(seed)

    def rows(n):
        drawn = torch.randn(n, width, generator=generator, dtype=F64)
        scale = torch.logspace(-decades / 2, decades / 2, width, dtype=F64)
        return (drawn * scale[torch.randperm(width, generator=generator)]).to(dtype)

    benign, malicious = Moments.from_rows(rows(n_benign)), Moments.from_rows(rows(n_malicious))
    numerator = shrink(malicious, weights[1])
    return numerator.plus(malicious.mean - benign.mean) if shift else numerator, shrink(benign, weights[0])


def oracle(numerator, denominator):
    values, vectors = eigh(numerator.dense().numpy(), denominator.dense().numpy())
    return torch.from_numpy(values.copy()).flip(0), torch.from_numpy(vectors.copy()).flip(1)


@settings(max_examples=120, deadline=None)
@given(
    width=st.integers(2, 60),
    n_benign=st.integers(2, 80),
    n_malicious=st.integers(2, 80),
    rank=st.integers(1, 12),
    decades=st.floats(0, 4),
    weights=st.tuples(st.floats(1e-4, 1), st.floats(0, 1)),
    shift=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    solver=st.sampled_from(["dual", "dense", "auto"]),
    seed=st.integers(0, 10_000),
)
def test_every_solver_agrees_with_scipy(
    width, n_benign, n_malicious, rank, decades, weights, shift, dtype, solver, seed
):
    numerator, denominator = random_pencil(
        width, n_benign, n_malicious, seed=seed, decades=decades, weights=weights, shift=shift, dtype=dtype
    )
    values, vectors = oracle(numerator, denominator)
    found = solve_pencil(numerator, denominator, rank=rank, solver=solver, clip=True)
    k = len(found.eigenvalues)
    torch.testing.assert_close(found.eigenvalues, values[:k], rtol=1e-8, atol=1e-8 * float(values[0]))
    identity = found.vectors.T @ denominator.dense() @ found.vectors
    torch.testing.assert_close(identity, torch.eye(k, dtype=F64), rtol=1e-9, atol=1e-9)
    assert found.residual < 1e-9
    apart = k == width or values[k - 1] - values[k] > 1e-4 * values[0]
    if k and apart:
        assert smallest_cosine(found.vectors, vectors[:, :k]) > 1 - 1e-8
    if k < rank:
        with pytest.raises(RankError) as caught:
            solve_pencil(numerator, denominator, rank=rank, solver=solver)
        assert caught.value.largest == k


@pytest.mark.parametrize("solver", ["dual", "dense"])
def test_many_more_dimensions_than_rows(solver):
    numerator, denominator = random_pencil(500, 40, 30, seed=0, weights=(0.05, 0.2))
    found = solve_pencil(numerator, denominator, rank=10, solver=solver)
    assert smallest_cosine(found.vectors, oracle(numerator, denominator)[1][:, :10]) > 1 - 1e-12
    assert found.order == (70 + 1 if solver == "dual" else 500)
    assert found.solver == solver


def test_auto_takes_the_smaller_order():
    assert solve_pencil(*random_pencil(50, 10, 10, seed=0), rank=1).solver == "dual"
    assert solve_pencil(*random_pencil(20, 10, 10, seed=0), rank=1).solver == "dense"


@pytest.mark.parametrize("solver", ["dual", "dense"])
def test_the_largest_rank_is_what_the_malicious_rows_determine(solver):
    numerator, denominator = random_pencil(60, 10, 8, seed=1)
    with pytest.raises(RankError, match="at most 8 for these rows, got 9") as caught:
        solve_pencil(numerator, denominator, rank=9, solver=solver)
    assert caught.value.largest == 8  # 8 rows span 7 centred directions, the shift of the mean is one more
    assert (
        solve_pencil(numerator, denominator, rank=8, solver=solver).eigenvalues[-1]
        > numerator.ridge / denominator.ridge
    )


@pytest.mark.parametrize("solver", ["dual", "dense"])
def test_where_rows_span_the_space_the_largest_rank_is_that_of_the_malicious_factor(solver):
    numerator, denominator = random_pencil(12, 100, 4, seed=1, shift=False)
    assert solve_pencil(numerator, denominator, rank=3, solver=solver).eigenvalues.shape == (3,)
    with pytest.raises(RankError) as caught:
        solve_pencil(numerator, denominator, rank=4, solver=solver)
    assert caught.value.largest == 3


@pytest.mark.parametrize("solver", ["dual", "dense"])
def test_directions_below_the_ridge_ratio_count_where_rows_span_the_space(solver):
    """A malicious class that is narrower than its ridge ratio says has still d ordered directions."""
    numerator, denominator = random_pencil(6, 100, 100, seed=1, weights=(0.001, 0.9))
    found = solve_pencil(numerator, denominator, rank=6, solver=solver)
    assert found.eigenvalues[-1] < numerator.ridge / denominator.ridge
    torch.testing.assert_close(found.eigenvalues, oracle(numerator, denominator)[0])


@pytest.mark.parametrize("solver", ["dual", "dense"])
def test_repeated_rows_and_ties_are_handled(solver):
    rows = torch.eye(4, 20, dtype=F64).repeat(3, 1)
    numerator = shrink(Moments.from_rows(rows), 0.3)
    found = solve_pencil(numerator, ShrunkCovariance.identity(20), rank=3, solver=solver)
    torch.testing.assert_close(found.eigenvalues, oracle(numerator, ShrunkCovariance.identity(20))[0][:3])
    with pytest.raises(RankError) as caught:
        solve_pencil(numerator, ShrunkCovariance.identity(20), rank=4, solver=solver)
    assert caught.value.largest == 3


@pytest.mark.parametrize("solver", ["dual", "dense"])
def test_one_direction_without_a_ridge_is_a_linear_solve(solver):
    _, denominator = random_pencil(30, 10, 10, seed=2)
    delta = torch.linspace(-1, 1, 30, dtype=F64)
    found = solve_pencil(ShrunkCovariance(0.0, delta[:, None]), denominator, rank=1, solver=solver)
    discriminant = torch.linalg.solve(denominator.dense(), delta)
    assert smallest_cosine(found.vectors, discriminant[:, None]) > 1 - 1e-12
    assert float(found.eigenvalues) == pytest.approx(float(delta @ discriminant))


def test_signs_and_order_are_deterministic():
    numerator, denominator = random_pencil(40, 12, 12, seed=3)
    first, second = (solve_pencil(numerator, denominator, rank=5) for _ in range(2))
    assert torch.equal(first.vectors, second.vectors)
    largest = first.vectors.gather(0, first.vectors.abs().argmax(0, keepdim=True))
    assert bool((largest > 0).all())
    assert bool((first.eigenvalues.diff() <= 0).all())


def test_condition_is_that_of_the_benign_covariance():
    denominator = ShrunkCovariance(1.0, 3 * torch.eye(5, 1, dtype=F64))
    found = solve_pencil(ShrunkCovariance(1.0, torch.eye(5, 2, dtype=F64)), denominator, rank=1, solver="dense")
    assert found.condition == pytest.approx(10)


@pytest.mark.parametrize("solver", ["dual", "dense"])
@pytest.mark.parametrize("n_benign", [5, 20])
def test_a_singular_benign_covariance_is_named(solver, n_benign):
    numerator, denominator = random_pencil(20, n_benign, 30, seed=0, weights=(0.0, 0.1))
    with pytest.raises(SingularCovarianceError, match=r"shrinkage=0\.1"):
        solve_pencil(numerator, denominator, rank=1, solver=solver)


@pytest.mark.parametrize("solver", ["dual", "dense"])
def test_no_shrinkage_is_fine_with_enough_rows(solver):
    numerator, denominator = random_pencil(20, 60, 60, seed=0, weights=(0.0, 0.0))
    found = solve_pencil(numerator, denominator, rank=4, solver=solver)
    assert smallest_cosine(found.vectors, oracle(numerator, denominator)[1][:, :4]) > 1 - 1e-10


def test_wrong_arguments_are_named():
    numerator, denominator = random_pencil(20, 10, 10, seed=0)
    with pytest.raises(RankError, match="rank must be 1 or more, got 0"):
        solve_pencil(numerator, denominator, rank=0)
    with pytest.raises(WidthError, match="20 and 3"):
        solve_pencil(numerator, ShrunkCovariance.identity(3), rank=1)


def test_an_unknown_solver_is_named():
    with unchecked(), pytest.raises(SubspaceError, match="'magic'"):
        solve_pencil(*random_pencil(20, 10, 10, seed=0), rank=1, solver="magic")
