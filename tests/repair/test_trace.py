"""The trace of readers over the tokens: by loops, against the scores without it, and as a figure."""

import dataclasses

import pytest
import torch
from fitted import make_subspace

from care_lens.repair import AllOf, EnergyReader, RepairError, read_scores

LOW, HIGH = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def readers():
    last = EnergyReader.from_subspace(make_subspace(LOW, seed=101))
    answer = EnergyReader.from_subspace(make_subspace(HIGH, seed=102), positions=("image", "generated"))
    return [last, answer, AllOf(readers=(last, answer))]


@torch.no_grad()
def test_a_trace_by_loops_and_against_the_scores(model, examples, readers):
    begun = [dataclasses.replace(examples[0], prefill="sure"), *examples[1:]]
    ends = model.hf_model.generation_config.eos_token_id
    plain = model.generate(model.prepare(begun), max_new_tokens=6).new_tokens
    try:
        model.hf_model.generation_config.eos_token_id = int(plain[1, 3])
        trace, scores = (
            read_scores(model, begun, readers, max_new_tokens=6, batch_size=2, trace=on, progress=False)
            for on in (True, False)
        )
        assert torch.equal(trace.scores, scores) and len(trace.rows) == 3
        new = [model.generate(model.prepare(one), max_new_tokens=6).new_tokens[0].tolist() for one in begun]
    finally:
        model.hf_model.generation_config.eos_token_id = ends
    for row, example, tokens in zip(trace.rows, begun, new, strict=True):
        given = model.prepare(example)
        stop = tokens.index(int(plain[1, 3])) if int(plain[1, 3]) in tokens else len(tokens) - 1
        ids = [*given.input_ids[0].tolist(), *tokens[:stop]]
        assert list(row.tokens) == model.tokenizer.convert_ids_to_tokens(ids)
        cache = _cache(model, given, tokens[:stop])
        own = [reader.tokens(cache[str(reader.site)])[0].tolist() for reader in readers[:2]]
        last, prompt = given.spans.last_index()[0], int(given.spans.prompt.sum())
        stands = [
            own[0][last],
            max([own[1][i] for i in range(prompt) if bool(given.spans.image[0, i])], default=-float("inf")),
        ]
        for position in range(len(ids)):
            span = "generated" if position >= prompt else "image" if bool(given.spans.image[0, position]) else "text"
            assert row.spans[position] == span
            reads = (position == last, span != "text")
            if position >= prompt:
                stands[1] = max(stands[1], own[1][position])
            for i in (0, 1):
                expected = own[i][position] if reads[i] else -float("inf")
                assert float(row.own[i, position]) == pytest.approx(expected, rel=1e-3)
                assert float(row.score[i, position]) == pytest.approx(stands[i], rel=1e-3)
            assert float(row.score[2, position]) == pytest.approx(min(stands), rel=1e-3)


def _cache(model, given, new):
    """A teacher-forced run over the prompt and these tokens."""
    from test_reading import answered

    if not new:
        return model.run_with_cache(given, sites=[LOW, HIGH])[1]
    return model.run_with_cache(answered(given, torch.tensor([new])), sites=[LOW, HIGH])[1]


@torch.no_grad()
def test_frame_and_figure(model, examples, readers):
    named = [dataclasses.replace(example, id=f"item {i}") for i, example in enumerate(examples)]
    trace = read_scores(model, named, readers, max_new_tokens=4, trace=True, progress=False)
    frame = trace.to_dataframe()
    assert list(frame) == ["example", "id", "position", "token", "span", "reader", "own_score", "score"]
    assert len(frame) == 3 * sum(len(row.tokens) for row in trace.rows) and frame.id.nunique() == 3
    assert (
        frame.reader.unique().tolist()
        == list(trace.readers)
        == [f"0: EnergyReader at {LOW}", f"1: EnergyReader at {HIGH}", "2: AllOf"]
    )
    assert frame[(frame.example == 1) & (frame.span == "image")].empty and "ScoreTrace" in repr(trace)
    figure = trace.plot(example=0, threshold=12.5)
    by_name = {one.name: one for one in figure.data}
    here = frame[(frame.example == 0) & (frame.reader == "1: EnergyReader at " + HIGH)]
    drawn = by_name[f"1: EnergyReader at {HIGH}, as it stands"]
    assert list(drawn.y) == pytest.approx(here.score.tolist()) and list(drawn.x) == here.position.tolist()
    assert any(shape.y0 == 12.5 == shape.y1 for shape in figure.layout.shapes)
    with pytest.raises(RepairError, match="example must be one of the 3"):
        trace.plot(example=3)
    empty = read_scores(model, [], readers, trace=True, progress=False)
    assert empty.scores.shape == (0, 3) and empty.to_dataframe().empty
    short = read_scores(model, named, readers, trace=True, progress=False)
    assert torch.equal(short.scores, read_scores(model, named, readers, progress=False))
    assert "generated" not in {span for row in short.rows for span in row.spans}
