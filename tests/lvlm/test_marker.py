"""Answers in rows of token ids are found behind the template's end of a request, and only there."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from care_lens.core import Example
from care_lens.core.conversation import Turn
from care_lens.lvlm.families import LLAVA
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
    # A picture behind the end of a request: no answer.
    ids = inputs.generate_kwargs()["input_ids"].clone()
    ids[0, -1] = lvlm.hf_model.config.image_token_id
    given = {**inputs.generate_kwargs(), "input_ids": ids, "pixel_values": torch.zeros(1, 3, 16, 16)}
    assert not raw_inputs(given, config=lvlm.hf_model.config, family=lvlm.family, marker=marker).spans.response.any()
    # Labels of whole rows, or of nothing, tell no answer apart.
    for labels in (inputs.input_ids, torch.full_like(inputs.input_ids, -100)):
        given = {**inputs.generate_kwargs(), "labels": labels}
        again = raw_inputs(given, config=lvlm.hf_model.config, family=lvlm.family, marker=marker).spans
        assert again.response.equal(inputs.spans.response)


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(letter) for letter in text]}

    def decode(self, ids):
        return "".join(map(chr, ids))


def processor_of(end):
    def written(conversation, **options):
        return "".join(part["text"] for message in conversation for part in message["content"]) + end

    return SimpleNamespace(
        chat_template="its own", image_token="<image>", apply_chat_template=written, tokenizer=Letters()
    )


def test_a_template_that_ends_requests_with_nothing_to_see_tells_nothing():
    assert answer_marker(processor_of("[/]"), LLAVA).end == tuple(map(ord, "[/]"))
    assert answer_marker(processor_of("\n "), LLAVA) == Marker() == answer_marker(processor_of(""), LLAVA)
    assert answer_marker(processor_of("[/]"), replace(LLAVA, prompt=lambda *_: "red")) == Marker()
