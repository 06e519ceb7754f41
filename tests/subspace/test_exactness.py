"""Numbers that were wrong: against numpy and scipy in float64."""

import contextlib
import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from subspace_rows import planted, unchecked

from care_lens.core import files
from care_lens.subspace import (
    IdenticalClassesWarning,
    LinearMap,
    NonFiniteError,
    RankError,
    SafetySubspace,
    SubspaceError,
    shrink,
)
from care_lens.subspace.contrast import class_moments, pencil
from care_lens.subspace.solvers import _ritz, solve_pencil


def rows(n, d, *, seed=0, stretch=5.0):
    generator = torch.Generator().manual_seed(seed)
    benign, malicious = torch.randn(2, n, d, generator=generator, dtype=torch.float64)
    malicious[:, 3] *= stretch
    return benign, malicious


def numpy_projector(benign, malicious, rank):
    """``C_b U U^T`` by scipy, no shrinkage."""
    b, m = benign.numpy(), malicious.numpy()
    delta = m.mean(axis=0) - b.mean(axis=0)
    cov = np.cov(b.T, bias=True)
    vectors = eigh(np.cov(m.T, bias=True) + np.outer(delta, delta), cov)[1][:, -rank:]
    return cov @ vectors @ vectors.T


@pytest.mark.parametrize("extra", [1, 2, 5])
def test_an_oblique_projector_keeps_its_digits_where_rows_are_hardly_more_than_columns(extra):
    benign, malicious = rows(60 + extra, 60)
    fitted = SafetySubspace.fit(benign, malicious, rank=2, shrinkage=None)
    expected = numpy_projector(benign, malicious, 2)
    assert np.linalg.norm(fitted.projector().double().numpy() - expected) < 1e-6 * np.linalg.norm(expected)
    mean = benign.mean(dim=0)
    repaired = malicious - (malicious - mean) @ torch.from_numpy(expected.T)
    error = (fitted.apply(malicious.float()) - repaired).norm()
    assert float(error) < 1e-5 * float(repaired.norm())


def test_a_projector_that_float32_would_not_hold_is_kept_in_float64(tmp_path):
    benign, malicious = rows(80, 12)
    scale = torch.ones(12, dtype=torch.float64)
    scale[:4] = 3e5
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    malicious[:, 5] *= 30
    benign, malicious = benign * scale @ turn, malicious * scale @ turn
    fitted = SafetySubspace.fit(benign, malicious, rank=1, shrinkage=None)
    assert fitted.left.dtype == torch.float64
    expected = numpy_projector(benign, malicious, 1)
    # Two float64 solvers at condition 1e11 agree to 1e-5; float32 would miss left.T @ write = 1 by 5e-4.
    assert np.linalg.norm(fitted.projector().numpy() - expected) < 1e-4 * np.linalg.norm(expected)
    assert abs(float((fitted.left.T @ fitted.write)[0, 0]) - 1) < 1e-9
    assert fitted.apply(malicious.float()).dtype == torch.float32
    again = SafetySubspace.load(fitted.save(tmp_path))
    assert again.left.dtype == torch.float64 and torch.equal(again.left, fitted.left)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_energies_where_means_are_large(dtype, mean):
    benign, malicious = rows(200, 32)
    centre = mean * torch.rand(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    benign, malicious = (benign + centre).to(dtype), (malicious + centre).to(dtype)
    fitted = SafetySubspace.fit(benign, malicious, rank=2, site="blocks.1.hook_resid_post")
    read = fitted.read.double()
    expected = ((malicious.double() - benign.double().mean(dim=0)) @ read).square().sum(dim=1)
    torch.testing.assert_close(fitted.energy(malicious).double(), expected, rtol=1e-4, atol=1e-6)
    moved = fitted.apply(malicious)
    wide = malicious.double()
    by_hand = wide - (wide - benign.double().mean(dim=0)) @ fitted.left.double() @ fitted.write.double().T
    torch.testing.assert_close(moved.double(), by_hand, rtol=2e-7, atol=1e-5)
    torch.testing.assert_close(fitted.correction()(malicious), moved)
    union = fitted.union(SafetySubspace.fit(benign, malicious.flip(1), rank=1, site="blocks.1.hook_resid_post"))
    torch.testing.assert_close(
        union.mean_benign.double(), benign.double().mean(dim=0), rtol=1e-12 if mean else 1e-6, atol=1e-6
    )
    assert fitted.mean_benign.dtype == (torch.float64 if mean else torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_readers_and_writers_where_means_are_large(dtype):
    from care_lens.repair import EnergyReader, LinearReader, Writer

    benign, malicious = rows(200, 32)
    centre = 1e6 * torch.rand(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    benign, malicious = (benign + centre).to(dtype), (malicious + centre).to(dtype)
    fitted = SafetySubspace.fit(benign, malicious, rank=2, site="blocks.1.hook_resid_post")
    offset = malicious.double() - benign.double().mean(dim=0)
    read = fitted.read.double()
    energy = EnergyReader.from_subspace(fitted).tokens(malicious[None])[0]
    torch.testing.assert_close(energy.double(), (offset @ read).square().sum(dim=1), rtol=1e-4, atol=1e-6)
    line = LinearReader.from_subspace(fitted).tokens(malicious[None])[0]
    torch.testing.assert_close(line.double(), offset @ read[:, 0], rtol=1e-4, atol=1e-4)
    delta = Writer.from_subspace(fitted).delta(malicious)
    expected = -offset @ fitted.left.double() @ fitted.write.double().T
    torch.testing.assert_close(delta.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("contrast", ["second_moment", "covariance", "mean"])
@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_one_class_given_twice_is_said(contrast, mean):
    benign, malicious = rows(60, 12)
    benign, malicious = benign + mean, malicious + mean
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    with pytest.warns(IdenticalClassesWarning, match="picked by rounding"), contextlib.suppress(RankError):
        SafetySubspace.fit(benign, benign[order], rank=1, contrast=contrast, shrinkage=0.1)
    same = malicious - malicious.mean(dim=0) + benign.mean(dim=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", IdenticalClassesWarning)
        SafetySubspace.fit(benign, malicious, rank=1, contrast=contrast)
        SafetySubspace.fit(
            benign, rows(60, 12, seed=3, stretch=1.0)[0] + mean, rank=1, contrast=contrast, shrinkage=0.1
        )
        if contrast != "mean":
            SafetySubspace.fit(benign, same, rank=1, contrast=contrast)


def test_a_constant_column_under_a_diagonal_target():
    benign, malicious = rows(90, 20)
    benign[:, 7] = malicious[:, 7] = 0.1
    constant_free = [i for i in range(20) if i != 7]
    fitted = SafetySubspace.fit(benign, malicious, rank=2, shrinkage="diagonal")
    without = SafetySubspace.fit(benign[:, constant_free], malicious[:, constant_free], rank=2, shrinkage="diagonal")
    torch.testing.assert_close(fitted.eigenvalues, without.eigenvalues)
    assert float(fitted.basis[7].abs().max()) < 1e-6
    torch.testing.assert_close(fitted.projector()[constant_free][:, constant_free], without.projector())
    # Constant in the benign class alone: measured against the median variance of the other columns.
    malicious[:, 7] += 40 * rows(90, 1 + 19, seed=5)[0][:, 0]
    fitted = SafetySubspace.fit(benign, malicious, rank=1, shrinkage="diagonal")
    median = float(benign.var(dim=0, correction=0)[constant_free].median())
    assert int(fitted.basis[:, 0].abs().argmax()) == 7
    second = float((malicious[:, 7] - 0.1).square().mean())
    assert float(fitted.eigenvalues[0]) == pytest.approx(second / median, rel=0.05)
    moments = class_moments(benign, malicious, "covariance", "benign")[0]
    assert float(shrink(moments, "diagonal").dense()[7, 7]) < 1e-12  # asked for as a floor only


def test_the_ritz_directions_are_nearly_the_exact_ones():
    benign, malicious = rows(60, 300)
    malicious[:, 9] *= 6
    malicious += 0.5
    both = pencil(
        *class_moments(benign, malicious, "second_moment", "benign"),
        contrast="second_moment",
        metric="benign",
        shrinkage="diagonal",
    )
    assert _ritz.serves(*both, 20)
    exact, found = solve_pencil(*both, rank=20, solver="dense"), _ritz.leading(*both, 20)
    torch.testing.assert_close(found.T @ both[1].times(found), torch.eye(20, dtype=torch.float64), atol=1e-4, rtol=0)
    values = (found * both[0].times(found)).sum(dim=0)
    assert bool((values <= exact.eigenvalues * (1 + 1e-6)).all())
    torch.testing.assert_close(values[:3], exact.eigenvalues[:3], rtol=1e-3, atol=0)
    torch.testing.assert_close(values, exact.eigenvalues, rtol=0.05, atol=0)


def test_the_rank_of_a_diagonal_fit_does_not_hang_on_the_shortcut():
    benign, malicious, _ = planted(50, 50, 170, spread=12.0)
    chosen = [
        SafetySubspace.fit(benign, malicious, rank="auto", shrinkage="diagonal", solver=solver).rank
        for solver in ("auto", "dense")
    ]
    assert chosen[0] == chosen[1] >= 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_activations_that_cannot_hold_the_result_are_refused(dtype):
    benign, malicious = rows(40, 12)
    fitted = SafetySubspace.fit(benign, malicious, rank=2)
    h = torch.ones(3, 12).to(dtype)
    with unchecked():
        for use in (
            fitted.apply,
            lambda x: fitted.apply(x, alpha=0),
            fitted.project,
            fitted.energy,
            fitted.coordinates,
            fitted.mahalanobis,
            fitted.correction(),
            fitted.projection(),
            LinearMap(scale=1.0, write=torch.zeros(12, 1), left=torch.zeros(12, 1)),
        ):
            with pytest.raises(SubspaceError, match="floating dtype"):
                use(h)
        for wrong in (torch.full((12,), torch.nan), torch.ones(12, dtype=torch.int64)):
            for use in (fitted.apply, lambda x, target: fitted.correction(target=target)):
                with pytest.raises(NonFiniteError, match="target"):
                    use(torch.ones(3, 12), target=wrong)


def sealed(directory, **changes):
    """A saved subspace with other tensors and valid sums."""
    benign, malicious = rows(40, 12)
    fitted = SafetySubspace.fit(benign, malicious, rank=2)
    fitted.save(directory)
    data, manifest = files.load_artifact(directory, "subspace", kind="care_lens.SafetySubspace", schema=3)
    tensors = files.tensors_of(data, where=directory)
    tensors |= {name: change(tensors[name]) for name, change in changes.items()}
    content = {key: part for key, part in manifest.items() if key not in ("kind", "schema", "files", "manifest_sha256")}
    files.save_artifact(
        directory,
        "subspace",
        kind="care_lens.SafetySubspace",
        schema=3,
        data={"safetensors": files.tensor_bytes(tensors)},
        content=content,
    )
    return directory


NAMES = ("basis", "read", "write", "left", "eigenvalues", "mean_benign", "mean_malicious")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "change",
    [
        lambda t: torch.cat([t, t]),
        lambda t: t[:-1],
        lambda t: t[None],
        lambda t: t[..., None],
        lambda t: t[..., 0],
        lambda t: t.long(),
        lambda t: torch.where(torch.arange(t.numel()).reshape(t.shape) == 1, torch.nan, t),
        lambda t: torch.where(torch.arange(t.numel()).reshape(t.shape) == 1, torch.inf, t),
    ],
    ids=["twice", "shorter", "axis before", "axis behind", "axis less", "integers", "nan", "inf"],
)
def test_tensors_that_are_no_subspace_are_refused_though_their_sums_are_right(tmp_path, name, change):
    with unchecked():
        directory = sealed(tmp_path, **{name: change})
        with pytest.raises(SubspaceError, match="must"):
            SafetySubspace.load(directory)


@pytest.mark.parametrize("name", ["basis", "read", "write", "left"])
@pytest.mark.parametrize(
    "change", [torch.zeros_like, lambda t: 2 * t, lambda t: t.roll(1, 0)], ids=["0", "2x", "rolled"]
)
def test_columns_that_do_not_fit_each_other_are_refused(tmp_path, name, change):
    with unchecked():
        directory = sealed(tmp_path, **{name: change})
        with pytest.raises(SubspaceError, match=r"must (be|have|lie)"):
            SafetySubspace.load(directory)


def test_eigenvalues_that_are_none_are_refused(tmp_path):
    for change in (lambda t: -t, lambda t: t.flip(0)):
        with pytest.raises(SubspaceError, match="eigenvalues in"):
            SafetySubspace.load(sealed(tmp_path, eigenvalues=change))
    with pytest.raises(SubspaceError, match=r"eigenvalues in .* must be numbers of 0 or more, got"):
        SafetySubspace.load(sealed(tmp_path, eigenvalues=lambda t: t * torch.nan))


def test_a_union_has_no_eigenvalues_and_loads(tmp_path):
    benign, malicious = rows(60, 24)
    first, second = (SafetySubspace.fit(benign, some, rank=2) for some in (malicious, malicious.flip(1)))
    for made in (first.union(second), first.intersect(first)):
        made.save(tmp_path)
        assert bool(SafetySubspace.load(tmp_path).eigenvalues.isnan().all())


def test_every_subspace_that_is_one_loads(tmp_path):
    from care_lens.subspace import random_like

    benign, malicious = rows(60, 24)
    options = ({}, {"projection": "orthogonal"}, {"metric": "identity"}, {"shrinkage": None}, {"shrinkage": "diagonal"})
    for option in options:
        fitted = SafetySubspace.fit(benign, malicious, rank=3, **option)
        other = SafetySubspace.fit(benign, malicious.flip(1), rank=2, **option)
        for one in (fitted, random_like(fitted), fitted.union(other), fitted.truncate(1)):
            for dtype in (None, torch.float16, torch.bfloat16, torch.float64):
                kept = one.to(dtype=dtype)
                assert torch.equal(SafetySubspace.load(kept.save(tmp_path)).left, kept.left)
