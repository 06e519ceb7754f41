"""Ablation by generation, against plain Hugging Face models with the component taken out."""

import json
from dataclasses import dataclass, replace

import pandas as pd
import pytest
import torch

from care_lens.core import Example, Verdict, rate_ci
from care_lens.mediation import AblationResult, ablate

NEW = 6


class WordJudge:
    """Complied if the answer holds an early word, refused if a late one, else other."""

    name = "words"

    def __call__(self, examples, texts):
        def verdict(text):
            words = text.split()
            if not words:
                return Verdict.MISSING
            return Verdict.COMPLIED if min(words) < "c" else Verdict.REFUSED if max(words) > "t" else Verdict.OTHER

        return [verdict(text) for text in texts]


@dataclass(frozen=True)
class Always:
    """One verdict of every answer."""

    verdict: Verdict
    name: str = "always"

    def __call__(self, examples, texts):
        return [self.verdict for _ in texts]


@pytest.fixture(scope="module")
def ablated(model, examples):
    return {
        mode: ablate(model, examples, judge=WordJudge(), mode=mode, max_new_tokens=NEW, n_boot=20, progress=False)
        for mode in ("mean", "zero", "skip")
    }


def answers(plain, lvlm, examples):
    """Greedy answers of a plain Hugging Face model."""
    inputs = lvlm.prepare(examples)
    new = plain.generate(**inputs.generate_kwargs(), max_new_tokens=NEW, do_sample=False)
    return lvlm.tokenizer.batch_decode(new[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def texts(result, component, layer=None):
    details = result.details
    rows = details[
        (details.component == component) & (details.layer.isna() if layer is None else details.layer == layer)
    ]
    return rows.text.tolist()


def submodule(model, component, layer):
    block = model.model.language_model.layers[layer]
    return block.mlp if component == "hook_mlp_out" else block.self_attn


@pytest.mark.parametrize("component", ["hook_mlp_out", "hook_attn_out"])
@pytest.mark.parametrize("layer", [0, 2])
def test_zero_and_skip_are_a_model_without_the_component(model, llava_maker, examples, ablated, component, layer):
    plain, _ = llava_maker("clip")
    module = submodule(plain, component, layer)
    (module.down_proj if component == "hook_mlp_out" else module.o_proj).weight.data.zero_()
    expected = answers(plain, model, examples)
    assert texts(ablated["zero"], component, layer) == texts(ablated["skip"], component, layer) == expected
    assert expected != texts(ablated["zero"], "none")


@pytest.mark.parametrize("window", [1, 2])
def test_skipped_blocks_are_a_model_without_them(model, llava_maker, examples, window):
    options = {"judge": WordJudge(), "mode": "skip", "max_new_tokens": NEW, "n_boot": 20, "progress": False}
    found = ablate(model, examples, components=("block",), window=window, **options)
    depth = model.n_layers()
    assert found.frame[found.frame.component == "block"].layer.unique().tolist() == list(range(depth))
    for layer in (0, depth - 2, depth - 1):
        plain, _ = llava_maker("clip")
        for block in plain.model.language_model.layers[layer : layer + window]:
            block.mlp.down_proj.weight.data.zero_()
            block.self_attn.o_proj.weight.data.zero_()
        expected = answers(plain, model, examples)
        assert texts(found, "block", layer) == expected != texts(found, "none")


def test_skipped_vision_blocks_are_a_model_without_them(model, llava_maker, examples):
    options = {"judge": WordJudge(), "mode": "skip", "max_new_tokens": NEW, "n_boot": 20, "progress": False}
    found = ablate(model, examples, tower="vision", layers=[0], components=("block",), window=2, **options)
    plain, _ = llava_maker("clip")
    for block in plain.model.vision_tower.encoder.layers[:2]:
        for linear in (block.mlp.fc2, block.self_attn.out_proj):
            linear.weight.data.zero_()
            linear.bias.data.zero_()
    assert texts(found, "block", 0) == answers(plain, model, examples)


def answers_with_mean(plain, lvlm, examples, reference, component, layer):
    """Answers of a plain model whose component always gives its mean over the reference, by module hooks."""
    module, kept = submodule(plain, component, layer), []

    def first(output):
        return output[0] if isinstance(output, tuple) else output

    handle = module.register_forward_hook(lambda *args: kept.append(first(args[2])))
    with torch.no_grad():
        for example in reference:
            plain(**lvlm.prepare(example).model_kwargs())
    handle.remove()
    mean = torch.stack([output[0].mean(dim=0) for output in kept]).mean(dim=0)

    def put(module, args, output):
        filled = mean.expand_as(first(output))
        return (filled, *output[1:]) if isinstance(output, tuple) else filled

    handle = module.register_forward_hook(put)
    try:
        return answers(plain, lvlm, examples)
    finally:
        handle.remove()


CELLS = [(component, layer) for component in ("hook_mlp_out", "hook_attn_out") for layer in (0, 1, 2)]


def test_mean_is_the_references_mean_at_every_position_and_step(model, llava_maker, examples, ablated):
    plain, _ = llava_maker("clip")
    options = {"max_new_tokens": NEW, "n_boot": 20, "progress": False}
    few = ablate(model, examples, judge=WordJudge(), reference=examples[1:2], **options)
    assert (few.settings["n_reference"], ablated["mean"].settings["n_reference"]) == (1, 3)
    for cell in CELLS:
        assert texts(ablated["mean"], *cell) == answers_with_mean(plain, model, examples, examples, *cell)
        assert texts(few, *cell) == answers_with_mean(plain, model, examples, examples[1:2], *cell)
    assert any(texts(ablated["mean"], *cell) != texts(few, *cell) for cell in CELLS)
    assert any(texts(ablated["mean"], *cell) != texts(ablated["zero"], *cell) for cell in CELLS)


def test_baseline_is_the_untouched_model(model, llava_maker, examples, ablated):
    plain, _ = llava_maker("clip")
    assert texts(ablated["mean"], "none") == answers(plain, model, examples)


def test_shares_count_verdicts(ablated):
    frame, details = ablated["zero"].frame, ablated["zero"].details
    for (component, layer), rows in details.groupby(["component", "layer"], dropna=False):
        at = frame[(frame.component == component) & (frame.layer.isna() if pd.isna(layer) else frame.layer == layer)]
        found = at.set_index("metric")
        judged = rows[rows.verdict != "missing"]
        assert found.loc["missing", "value"] == (rows.verdict == "missing").mean()
        for verdict in ("complied", "refused", "other"):
            assert found.loc[verdict, "n"] == len(judged)
            if len(judged):
                assert found.loc[verdict, "value"] == pytest.approx((judged.verdict == verdict).mean())
        assert (component == "none") == ("complied change" not in found.index)
    assert len(frame) == 4 + 6 * 7


def test_changes_are_differences_from_the_baseline(ablated):
    frame = ablated["zero"].frame
    shares = frame[frame.effect == "share"].set_index(["component", "layer", "metric"])["value"]
    before = frame[frame.component == "none"].set_index("metric")["value"]
    for row in frame[frame.effect == "difference"].itertuples():
        verdict = row.metric.removesuffix(" change")
        if row.n == 3:
            share = shares.loc[(row.component, row.layer, verdict)]
            assert row.value == pytest.approx(share - before[verdict])


def test_intervals_are_exact_where_every_example_is_its_own_item(model, examples):
    options = {"judge": WordJudge(), "layers": (), "max_new_tokens": NEW, "mode": "zero", "progress": False}
    apart = ablate(model, examples[:2], **options).frame.iloc[0]
    exact = rate_ci(round(apart.value * apart.n), int(apart.n))
    assert (apart.ci_low, apart.ci_high) == pytest.approx((exact.low, exact.high))


def test_intervals_of_shared_items_are_no_points(model, examples):
    """All answers alike, two rows an item: what four agreeing items say, not [0, 0] or [1, 1]."""
    rows = [replace(example, id="", group=f"item {i // 2}") for i, example in enumerate([examples[1]] * 8)]
    options = {"layers": (0,), "max_new_tokens": 1, "mode": "zero", "progress": False}
    found = ablate(model, rows, judge=Always(Verdict.COMPLIED), **options).frame
    share = found[(found.metric == "complied")]
    exact = rate_ci(4, 4)
    assert (
        (share.value == 1).all() and share.ci_low.to_numpy() == pytest.approx(exact.low) and (share.ci_high == 1).all()
    )
    change = found[found.effect == "difference"]
    assert (change.value == 0).all() and (change.ci_low < -0.3).all() and (change.ci_high > 0.3).all()


@pytest.mark.parametrize(("tower", "component"), [("language", "hook_mlp_out"), ("vision", "hook_attn_out")])
def test_resampling_does_not_depend_on_batches_order_or_other_rows(model, examples, picture, tower, component):
    more = Example("how to make a red picture of blue", image=picture(9), id="longer", group="other")
    rows = [*examples, more] if tower == "language" else [e for e in (*examples, more) if e.image is not None]
    options = {
        "judge": WordJudge(), "components": (component,), "layers": (0,), "tower": tower, "mode": "resample",
        "reference": rows, "max_new_tokens": 6, "n_boot": 10, "seed": 3, "progress": False,
    }  # fmt: skip

    def answered(some, **more_options):
        details = ablate(model, some, **{**options, **more_options}).details
        return dict(
            zip(details.id[details.component == component], details.text[details.component == component], strict=True)
        )

    whole = answered(rows)
    assert len(whole) == len(rows) > 1
    assert answered(rows, batch_size=1) == whole
    assert answered(rows[::-1], batch_size=2, reference=rows[::-1]) == whole
    assert answered(rows[1:]) == {name: text for name, text in whole.items() if name in {e.id for e in rows[1:]}}
    if tower == "language":  # so small a vision tower does not change first words
        assert any(answered(rows, seed=seed) != whole for seed in (4, 5, 6))


def test_the_vision_tower_can_be_ablated(model, llava_maker, examples):
    options = {"judge": WordJudge(), "max_new_tokens": NEW, "n_boot": 20, "progress": False}
    found = ablate(model, examples, tower="vision", components=("hook_mlp_out",), mode="zero", **options)
    plain, _ = llava_maker("clip")
    plain.model.vision_tower.encoder.layers[1].mlp.fc2.weight.data.zero_()
    plain.model.vision_tower.encoder.layers[1].mlp.fc2.bias.data.zero_()
    assert texts(found, "hook_mlp_out", 1) == answers(plain, model, examples)
    with pytest.raises(ValueError, match="one with an image"):
        ablate(model, examples[1:2], tower="vision", **options)


def test_a_stopped_ablation_goes_on(model, examples, tmp_path):
    options = {
        "judge": WordJudge(),
        "mode": "zero",
        "layers": (0, 1),
        "max_new_tokens": NEW,
        "n_boot": 20,
        "progress": False,
    }
    whole = ablate(model, examples, checkpoint=tmp_path / "whole.jsonl", **options)
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    stopped = tmp_path / "stopped.jsonl"
    stopped.write_text("".join(lines[:3]) + lines[3][:9])
    resumed = ablate(model, examples, checkpoint=stopped, **options)
    pd.testing.assert_frame_equal(resumed.frame, whole.frame, check_exact=True)
    pd.testing.assert_frame_equal(resumed.details, whole.details, check_exact=True)
    with pytest.raises(ValueError, match="differs in \\['mode', 'reference'\\]"):
        ablate(model, examples, checkpoint=stopped, **{**options, "mode": "mean"})


def test_save_and_load(ablated, tmp_path):
    ablated["zero"].save(tmp_path, "ablation")
    back = AblationResult.load(tmp_path, "ablation")
    pd.testing.assert_frame_equal(back.frame, ablated["zero"].frame)
    pd.testing.assert_frame_equal(back.details, ablated["zero"].details, check_exact=True)
    json.dumps(back.settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "skip", "components": ("hook_resid_post",)}, "to be skipped"),
        ({"mode": "mean", "components": ("block",)}, "must be 'skip' for whole blocks"),
        ({"mode": "skip", "window": 2}, "window is of whole blocks"),
        ({"mode": "skip", "components": ("block",), "window": 0}, "1 or more"),
        ({"layers": (7,)}, "no site"),
    ],
)
def test_refusals(model, examples, options, message):
    with pytest.raises(ValueError, match=message):
        ablate(model, examples, judge=WordJudge(), progress=False, **options)


def test_hooks_are_gone_after_an_exception(model, examples):
    def judge(examples, texts):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        ablate(model, examples, judge=judge, mode="zero", max_new_tokens=2, progress=False)
    assert not any(point.fwd_hooks for point in model.bridge.hook_dict.values())


def test_resampling_puts_the_other_examples_own_activations_there(model, examples):
    """What the MLP then adds to the stream is at every position one of those of the reference example."""
    seen = []

    def spy(activation, hook):
        seen.append(activation)

    reference = [Example("sure", group="other")]
    options = {"judge": WordJudge(), "mode": "resample", "layers": [1], "components": ["hook_mlp_out"]}
    with torch.no_grad():
        held = model.run_with_cache(model.prepare(reference), sites=["blocks.1.hook_mlp_out"])[1]
    allowed = held["blocks.1.hook_mlp_out"][0]
    with model.hooks([("blocks.1.hook_resid_post", spy), ("blocks.1.hook_resid_mid", spy)]):
        ablate(model, examples, reference=reference, max_new_tokens=2, progress=False, n_boot=5, **options)
    mids, posts = seen[-2], seen[-1]  # the last token generated: what the MLP wrote is one of the reference's
    wrote = (posts - mids).flatten(0, 1)
    assert (torch.cdist(wrote, allowed).amin(dim=1) < 1e-4).all()


@pytest.mark.parametrize(("component", "before", "after"), [
    ("hook_mlp_out", "hook_resid_mid", "hook_resid_post"),
    ("hook_attn_out", "hook_resid_pre", "hook_resid_mid"),
])  # fmt: skip
def test_resampling_the_vision_tower_puts_the_other_pictures_own_activations_there(
    model, picture, component, before, after
):
    """What the component then adds to the stream is at every patch one of those of the reference's picture, at patches drawn at random, and none
    of the picture's own."""
    rows = [Example("what is in the picture", image=picture(i), id=str(i), group=str(i)) for i in (3, 4)]
    reference = [Example("red", image=picture(7), group="other")]
    site, seen = f"vision.blocks.1.{component}", {}

    def spy(name):
        def keep(activation, hook):
            seen[name] = activation

        return f"vision.blocks.1.{name}", keep

    def own(examples):
        with torch.no_grad():
            return model.run_with_cache(model.prepare(examples), sites=[site])[1][site]

    allowed, theirs = own(reference)[0], own(rows)
    options = {"judge": WordJudge(), "mode": "resample", "layers": [1], "components": [component], "tower": "vision"}
    with model.hooks([spy(before), spy(after)]):
        ablate(model, rows, reference=reference, max_new_tokens=1, progress=False, n_boot=5, **options)
    wrote = seen[after] - seen[before]
    assert wrote.shape == theirs.shape
    far = torch.cdist(wrote, allowed[None].expand(len(rows), -1, -1))
    assert (far.amin(dim=2) < 1e-4).all()
    drawn = far.argmin(dim=2)
    places = torch.arange(drawn.shape[1])
    assert all(len(set(row.tolist())) > 1 for row in drawn)
    assert not any(torch.equal(row, places) for row in drawn) and not torch.equal(drawn[0], drawn[1])
    assert (torch.cdist(wrote, theirs).amin(dim=2) > 1e-3).all()


def test_resampling_is_that_of_the_seed(model, examples):
    options = {"judge": WordJudge(), "mode": "resample", "max_new_tokens": NEW, "n_boot": 5, "progress": False}
    first, again, other = (ablate(model, examples, seed=seed, **options) for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first.details, again.details)
    assert first.details.text.tolist() != other.details.text.tolist()
    assert first.settings["n_reference"] == len(examples)


def test_donors_are_of_another_group_where_there_is_one():
    from care_lens.mediation.resampling import donors

    several = [Example("a", group="x"), Example("b", group="x"), Example("c", group="y")]
    for seed in range(10):
        found = donors(several, several, seed)
        assert found[0] == found[1] == 2 and found[2] in (0, 1)
        assert donors(several[:2], several[:2], seed) == [1, 0]
    assert donors(several[:1], several[:1], 0) == [0]


def test_resampling_the_vision_tower(model, examples):
    options = {"judge": WordJudge(), "mode": "resample", "max_new_tokens": 2, "n_boot": 5, "progress": False}
    result = ablate(model, examples, tower="vision", layers=[1], **options)
    assert set(result.frame.component) == {"none", "hook_attn_out", "hook_mlp_out"}
    text_only = [example for example in examples if example.image is None]
    with pytest.raises(ValueError, match="reference must include an example with an image"):
        ablate(model, examples, tower="vision", reference=text_only, layers=[1], **options)
