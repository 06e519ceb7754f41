"""The lens against a projection by hand: plain torch hooks on plain Hugging Face models, and the formulas of norm and unembedding."""

import importlib
import pkgutil

import pytest
import torch
import zoo

from care_lens.core import Example
from care_lens.lens import LensResult, logit_lens, states, stream_sites
from care_lens.lvlm import HookedLVLM

SPECIMENS = {
    specimen.name: specimen
    for module in pkgutil.iter_modules(zoo.__path__)
    for specimen in getattr(importlib.import_module(f"zoo.{module.name}"), "SPECIMENS", [])
}


def first(value):
    return value[0] if isinstance(value, tuple) else value


def streams_by_hand(plain, specimen, kwargs, *, skip_after=None):
    """What enters each language layer and leaves the last; with the blocks of the vision tower after one of them skipped."""
    blocks = list(plain.get_submodule(specimen.language_layers))
    held, seen, handles = {}, {}, []

    def enters(module, args, given, at):
        held[at] = first(args) if args else given["hidden_states"]

    for at, block in enumerate(blocks):
        handles.append(block.register_forward_pre_hook(lambda m, a, k, at=at: enters(m, a, k, at), with_kwargs=True))
    handles.append(blocks[-1].register_forward_hook(lambda m, a, out: held.update({len(blocks): first(out)})))
    if skip_after is not None:
        tower = list(plain.get_submodule(specimen.vision_layers))

        def after(module, args, out, at):
            if at == skip_after:
                seen["kept"] = first(out).clone()
            elif at > skip_after:
                return (seen["kept"], *out[1:]) if isinstance(out, tuple) else seen["kept"]
            return None

        handles += [
            block.register_forward_hook(lambda m, a, out, at=at: after(m, a, out, at), prepend=True)
            for at, block in enumerate(tower)
        ]
    try:
        with torch.no_grad():
            plain(**kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return held


def projected(plain, specimen, stream):
    """softmax(soft cap(W_U norm(h))), written out."""
    norm = plain.get_submodule(f"{specimen.language_layers.rpartition('.')[0]}.norm")
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    weight = 1 + norm.weight if "Gemma" in type(norm).__name__ else norm.weight
    h = stream.double()
    h = h / torch.sqrt(h.square().mean(-1, keepdim=True) + eps) * weight.double()
    logits = h @ plain.get_output_embeddings().weight.double().T
    cap = getattr(plain.config.text_config, "final_logit_softcapping", None)
    return torch.softmax(logits if cap is None else cap * torch.tanh(logits / cap), dim=-1)


@pytest.mark.parametrize("name", SPECIMENS)
def test_every_family(name, picture):
    specimen = SPECIMENS[name]
    plain, _ = specimen.make()
    plain.set_attn_implementation("eager")
    with HookedLVLM.from_hf(*specimen.make()) as lvlm:
        example = Example("what is red", image=picture(0, (48, 32)), id="a")
        inputs = lvlm.prepare(example)
        read = [site for site in stream_sites(lvlm) if site.tower == "language" or site.layer != 1]
        found = logit_lens(lvlm, [example], sites=read, top_k=2, n_boot=2, progress=False)
        image = inputs.spans.image[0]
        expected = {
            f"blocks.{at}.hook_resid_pre": h
            for at, h in streams_by_hand(plain, specimen, inputs.model_kwargs()).items()
        }
        depth = lvlm.n_layers()
        expected[f"blocks.{depth - 1}.hook_resid_post"] = expected.pop(f"blocks.{depth}.hook_resid_pre")
        for at in (0, 2):
            by_hand = streams_by_hand(plain, specimen, inputs.model_kwargs(), skip_after=at)
            expected[f"vision.blocks.{at}.hook_resid_post"] = by_hand[0]
        assert {str(site) for site in read} == set(expected)
        details = found.details
        places = (
            details.tower.map({"vision": "vision.", "language": ""})
            + "blocks."
            + details.layer.astype(str)
            + "."
            + details.component
        )
        for site, stream in expected.items():
            mine = details[places == site]
            by_hand = projected(plain, specimen, stream[0]).float()
            at = torch.tensor(mine.token_index.to_numpy())
            assert set(at.tolist()) == (
                {*image.nonzero()[:, 0].tolist()} if site.startswith("vision") else {*range(len(image))}
            )
            read = by_hand[at, torch.tensor(mine.word_id.to_numpy())]
            torch.testing.assert_close(torch.tensor(mine.value.to_numpy()).float(), read, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(
                read, by_hand[at].sort(descending=True).values[range(len(at)), mine["rank"].to_numpy() - 1]
            )
        grids = inputs.spans.grids[0]
        patches = mine[mine.grid >= 0].drop_duplicates("token_index")
        assert len(patches) == sum(grid.rows * grid.cols for grid in grids)
        for row in patches.to_dict("records"):
            assert grids[row["grid"]].rectangle(row["token_index"]) == (row["x0"], row["y0"], row["x1"], row["y1"])
        # A stopped pass leaves nothing behind.
        torch.testing.assert_close(lvlm(inputs), plain(**inputs.model_kwargs()).logits.detach())


def test_measures_are_their_definitions(model, picture, tmp_path):
    rows = [
        Example("what is red", image=picture(0), group="red", id="a"),
        Example("how is blue", image=picture(1), group="blue"),
    ]
    found = logit_lens(
        model, rows, targets=["red", "blue"], positions=("image", "text"), top_k=4, n_boot=20, progress=False
    )
    site = "blocks.1.hook_resid_pre"
    ids = [model.tokenizer.convert_tokens_to_ids(word) for word in ("red", "blue")]
    own, chance, entropy, kl = [], [], [], []
    for at, row in enumerate(rows):
        inputs = model.prepare(row)
        with torch.no_grad():
            logits, cache = model.run_with_cache(inputs, sites=[site])
            lens = torch.log_softmax(model.bridge.unembed(model.bridge.ln_final(cache[site]))[0], -1)[
                inputs.spans.image[0]
            ]
            output = torch.log_softmax(logits[0], -1)[inputs.spans.image[0]]
        own.append(float(lens[:, ids[at]].max()))
        chance.append(float(lens[:, ids[1 - at]].max()))
        entropy.append(float(-(lens.exp() * lens).sum(-1).mean()))
        kl.append(float((output.exp() * (output - lens)).sum(-1).mean()))
    frame = found.frame[(found.frame.layer == 1) & (found.frame.tower == "language") & (found.frame.span == "image")]
    frame = frame[frame.component == "hook_resid_pre"].set_index("metric")
    assert frame.loc["target log probability", "value"] == pytest.approx(sum(own) / 2, rel=1e-4)
    assert frame.loc["target log probability", "chance"] == pytest.approx(sum(chance) / 2, rel=1e-4)
    assert frame.loc["entropy", "value"] == pytest.approx(sum(entropy) / 2, rel=1e-4)
    assert frame.loc["kl to output", "value"] == pytest.approx(sum(kl) / 2, rel=1e-4)
    last = found.frame[(found.frame.component == "hook_resid_post") & (found.frame.tower == "language")].set_index(
        "metric"
    )
    assert last.loc["agreement", "value"].eq(1).all() and last.loc["kl to output", "value"].abs().max() < 1e-6
    found.save(tmp_path, "lens")
    back = LensResult.load(tmp_path, "lens")
    assert (
        back.frame.equals(found.frame) and back.details.equals(found.details) and back.pictures.equals(found.pictures)
    )
    assert {"image, chance", "image", "text"} <= {trace.name for trace in back.plot().data}


def test_states_of_the_last_vision_block_are_what_the_language_model_is_given(model, picture):
    inputs = model.prepare([Example("what is red", image=picture(0)), Example("how is blue")])
    last = model.sites(tower="vision", component="hook_resid_post")[-1]
    start = model.sites(tower="language", component="hook_resid_pre")[0]
    found = dict(states(model, inputs, [last, start]))
    image = inputs.spans.image
    torch.testing.assert_close(found[last][image], found[start][image])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": ["blocks.0.hook_mlp_out"]}, "must be residual streams"),
        ({"sites": []}, "at least one site"),
        ({"positions": "image"}, "positions must be some of"),
        ({"positions": ("nowhere",)}, "nowhere"),
        ({"targets": ["red", "blue"]}, "one an example, 1"),
        ({"targets": ["red blue sure"]}, "single tokens"),
        ({"targets": [10**6]}, "single tokens"),
        ({"top_k": 10**6}, "size of the vocabulary"),
        ({"top_k": 0}, "top_k must be 1"),
    ],
)
def test_refusals(model, picture, options, message):
    with pytest.raises(ValueError, match=message):
        logit_lens(model, [Example("what is red", image=picture(0))], progress=False, **options)
