"""Corrections that act only where their gate opens."""

import dataclasses

import pytest
import torch
from fitted import make_correction

from care_lens.repair import AlwaysOpen, ConformalGate, Correction, HybridFusion

SITE = "blocks.1.hook_resid_post"


def pulsed(threshold, positions, reader_site="blocks.0.hook_resid_post"):
    gate = ConformalGate(threshold=threshold, epsilon=0.1, n=9)
    correction = make_correction(gate=gate, positions=positions, reader_site=reader_site)
    return HybridFusion(textual=(dataclasses.replace(correction, pulse=True),), rule="sequential")


def touched(model, fusion, inputs):
    """[batch, pos] which tokens the repair edits."""
    seen = []
    pair = (SITE, lambda activation, hook: seen.append(activation.clone()))
    with torch.no_grad():
        model.run_with_hooks(inputs, fwd_hooks=[pair, *fusion.fwd_hooks(inputs), pair])
    return (seen[1] != seen[0]).any(-1)


def scores(model, fusion, inputs):
    """[batch, pos] the reader's score of each token by itself."""
    (reader,) = fusion.readers
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, sites=[str(reader.leaves[0].site)])
    return reader.tokens(cache[str(reader.leaves[0].site)])


def test_a_gate_opened_by_the_prompt_edits_the_prompt_and_leaves_the_answer(model, examples):
    inputs = model.prepare(examples, responses=True)
    edited = touched(model, pulsed(-1.0, "last"), inputs)
    assert torch.equal(edited, inputs.spans.prompt)


def test_a_gate_opened_by_the_answer_edits_the_one_token_that_opens_it(model, examples):
    inputs = model.prepare(examples, responses=True)
    probe = scores(model, pulsed(0.0, "generated"), inputs).masked_fill(~inputs.spans.response, -torch.inf)
    best = probe.amax(1)
    threshold = float(best.min()) - 1e-3  # every row opens somewhere, most not at their first token
    expected = torch.zeros_like(inputs.spans.response)
    for row, values in enumerate(probe):
        expected[row, int((values > threshold).nonzero()[0])] = True
    assert torch.equal(touched(model, pulsed(threshold, "generated"), inputs), expected)
    held = pulsed(threshold, "generated")
    held = dataclasses.replace(held, textual=(dataclasses.replace(held.textual[0], pulse=False),))
    first = expected.int().cumsum(1).bool()
    assert torch.equal(touched(model, held, inputs), first & inputs.spans.response)


@pytest.mark.parametrize("positions", ["generated", ("last", "generated")])
def test_rows_generate_alone_what_they_generate_in_a_batch(model, examples, positions):
    inputs = model.prepare(examples)
    fusion = pulsed(5.0, positions)
    with fusion.on(model):
        answer = model.generate(inputs, max_new_tokens=6, min_new_tokens=6)
    for row, example in enumerate(examples):
        alone = model.prepare(example)
        with fusion.on(model):
            single = model.generate(alone, max_new_tokens=6, min_new_tokens=6)
        assert torch.equal(single.new_tokens[0], answer.new_tokens[row])


def test_a_pulse_needs_a_reader():
    writer = make_correction().writer
    with pytest.raises(ValueError, match="pulse"):
        Correction(writer=writer, pulse=True)
    with pytest.raises(ValueError, match="pulse"):
        dataclasses.replace(pulsed(1.0, "last").textual[0], gate=AlwaysOpen())
