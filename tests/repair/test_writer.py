import dataclasses
import warnings

import pytest
import torch
from fitted import make_subspace

from care_lens.core import Site
from care_lens.repair import Writer

SITE = Site.parse("blocks.1.hook_resid_post")


def rows(n=7, seed=5):
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("projection", ["orthogonal", "oblique"])
def test_at_alpha_1_coordinates_are_the_targets_and_a_second_edit_does_nothing(projection):
    subspace = make_subspace(projection=projection)
    target = rows(1, seed=6)[0]
    writer = Writer.from_subspace(subspace, target=target)
    once = rows() + writer.delta(rows())
    torch.testing.assert_close(once @ subspace.left, (target @ subspace.left).expand(7, 3), atol=1e-4, rtol=1e-4)
    assert float(writer.delta(once).abs().max()) < 1e-4
    assert float(writer.delta(rows()).norm(dim=-1).min()) > 0.1


@pytest.mark.parametrize("projection", ["orthogonal", "oblique"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_delta_is_the_subspaces_own_correction(projection, beta):
    subspace = make_subspace(projection=projection)
    writer = Writer.from_subspace(subspace, beta=beta)
    torch.testing.assert_close(rows() + writer.delta(rows()), subspace.apply(rows(), alpha=1.0, beta=beta))


def test_orthogonal_edit_has_no_component_outside_the_span():
    subspace = make_subspace(projection="orthogonal")
    delta = Writer.from_subspace(subspace).delta(rows())
    torch.testing.assert_close(delta @ subspace.basis @ subspace.basis.T, delta, atol=1e-5, rtol=1e-5)


def test_towards_moves_one_coordinate_to_the_targets():
    target, source = rows(2)
    writer = Writer.towards("blocks.1.hook_resid_post", target=target, source=source)
    torch.testing.assert_close(source + writer.delta(source), target)
    axis = torch.nn.functional.normalize(target - source, dim=0)
    moved = rows() + writer.delta(rows())
    torch.testing.assert_close(moved @ axis, (target @ axis).expand(7))
    rejected = rows() - (rows() @ axis)[:, None] * axis
    torch.testing.assert_close(moved - (moved @ axis)[:, None] * axis, rejected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="must differ"):
        Writer.towards(SITE, target=target, source=target)


def test_alpha_above_1_warns_and_below_0_is_refused():
    with pytest.warns(UserWarning, match="past their target"):
        Writer.from_subspace(make_subspace(), alpha=4.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        writer = Writer.from_subspace(make_subspace(), alpha=1.0)
    for alpha in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha must be 0 or more"):
            dataclasses.replace(writer, alpha=alpha)


def test_refused():
    writer = Writer.from_subspace(make_subspace())
    with pytest.raises(ValueError, match="identity"):
        dataclasses.replace(writer, left=2 * writer.left)
    with pytest.raises(ValueError, match="32 wide"):
        writer.delta(torch.zeros(2, 31))
    with pytest.raises(ValueError, match="scope must be one of"):
        dataclasses.replace(writer, scope=("image", "words"))
    for site in ("vision.blocks.0.hook_resid_post", "projector.hook_out", "blocks.0.attn.hook_z"):
        with pytest.raises(ValueError, match="language tower"):
            dataclasses.replace(writer, site=Site.parse(site))


def test_one_writer_serves_models_of_different_precision():
    writer = Writer.from_subspace(make_subspace())
    exact = writer.delta(rows().double())
    assert exact.dtype == torch.float64
    rounded = writer.delta(rows())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact.float(), atol=1e-4, rtol=1e-4)
