import dataclasses
import warnings

import pytest
import torch
from scipy.linalg import eigh
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from subspace_rows import planted, unchecked

from care_lens.core import Site
from care_lens.subspace import (
    EnergyRank,
    ModelIdentity,
    Moments,
    RankError,
    SafetySubspace,
    SubspaceError,
    SubspaceMismatchError,
)

PROJECTIONS = ["orthogonal", "oblique"]


def shrunk(rows, weight):
    covariance = torch.cov(rows.double().T, correction=0)
    return (1 - weight) * covariance + weight * covariance.trace() / len(covariance) * torch.eye(
        len(covariance)
    ).double()


def cosines(first, second):
    bases = [torch.linalg.qr(one.double()).Q for one in (first, second)]
    return torch.linalg.svdvals(bases[0].T @ bases[1])


@pytest.fixture(scope="module")
def rows():
    return planted(60, 50, 40, shift=1.0)[:2]


@pytest.fixture(scope="module", params=PROJECTIONS)
def subspace(request, rows):
    return SafetySubspace.fit(*rows, rank=4, projection=request.param, shrinkage=0.1, site="blocks.1.hook_mlp_out")


@pytest.mark.parametrize("contrast", ["covariance", "second_moment", "mean"])
@pytest.mark.parametrize("solver", ["dual", "dense"])
def test_fit_is_the_generalised_eigenproblem_of_the_contrast(rows, contrast, solver):
    benign, malicious = rows
    delta = malicious.mean(0) - benign.mean(0)
    numerator = {
        "covariance": shrunk(malicious, 0.1),
        "second_moment": shrunk(malicious, 0.1) + torch.outer(delta, delta),
        "mean": torch.outer(delta, delta),
    }[contrast]
    values, vectors = eigh(numerator.numpy(), shrunk(benign, 0.1).numpy())
    rank = 1 if contrast == "mean" else 3
    fitted = SafetySubspace.fit(benign, malicious, rank=rank, contrast=contrast, shrinkage=0.1, solver=solver)
    expected = torch.from_numpy(vectors.copy()).flip(1)[:, :rank]
    assert cosines(fitted.read, expected).min() > 1 - 1e-10
    assert cosines(fitted.basis, expected).min() > 1 - 1e-10
    torch.testing.assert_close(fitted.eigenvalues, torch.from_numpy(values.copy()).flip(0)[:rank].float())
    assert fitted.diagnostics["solver"] == solver


def test_the_mean_contrast_is_scikit_learns_discriminant():
    """Its within-class scatter is that of both classes; with the benign one given twice it is C_b."""
    benign, malicious, _ = planted(300, 300, 12, shift=3.0)
    twin = benign - benign.mean(0) + malicious.mean(0)
    labels = [0] * 300 + [1] * 300
    analysis = LinearDiscriminantAnalysis(solver="eigen").fit(torch.cat([benign, twin]).numpy(), labels)
    fitted = SafetySubspace.fit(benign, twin, contrast="mean", shrinkage=None)
    assert cosines(fitted.read, torch.from_numpy(analysis.coef_).T).min() > 1 - 1e-10


def test_the_mean_contrast_in_the_identity_metric_is_the_difference_of_means(rows):
    delta = (rows[1].mean(0) - rows[0].mean(0)).float()
    fitted = SafetySubspace.fit(*rows, contrast="mean", metric="identity", projection="orthogonal")
    torch.testing.assert_close(fitted.basis[:, 0], delta / delta.norm())
    torch.testing.assert_close(fitted.eigenvalues[0], delta.square().sum())


def test_the_identity_metric_gives_principal_components(rows):
    fitted = SafetySubspace.fit(*rows, rank=3, contrast="covariance", metric="identity", shrinkage=None)
    _, _, components = torch.pca_lowrank(rows[1], q=40)
    assert cosines(fitted.read, components[:, :3]).min() > 1 - 1e-9
    torch.testing.assert_close(fitted.read.T @ fitted.read, torch.eye(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(80, 80, 200), (2000, 2000, 40)])
def test_a_planted_subspace_is_recovered(shape):
    benign, malicious, truth = planted(*shape, spread=8.0)
    for contrast in ("covariance", "second_moment"):
        fitted = SafetySubspace.fit(benign, malicious, rank=2, contrast=contrast)
        assert cosines(fitted.basis, truth).min() > (0.8 if shape[0] < shape[2] else 0.98)


def test_second_moment_finds_a_pure_shift_that_covariance_misses():
    benign, malicious, truth = planted(1000, 1000, 30, planted=1, spread=1.0, shift=6.0)
    found = {
        contrast: float(cosines(SafetySubspace.fit(benign, malicious, rank=1, contrast=contrast).basis, truth)[0])
        for contrast in ("covariance", "second_moment", "mean")
    }
    assert found["second_moment"] > 0.98
    assert found["mean"] > 0.98
    assert found["covariance"] < 0.6


def test_basis_read_and_write_are_what_they_say(subspace, rows):
    identity = torch.eye(4, dtype=torch.float64)
    wide = subspace.to(dtype=torch.float64)
    metric = shrunk(rows[0], 0.1)
    torch.testing.assert_close(wide.basis.T @ wide.basis, identity, atol=1e-6, rtol=0)
    torch.testing.assert_close(wide.read.T @ metric @ wide.read, identity, atol=1e-5, rtol=0)
    torch.testing.assert_close(wide.left.T @ wide.write, identity, atol=1e-6, rtol=0)
    assert cosines(wide.left, wide.basis).min() > 1 - 1e-10
    if subspace.diagnostics["projection"] == "oblique":
        torch.testing.assert_close(wide.write, metric @ wide.read, atol=1e-5, rtol=1e-5)
        assert torch.equal(subspace.left, subspace.read)
    else:
        assert torch.equal(subspace.left, subspace.basis)
        assert torch.equal(subspace.write, subspace.basis)


def test_columns_point_at_the_malicious_mean_and_spans_are_nested(subspace):
    delta = subspace.mean_malicious - subspace.mean_benign
    assert bool((delta @ subspace.read >= 0).all())
    for j in range(1, 5):
        assert cosines(subspace.basis[:, :j], subspace.read[:, :j]).min() > 1 - 1e-9


def test_basis_columns_point_where_the_read_columns_do():
    for seed in range(8):
        fitted = SafetySubspace.fit(*planted(60, 50, 12, shift=1.0, seed=seed)[:2], rank=4)
        assert bool(((fitted.basis * fitted.read).sum(0) > 0).all())


def test_the_projector_is_one(subspace, rows):
    projector = subspace.projector().double()
    torch.testing.assert_close(projector @ projector, projector, atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank(projector, atol=1e-4) == 4
    symmetric = torch.allclose(projector, projector.T, atol=1e-5)
    assert symmetric == (subspace.diagnostics["projection"] == "orthogonal")
    torch.testing.assert_close(subspace.project(rows[1]), rows[1] @ projector.T, atol=1e-4, rtol=1e-4)


def test_apply_puts_the_coordinates_on_the_target(subspace, rows):
    h = rows[1].float()
    target = torch.randn(40, generator=torch.Generator().manual_seed(1))
    for aim, options in (
        (subspace.mean_benign, {}),
        (0.5 * subspace.mean_benign, {"beta": 0.5}),
        (torch.zeros(40), {"beta": 0.0}),
        (target, {"target": target}),
    ):
        moved = subspace.apply(h, **options)
        torch.testing.assert_close(moved @ subspace.left, (aim @ subspace.left).expand(50, 4), atol=1e-4, rtol=0)
        torch.testing.assert_close(subspace.apply(moved, **options), moved, atol=1e-4, rtol=0)
        half = subspace.apply(h, alpha=0.5, **options)
        torch.testing.assert_close(half, (h + moved) / 2, atol=1e-5, rtol=1e-5)
    assert subspace.energy(subspace.apply(h)).max() < 1e-6 < subspace.energy(h).min()


def test_apply_is_the_papers_formula_for_the_orthogonal_projection(rows):
    subspace = SafetySubspace.fit(*rows, rank=3, projection="orthogonal")
    safe = torch.eye(40) - subspace.basis @ subspace.basis.T
    h = rows[1].float()
    expected = h @ safe + 0.7 * ((torch.eye(40) - safe) @ subspace.mean_benign)
    torch.testing.assert_close(subspace.apply(h, beta=0.7), expected, atol=1e-5, rtol=1e-5)


def test_each_projection_edits_least_in_its_own_metric(rows):
    """Of all edits that clear the coordinates; per row, for benign activations."""
    benign = rows[0]
    fits = {name: SafetySubspace.fit(*rows, rank=3, shrinkage=0.1, projection=name) for name in PROJECTIONS}
    edits = {name: benign - fit.apply(benign) for name, fit in fits.items()}
    inverse = torch.linalg.inv(shrunk(benign, 0.1))
    benign_norm = {name: ((edit @ inverse) * edit).sum(1) for name, edit in edits.items()}
    euclidean = {name: edit.square().sum(1) for name, edit in edits.items()}
    assert bool((benign_norm["oblique"] < benign_norm["orthogonal"]).all())
    assert bool((euclidean["orthogonal"] < euclidean["oblique"]).all())
    energy = fits["oblique"].energy(benign)
    torch.testing.assert_close(benign_norm["oblique"], energy, atol=1e-5, rtol=1e-4)


def test_benign_energy_is_the_rank_on_average(rows):
    fitted = SafetySubspace.fit(rows[0], rows[1], rank=2, shrinkage=0.0)
    assert float(fitted.energy(rows[0]).mean()) == pytest.approx(2, rel=1e-4)
    energy = fitted.energy(rows[1])
    assert float(energy.mean()) == pytest.approx(float(fitted.eigenvalues.sum()), rel=1e-4)
    torch.testing.assert_close(fitted.coordinates(rows[1]).square().sum(-1), energy)
    uncentred = fitted.energy(rows[1].float(), centre=False)
    torch.testing.assert_close(uncentred, (rows[1].float() @ fitted.read).square().sum(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_activations_keep_their_dtype_shape_and_identity(subspace, rows, dtype):
    h = rows[1][:6].to(dtype).reshape(2, 3, 40)
    before = h.clone()
    moved = subspace.apply(h)
    assert moved.dtype == dtype and moved.shape == h.shape
    assert torch.equal(h, before)
    exact = h.double() - (h.double() - subspace.mean_benign.double()) @ subspace.projector().double().T
    torch.testing.assert_close(moved, exact.to(dtype), atol=1e-4, rtol=torch.finfo(dtype).eps * 2 + 1e-6)
    assert subspace.apply(h, alpha=0.0) is h
    assert subspace.project(h).dtype == (dtype if dtype == torch.float64 else torch.float32)


def test_large_half_precision_activations_do_not_overflow():
    benign, malicious, _ = planted(80, 80, 16)
    scaled = [(900 * rows).to(torch.float16) for rows in (benign, malicious)]
    exact = SafetySubspace.fit(scaled[0].double(), scaled[1].double(), rank=2)
    half = SafetySubspace.fit(*scaled, rank=2)
    assert torch.equal(half.read, exact.read)
    assert bool(half.apply(scaled[1]).isfinite().all())


def test_alpha_above_one_warns_and_reflects(subspace, rows):
    h = rows[1].float()
    with pytest.warns(UserWarning, match="above 1"):
        beyond = subspace.apply(h, alpha=2.0)
    torch.testing.assert_close(subspace.coordinates(beyond), -subspace.coordinates(h), atol=1e-4, rtol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subspace.apply(h, alpha=1.0)


@pytest.mark.parametrize("wrong", [{"alpha": -0.1}, {"alpha": float("nan")}, {"beta": 1.5}, {"beta": -1.0}])
def test_strengths_out_of_range_are_named(subspace, wrong):
    with pytest.raises(SubspaceError, match=next(iter(wrong))):
        subspace.apply(torch.zeros(40), **wrong)


def test_truncation_is_the_fit_of_that_rank(subspace, rows):
    notes = subspace.diagnostics
    fitted = SafetySubspace.fit(*rows, rank=2, projection=notes["projection"], shrinkage=0.1)
    cut = subspace.truncate(2)
    torch.testing.assert_close(cut.projector(), fitted.projector(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cut.read, fitted.read, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(cut.eigenvalues, fitted.eigenvalues)
    assert (cut.rank, cut.site) == (2, subspace.site)
    for wrong in (0, 5):
        with pytest.raises(RankError, match="between 1 and 4"):
            subspace.truncate(wrong)


def test_comparison_is_by_principal_angles(rows):
    fitted = SafetySubspace.fit(*rows, rank=4)
    same = fitted.compare(fitted.truncate(2))
    torch.testing.assert_close(same.cosines, torch.ones(2, dtype=torch.float64))
    assert same.kernel == pytest.approx(2)
    assert same.normalized == pytest.approx(2 / 8**0.5)
    assert same.chance == pytest.approx(8**0.5 / 40)
    other = SafetySubspace.fit(rows[1], rows[0], rank=3)
    found = fitted.compare(other)
    torch.testing.assert_close(found.cosines, cosines(fitted.basis, other.basis), atol=1e-7, rtol=0)
    torch.testing.assert_close(found.angles, found.cosines.clamp(max=1).acos())
    with pytest.raises(SubspaceMismatchError, match="width"):
        fitted.compare(SafetySubspace.fit(rows[0][:, :9], rows[1][:, :9], rank=1))


def test_it_refuses_to_be_used_elsewhere(rows):
    typed = SafetySubspace.fit(*rows, rank=1, site="blocks.1.hook_mlp_out", modality="visual")
    assert typed.site == Site("language", 1, "hook_mlp_out")
    typed.check(site="blocks.1.hook_mlp_out", modality="visual", width=40)
    typed.check()
    for wrong in ({"site": "blocks.2.hook_mlp_out"}, {"modality": "textual"}, {"width": 41}):
        with pytest.raises(SubspaceMismatchError, match=next(iter(wrong))):
            typed.check(**wrong)
    with pytest.raises(SubspaceMismatchError, match="fitted without a site"):
        SafetySubspace.fit(*rows, rank=1).check(site="blocks.2.hook_mlp_out")
    for use in (typed.apply, typed.project, typed.energy):
        with pytest.raises(SubspaceMismatchError, match="got 39"):
            use(torch.zeros(2, 39))


def test_fits_are_reproducible_and_leave_their_rows_alone(rows):
    copies = [part.clone() for part in rows]
    first, second = (SafetySubspace.fit(*rows, rank=3) for _ in range(2))
    assert torch.equal(first.read, second.read)
    assert all(torch.equal(part, copy) for part, copy in zip(rows, copies, strict=True))


def test_representations_say_what_it_is(subspace):
    for text in (repr(subspace), subspace._repr_html_()):
        for word in (
            "SafetySubspace",
            "blocks.1.hook_mlp_out",
            "4 of width 40",
            "60 benign, 50 malicious",
            "█",
        ):
            assert word in text
    assert len(repr(subspace)) < 700 and len(repr(subspace).splitlines()) <= 8
    named = dataclasses.replace(subspace, model=ModelIdentity("<b>theirs<b>" * 40, revision="main"))
    assert max(map(len, repr(named).splitlines())) <= 160 and "<b>theirs" not in named._repr_html_()
    assert "&lt;b&gt;theirs" in named._repr_html_() and "tensor(" not in repr(named)
    assert subspace._repr_html_().startswith("<table>")


@pytest.mark.parametrize("contrast", ["covariance", "second_moment", "mean"])
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("keep", ["rows", "sums"])
def test_streamed_moments_give_the_fit_of_their_rows(rows, contrast, projection, keep):
    streamed = []
    for part in rows:
        start = Moments.from_rows(part[:20])
        start = start if keep == "rows" else start.without_rows()
        streamed.append(start.update(part[20:31]).update(part[31:]))
    options = {
        "rank": 1 if contrast == "mean" else 3,
        "contrast": contrast,
        "projection": projection,
        "site": "blocks.1.hook_mlp_out",
        "modality": "visual",
    }
    found, expected = SafetySubspace.from_moments(*streamed, **options), SafetySubspace.fit(*rows, **options)
    assert found.equals(expected)
    torch.testing.assert_close(found.eigenvalues, expected.eigenvalues)
    assert found.diagnostics["shrinkage_benign"] == pytest.approx(expected.diagnostics["shrinkage_benign"])


def test_moments_know_the_energy_rank_but_no_rule_that_needs_rows(rows):
    moments = [Moments.from_rows(part).without_rows() for part in rows]
    found = SafetySubspace.from_moments(*moments, rank=EnergyRank(0.5))
    assert found.equals(SafetySubspace.fit(*rows, rank=EnergyRank(0.5)))
    for rank in ("auto", "permutation"):
        with unchecked(), pytest.raises(SubspaceError, match=r"use SafetySubspace\.fit"):
            SafetySubspace.from_moments(*moments, rank=rank)
    with unchecked(), pytest.raises(SubspaceError, match="rank must be a number, one of"):
        SafetySubspace.from_moments(*moments, rank=True)
