"""Answers in rows of token ids are found behind the template's end of a request, and only there."""

from dataclasses import replace

import pytest
import torch

from care_lens.core import Example
from care_lens.core.conversation import Turn
from care_lens.lvlm.marker import Marker, answer_marker, begun_answers
from care_lens.lvlm.raw import raw_inputs

MARKER = Marker(end=(1, 2), turn=(9, 5))


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ([5, 1, 2, 7, 8], [3, 4]),
        ([0, 0, 5, 1, 2], []),  # nothing behind it
        ([5, 6, 7, 8, 3], []),  # no end of a request
        ([5, 1, 2, 7, 9, 5, 6], []),  # another request behind it
        ([5, 1, 2, 7, 9, 5, 6, 1, 2, 7], [9]),  # an earlier answer is prompt
        ([5, 1, 2, 4, 7], []),  # a picture behind it
        ([1, 2], []),
        ([1], []),
    ],
)
def test_what_stands_behind_the_end_of_a_request(row, answer):
    ids = torch.tensor([row])
    found = begun_answers(ids, ids != 0, MARKER, never=(4,))
    assert found[0].nonzero()[:, 0].tolist() == answer
    padded = torch.tensor([[0, 0, *row, 0]])
    assert begun_answers(padded, padded != 0, MARKER, never=(4,))[0].nonzero()[:, 0].tolist() == [
        2 + at for at in answer
    ]
    assert not begun_answers(ids, ids != 0, Marker()).any()


def test_what_the_template_writes_is_found_and_rows_are_told_by_it(lvlm):
    marker = answer_marker(lvlm.processor, lvlm.family)
    assert marker.end and marker.turn
    earlier = Example("red", turns=(Turn("user", "how"), Turn("assistant", "sure blue")), prefill="sure red")
    inputs = lvlm.prepare([earlier, Example("how to make a red")])
    told = raw_inputs(
        inputs.generate_kwargs(), config=lvlm.hf_model.config, family=lvlm.family, marker=marker, generating=True
    ).spans
    assert told.prefill.equal(inputs.spans.prefill) and told.response.equal(inputs.spans.response)
    # Labels of whole rows, or of nothing, tell no answer apart.
    for labels in (inputs.input_ids, torch.full_like(inputs.input_ids, -100)):
        given = {**inputs.generate_kwargs(), "labels": labels}
        again = raw_inputs(given, config=lvlm.hf_model.config, family=lvlm.family, marker=marker).spans
        assert again.response.equal(inputs.spans.response)


def test_a_template_that_ends_requests_with_nothing_to_see_tells_nothing(llava_maker):
    _, processor = llava_maker("clip")
    from care_lens.lvlm.families import LLAVA

    processor.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %} {% endfor %}"
    )
    assert answer_marker(processor, LLAVA) == Marker()
    assert answer_marker(processor, replace(LLAVA, prompt=lambda *_: "red")) == Marker()
