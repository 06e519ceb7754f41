"""One edit behind a subspace, its maps and writers: to the bit what each of them computed by a formula of its own."""

import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from subspace_rows import planted

from care_lens.core import Site
from care_lens.repair import Writer
from care_lens.subspace import LinearMap, SafetySubspace
from care_lens.subspace.affine import along, working_dtype

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
FLOATS = (F16, BF16, F32, F64)


def old_centred(activation, centre):
    if centre.dtype != F64 or activation.dtype == F64:
        return activation - centre.to(device=activation.device, dtype=activation.dtype)
    high = centre.to(activation.dtype)
    low = (centre - high.to(F64)).to(activation.dtype)
    return (activation - high) - low


def old_wide(h, left):
    return h.to(F64 if left.dtype == F64 else torch.promote_types(h.dtype, F32))


def old_project(of, h):
    wide = old_wide(h, of.left)
    return ((wide @ of.left.to(wide)) @ of.write.to(wide).T).to(torch.promote_types(h.dtype, F32))


def old_apply(of, h, alpha, aim):
    return (old_wide(h, of.left) - alpha * old_project(of, old_centred(old_wide(h, of.left), aim))).to(h.dtype)


def old_map(of, h):
    wide = h.to(torch.promote_types(h.dtype, F32))
    if of.left.dtype == F64:
        wide = wide.double()
    about = wide if of.centre is None else old_centred(wide, of.centre)
    moved = (about @ of.left.to(wide)) @ of.write.to(wide).T
    if of.scale == 1:
        return (wide + moved).to(h.dtype)
    moved = moved + of.scale * about
    return (moved if of.centre is None else moved + of.centre.to(wide)).to(h.dtype)


def old_delta(of, h):
    if F64 in (of.write.dtype, of.left.dtype) and h.dtype != F64:
        return old_delta(of, h.double()).to(h.dtype)
    return -(old_centred(h, of.target) @ of.left.to(h)) @ of.write.to(h).T


def same_bits(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    assert torch.equal(found.contiguous().view(whole), expected.contiguous().view(whole))


@functools.cache
def made(projection, own, far):
    """A subspace of tensors of dtype ``own`` whose means are ``far`` from 0 and kept in float64 where they are."""
    benign, malicious, _ = planted(60, 40, 12)
    fitted = SafetySubspace.fit(
        benign, malicious, rank=3, projection=projection, site=Site.parse("blocks.1.hook_mlp_out")
    )
    parts = {name: getattr(fitted, name).to(own) for name in ("basis", "read", "write", "left")}
    mean = benign.mean(dim=0) + far
    return dataclasses.replace(fitted, **parts, mean_benign=mean if far else mean.to(own))


CASES = {
    "projection": st.sampled_from(["oblique", "orthogonal"]),
    "own": st.sampled_from([F32, F64]),
    "far": st.sampled_from([0.0, 1e6]),
    "dtype": st.sampled_from(FLOATS),
    "alpha": st.floats(0.01, 1.0),
    "beta": st.floats(0.0, 1.0),
    "shape": st.sampled_from([(), (0,), (5,), (2, 3), (2, 0, 3)]),
    "seed": st.integers(0, 99),
}


def rows(shape, dtype, far, seed):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, 12, generator=generator, dtype=F64) + min(far, 1e3)).to(dtype)


@given(**CASES)
@settings(max_examples=60, deadline=None)
def test_a_subspace_edits_as_it_did(projection, own, far, dtype, alpha, beta, shape, seed):
    subspace, h = made(projection, own, far), rows(shape, dtype, far, seed)
    before = h.clone()
    same_bits(subspace.apply(h, alpha=alpha, beta=beta), old_apply(subspace, h, alpha, beta * subspace.mean_benign))
    target = rows((), F64, far, seed + 1)
    same_bits(subspace.apply(h, alpha=alpha, target=target), old_apply(subspace, h, alpha, target))
    same_bits(subspace.project(h), old_project(subspace, h))
    wide = old_wide(h, subspace.left)
    coordinates = old_centred(wide, subspace.mean_benign) @ subspace.read.to(wide)
    same_bits(subspace.coordinates(h), coordinates.to(torch.promote_types(dtype, F32)))
    same_bits(h, before)


@given(scale=st.sampled_from([0.0, 1.0, -0.7]), centred=st.booleans(), **CASES)
@settings(max_examples=60, deadline=None)
def test_a_linear_map_maps_as_it_did(scale, centred, projection, own, far, dtype, alpha, beta, shape, seed):
    subspace, h = made(projection, own, far), rows(shape, dtype, far, seed)
    centre = beta * subspace.mean_benign if centred else None
    same_bits(subspace.correction(alpha=alpha, beta=beta)(h), old_map(subspace.correction(alpha=alpha, beta=beta), h))
    one = LinearMap(scale=scale, write=-alpha * subspace.write, left=subspace.left, centre=centre)
    same_bits(one(h), old_map(one, h))


@given(mixed=st.booleans(), **CASES)
@settings(max_examples=60, deadline=None)
def test_a_writer_writes_as_it_did(mixed, projection, own, far, dtype, alpha, beta, shape, seed):
    subspace, h = made(projection, own, far), rows(shape, dtype, far, seed)
    writer = Writer.from_subspace(subspace, alpha=alpha, beta=beta)
    if mixed:
        writer = dataclasses.replace(writer, write=writer.write.double())
    same_bits(writer.delta(h), old_delta(writer, h))
    same_bits(writer.delta(h), old_delta(writer, h))  # of what is kept for the device and dtype now


def test_gradients_and_inference_mode_pass_through_what_is_kept():
    writer = Writer.from_subspace(made("oblique", F32, 0.0))
    with torch.inference_mode():
        writer.delta(rows((3,), F32, 0.0, 0))
    h = rows((3,), F32, 0.0, 0).requires_grad_()
    writer.delta(h).square().sum().backward()
    assert h.grad is not None and bool(h.grad.any())


@pytest.mark.parametrize("h", FLOATS)
@pytest.mark.parametrize("own", [F32, F64])
def test_the_dtype_in_which_an_edit_is_computed(h, own):
    expected = F64 if own == F64 or h == F64 else F32
    assert working_dtype(h, torch.zeros(1, dtype=own)) == expected
    assert working_dtype(h, torch.zeros(1, dtype=own), least=h) == (F64 if own == F64 else h)


def test_tensors_that_lie_elsewhere_are_moved_to_the_activations():
    """On the meta device nothing is computed: shapes, dtypes and devices alone are followed."""
    h = torch.empty(2, 5, 12, dtype=F32, device="meta")
    found = along(h, write=torch.ones(12, 3), left=torch.ones(12, 3, dtype=F64), centre=(h[0, 0], None))
    assert (found.device.type, found.dtype, found.shape) == ("meta", F32, h.shape)
