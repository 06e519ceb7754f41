"""Corrections of a begun answer, and corrections that write again where the answer turns."""

import dataclasses

import pytest
import torch
from fitted import make_correction
from test_reading import answered
from unchecking import unchecked

from care_lens.core import Site
from care_lens.repair import (
    ConformalGate,
    Correction,
    HybridFusion,
    LinearReader,
    MaxReader,
    RepairError,
    Writer,
    bake,
    explain,
)
from care_lens.repair.errors import BakeError

SITE, READ = "blocks.1.hook_resid_post", "blocks.0.hook_resid_post"
OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def gated(threshold, positions, *, scope="all", pulse=False, unless=None, **options):
    gate = ConformalGate(threshold=threshold, epsilon=0.1, n=9)
    correction = make_correction(SITE, gate=gate, positions=positions, reader_site=READ, scope=scope, **options)
    return HybridFusion(
        textual=(dataclasses.replace(correction, pulse=pulse, unless=unless),), rule="sequential", name="re-armed"
    )


def sparing(location=0.0, *, seed=7, positions="generated"):
    direction, centre = torch.randn(2, 32, generator=torch.Generator().manual_seed(seed))
    return LinearReader(
        site=Site.parse(READ), direction=direction, centre=0.1 * centre, positions=positions, location=location
    )


def begun(examples, *, responses=False):
    """The rows with answers begun for them, of different lengths; the third has none."""
    given = ("sure red then", "how to", None)
    kept = [dataclasses.replace(e, prefill=p) for e, p in zip(examples, given, strict=True)]
    # A response holds the prefill that it begins with.
    return [dataclasses.replace(e, response=f"{e.prefill} blue") if responses and e.prefill else e for e in kept]


def touched(model, fusion, inputs):
    """[batch, pos] which tokens the repair edits."""
    seen = []
    spy = (SITE, lambda activation, hook: seen.append(activation.clone()))
    with torch.no_grad():
        model.run_with_hooks(inputs, fwd_hooks=[spy, *fusion.fwd_hooks(inputs), spy])
    return (seen[1] != seen[0]).any(-1)


def own_scores(model, reader, inputs):
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, sites=[READ])
    return reader.tokens(cache[READ])


def test_a_pulse_at_the_end_of_what_is_given_acts_there_whatever_is_given(model, examples):
    inputs = model.prepare(begun(examples))
    edited = touched(model, gated(-1.0, "last", scope="context_end", pulse=True), inputs)
    assert edited.sum(1).tolist() == [1, 1, 1]
    for row, spans in enumerate(zip(inputs.spans.prefill, inputs.spans.last, strict=True)):
        given, last = (mask.nonzero()[:, 0].tolist() for mask in spans)
        assert edited[row].nonzero()[:, 0].tolist() == [max([*given, *last])]
    assert bool((edited[:2] & inputs.spans.prefill[:2]).any(1).all())
    # A gate that is closed leaves every bit there, too.
    assert not touched(model, gated(1e9, "last", scope="context_end", pulse=True), inputs).any()


def test_what_is_given_cannot_spend_a_pulse(model, examples):
    inputs = model.prepare(begun(examples, responses=True), responses=True)
    fusion = gated(0.0, "generated", pulse=True)
    scores = own_scores(model, fusion.readers[0], inputs).masked_fill(~inputs.spans.response, -torch.inf)
    given = scores.masked_fill(~inputs.spans.prefill, -torch.inf)[:2]
    threshold = float(given.amax(1).min()) - 1e-3  # a given token opens both begun rows
    expected = torch.zeros_like(inputs.spans.response)
    for row, values in enumerate(scores):
        opens = (values > threshold).nonzero()[:, 0].tolist()
        if opens:
            expected[row, opens[0]] = True
        end = int(inputs.spans.context_end[row].nonzero())
        if any(position <= end for position in opens):
            expected[row, end] = True
    assert bool(expected[:2].any(1).all())
    assert torch.equal(touched(model, gated(threshold, "generated", pulse=True), inputs), expected)


@pytest.mark.parametrize("positions", ["last", "generated"])
def test_a_re_armed_correction_writes_at_every_open_token_but_those_it_spares(model, examples, positions):
    inputs = model.prepare(begun(examples, responses=True), responses=True)
    scores = own_scores(model, sparing(), inputs)
    answer = inputs.spans.response
    unless = sparing(float(scores[answer].median()))  # half of the answers' tokens are spared
    fusion = gated(-1.0, positions, unless=unless)
    spared = own_scores(model, unless, inputs) > 0
    assert 0 < int((spared & answer).sum()) < int(answer.sum())
    # The prompt is never spared, whatever stands there.
    assert bool((spared & inputs.spans.prompt).any())
    open_at = answer if positions == "generated" else ~inputs.spans.padding
    assert torch.equal(touched(model, fusion, inputs), open_at & ~(spared & answer))
    assert fusion.readers[0].leaves == fusion.textual[0].reader.leaves  # no part of the gate's score


@torch.no_grad()
@pytest.mark.parametrize("rule", ["adaptive", "sequential"])
def test_cached_generation_equals_a_teacher_forced_run_of_begun_answers(model, examples, rule):
    inputs = model.prepare(begun(examples))
    unless = sparing(float(own_scores(model, sparing(), inputs)[inputs.spans.text].median()))
    prompt = gated(-1.0, "last", scope="context_end", pulse=True).textual[0]
    answer = gated(-1.0, ("last", "generated"), scope="generated", unless=unless, seed=2).textual[0]
    fusion = HybridFusion(visual=(prompt,), textual=(prompt, answer), rule=rule)
    with fusion.recording(model) as seen:
        generation = model.generate(inputs, **OPTIONS, output_logits=True)
    whole = answered(inputs, generation.new_tokens)
    with fusion.recording(model) as forced:
        logits = model(whole)[:, -7:-1]
    logits[:, :, model.tokenizer.eos_token_id] = -torch.inf
    assert torch.equal(logits.argmax(dim=-1), generation.new_tokens)
    one, other = (
        record.to_dataframe().set_index(["row", "position"]).sort_index()[["gate_textual", "edit_norm"]]
        for record in (seen, forced)
    )
    shared = one.index.intersection(other.index)
    assert len(shared) == len(one)
    torch.testing.assert_close(
        torch.tensor(one.loc[shared].values), torch.tensor(other.loc[shared].values), atol=1e-4, rtol=1e-4
    )
    generated = one.gate_textual[[position >= 0 for _, position in one.index]]
    assert 0 < int((generated == 0).sum()) < len(generated)
    # Rows alone, and with a strength of 0.
    with fusion.on(model):
        alone = [model.generate(model.prepare(one), **OPTIONS).new_tokens for one in begun(examples)]
    assert torch.equal(torch.cat(alone), generation.new_tokens)
    off = dataclasses.replace(
        fusion,
        visual=(),
        textual=tuple(
            dataclasses.replace(c, writer=dataclasses.replace(c.writer, alpha=0.0)) for c in (prompt, answer)
        ),
    )
    bare = model(whole)
    with off.on(model):
        assert torch.equal(model(whole), bare)


def test_a_token_that_cannot_be_read_is_not_spared(model, examples):
    inputs = model.prepare(begun(examples))
    unless = sparing(-1e9)  # spares every token of an answer
    broken = inputs.spans.prefill & inputs.spans.context_end
    assert broken.sum() == 2

    def spoil(activation, hook):
        spoiled = activation.clone()
        spoiled[broken] = torch.nan
        return spoiled

    fusion = gated(-1.0, "last", unless=unless)
    (name, hook), *_ = [(name, hook) for name, hook in fusion.fwd_hooks(inputs) if name == READ]
    hooks = dict(fusion.fwd_hooks(inputs))
    states = torch.randn(*inputs.input_ids.shape, 32, generator=torch.Generator().manual_seed(0))
    hooks[READ](spoil(states, None), None)
    edited = (hooks[SITE](states, None) != states).any(-1)
    assert torch.equal(edited, inputs.spans.prompt | broken) and name == READ and callable(hook)


def test_saved_loaded_explained_and_not_baked(model, examples, tmp_path):
    fusion = gated(3.0, "generated", unless=sparing(1.5))
    fusion.save(tmp_path / "repair")
    again = HybridFusion.load(tmp_path / "repair")
    assert again.describe() == fusion.describe()
    assert torch.equal(again.textual[0].unless.direction, fusion.textual[0].unless.direction)
    assert fusion.describe() != gated(3.0, "generated", unless=sparing(1.6)).describe()
    assert "spares what LinearReader reads as refusal" in explain(fusion).frame.note[0]
    (at_end,) = explain(gated(1.0, "last", scope="context_end", pulse=True)).frame.acts_on
    assert at_end == "prompt"
    open_writer = dataclasses.replace(fusion.textual[0], reader=None, gate=type(make_correction().gate)())
    with pytest.raises(BakeError, match="spares tokens on what is read"):
        bake(HybridFusion(textual=(open_writer,)), model, tmp_path / "baked", examples=examples)


@pytest.mark.parametrize(
    ("unless", "words"),
    [
        (3.0, "unless must be a reader of one site"),
        (MaxReader(readers=(sparing(),)), "unless must be a reader of one site"),
        (sparing(positions="last"), "unless must read the tokens of the answer"),
        (dataclasses.replace(sparing(), site=Site.parse("blocks.2.hook_resid_post")), "at or before its writer"),
    ],
)
def test_what_cannot_spare_is_refused(unless, words):
    with unchecked(), pytest.raises(RepairError, match=words):
        Correction(writer=make_correction(SITE).writer, unless=unless)


def test_a_writer_of_several_sources_moves_the_coordinates_along_all_lines():
    generator = torch.Generator().manual_seed(3)
    target, sources = torch.randn(12, generator=generator), torch.randn(3, 12, generator=generator)
    writer = Writer.towards(SITE, target=target, source=sources)
    assert writer.rank == 3
    lines = (target - sources).double().T
    project = lines @ torch.linalg.pinv(lines)
    rows = torch.randn(1, 5, 12, generator=generator)
    expected = -(rows.double() - target.double()) @ project
    torch.testing.assert_close(writer.delta(rows).double(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(sources + writer.delta(sources[None])[0], target.expand(3, 12), atol=1e-5, rtol=1e-4)
    assert Writer.towards(SITE, target=target, source=torch.stack([sources[0], sources[0]])).rank == 1
    one, several = (Writer.towards(SITE, target=target, source=s) for s in (sources[0], sources[:1]))
    torch.testing.assert_close(one.write, several.write, atol=1e-6, rtol=1e-5)
    with pytest.raises(RepairError, match="must differ"):
        Writer.towards(SITE, target=target, source=target.expand(2, 12))
    with unchecked(), pytest.raises(RepairError, match="source"):
        Writer.towards(SITE, target=target, source=sources[:, :5])
