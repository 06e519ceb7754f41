"""Mediation on both towers: identities that must hold, refusals, and what a sweep leaves behind."""

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

from care_lens.core import Example, PairedExamples
from care_lens.core.outcome import ResponseLogProb
from care_lens.mediation import MediationResult, default_sites, mediate

EXACT = {"abs": 1e-5, "rel": 1e-5}


@pytest.fixture(scope="module")
def swept(model, pairs, margin):
    return mediate(model, pairs, outcome=margin, n_boot=20, progress=False)


def test_everything_at_the_first_residual_is_the_total_effect(swept, read):
    te = read(swept, "blocks.0.hook_resid_pre", "all", "TE")
    assert read(swept, "blocks.0.hook_resid_pre", "all", "NIE") == pytest.approx(te, **EXACT)
    assert read(swept, "blocks.0.hook_resid_pre", "all", "NDE") == pytest.approx(0, **EXACT)
    assert abs(te) > 0.01


def test_the_picture_is_the_total_effect_where_texts_are_equal(model, same_text, margin, read):
    sites = ["vision.hook_embed", "projector.hook_in", "projector.hook_out", "blocks.0.hook_resid_pre"]
    result = mediate(model, same_text, outcome=margin, sites=sites, positions=("image",), n_boot=20, progress=False)
    te = read(result, sites[0], "all", "TE")
    assert abs(te) > 0.01
    for site in sites:
        position = "image" if site.startswith("blocks") else "all"
        assert read(result, site, position, "NIE") == pytest.approx(te, **EXACT)
        assert read(result, site, position, "TIE") == pytest.approx(te, **EXACT)
        assert read(result, site, position, "proportion") == pytest.approx(1, **EXACT)


def test_the_vision_tower_against_exchanged_pictures(model, pictured, margin, swept):
    """Exchanging all that leaves the tower is giving the other twin's picture."""
    details = swept.details
    rows = details[(details.tower == "projector") & (details.pair < 2)]
    last = details[(details.tower == "vision") & (details.component == "hook_resid_pre") & (details.layer == 0)]
    assert rows.pair.tolist() == last.pair.tolist() == [0, 1]
    for i, (safe, unsafe) in enumerate(pictured):
        swapped = model.prepare([replace(safe, image=unsafe.image), replace(unsafe, image=safe.image)])
        with torch.no_grad():
            expected = margin(model(swapped), swapped).tolist()
        for found in (rows.iloc[i], last.iloc[i]):
            assert [found.safe_patched, found.unsafe_patched] == pytest.approx(expected, **EXACT)


def test_a_middle_vision_layer_against_plain_hooks(model, llava_maker, pictured, margin, swept):
    plain, _ = llava_maker("clip")
    mlp = plain.model.vision_tower.encoder.layers[1].mlp
    for i, (safe, unsafe) in enumerate(pictured):
        a, b = model.prepare(safe), model.prepare(unsafe)
        kept = []
        with torch.no_grad():
            handle = mlp.register_forward_hook(lambda *args, kept=kept: kept.append(args[2]))
            plain(**b.model_kwargs())
            handle.remove()
            handle = mlp.register_forward_hook(lambda *args, kept=kept: kept[0])
            expected = float(margin(plain(**a.model_kwargs()).logits, a))
            handle.remove()
        details = swept.details
        row = details[(details.tower == "vision") & (details.layer == 1) & (details.component == "hook_mlp_out")]
        assert row.iloc[i].safe_patched == pytest.approx(expected, **EXACT)
        assert abs(row.iloc[i].safe_patched - row.iloc[i].safe) > 1e-4


def test_pairs_without_pictures_are_left_out_where_there_is_nothing_to_exchange(swept):
    frame = swept.frame
    about_images = (frame.tower != "language") | (frame.position == "image")
    assert set(frame[about_images].n) == {2}
    assert set(frame[~about_images].n) == {3}
    assert not frame[frame.effect == "NIE"]["value"].isna().any()
    assert len(swept.details) == 3 * (3 * 3 * 3) + 2 * (3 * 3 + 3 * 3 + 1)


def test_frame_is_tidy_and_complete(model, swept):
    assert tuple(swept.frame.columns) == (
        *("tower", "layer", "component", "position", "metric", "effect"),
        *("value", "ci_low", "ci_high", "n", "seed"),
    )
    language = len([site for site in default_sites(model) if site.tower == "language"])
    assert len(swept.frame) == 6 * (4 * language + len(default_sites(model)) - language)
    assert set(swept.frame.metric) == {"UnsafeMargin"}
    assert swept.settings["n"] == swept.settings["groups"] == 3
    json.dumps(swept.settings)


@pytest.mark.parametrize("batch_size", [2, 3, 7])
def test_batches_change_nothing(model, pairs, margin, batch_size, swept):
    sites = [site for site in default_sites(model) if site.layer in (1, None)]
    few = mediate(model, pairs, outcome=margin, sites=sites, batch_size=batch_size, n_boot=20, progress=False)
    key = ["tower", "layer", "component", "position", "effect"]
    both = few.frame.merge(swept.frame, on=key)
    assert len(both) == len(few.frame)
    pd.testing.assert_series_equal(both.value_x, both.value_y, check_names=False, atol=1e-5, rtol=1e-4)


def test_twins_that_are_the_same_have_no_effects_and_are_not_run(model, pictured, margin):
    same = PairedExamples(pictured.safe, pictured.safe)
    calls = []
    handle = model.hf_model.register_forward_hook(lambda *_: calls.append(1))
    result = mediate(model, same, outcome=margin, sites=["blocks.1.hook_mlp_out"], n_boot=10, progress=False)
    handle.remove()
    assert len(calls) == 2  # untouched outcomes, cache
    effects = result.frame[result.frame.effect != "proportion"]
    assert (effects["value"] == 0).all()


def test_heads_and_neurons_are_sites_too(model, pictured, margin, read):
    sites = [
        "blocks.1.attn.hook_z",
        "blocks.1.hook_attn_out",
        "blocks.1.mlp.hook_post",
        "blocks.1.hook_mlp_out",
    ]
    result = mediate(model, pictured, outcome=margin, sites=sites, positions=("text",), n_boot=10, progress=False)
    for inner, outer in (sites[:2], sites[2:]):
        assert read(result, inner, "text", "NIE") == pytest.approx(read(result, outer, "text", "NIE"), **EXACT)


def test_outcomes_over_responses(model, same_text, read):
    answered = [replace(example, response="sure red") for example in same_text.safe]
    unsafe = [replace(example, response="sure red") for example in same_text.unsafe]
    result = mediate(
        model,
        PairedExamples(tuple(answered), tuple(unsafe)),
        outcome=ResponseLogProb(),
        sites=["blocks.0.hook_resid_pre"],
        positions=("image", "last"),
        n_boot=10,
        progress=False,
    )
    inputs = [model.prepare(examples, responses=True) for examples in (answered, unsafe)]
    with torch.no_grad():
        safe, harmful = (ResponseLogProb()(model(batch), batch) for batch in inputs)
    te = read(result, "blocks.0.hook_resid_pre", "image", "TE")
    assert te == pytest.approx(float((harmful - safe).mean()), **EXACT)
    assert read(result, "blocks.0.hook_resid_pre", "image", "NIE") == pytest.approx(te, **EXACT)


def test_misaligned_twins_exchange_what_both_have(model, picture, margin, read):
    safe = Example("what is red", image=picture(0))
    longer = Example("how to make a red picture", image=picture(1))
    odd = PairedExamples((safe, safe), (longer, safe))
    with pytest.raises(ValueError, match=r"positions \['text', 'all'\], got twins that differ in pairs \[0\]"):
        mediate(model, odd, outcome=margin, progress=False)
    pair = odd[:1]
    sites = ["blocks.0.hook_resid_pre", "blocks.2.hook_resid_post"]
    result = mediate(model, pair, outcome=margin, sites=sites, positions=("image", "last"), n_boot=10, progress=False)
    a = model.prepare(replace(safe, image=picture(1)))
    with torch.no_grad():
        expected = float(margin(model(a), a))
    rows = result.details.set_index(["layer", "position"])
    assert rows.loc[(0, "image"), "safe_patched"] == pytest.approx(expected, **EXACT)
    assert read(result, sites[1], "last", "NIE") == pytest.approx(read(result, sites[1], "last", "TE"), **EXACT)


def test_text_alone_has_language_cells_only(model, pairs, margin, caplog):
    result = mediate(model, pairs[2:], outcome=margin, n_boot=10, progress=False)
    assert set(result.frame.tower) == {"language"}
    assert set(result.frame.position) == {"text", "last", "all"}
    assert "left out" in caplog.text
    with pytest.raises(ValueError, match="must have images"):
        mediate(model, pairs[2:], outcome=margin, sites=["projector.hook_out"], progress=False)


def test_an_outcome_of_ones_own(model, pictured, read):
    def first_logit(logits, inputs):
        assert logits.shape[1] == inputs.input_ids.shape[1]
        return logits[:, -1, 5]

    result = mediate(
        model, pictured, outcome=first_logit, sites=["blocks.2.hook_resid_post"], n_boot=10, progress=False
    )
    te = read(result, "blocks.2.hook_resid_post", "last", "TE")
    assert read(result, "blocks.2.hook_resid_post", "last", "NIE") == pytest.approx(te, **EXACT)
    assert set(result.frame.metric) == {"first_logit"}


def test_hooks_are_gone_after_an_exception(model, pictured):
    calls = []

    def failing(logits, inputs):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("enough")
        return logits[:, -1, 5]

    with pytest.raises(RuntimeError, match="enough"):
        mediate(model, pictured, outcome=failing, progress=False)
    assert not any(point.fwd_hooks for point in model.bridge.hook_dict.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": ["vision.blocks.0.attn.hook_pattern"]}, "must be editable"),
        ({"sites": ["blocks.0.attn.hook_pattern"]}, "must be editable"),
        ({"sites": ["blocks.9.hook_mlp_out"]}, "no site"),
        ({"sites": []}, "at least one"),
        ({"positions": ("middle",)}, "span must be"),
        ({"batch_size": 1}, "batch_size"),
        ({"outcome": lambda logits, inputs: logits[:, -1, 5] * float("nan")}, "finite"),
        ({"outcome": lambda logits, inputs: logits[:1, -1, 5]}, "one finite number a row"),
    ],
)
def test_refusals(model, pictured, margin, options, message):
    with pytest.raises(ValueError, match=message):
        mediate(model, pictured, progress=False, **{"outcome": margin, **options})
    with pytest.raises(ValueError, match="at least one pair"):
        mediate(model, pictured[:0], outcome=margin, progress=False)


def test_a_stopped_sweep_goes_on(model, pairs, margin, tmp_path):
    options = {
        "sites": ["blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out", "projector.hook_out"],
        "n_boot": 20,
    }
    whole = mediate(model, pairs, outcome=margin, progress=False, checkpoint=tmp_path / "whole.jsonl", **options)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    stopped = tmp_path / "stopped.jsonl"
    stopped.write_text("".join(lines[:4]) + lines[4][:20])
    resumed = mediate(model, pairs, outcome=margin, progress=False, checkpoint=stopped, **options)
    pd.testing.assert_frame_equal(resumed.frame, whole.frame, check_exact=True)
    pd.testing.assert_frame_equal(resumed.details, whole.details, check_exact=True)
    assert sorted(stopped.read_text().splitlines()) == sorted(line.strip() for line in lines)
    calls = []
    handle = model.hf_model.register_forward_hook(lambda *_: calls.append(1))
    mediate(model, pairs, outcome=margin, progress=False, checkpoint=stopped, **options)
    handle.remove()
    assert len(calls) == 2  # the probe of the pairs with pictures and of those without


def test_another_sweeps_checkpoint_is_refused(model, pictured, margin, llava_maker, tmp_path):
    from care_lens.lvlm import HookedLVLM

    path = tmp_path / "sweep.jsonl"
    options = {
        "outcome": margin,
        "sites": ["blocks.0.hook_mlp_out"],
        "n_boot": 10,
        "progress": False,
        "checkpoint": path,
    }
    mediate(model, pictured, **options)
    with pytest.raises(ValueError, match="differs in \\['batch_size'\\]"):
        mediate(model, pictured, **{**options, "batch_size": 4})
    with pytest.raises(ValueError, match="examples"):
        mediate(model, pictured[:1], **options)
    with pytest.raises(ValueError, match="same model"):
        mediate(HookedLVLM.from_hf(*llava_maker("clip", seed=1)), pictured, **options)


def test_save_and_load(swept, tmp_path):
    swept.save(tmp_path, "effects")
    back = MediationResult.load(tmp_path, "effects")
    pd.testing.assert_frame_equal(back.frame, swept.frame)
    pd.testing.assert_frame_equal(back.details, swept.details, check_exact=True)
    assert back.settings == json.loads(json.dumps(swept.settings))


def test_exchanges_that_come_to_the_same_are_run_once(model, same_text, margin):
    """At the first residual only image positions differ: "all" is "image", and "text" and "last" are nothing."""
    rows = []
    handle = model.hf_model.register_forward_hook(lambda *args: rows.append(len(args[2].logits)))
    result = mediate(model, same_text, outcome=margin, sites=["blocks.0.hook_resid_pre"], n_boot=10, progress=False)
    handle.remove()
    assert rows == [6, 6, 6]  # untouched outcomes, cache, one exchange of each twin
    found = result.details.set_index(["position", "pair"])["safe_patched"]
    assert found["all"].tolist() == found["image"].tolist() != found["text"].tolist()
