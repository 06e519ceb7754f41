"""The operators of a subspace as linear maps: their algebra, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subspace_rows import planted, unchecked

from care_lens.subspace import LinearMap, SafetySubspace, SubspaceError, SubspaceMismatchError

F64 = torch.float64


@pytest.fixture(scope="module", params=["orthogonal", "oblique"])
def fitted(request):
    benign, malicious, _ = planted(200, 150, 24, planted=3, shift=2.0)
    subspace = SafetySubspace.fit(benign, malicious, rank=3, projection=request.param, shrinkage=0.1)
    # The stored float32 tensors satisfy L^T W = I to 1e-6; the algebra of the maps is exact beyond that.
    return subspace.to(dtype=F64), benign, malicious


def shrunk(rows, weight):
    covariance = torch.cov(rows.T, correction=0)
    return (1 - weight) * covariance + weight * covariance.trace() / len(covariance) * torch.eye(
        len(covariance), dtype=F64
    )


def close(first, second, atol=1e-5):
    torch.testing.assert_close(first, second, atol=atol, rtol=atol)


def test_the_projection_is_a_projector_that_keeps_what_is_read(fitted):
    subspace, _, malicious = fitted
    p = subspace.projection()
    close((p @ p).matrix(), p.matrix())
    close(p.matrix(), subspace.projector())
    assert p.trace() == pytest.approx(3, abs=1e-5)
    close(subspace.read.T @ p.matrix(), subspace.read.T)
    close(p(malicious), subspace.project(malicious), atol=1e-12)
    removed = subspace.removal()
    close((p @ removed).matrix(), torch.zeros(24, 24, dtype=F64))
    close((removed @ removed).matrix(), removed.matrix())


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_removed_coordinates_hit_the_target(fitted, beta):
    subspace, _, malicious = fitted
    hit = subspace.correction(beta=beta)(malicious)
    aim = (beta * subspace.mean_benign) @ subspace.read
    close(hit @ subspace.read, aim.expand(len(malicious), -1))
    target = torch.linspace(-1, 1, 24, dtype=F64)
    close(subspace.correction(target=target)(malicious) @ subspace.read, (target @ subspace.read).expand(150, -1))


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from([torch.float16, torch.bfloat16, torch.float32, F64]))
@settings(max_examples=25, deadline=None)
def test_the_correction_is_apply(alpha, beta, dtype):
    benign, malicious, _ = planted(60, 40, 10)
    subspace = SafetySubspace.fit(benign, malicious, rank=2)
    h = malicious.to(dtype)
    found = subspace.correction(alpha=alpha, beta=beta)(h)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, subspace.apply(h, alpha=alpha, beta=beta), rtol=4 * eps, atol=1e-5 + 40 * eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_alpha_zero_is_the_identity_bit_for_bit(fitted, dtype):
    subspace, _, malicious = fitted
    h = malicious.to(dtype)
    for untouched in (subspace.correction(alpha=0.0)(h), subspace.removal(0.0)(h), subspace.apply(h, alpha=0.0)):
        assert untouched is h
    assert not subspace.removal(0.1).is_identity


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_benign_energy_changed_is_what_removal_says(fitted, alpha):
    """Over the benign distribution of the fit, whose covariance is the shrunk one."""
    subspace, benign, _ = fitted
    metric = shrunk(benign, 0.1)
    change = torch.eye(24, dtype=F64) - subspace.removal(alpha).matrix()
    benign_units = float((torch.linalg.inv(metric) @ change @ metric @ change.T).trace())
    euclidean = float((change @ metric @ change.T).trace())
    if subspace.diagnostics["projection"] == "oblique":
        assert benign_units == pytest.approx(alpha**2 * 3, rel=1e-4)
        assert euclidean == pytest.approx(alpha**2 * float(subspace.write.square().sum()), rel=1e-4)
    else:
        assert benign_units > alpha**2 * 3
        within = subspace.basis.T @ metric @ subspace.basis
        assert euclidean == pytest.approx(alpha**2 * float(within.trace()), rel=1e-4)


def test_each_projector_is_the_least_change_in_its_own_metric(fitted):
    subspace, benign, malicious = fitted
    metric = shrunk(benign, 0.1)
    other = SafetySubspace.fit(
        benign,
        malicious,
        rank=3,
        shrinkage=0.1,
        projection="oblique" if subspace.diagnostics["projection"] == "orthogonal" else "orthogonal",
    ).to(dtype=F64)
    inner = torch.linalg.inv(metric) if subspace.diagnostics["projection"] == "oblique" else torch.eye(24, dtype=F64)
    cost = [float((inner @ p @ metric @ p.T).trace()) for p in (subspace.projector(), other.projector())]
    assert cost[0] < cost[1]


@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0, -0.5]), st.sampled_from([0.0, 1.0, 2.0]))
@settings(max_examples=25, deadline=None)
def test_composition_and_transpose_are_those_of_matrices(seed, a, b):
    generator = torch.Generator().manual_seed(seed)
    w, left, v, k = (torch.randn(6, 2, generator=generator, dtype=F64) for _ in range(4))
    first, second = LinearMap(scale=a, write=w, left=left), LinearMap(scale=b, write=v, left=k)
    close((first @ second).matrix(), first.matrix() @ second.matrix(), atol=1e-10)
    close(first.T.matrix(), first.matrix().T, atol=1e-12)
    h = torch.randn(5, 6, generator=generator, dtype=F64)
    close((first @ second)(h), first(second(h)), atol=1e-10)
    close(first(h), h @ first.matrix().T, atol=1e-10)
    assert first.trace() == pytest.approx(float(first.matrix().trace()))


def test_maps_about_one_centre_compose_and_others_do_not():
    generator = torch.Generator().manual_seed(0)
    w, left = (torch.randn(6, 2, generator=generator, dtype=F64) for _ in range(2))
    centre = torch.arange(6.0, dtype=F64)
    one = LinearMap(scale=0.5, write=w, left=left, centre=centre)
    h = torch.randn(3, 6, generator=generator, dtype=F64)
    close((one @ one)(h), one(one(h)), atol=1e-10)
    close(one(centre[None]), centre[None], atol=1e-12)
    for other in (one.linear(), LinearMap(scale=1.0, write=w, left=left, centre=centre + 1)):
        with pytest.raises(SubspaceError, match="one centre"):
            one @ other
    with pytest.raises(SubspaceError, match="linear"):
        _ = one.T
    half = one.to(dtype=torch.float32)
    assert half.centre is not None and half.write.dtype == half.centre.dtype == torch.float32


def test_shapes_that_do_not_fit_are_named():
    write = torch.zeros(4, 2)
    with unchecked():
        with pytest.raises(SubspaceMismatchError, match="one shape"):
            LinearMap(scale=1.0, write=write, left=torch.zeros(4, 1))
        with pytest.raises(SubspaceMismatchError, match="width 4, got 5"):
            LinearMap(scale=0.0, write=write, left=write)(torch.zeros(2, 5))
        with pytest.raises(SubspaceMismatchError, match="got 4 and 5"):
            LinearMap(scale=1.0, write=write, left=write) @ LinearMap(
                scale=1.0, write=torch.zeros(5, 1), left=torch.zeros(5, 1)
            )
