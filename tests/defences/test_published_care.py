import dataclasses
import functools

import care_oracle as oracle
import numpy as np
import pytest
import torch
from world_model import make_world_model

from care_lens import organism
from care_lens.core import Defence, Example
from care_lens.defences import CAREFaults, FitError, PublishedCARE
from care_lens.defences.care_fit import care_columns, image_row, text_row, text_span

REFUSALS = ("sorry i cannot help with that", "sorry i cannot help", "i cannot help with that")

#: width, benign and malicious pictures, textual requests, k, layers, strengths, variant. At 24, 32 and 48 there are fewer rows than dimensions.
SHAPES = [
    (24, 7, 6, 7, 4, [1], (4.0, 4.0), "cross_hsic"),
    (32, 6, 8, 6, 4, [0, 2], (4.5, 1.0), "variance"),
    (8, 14, 12, 12, 3, [1, 2], (0.5, 4.5), "cross_hsic"),
    (16, 14, 12, 14, 6, [2], (2.0, 3.0), "variance"),
    (48, 8, 10, 10, 6, [0, 1, 2], (4.0, 4.0), "cross_hsic"),
]


@functools.cache
def model_of(width, dtype):
    return make_world_model(seed=width, dtype=dtype, width=width, layers=3, mlp=32)


def fitted(shape, dtype=torch.float32, batch_size=16, **options):
    width, n_b, n_m, n_t, k, layers, (alpha_v, alpha_t), variant = shape
    lvlm = model_of(width, dtype)
    data = {
        "benign": organism.examples("benign typographic", "fit", n=n_b) + organism.examples("benign plain", "fit", n=3),
        "malicious": organism.examples("typographic", "fit", n=n_m) + organism.examples("wrapper", "fit", n=2),
        "requests": organism.examples("typographic+wrapper", "validation", n=n_t // 2)
        + organism.examples("wrapper", "fit", n=n_t - n_t // 2),
    }
    made = PublishedCARE.fit(
        lvlm, **data, refusals=REFUSALS, layers=layers, rank=k, alpha_visual=alpha_v, alpha_textual=alpha_t, beta=0.9,
        visual_score=variant, batch_size=batch_size, progress=False, **options,
    )  # fmt: skip
    return lvlm, data, made


def samples(lvlm, examples, layers):
    """By layer the image and text tokens of each example by itself, at the block's output; the text after the picture."""
    found = {layer: [] for layer in layers}
    for example in examples:
        inputs = lvlm.prepare(example, responses=True)
        sites = [f"blocks.{layer}.hook_resid_post" for layer in layers]
        with torch.no_grad():
            _, cache = lvlm.run_with_cache(inputs, sites=sites, logits_to_keep=1)
        pictured = np.flatnonzero(inputs.spans.image[0].numpy())
        first = pictured[-1] + 1 if len(pictured) else 0
        for layer, site in zip(layers, sites, strict=True):
            tokens = cache[site][0].numpy()
            found[layer].append((tokens[pictured], tokens[first:]))
    return found


def subspaces(lvlm, data, layers, k, variant):
    """By layer the visual and the textual subspace."""
    answered = [dataclasses.replace(e, response=REFUSALS[i % 3]) for i, e in enumerate(data["requests"])]
    classes = {
        "benign": [e for e in data["benign"] if e.image],
        "malicious": [e for e in data["malicious"] if e.image],
        "refused": answered,
        "complied": data["requests"],
    }
    tokens = {name: samples(lvlm, examples, layers) for name, examples in classes.items()}

    def rows(name, layer):
        seen = [
            oracle.visual_row(*sample, variant) if name in ("benign", "malicious") else oracle.textual_row(sample[1])
            for sample in tokens[name][layer]
        ]
        return np.stack(seen)

    return {
        layer: (
            oracle.subspace(rows("benign", layer), rows("malicious", layer), k),
            oracle.subspace(rows("refused", layer), rows("complied", layer), k),
        )
        for layer in layers
    }


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]} wide, {s[1]} rows")
def test_edits_are_those_of_the_plain_implementation(shape):
    # One row at a time: a float64 model's eager attention gives NaN in padded batches.
    lvlm, data, made = fitted(shape, dtype=torch.float64, batch_size=1)
    *_, k, layers, alphas, variant = shape
    expected_of = subspaces(lvlm, data, layers, k, variant)
    for asked in (data["malicious"][0], data["requests"][-1], data["benign"][0]):
        inputs = lvlm.prepare(asked)
        seen = {layer: [] for layer in layers}
        spies = [
            (f"blocks.{n}.hook_mlp_out", lambda a, hook, n=n, seen=seen: seen[n].append(a.clone())) for n in layers
        ]
        with torch.no_grad():
            lvlm.run_with_hooks(inputs, fwd_hooks=[*spies, *made.fwd_hooks(inputs), *spies])
        for layer in layers:
            before, after = (a[0].numpy() for a in seen[layer])
            expected = np.stack([oracle.edit(h, *expected_of[layer], alphas, 0.9) for h in before])
            assert np.abs(expected).max() > 1e-3
            np.testing.assert_allclose(after - before, expected, atol=1e-5, rtol=1e-5)


def test_a_fit_in_padded_batches_is_a_fit_row_by_row():
    one, many = (fitted(SHAPES[3], batch_size=n)[2] for n in (1, 16))
    h = torch.randn(20, SHAPES[3][0], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(one.edit(h, 2), many.edit(h, 2), rtol=1e-2, atol=1e-2)


def test_each_fault_is_a_switch_of_its_own():
    shape = SHAPES[3]
    published = fitted(shape)[2]
    h = torch.randn(50, shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = shape[5][0]
    edit = published.edit(h, layer)
    for name in CAREFaults.names():
        faults = CAREFaults().without(name)
        assert getattr(faults, name) is False and sum(dataclasses.astuple(faults)) == len(CAREFaults.names()) - 1
        other = fitted(shape, faults=faults)[2]
        same = torch.allclose(other.edit(h, layer), edit, rtol=1e-6, atol=1e-9)
        assert same == (name == "clipped_distances"), name  # no distance of this small model reaches the clip
    assert dataclasses.astuple(CAREFaults.none()) == (False,) * 6
    with pytest.raises(ValueError, match="must be of"):
        CAREFaults().without("nothing")


def test_a_distance_beyond_the_clip_counts_as_the_clip():
    tokens = 1000 * torch.arange(1.0, 9.0, dtype=torch.float64)[:, None] ** 2 * torch.ones(1, 3, dtype=torch.float64)
    clipped, whole = (text_row(tokens, clip=clip) for clip in (True, False))
    torch.testing.assert_close(whole, tokens[-1])  # the farthest one
    torch.testing.assert_close(clipped, tokens[0])  # all are equally far: the first one
    assert torch.equal(image_row(tokens, tokens[:4] * 10, score="variance", clip=True), tokens[0])


def test_the_sound_variant_is_a_projection_and_finds_a_shift_of_the_mean():
    generator = torch.Generator().manual_seed(1)
    benign = torch.randn(40, 12, generator=generator, dtype=torch.float64)
    malicious = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    malicious[:, 3] += 6.0
    columns, values, mean = care_columns(benign, malicious, rank=2, faults=CAREFaults.none())
    torch.testing.assert_close(columns.T @ columns, torch.eye(2, dtype=torch.float64), atol=1e-12, rtol=0)
    assert float(columns[3].square().sum()) > 0.9 and float(values[0]) > 5
    torch.testing.assert_close(mean, benign.mean(0))
    published = care_columns(benign, malicious, rank=2, faults=CAREFaults())[0]
    assert float(published[3].square().sum()) < 0.5  # the shift is not seen
    assert float((published.T @ published - torch.eye(2, dtype=torch.float64)).abs().max()) > 1e-3


def test_a_rank_past_the_rows_is_said():
    generator = torch.Generator().manual_seed(2)
    benign, malicious = (torch.randn(n, 12, generator=generator, dtype=torch.float64) for n in (20, 5))
    with pytest.warns(UserWarning, match="span 4 directions"):
        care_columns(benign, malicious, rank=5, faults=CAREFaults())
    with pytest.raises(FitError, match="span 5 directions"):
        care_columns(benign, malicious, rank=6, faults=CAREFaults.none())
    with pytest.raises(FitError, match="two rows"):
        care_columns(benign[:1], malicious, rank=1, faults=CAREFaults())


def test_restricted_is_a_fit_with_fewer_directions_and_blocks():
    shape = SHAPES[4]
    made = fitted(shape)[2]
    small = made.restricted(layers=[0, 2], rank=3, alpha_visual=1.0)
    assert small.layers == (0, 2) and small.alpha_visual == 1.0 and small.alpha_textual == made.alpha_textual
    again = fitted((*shape[:4], 3, [2], (1.0, 4.0), shape[7]))[2]
    h = torch.randn(20, shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(small.edit(h, 2), again.edit(h, 2))
    with pytest.raises(ValueError, match="fit more directions"):
        made.restricted(rank=99)
    with pytest.raises(ValueError, match="fit those too"):
        made.restricted(layers=[7])


def test_text_begins_after_the_picture(world_model):
    rows = [organism.examples("typographic", "fit", n=1)[0], Example("a b c")]
    inputs = world_model.prepare(rows)
    span = text_span(inputs.spans)
    last = int(inputs.spans.image[0].nonzero()[-1])
    assert not bool(span[0, : last + 1].any()) and torch.equal(span[0, last + 1 :], inputs.spans.text[0, last + 1 :])
    assert torch.equal(span[1], inputs.spans.text[1])


def test_one_modality_alone_has_all_the_weight_and_lacks_are_named(world_model):
    asked = organism.examples("wrapper", "fit", n=6)
    made = PublishedCARE.fit(
        world_model, benign=[], malicious=asked, refusals=REFUSALS, layers=[1], rank=2, progress=False
    )
    assert not made.visual and isinstance(made, Defence)
    h = torch.randn(4, 24)
    u, mean = made.textual[1].columns.float(), made.textual[1].mean.float()
    torch.testing.assert_close(made.edit(h, 1), -4.0 * (h - mean) @ u @ u.T, atol=1e-5, rtol=1e-4)
    with pytest.raises(FitError, match="response to teacher-force"):
        bare = [dataclasses.replace(e, response=None) for e in asked]
        PublishedCARE.fit(world_model, benign=[], malicious=bare, refusals=REFUSALS, layers=[1], rank=2, progress=False)
    with pytest.raises(FitError, match="must not be empty"):
        PublishedCARE.fit(world_model, benign=[], malicious=asked, refusals=REFUSALS, layers=[], rank=2)
