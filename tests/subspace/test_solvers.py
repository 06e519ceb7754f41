from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import eigh
from subspace_rows import planted, unchecked

from care_lens.subspace import (
    ConvergenceError,
    Moments,
    RankError,
    SafetySubspace,
    ShrunkCovariance,
    SingularCovarianceError,
    SubspaceError,
    WidthError,
    shrink,
    solve_pencil,
)
from care_lens.subspace.solvers import _cost, _householder, _krylov, _symmetric

F64 = torch.float64
kept = _householder.solve


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
    solver=st.sampled_from(["dual", "dense", "iterative", "auto"]),
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


@pytest.mark.parametrize("solver", ["dual", "dense", "iterative"])
def test_many_more_dimensions_than_rows(solver):
    numerator, denominator = random_pencil(500, 40, 30, seed=0, weights=(0.05, 0.2))
    found = solve_pencil(numerator, denominator, rank=10, solver=solver)
    assert smallest_cosine(found.vectors, oracle(numerator, denominator)[1][:, :10]) > 1 - 1e-12
    assert found.order == (40 + 30 + 1 if solver == "dual" else 500)
    assert found.solver == solver


@pytest.mark.parametrize("shape", [(700, 40, 30), (300, 500, 400), (300, 40, 900)])
@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("decades", [0.0, 2.0])
def test_block_lanczos_agrees_where_it_iterates(shape, rank, decades):
    """Wide enough that the basis is restarted, with few and with many benign rows: both whitenings."""
    numerator, denominator = random_pencil(*shape, seed=rank, decades=decades, weights=(0.1, 0.1))
    values, vectors = oracle(numerator, denominator)
    found = solve_pencil(numerator, denominator, rank=rank, solver="iterative")
    torch.testing.assert_close(found.eigenvalues, values[:rank], rtol=1e-10, atol=0)
    assert smallest_cosine(found.vectors, vectors[:, :rank]) > 1 - 1e-8
    assert found.residual < 1e-10
    assert found.residuals.shape == (rank,)
    assert (found.solver, found.order) == ("iterative", shape[0])


@pytest.mark.parametrize("solver", ["dense", "iterative", "auto"])
@pytest.mark.parametrize("shape", [(60, 20, 15), (60, 200, 150), (250, 30, 300)])
@pytest.mark.parametrize("rows", [True, False])
def test_a_diagonal_target_is_solved_as_scipy_would(solver, shape, rows):
    generator = torch.Generator().manual_seed(0)
    scale = torch.ones(shape[0], dtype=F64)
    scale[3] = 1000.0  # a massive activation
    both = []
    for count in shape[1:]:
        moments = Moments.from_rows(torch.randn(count, shape[0], generator=generator, dtype=F64) * scale)
        both.append(shrink(moments if rows else moments.without_rows(), "diagonal"))
    values, vectors = oracle(both[1], both[0])
    found = solve_pencil(both[1], both[0], rank=3, solver=solver)
    torch.testing.assert_close(found.eigenvalues, values[:3], rtol=1e-8, atol=0)
    assert smallest_cosine(found.vectors * scale[:, None], vectors[:, :3] * scale[:, None]) > 1 - 1e-8


@pytest.mark.parametrize("solver", ["dense", "iterative"])
def test_the_sums_alone_are_solved_without_rows(solver):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(n, 30, generator=generator, dtype=F64) for n in (90, 80)]
    full = [shrink(Moments.from_rows(part), 0.1) for part in rows]
    sums = [shrink(Moments.from_rows(part).without_rows(), 0.1).plus(torch.ones(30, dtype=F64)) for part in rows]
    assert sums[0].matrix is not None
    expected = solve_pencil(full[1].plus(torch.ones(30, dtype=F64)), full[0].plus(torch.ones(30, dtype=F64)), rank=4)
    found = solve_pencil(sums[1], sums[0], rank=4, solver=solver)
    torch.testing.assert_close(found.eigenvalues, expected.eigenvalues)
    torch.testing.assert_close(found.vectors, expected.vectors, rtol=1e-7, atol=1e-9)
    with pytest.raises(SubspaceError, match=r"solver='dual' needs rows .* sums of its rows alone for the malicious"):
        solve_pencil(sums[1], sums[0], rank=4, solver="dual")


def test_sums_of_few_rows_determine_no_more_than_their_rows():
    generator = torch.Generator().manual_seed(1)
    benign, malicious = (Moments.from_rows(torch.randn(n, 20, generator=generator, dtype=F64)) for n in (8, 6))
    pencils = [(shrink(m, 0.2), shrink(b, 0.2)) for m, b in ((malicious, benign), (malicious.without_rows(), benign))]
    limits = []
    for pencil in pencils:
        with pytest.raises(RankError) as caught:
            solve_pencil(*pencil, rank=15)
        limits.append(caught.value.largest)
    assert limits == [5, 5]


def test_dual_refuses_a_diagonal_target_and_a_constant_column_is_singular():
    rows = torch.randn(12, 30, generator=torch.Generator().manual_seed(0), dtype=F64)
    diagonal = shrink(Moments.from_rows(rows), 0.3, target="diagonal")
    with pytest.raises(SubspaceError, match="a diagonal target for the malicious class"):
        solve_pencil(diagonal, diagonal, rank=1, solver="dual")
    rows[:, 4] = 2.0
    flat = shrink(Moments.from_rows(rows), 0.3, target="diagonal")
    for solver in ("dense", "iterative"):
        with pytest.raises(SingularCovarianceError):
            solve_pencil(diagonal, flat, rank=1, solver=solver)


@pytest.mark.parametrize("solver", ["dual", "dense", "iterative"])
def test_tied_eigenvalues_give_their_whole_eigenspace(solver):
    """Three directions of one eigenvalue: the span is determined, the basis in it is not."""
    eye = torch.eye(400, dtype=F64)
    malicious, benign = ShrunkCovariance(1.0, 2 * eye[:, [5, 90, 300]]), ShrunkCovariance(1.0, 0 * eye[:, :2])
    found = solve_pencil(malicious, benign, rank=3, solver=solver)
    torch.testing.assert_close(found.eigenvalues, torch.full((3,), 5.0, dtype=F64))
    assert smallest_cosine(found.vectors, eye[:, [5, 90, 300]]) > 1 - 1e-12
    with pytest.raises(RankError) as caught:
        solve_pencil(malicious, benign, rank=4, solver=solver)
    assert caught.value.largest == 3


def test_lanczos_finds_what_lapack_does_and_restarts():
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(400, 400, generator=generator, dtype=F64)).Q
    values = torch.arange(1, 401, dtype=F64) ** -0.5
    values[3:6] = values[3]
    matrix = (rotation * values) @ rotation.T
    found = _krylov.top_pairs(matrix.__matmul__, 400, 6, tolerance=1e-12)
    assert found.products > _krylov.BLOCKS * _krylov.block_size(6)
    assert found.error <= 1e-12
    torch.testing.assert_close(found.values, values[:6], rtol=1e-12, atol=0)
    assert smallest_cosine(found.vectors, rotation[:, :6]) > 1 - 1e-12
    again = _krylov.top_pairs(matrix.__matmul__, 400, 6, tolerance=1e-12)
    assert torch.equal(found.vectors, again.vectors)


def test_lanczos_that_missed_a_pair_is_not_believed(monkeypatch):
    matrix = torch.diag(torch.arange(300, 0, -1, dtype=F64))
    right = torch.eye(300, dtype=F64)[:, :3]
    missed = _krylov.TopPairs(
        torch.tensor([300.0, 298, 297], dtype=F64), torch.eye(300, dtype=F64)[:, [0, 2, 3]], 0.0, 3
    )
    assert not _symmetric._complete(matrix, missed)
    assert _symmetric._complete(matrix, _krylov.TopPairs(torch.tensor([300.0, 299, 298], dtype=F64), right, 0.0, 3))
    monkeypatch.setattr(_krylov, "worthwhile", lambda order, rank: True)
    monkeypatch.setattr(_krylov, "top_pairs", lambda *args, **options: missed)
    assert _symmetric.leading(matrix, 3)[0].tolist() == [300, 299, 298]


def test_the_dense_solver_by_lanczos_agrees_with_scipy(monkeypatch):
    monkeypatch.setattr(_krylov, "_LEAST_ORDER", 100)
    numerator, denominator = random_pencil(300, 400, 350, seed=0)
    assert _krylov.worthwhile(300, 4)
    values, vectors = oracle(numerator, denominator)
    found = solve_pencil(numerator, denominator, rank=4, solver="dense")
    torch.testing.assert_close(found.eigenvalues, values[:4], rtol=1e-10, atol=0)
    assert smallest_cosine(found.vectors, vectors[:, :4]) > 1 - 1e-8


def test_lanczos_that_does_not_converge_is_named_and_auto_goes_on(monkeypatch):
    numerator, denominator = random_pencil(300, 400, 350, seed=0)
    monkeypatch.setattr(_krylov, "_CYCLES", 1)
    with pytest.raises(ConvergenceError, match="take solver='dense'"):
        solve_pencil(numerator, denominator, rank=4, solver="iterative")
    monkeypatch.setattr(_cost, "cheapest", lambda *args: "iterative")
    found = solve_pencil(numerator, denominator, rank=4)
    assert found.solver == "dense"
    assert smallest_cosine(found.vectors, oracle(numerator, denominator)[1][:, :4]) > 1 - 1e-8


def test_gram_matrices_that_lose_too_much_give_way_to_householder(monkeypatch):
    """Benign rows of condition 1e10: through their Gram matrix half the digits would go."""
    used = []
    monkeypatch.setattr(_householder, "solve", lambda *args: used.append(args) or kept(*args))
    numerator, denominator = random_pencil(60, 20, 15, seed=0, decades=6.0, weights=(1e-4, 0.5))
    found = solve_pencil(numerator, denominator, rank=2, solver="dual")
    assert used
    assert found.residual < 1e-9
    used.clear()
    solve_pencil(*random_pencil(60, 20, 15, seed=0), rank=2, solver="dual")
    assert not used


def test_auto_goes_by_what_has_to_be_multiplied():
    def shape(width, columns):
        return ShrunkCovariance(1.0, torch.empty((), dtype=F64).expand(width, columns))

    cases = {(3584, 720): "dual", (300, 200): "dense", (4096, 6000): "iterative", (4096, 2500): "iterative"}
    for (width, columns), expected in cases.items():
        assert _cost.cheapest(shape(width, columns), shape(width, columns), 32) == expected
    assert _cost.cheapest(shape(4096, 6000), shape(4096, 6000), 1000) == "dense"  # k is no small part of d


def test_half_precision_covariances_are_moved_to_float64():
    numerator, denominator = random_pencil(30, 10, 10, seed=0)
    narrow = [replace(one, factor=one.factor.float()) for one in (numerator, denominator)]
    with unchecked():
        found = solve_pencil(*narrow, rank=2)
    assert found.vectors.dtype == F64
    torch.testing.assert_close(
        found.eigenvalues, solve_pencil(numerator, denominator, rank=2).eigenvalues, rtol=1e-5, atol=0
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_covariances_on_a_gpu_are_moved():
    numerator, denominator = random_pencil(30, 10, 10, seed=0)
    moved = [replace(one, factor=one.factor.cuda()) for one in (numerator, denominator)]
    expected = solve_pencil(numerator, denominator, rank=2)
    torch.testing.assert_close(solve_pencil(*moved, rank=2).vectors, expected.vectors)


def test_auto_takes_the_smaller_order():
    assert solve_pencil(*random_pencil(50, 10, 10, seed=0), rank=1).solver == "dual"
    assert solve_pencil(*random_pencil(20, 10, 10, seed=0), rank=1).solver == "dense"


@pytest.mark.parametrize("solver", ["dual", "dense", "iterative"])
def test_the_largest_rank_is_what_the_malicious_rows_determine(solver):
    numerator, denominator = random_pencil(60, 10, 8, seed=1)
    with pytest.raises(RankError, match="at most 8 for these rows, got 9") as caught:
        solve_pencil(numerator, denominator, rank=9, solver=solver)
    assert caught.value.largest == 8  # 8 rows span 7 centred directions, the shift of the mean is one more
    assert (
        solve_pencil(numerator, denominator, rank=8, solver=solver).eigenvalues[-1]
        > numerator.ridge / denominator.ridge
    )


@pytest.mark.parametrize("solver", ["dual", "dense", "iterative"])
def test_where_rows_span_the_space_the_largest_rank_is_that_of_the_malicious_factor(solver):
    numerator, denominator = random_pencil(12, 100, 4, seed=1, shift=False)
    assert solve_pencil(numerator, denominator, rank=3, solver=solver).eigenvalues.shape == (3,)
    with pytest.raises(RankError) as caught:
        solve_pencil(numerator, denominator, rank=4, solver=solver)
    assert caught.value.largest == 3


@pytest.mark.parametrize("solver", ["dual", "dense", "iterative"])
def test_directions_below_the_ridge_ratio_count_where_rows_span_the_space(solver):
    """A malicious class that is narrower than its ridge ratio says has still d ordered directions."""
    numerator, denominator = random_pencil(6, 100, 100, seed=1, weights=(0.001, 0.9))
    found = solve_pencil(numerator, denominator, rank=6, solver=solver)
    assert found.eigenvalues[-1] < numerator.ridge / denominator.ridge
    torch.testing.assert_close(found.eigenvalues, oracle(numerator, denominator)[0])


@pytest.mark.parametrize("solver", ["dual", "dense", "iterative"])
def test_repeated_rows_and_ties_are_handled(solver):
    rows = torch.eye(4, 20, dtype=F64).repeat(3, 1)
    numerator = shrink(Moments.from_rows(rows), 0.3)
    found = solve_pencil(numerator, ShrunkCovariance.identity(20), rank=3, solver=solver)
    torch.testing.assert_close(found.eigenvalues, oracle(numerator, ShrunkCovariance.identity(20))[0][:3])
    with pytest.raises(RankError) as caught:
        solve_pencil(numerator, ShrunkCovariance.identity(20), rank=4, solver=solver)
    assert caught.value.largest == 3


@pytest.mark.parametrize("solver", ["dual", "dense", "iterative"])
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


@pytest.mark.parametrize("solver", ["dual", "dense", "iterative"])
@pytest.mark.parametrize("n_benign", [5, 20])
def test_a_singular_benign_covariance_is_named(solver, n_benign):
    numerator, denominator = random_pencil(20, n_benign, 30, seed=0, weights=(0.0, 0.1))
    with pytest.raises(SingularCovarianceError, match=r"shrinkage=0\.1"):
        solve_pencil(numerator, denominator, rank=1, solver=solver)


@pytest.mark.parametrize("solver", ["dual", "dense", "iterative"])
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


@pytest.mark.parametrize("solver", ["dual", "dense", "iterative", "auto"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_fit_takes_every_solver_and_dtype_and_says_which_it_took(solver, dtype):
    benign, malicious, _ = planted(60, 50, 160, spread=6.0)
    benign, malicious = benign.to(dtype), malicious.to(dtype)
    found = SafetySubspace.fit(benign, malicious, rank=2, solver=solver)
    expected = SafetySubspace.fit(benign, malicious, rank=2, solver="dense")
    torch.testing.assert_close(found.read, expected.read, rtol=1e-4, atol=1e-5)
    assert found.diagnostics["solver"] == ("dual" if solver == "auto" else solver)
    assert found.diagnostics["residual"] < 1e-10
    assert found.read.dtype == torch.float32


def test_a_fit_with_a_diagonal_target_reports_it_and_has_no_single_floor():
    benign, malicious, truth = planted(120, 120, 40, spread=6.0)
    found = SafetySubspace.fit(benign, malicious, rank=2, shrinkage="diagonal")
    assert found.diagnostics["shrinkage_target"] == "diagonal"
    assert found.diagnostics["noise_eigenvalue"] is None
    assert smallest_cosine(found.basis.double(), truth) > 0.9
    assert SafetySubspace.fit(benign, malicious, rank=2).diagnostics["shrinkage_target"] == "identity"
