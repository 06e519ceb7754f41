import dataclasses

import pytest
import torch

from care_lens.repair import Writer
from care_lens.repair import fuse as fuse_module
from care_lens.repair.fuse import GatedWriter, adaptive_weight, fused_edit, modality_edit

SITE = "blocks.0.hook_resid_post"
ONES = torch.ones(1, 2)
IMAGE = torch.tensor([[True, False]])
H = torch.tensor([[[3.0, 3.0, 5.0], [1.0, 4.0, 5.0]]])


def axis_writer(axis, to=0.0, alpha=1.0):
    """Sets one coordinate to a value."""
    source, target = torch.zeros(3), torch.zeros(3)
    target[axis], source[axis] = to, to + 1
    return dataclasses.replace(Writer.towards(SITE, target=target, source=source), alpha=alpha)


def fuse(visual, textual, rule, weights=(0.5, 0.5)):
    return H + fused_edit(H, visual, textual, rule=rule, weights=weights, image=IMAGE).edit


def test_adaptive_applies_half_of_each_of_two_equal_orthogonal_edits():
    fused = fuse([GatedWriter(axis_writer(0), ONES)], [GatedWriter(axis_writer(1), ONES)], "adaptive")
    torch.testing.assert_close(fused[0, 0], torch.tensor([1.5, 1.5, 5.0]))
    torch.testing.assert_close(fused[0, 1], torch.tensor([1 - 0.2 * 1, 4 - 0.8 * 4, 5.0]))


def test_adaptive_weights_do_not_depend_on_strength():
    strong = [GatedWriter(axis_writer(0, alpha=3.0), ONES)]
    fused = fuse(strong, [GatedWriter(axis_writer(1, alpha=0.5), ONES)], "adaptive")
    torch.testing.assert_close(fused[0, 0], torch.tensor([3 - 0.5 * 9, 3 - 0.5 * 1.5, 5.0]))


@pytest.mark.parametrize("rule", ["adaptive", "sequential", "parallel", "modality", "joint"])
def test_no_edit_where_all_gates_are_closed(rule):
    closed = [GatedWriter(axis_writer(0), torch.zeros(1, 2))]
    assert bool((fuse(closed, closed, rule) == H).all())
    assert bool((fuse([], [], rule) == H).all())


@pytest.mark.parametrize("other", [[], [GatedWriter(axis_writer(1), torch.zeros(1, 2))]])
def test_a_closed_or_absent_modality_does_not_dilute_the_other(other):
    opened = [GatedWriter(axis_writer(0), ONES)]
    expected = H * torch.tensor([0.0, 1.0, 1.0])
    for rule in ("adaptive", "sequential", "modality", "joint"):
        torch.testing.assert_close(fuse(opened, other, rule), expected)
        torch.testing.assert_close(fuse(other, opened, rule), expected)
    torch.testing.assert_close(fuse(opened, other, "parallel", (1.0, 0.3)), expected)


def test_gates_act_per_token():
    first = torch.tensor([[1.0, 0.0]])
    fused = fuse([GatedWriter(axis_writer(0), first)], [GatedWriter(axis_writer(1), 1 - first)], "adaptive")
    torch.testing.assert_close(fused, torch.tensor([[[0.0, 3.0, 5.0], [1.0, 0.0, 5.0]]]))


def test_sequential_is_visual_then_textual():
    to_1, to_2 = [GatedWriter(axis_writer(0, 1.0), ONES)], [GatedWriter(axis_writer(0, 2.0), ONES)]
    assert fuse(to_1, to_2, "sequential")[..., 0].tolist() == [[2.0, 2.0]]
    assert fuse(to_2, to_1, "sequential")[..., 0].tolist() == [[1.0, 1.0]]


def test_parallel_weights():
    fused = fuse([GatedWriter(axis_writer(0), ONES)], [GatedWriter(axis_writer(1), ONES)], "parallel", (1.0, 0.25))
    torch.testing.assert_close(fused, H * torch.tensor([0.0, 0.75, 1.0]))


def test_corrections_of_one_modality_act_in_sequence():
    half = [
        GatedWriter(axis_writer(0, 1.0, alpha=0.5), ONES),
        GatedWriter(axis_writer(0, 2.0, alpha=0.5), ONES),
    ]
    expected = H.clone()
    expected[..., 0] = (H[..., 0] + (1 - H[..., 0]) / 2) / 2 + 1
    torch.testing.assert_close(H + modality_edit(H, half), expected)
    expected[..., 0] = 2.0
    torch.testing.assert_close(H + modality_edit(H, half, unit=True), expected)


def test_weight_of_zero_edits_has_finite_gradients():
    visual, textual = (torch.zeros(1, 1, 3, requires_grad=True) for _ in range(2))
    weight = adaptive_weight(visual, textual)
    weight.sum().backward()
    assert weight.tolist() == [[[0.0]]]
    assert visual.grad is not None and bool(visual.grad.isfinite().all())


@pytest.mark.parametrize("rule", ["adaptive", "sequential", "parallel", "modality", "joint"])
@pytest.mark.parametrize("seed", range(4))
def test_only_tokens_at_which_a_gate_is_open_are_computed(rule, seed, monkeypatch):
    draw = torch.Generator().manual_seed(seed)
    h, image = torch.randn(3, 9, 3, generator=draw), torch.rand(3, 9, generator=draw) < 0.5
    open_at = torch.zeros(9, dtype=torch.bool)
    open_at[torch.randperm(9, generator=draw)[: 2 * seed]] = True  # at no token, at some of them
    seen, said = (
        [
            GatedWriter(
                axis_writer(axis, to=1.0, alpha=1.5), torch.rand(3, 9, generator=draw).round(decimals=1) * open_at
            )
        ]
        for axis in (0, 1)
    )
    seen = [one._replace(gate=one.openness.sign()) for one in seen]
    options = {"rule": rule, "weights": (0.3, 0.6), "image": image}
    whole = fuse_module._fused(h, seen, said, share=None, **options)
    shapes, every = [], fuse_module._fused
    monkeypatch.setattr(fuse_module, "_fused", lambda h, *a, **k: shapes.append(h.shape[1]) or every(h, *a, **k))
    few = fused_edit(h, seen, said, **options)
    assert shapes == [int(open_at.sum()) + 1]
    for one, other in zip(few, whole, strict=True):
        torch.testing.assert_close(one, other)
    assert not few.edit[:, ~open_at].any()


def test_a_share_of_the_whole_row_sees_every_token():
    gates = torch.tensor([[1.0, 0.0]])
    shapes = []

    def share(visual, textual):
        shapes.append(visual.shape[1])
        return adaptive_weight(visual, textual)

    fused_edit(
        H, [GatedWriter(axis_writer(0), gates)], [GatedWriter(axis_writer(1), gates)], rule="adaptive", share=share
    )
    assert shapes == [2]
