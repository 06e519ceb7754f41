"""Path effects: by hand on a linear model, against TransformerLens and against plain hooks."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from transformer_lens.patching import get_act_patch_direct_path
from zoo.straight import straight

from care_lens.core import LogitDifference, PairedExamples, Site
from care_lens.lvlm import HookedLVLM
from care_lens.mediation import Mediator, mediate
from care_lens.mediation.paths import PathResult, head_paths, path_effects

QUICK = {"n_boot": 20, "progress": False}


def value(result, path, position="all"):
    frame = result.frame
    (found,) = frame[(frame.mediator == path) & (frame.position == position)]["value"].tolist()
    return found


@pytest.fixture(scope="module")
def linear(llava_maker):
    plain, _ = llava_maker("clip", num_key_value_heads=4, num_hidden_layers=2)
    layers = plain.model.language_model.layers
    mixers = [(layer.self_attn.o_proj.weight @ layer.self_attn.v_proj.weight).detach().double() for layer in layers]
    mlps = [(layer.mlp.down_proj.weight @ layer.mlp.up_proj.weight).detach().double() for layer in layers]
    return straight(llava_maker, mlps=True), mixers, mlps, plain.lm_head.weight.detach().double()


def test_by_hand_on_a_linear_network_of_two_layers(linear, pictured):
    lvlm, (a0, a1), (m0, m1), read_out = linear
    toward, away = lvlm.tokenizer.convert_tokens_to_ids(["sure", "sorry"])
    direction = read_out[toward] - read_out[away]
    sender = "blocks.0.hook_attn_out"
    for pair in (pictured[:1], pictured[1:]):
        found = path_effects(lvlm, pair, outcome=LogitDifference((toward,), (away,)), senders=[sender], **QUICK)
        inputs = lvlm.prepare([*pair.safe, *pair.unsafe])
        with torch.no_grad():
            _, cache = lvlm.run_with_cache(inputs, sites=["blocks.0.hook_resid_pre"])
        safe, unsafe = cache["blocks.0.hook_resid_pre"].double()

        def upto(h):
            return h.cumsum(dim=0) / torch.arange(1, len(h) + 1, dtype=h.dtype)[:, None]

        delta = upto(unsafe - safe) @ a0.T

        def mlp1(h):
            return h + h @ m1.T

        def layer1(h):
            return mlp1(h + upto(h) @ a1.T)

        want = {
            "blocks.0.hook_mlp_out": layer1(delta @ m0.T),
            "blocks.1.hook_attn_out": mlp1(upto(delta) @ a1.T),
            "blocks.1.hook_mlp_out": delta @ m1.T,
            "end": delta,
        }
        assert found.frame.receiver.tolist() == list(want)
        for receiver, change in want.items():
            expected = float(direction @ change[-1])
            assert value(found, f"{sender} -> {receiver}") == pytest.approx(expected, abs=2e-4, rel=2e-4), receiver
            assert abs(expected) > 1e-2
        whole = mediate(
            lvlm, pair, outcome=LogitDifference((toward,), (away,)), sites=[sender], positions=("all",), **QUICK
        )
        nie = whole.frame[whole.frame.effect == "NIE"]["value"].item()
        assert found.frame["value"].sum() == pytest.approx(nie, abs=1e-3, rel=1e-3)


def test_a_path_to_the_queries_is_transformer_lens_s(model, pictured, margin):
    found = head_paths(model, pictured, outcome=margin, layer=0, head=1, **QUICK)
    for i in range(2):
        pair = pictured[i : i + 1]
        safe, unsafe = model.prepare(pair.safe), model.prepare(pair.unsafe)
        with torch.no_grad():
            _, clean = model.bind(unsafe).run_with_cache(unsafe.input_ids)
            _, corrupted = model.bind(safe).run_with_cache(safe.input_ids)
            theirs = get_act_patch_direct_path(
                model.bind(safe),
                safe.input_ids,
                clean,
                corrupted,
                lambda logits, safe=safe: margin(logits, safe)[0],
                0,
                1,
                verbose=False,
            )
        ours = found.details[found.details.pair == i]["safe_patched"]
        assert ours.tolist() == pytest.approx(theirs[1:].flatten().tolist(), abs=1e-5)
        assert np.ptp(ours) > 1e-4


def test_our_hooks_give_what_transformer_lens_gives(llava_maker, pictured, margin):
    """With one head and no queries and keys, what attention reads is what its values read; MLPs and norms are as they were."""
    plain, processor = llava_maker("clip", num_attention_heads=1, num_key_value_heads=1)
    with torch.no_grad():
        for layer in plain.model.language_model.layers:
            layer.self_attn.q_proj.weight.zero_()
    one = HookedLVLM.from_hf(plain, processor)
    theirs = head_paths(one, pictured, outcome=margin, layer=0, head=0, component="v", **QUICK)
    head = Mediator((Site("language", 0, "attn.hook_z"),), (0,))
    ours = path_effects(one, pictured, outcome=margin, senders=[head, "blocks.0.hook_attn_out"], **QUICK)
    for layer in (1, 2):
        want = theirs.details[theirs.details.mediator == f"{head.name} -> blocks.{layer}.attn.v[0]"]["safe_patched"]
        for sender in (head.name, "blocks.0.hook_attn_out"):
            found = ours.details[ours.details.mediator == f"{sender} -> blocks.{layer}.hook_attn_out"]["safe_patched"]
            assert found.tolist() == pytest.approx(want.tolist(), abs=1e-5)
        assert (want.to_numpy() - theirs.details["safe"].unique()).__abs__().max() > 1e-4


def test_the_vision_tower_against_plain_hooks(model, llava_maker, pictured, margin):
    """An MLP of a later layer reads what attention writes in the first, by hooks on the plain model."""
    plain, _ = llava_maker("clip")
    layers = plain.model.vision_tower.encoder.layers
    pair = pictured[:1]
    inputs = [model.prepare(side) for side in (pair.safe, pair.unsafe)]
    writers = [part for layer in layers for part in (layer.self_attn, layer.mlp)]

    def run(which, edits):
        """Outcome and all that was written, with some of it replaced."""
        kept, handles = {}, []
        for i, module in enumerate(writers):

            def hook(module, args, output, i=i):
                kept[i] = output[0] if isinstance(output, tuple) else output
                if i in edits:
                    return (edits[i], *output[1:]) if isinstance(output, tuple) else edits[i]
                return None

            handles.append(module.register_forward_hook(hook))
        with torch.no_grad():
            logits = plain(**inputs[which].model_kwargs()).logits
        for handle in handles:
            handle.remove()
        return float(margin(logits, inputs[which])[0]), kept

    before, safe = run(0, {})
    _, unsafe = run(1, {})
    end, reads = run(0, {**{i: safe[i] for i in range(1, len(writers))}, 0: unsafe[0]})
    found = path_effects(model, pair, outcome=margin, senders=["vision.blocks.0.hook_attn_out"], **QUICK)
    assert value(found, "vision.blocks.0.hook_attn_out -> end") == pytest.approx(end - before, abs=1e-5)
    for i, receiver in ((1, "blocks.0.hook_mlp_out"), (2, "blocks.1.hook_attn_out"), (5, "blocks.2.hook_mlp_out")):
        after, _ = run(0, {i: reads[i]})
        assert value(found, f"vision.blocks.0.hook_attn_out -> vision.{receiver}") == pytest.approx(
            after - before, abs=1e-5
        )
    assert abs(end - before) > 1e-4
    assert len(found.frame) == 6


def test_pairs_and_positions(model, pairs, margin):
    senders = ["blocks.1.hook_mlp_out", "vision.blocks.2.hook_attn_out"]
    found = path_effects(
        model, pairs, outcome=margin, senders=senders, positions=("image", "last"), batch_size=2, **QUICK
    )
    counts = found.frame.groupby(["sender", "position"])["n"].unique().map(list)
    assert counts.to_dict() == {
        ("blocks.1.hook_mlp_out", "image"): [2],
        ("blocks.1.hook_mlp_out", "last"): [3],
        ("vision.blocks.2.hook_attn_out", "all"): [2],
    }
    # What is written at image positions is not at the last one, which alone is read at the end.
    assert value(found, "blocks.1.hook_mlp_out -> end", "image") == pytest.approx(0, abs=1e-6)
    assert abs(value(found, "blocks.1.hook_mlp_out -> end", "last")) > 1e-3


def test_refusals(model, pictured, pairs, margin):
    options = {"outcome": margin, **QUICK}
    for senders, receivers, said in (
        (["blocks.0.hook_resid_pre"], None, "one site of"),
        (["blocks.0.hook_attn_out"], ["blocks.1.attn.hook_z"], "named by their output"),
        (["blocks.1.hook_attn_out"], ["blocks.0.hook_mlp_out"], "come after"),
        (["blocks.1.hook_attn_out"], ["vision.blocks.2.hook_mlp_out"], "come after"),
    ):
        with pytest.raises(ValueError, match=said):
            path_effects(model, pictured, senders=senders, receivers=receivers, **options)
    with pytest.raises(ValueError, match="images"):
        path_effects(model, pairs[2:], senders=["vision.blocks.0.hook_attn_out"], **options)
    with pytest.raises(ValueError, match="head in"):
        head_paths(model, pictured, layer=0, head=4, **options)
    with pytest.raises(ValueError, match="layer must"):
        head_paths(model, pictured, layer=2, head=0, **options)


def test_hooks_are_gone_after_an_exception(model, pictured):
    inputs = model.prepare(list(pictured.safe))
    calls = []

    def fails(logits, inputs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("inside")
        return logits[:, -1, 0]

    with torch.no_grad():
        before = model(inputs)
    with pytest.raises(RuntimeError, match="inside"):
        path_effects(model, pictured, outcome=fails, senders=["blocks.0.hook_attn_out"], **QUICK)
    with torch.no_grad():
        assert torch.equal(model(inputs), before)


def test_save_and_load_and_draw(model, pictured, margin, tmp_path):
    found = path_effects(model, PairedExamples(pictured.safe, pictured.unsafe), outcome=margin,
                         senders=["blocks.0.hook_attn_out"], **QUICK)  # fmt: skip
    found.save(tmp_path, "paths")
    back = PathResult.load(tmp_path, "paths")
    pd.testing.assert_frame_equal(back.frame, found.frame)
    pd.testing.assert_frame_equal(back.details, found.details, check_exact=True)
    assert back.settings == json.loads(json.dumps(found.settings))
    assert found.plot().data[0].z.shape == (1, 6)
