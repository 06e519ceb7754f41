import pytest
import torch
from subspace_rows import planted

from care_lens.subspace import SafetySubspace, SubspaceError, edit_norm_ratio, random_like


@pytest.fixture(scope="module", params=["orthogonal", "oblique"])
def fitted(request):
    benign, malicious, _ = planted(80, 60, 64, shift=2.0)
    subspace = SafetySubspace.fit(
        benign, malicious, rank=3, projection=request.param, site="blocks.0.hook_mlp_out", modality="textual"
    )
    return subspace, malicious.float()


def test_a_control_has_the_same_shape_elsewhere(fitted):
    subspace, _ = fitted
    control = random_like(subspace, seed=3)
    assert (control.rank, control.site, control.modality) == (3, subspace.site, subspace.modality)
    assert torch.equal(control.mean_benign, subspace.mean_benign)
    for name in ("basis", "read", "write", "left"):
        own, moved = getattr(subspace, name), getattr(control, name)
        torch.testing.assert_close(moved.T @ moved, own.T @ own, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(control.left.T @ control.write, torch.eye(3), atol=1e-5, rtol=0)
    projector = control.projector()
    torch.testing.assert_close(projector @ projector, projector, atol=1e-5, rtol=0)
    assert subspace.compare(control).normalized < 0.3
    assert "control" in repr(control)


def test_controls_are_seeded_and_uniform(fitted):
    subspace, _ = fitted
    assert torch.equal(random_like(subspace, 1).basis, random_like(subspace, 1).basis)
    overlaps = [subspace.compare(random_like(subspace, seed)).kernel for seed in range(200)]
    expected = 9 / 64  # k^2 / d for uniformly random subspaces
    assert sum(overlaps) / 200 == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize("options", [{}, {"beta": 0.0}, {"target": torch.ones(64)}])
def test_scaled_controls_edit_by_as_much(fitted, options):
    subspace, malicious = fitted
    control = random_like(subspace, seed=5)
    ratio = edit_norm_ratio(subspace, control, malicious, **options)
    aims = {"beta": options.get("beta", 1.0), "target": options.get("target")}
    alpha = 1 / max(1.0, ratio)
    own = (subspace.apply(malicious, alpha=alpha, **aims) - malicious).norm(dim=1).mean()
    random = (control.apply(malicious, alpha=alpha * ratio, **aims) - malicious).norm(dim=1).mean()
    torch.testing.assert_close(own, random, rtol=1e-4, atol=0)


def test_a_subspace_of_more_than_half_the_space_has_a_control():
    benign, malicious, _ = planted(80, 60, 6)
    control = random_like(SafetySubspace.fit(benign, malicious, rank=5))
    torch.testing.assert_close(control.left.T @ control.write, torch.eye(5), atol=1e-5, rtol=0)


def test_a_control_that_edits_nothing_is_named(fitted):
    subspace, _ = fitted
    with pytest.raises(SubspaceError, match="norm 0"):
        edit_norm_ratio(subspace, subspace, subspace.mean_benign[None].double())
