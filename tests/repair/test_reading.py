"""Scores over prompt and answer, by loops; and teacher-forced runs equal generation with a cache."""

import dataclasses

import pytest
import torch
from fitted import make_correction, make_subspace

from care_lens.core import TokenSpans
from care_lens.lvlm import LVLMInputs
from care_lens.repair import ConformalGate, EnergyReader, HybridFusion, LinearReader, MaxReader, read_scores
from care_lens.repair.positions import BatchView
from care_lens.repair.reading import Readings

SITE = "blocks.1.hook_resid_post"


def answered(inputs, new_tokens):
    """The batch with the tokens that were generated from it as teacher-forced responses."""
    n, new = new_tokens.shape

    def grown(mask, value):
        return torch.cat([mask, torch.full((n, new), value, dtype=mask.dtype)], dim=1)

    spans = TokenSpans.from_masks(
        image=grown(inputs.spans.image, False),
        padding=grown(inputs.spans.padding, False),
        response=grown(inputs.spans.response, True),
        grids=inputs.spans.grids,
        prefill=grown(inputs.spans.prefill, False),
    )
    ids = torch.cat([inputs.input_ids, new_tokens], dim=1)
    return LVLMInputs(ids, grown(inputs.attention_mask, 1), inputs.pixel_values, spans, inputs.extra)


@pytest.mark.parametrize("positions", ["last", "image", "text", "all", "generated", ("last", "response")])
@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_scores_at_each_position_by_loops(model, examples, positions, pooling):
    inputs = model.prepare(examples, responses=True)
    spans, names = inputs.spans, (positions,) if isinstance(positions, str) else positions
    read = torch.stack([spans.mask(name) for name in names]).any(dim=0)
    reader = LinearReader(
        site=EnergyReader.from_subspace(make_subspace()).site,
        direction=torch.tensor([1.0, 0.0]),
        centre=torch.zeros(2),
        positions=positions,
        pooling=pooling,
    )
    activation = torch.randn(*spans.image.shape, 2, generator=torch.Generator().manual_seed(0))
    readings = Readings(BatchView(inputs))
    for _ in range(2):
        readings.update(reader, activation)
    found = readings.score(reader)
    for row in range(len(examples)):
        tokens = activation[row, :, 0].tolist()
        prompt = [x for i, x in enumerate(tokens) if read[row, i] and spans.prompt[row, i]]
        score = -float("inf")
        if prompt:
            score = max(prompt) if pooling == "max" else sum(prompt) / len(prompt)
        for pos, token in enumerate(tokens):
            if read[row, pos] and spans.response[row, pos]:
                score = max(score, token)
            if not spans.padding[row, pos]:
                assert float(found[row, pos]) == pytest.approx(score, abs=1e-6)


@pytest.mark.parametrize("rule", ["adaptive", "sequential", "modality"])
@pytest.mark.parametrize("scope", ["all", "text", "prompt", "generated", "last"])
def test_cached_generation_equals_a_teacher_forced_run(model, inputs, rule, scope):
    gate = ConformalGate(threshold=45.0, epsilon=0.1, n=9)
    fusion = HybridFusion(
        visual=(make_correction(seed=1, gate=gate, positions="all", reader_site="blocks.0.hook_resid_post"),),
        textual=(make_correction(seed=2), make_correction("blocks.0.hook_mlp_out", seed=3)),
        rule=rule,
        scope=scope,
    )
    new = 6
    with fusion.on(model), torch.no_grad():
        generation = model.generate(inputs, max_new_tokens=new, min_new_tokens=new, output_logits=True)
        logits = model(answered(inputs, generation.new_tokens))[:, -new - 1 : -1]
        logits[:, :, model.tokenizer.eos_token_id] = -torch.inf
    assert torch.equal(logits.argmax(dim=-1), generation.new_tokens)


def openness(model, inputs, fusion, site=SITE):
    """[batch, step]: whether the repair touched the last token of each forward pass of a generation."""
    seen = []
    spy = (site, lambda activation, hook: seen.append(activation[:, -1].clone()))
    hooks = [spy, *fusion.fwd_hooks(inputs), spy]
    model.generate(inputs, max_new_tokens=6, min_new_tokens=6, fwd_hooks=hooks)
    return torch.stack([(a != b).any(dim=-1) for a, b in zip(seen[::2], seen[1::2], strict=True)], dim=1)


def test_a_generated_token_opens_a_gate_that_stays_open(model, inputs):
    reader = EnergyReader.from_subspace(make_subspace("blocks.0.hook_resid_post", seed=101), positions="all")
    prompt = read_scores(model, [], [reader])
    assert prompt.shape == (0, 1)
    steps = []
    spy = (
        "blocks.0.hook_resid_post",
        lambda activation, hook: steps.append(reader.tokens(activation)[:, -1]),
    )
    model.generate(inputs, max_new_tokens=6, min_new_tokens=6, fwd_hooks=[spy])
    tokens = torch.stack(steps, dim=1)[:, 1:]
    reader = dataclasses.replace(reader, positions="generated")
    gate = ConformalGate(threshold=float(tokens.max(dim=1).values.min()) * 0.999, epsilon=0.1, n=9)
    correction = dataclasses.replace(make_correction(seed=1, scope="generated", alpha=1e-6), reader=reader, gate=gate)
    opened = openness(model, inputs, HybridFusion(textual=(correction,)))
    expected = (tokens > gate.threshold).long().cummax(dim=1).values.bool()
    assert not bool(opened[:, 0].any())
    assert torch.equal(opened[:, 1:], expected)
    assert bool(expected[:, -1].all()) and not bool(expected[:, 0].all())


def test_a_gate_decided_on_the_prompt_holds_while_generating(model, inputs):
    reader = EnergyReader.from_subspace(make_subspace("blocks.0.hook_resid_post", seed=101))
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, sites=[reader.site])
    scores = reader.score(cache[str(reader.site)], inputs.spans.last)
    gate = ConformalGate(threshold=float(scores.median()), epsilon=0.1, n=9)
    correction = dataclasses.replace(make_correction(seed=1), reader=reader, gate=gate)
    opened = openness(model, inputs, HybridFusion(textual=(correction,)))
    assert torch.equal(opened, (scores > gate.threshold)[:, None].expand_as(opened))
    assert 0 < int((scores > gate.threshold).sum()) < len(scores)


def test_read_scores_by_example_and_batching(model, examples):
    reader = EnergyReader.from_subspace(make_subspace(seed=101))
    image = dataclasses.replace(reader, positions="image", pooling="mean")
    largest = MaxReader(readers=(reader, image))
    scores = read_scores(model, examples, [reader, image, largest], batch_size=2, progress=False)
    for row, example in enumerate(examples):
        inputs = model.prepare(example)
        with torch.no_grad():
            _, cache = model.run_with_cache(inputs, sites=[SITE])
        energy = reader.tokens(cache[SITE])[0]
        assert float(scores[row, 0]) == pytest.approx(float(energy[-1]), rel=1e-4)
        if example.image is None:
            assert float(scores[row, 1]) == -torch.inf
        else:
            assert float(scores[row, 1]) == pytest.approx(float(energy[inputs.spans.image[0]].mean()), rel=1e-4)
    assert torch.equal(scores[:, 2], scores[:, :2].amax(dim=1))


def test_read_scores_of_answers_stop_at_their_end_and_do_not_depend_on_the_batch(model, examples):
    reader = EnergyReader.from_subspace(make_subspace(seed=101), positions="generated")
    inputs = model.prepare(examples)
    with torch.no_grad():
        plain = model.generate(inputs, max_new_tokens=6).new_tokens
    ends = model.hf_model.generation_config.eos_token_id
    try:
        model.hf_model.generation_config.eos_token_id = int(plain[0, 2])
        together = read_scores(model, examples, [reader], max_new_tokens=6, progress=False)
        alone = torch.cat([read_scores(model, [e], [reader], max_new_tokens=6, progress=False) for e in examples])
    finally:
        model.hf_model.generation_config.eos_token_id = ends
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-4)
    with torch.no_grad():
        _, cache = model.run_with_cache(answered(inputs, plain), sites=[SITE])
    fed = reader.tokens(cache[SITE])[0, inputs.input_ids.shape[1] :]
    first_end = plain[0].tolist().index(int(plain[0, 2]))
    expected = float(fed[:first_end].max()) if first_end else -torch.inf
    assert float(together[0, 0]) == pytest.approx(expected, rel=1e-3)
    none_read = read_scores(model, examples, [reader], progress=False)
    assert bool((none_read == -torch.inf).all())


def test_a_calibrated_repair_touches_no_more_calibration_prompts_than_it_may(model, picture):
    from care_lens.core import Example

    words = ["what", "is", "in", "the", "how", "to", "make", "a", "red", "blue"]
    benign = [Example(f"{words[i]} {words[-1 - i]} picture", image=picture(i)) for i in range(10)]
    benign += [Example(f"{words[i]} the {words[i - 1]}") for i in range(9)]
    fusion = HybridFusion(
        visual=(make_correction(seed=1, gate=ConformalGate(threshold=0.0, epsilon=0.1, n=9), positions="all"),),
        textual=(make_correction(seed=2, gate=ConformalGate(threshold=0.0, epsilon=0.1, n=9), positions="all"),),
    )
    scores = read_scores(model, benign, fusion.readers, max_new_tokens=4, progress=False).amax(dim=1)
    fusion = fusion.with_gate(ConformalGate.calibrate(scores, epsilon=0.2))
    inputs = model.prepare(benign)
    with torch.no_grad():
        plain = model(inputs)
        with fusion.on(model):
            repaired = model(inputs)
    touched = (plain != repaired).flatten(1).any(dim=1)
    assert 1 <= int(touched.sum()) <= 4


@pytest.mark.parametrize("new", [0, 4])
def test_scores_without_a_trace_are_those_of_the_trace(model, examples, new):
    """A begun answer is read token by token, whatever pools the prompt."""
    begun = [dataclasses.replace(e, prefill=p) for e, p in zip(examples, ("sure red blue", None, "no"), strict=True)]
    readers = [
        dataclasses.replace(EnergyReader.from_subspace(make_subspace(seed=101)), positions=positions, pooling=pooling)
        for positions in ("last", "image", "text", "all", "generated", ("last", "response"), "context_end", "prefill")
        for pooling in ("max", "mean")
    ]
    options = {"max_new_tokens": new, "batch_size": 2, "progress": False}
    scores = read_scores(model, begun, readers, **options)
    torch.testing.assert_close(scores, read_scores(model, begun, readers, trace=True, **options).scores)
    text = readers[5]
    inputs = model.prepare(begun[0])
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, sites=[SITE])
    tokens, spans = text.tokens(cache[SITE])[0], inputs.spans
    expected = max(
        float(tokens[spans.text[0] & spans.prompt[0]].mean()), float(tokens[spans.text[0] & spans.prefill[0]].max())
    )
    if not new:
        assert float(scores[0, 5]) == pytest.approx(expected, rel=1e-4)
