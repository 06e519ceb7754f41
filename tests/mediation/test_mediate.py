"""Mediation on both towers: identities that must hold, refusals, and what a sweep leaves behind."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from care_lens.core import Example, KLDivergence, PairedExamples, PrefixMargin, ResponseLogProb, Site, Verdict
from care_lens.mediation import JudgedCompliance, MediationResult, Mediator, cumulative, default_sites, heads, mediate

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
        # One item: no interval, and without one no proportion.
        assert np.isnan(read(result, site, position, "proportion"))


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
        *("tower", "layer", "component", "head", "neuron", "mediator", "position", "metric", "effect"),
        *("value", "ci_low", "ci_high", "p_value", "n", "seed"),
    )
    tested = swept.frame[swept.frame.effect != "proportion"]
    assert tested.p_value.between(0, 1).all() and swept.frame[swept.frame.effect == "proportion"].p_value.isna().all()
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
    # Copies of the pictures: an example that is its own twin is refused.
    same = PairedExamples(pictured.safe, tuple(replace(one, image=one.image.copy()) for one in pictured.safe))
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
    odd = PairedExamples((safe, safe), (longer, replace(safe, image=picture(2))))
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
        ({"positions": ("middle",)}, "positions must be some of"),
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
    with pytest.raises(ValueError, match="weights"):
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
    options = {"sites": ["blocks.0.hook_resid_pre"], "n_boot": 10, "progress": False}
    result = mediate(model, same_text, outcome=margin, replay=False, **options)
    handle.remove()
    assert rows == [6, 6, 6]  # untouched outcomes, cache, one exchange of each twin
    found = result.details.set_index(["position", "pair"])["safe_patched"]
    assert found["all"].tolist() == found["image"].tolist() != found["text"].tolist()
    block, runs = model.bridge.blocks[2], []
    handle = block.register_forward_pre_hook(lambda module, args: runs.append(len(args[0])))
    mediate(model, same_text, outcome=margin, **options)
    handle.remove()
    # As before; three tries of the block by itself and its whole; keys and values, and the end of the one exchange.
    assert runs == [6, 6, *[6] * 4, 6, 6]


def test_each_position_is_named_by_its_token(model, pairs, margin):
    """Pairs of other lengths have other positions; those after a pair's end leave it out."""
    site = "blocks.0.hook_resid_pre"
    result = mediate(model, pairs, outcome=margin, sites=[site], positions=("each",), n_boot=10, progress=False)
    counts = result.details.groupby("pair").position.agg(lambda found: sorted(map(int, found)))
    for i, (safe, _) in enumerate(pairs):
        assert counts[i] == list(range(model.prepare(safe).input_ids.shape[1]))
    one = mediate(model, pairs[:1], outcome=margin, sites=[site], positions=("3",), n_boot=10, progress=False)
    kept = []
    safe, unsafe = (model.prepare(side) for side in pairs[0])
    with torch.no_grad():
        model.run_with_hooks(unsafe, fwd_hooks=[(site, lambda activation, hook: kept.append(activation.clone()))])

        def swap(activation, hook):
            return torch.cat([activation[:, :3], kept[0][:, 3:4], activation[:, 4:]], dim=1)

        expected = float(margin(model.run_with_hooks(safe, fwd_hooks=[(site, swap)]), safe))
    assert one.details.safe_patched.tolist() == pytest.approx([expected], **EXACT)
    with pytest.raises(ValueError, match="below the longest"):
        mediate(model, pairs, outcome=margin, sites=[site], positions=("99",), progress=False)


def test_heads_together_are_attention_and_alone_are_theirs(model, pictured, margin, read):
    """All heads as a set are the site; one head is an edit of its slice."""
    site = "blocks.1.attn.hook_z"
    every = Mediator((Site.parse(site),), tuple(range(4)))
    found = mediate(
        model, pictured, outcome=margin, sites=[site, every, *heads(model, layers=[1])], n_boot=10, progress=False
    ).details
    columns = ["position", "pair", "safe_patched", "unsafe_patched"]
    parts = {name: part[columns].reset_index(drop=True) for name, part in found.groupby("mediator")}
    pd.testing.assert_frame_equal(parts[site], parts[every.name], atol=1e-6)
    assert set(found["head"].dropna()) == {0, 1, 2, 3}
    inputs = model.prepare([*pictured.safe, *pictured.unsafe])
    with torch.no_grad():
        own = model.run_with_cache(inputs, sites=[site])[1][site]

        def swap(activation, hook):
            out = activation.clone()
            out[:2, -1, 2] = own[2:, -1, 2]
            return out

        expected = margin(model.run_with_hooks(inputs, fwd_hooks=[(site, swap)]), inputs)[:2].tolist()
    row = found[(found["head"] == 2) & (found.position == "last")]
    assert row.safe_patched.tolist() == pytest.approx(expected, **EXACT)


def test_all_layers_together_carry_everything(model, pictured, margin, read):
    """Attention and MLP outputs of all layers, and the first residual, are all there is to the logits."""
    parts = [site for site in default_sites(model) if site.tower == "language" and site.component != "hook_resid_pre"]
    whole = Mediator((Site.parse("blocks.0.hook_resid_pre"), *parts), name="everything")
    steps = cumulative(parts)
    result = mediate(
        model, pictured, outcome=margin, sites=[whole, *steps], positions=("all",), n_boot=10, progress=False
    )
    frame = result.frame.set_index(["mediator", "effect"])["value"]
    assert frame["everything", "NIE"] == pytest.approx(frame["everything", "TE"], **EXACT)
    assert set(result.frame[result.frame.mediator == "everything"].component) == {"several"}
    assert len(set(result.frame.mediator)) == 1 + len(steps)
    alone = mediate(model, pictured, outcome=margin, sites=[whole], positions=("all",), n_boot=10, progress=False)
    assert list(alone.plot().data[0].y) == ["everything"]


def test_kl_is_zero_where_nothing_is_exchanged(model, pictured, read):
    sites = ["blocks.0.hook_resid_pre"]
    result = mediate(model, pictured, outcome=KLDivergence(), sites=sites, n_boot=10, progress=False)
    assert (result.details.safe.abs() < 1e-6).all()
    te = read(result, sites[0], "all", "TE")
    inputs = model.prepare([*pictured.safe, *pictured.unsafe])
    with torch.no_grad():
        safe, unsafe = model(inputs)[:, -1].log_softmax(-1).split(2)
    expected = torch.nn.functional.kl_div(unsafe, safe, log_target=True, reduction="none").sum(-1).mean()
    assert te == pytest.approx(float(expected), **EXACT)
    assert read(result, sites[0], "all", "NIE") == pytest.approx(te, **EXACT)


def test_margins_over_prefixes(model, pictured, read):
    outcome = PrefixMargin(comply=("sure red", "yes"), refuse=("sorry i cannot",))
    sites = ["blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out"]
    result = mediate(model, pictured, outcome=outcome, sites=sites, positions=("all",), n_boot=10, progress=False)
    assert set(result.frame.n) == {2} and set(result.frame.metric) == {"PrefixMargin"}

    def by_hand(example):
        totals = []
        for text in outcome.prefixes:
            inputs = model.prepare(replace(example, response=text), responses=True)
            words = model.tokenizer(text, add_special_tokens=False)["input_ids"]
            start = inputs.input_ids.shape[1] - len(words) - 1
            with torch.no_grad():
                log_probs = model(inputs)[0].log_softmax(-1)
            totals.append(sum(log_probs[start + i - 1, word] for i, word in enumerate(words)))
        return float(torch.logaddexp(totals[0], totals[1]) - totals[2])

    for i, (safe, unsafe) in enumerate(pictured):
        row = result.details[result.details.pair == i].iloc[0]
        assert [row.safe, row.unsafe] == pytest.approx([by_hand(safe), by_hand(unsafe)], **EXACT)
        assert row.safe_patched == pytest.approx(row.unsafe, **EXACT)


class FirstWord:
    """Complied if the answer begins with an early word; missing if it is empty."""

    def __call__(self, examples, texts):
        assert len(examples) == len(texts)
        return [
            Verdict.MISSING if not text else Verdict.COMPLIED if text.split()[0] < "n" else Verdict.REFUSED
            for text in texts
        ]


def test_refusal_by_generation(model, pictured, read):
    """Everything at the first residual gives the twin's own answer, token for token of its first step."""
    sites = ["blocks.0.hook_resid_pre", "projector.hook_out"]
    outcome = JudgedCompliance(FirstWord(), max_new_tokens=1)
    result = mediate(model, pictured, outcome=outcome, sites=sites, positions=("all",), n_boot=10, progress=False)
    texts = [
        model.generate(model.prepare(list(side)), max_new_tokens=1).texts for side in (pictured.safe, pictured.unsafe)
    ]
    expected = [[float(text.split()[0] < "n") for text in side] for side in texts]
    rows = result.details[result.details.tower == "language"]
    assert [rows.safe.tolist(), rows.unsafe.tolist()] == expected
    assert [rows.unsafe_patched.tolist(), rows.safe_patched.tolist()] == expected
    assert "FirstWord" in result.settings["outcome"]
    json.dumps(result.settings)


def test_an_outcome_that_is_the_wrong_way_round_is_told(model, pairs, margin, caplog):
    """Twins that are exchanged have the opposite effect in every pair; one of the two directions is told, and only where all pairs agree."""

    def told(given):
        caplog.clear()
        made = mediate(model, given, outcome=margin, sites=["blocks.1.hook_mlp_out"], n_boot=10, progress=False)
        effects = made.details.groupby("pair")[["safe", "unsafe"]].first()
        return bool((effects["unsafe"] < effects["safe"]).all()), "larger for the safe twin" in caplog.text

    agree = [told(pairs), told(PairedExamples(pairs.unsafe, pairs.safe))]
    assert all(expected == said for expected, said in agree)
    few = pairs[:1]
    one = PairedExamples(tuple(few.unsafe) * 2, tuple(few.safe) * 2)
    assert {told(PairedExamples(one.unsafe, one.safe)), told(one)} == {(True, True), (False, False)}
