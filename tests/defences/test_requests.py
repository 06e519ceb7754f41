"""Defences that change what is asked, and that evaluation asks what they say."""

import dataclasses

import pytest
import torch

from care_lens.core import defended
from care_lens.defences import CannotJudgeError, NoDefence, NotOnModelError, SecondLook, SelfReminder
from care_lens.evaluation.fidelity import next_token_kl
from care_lens.evaluation.generate import generate_all
from care_lens.evaluation.store import GenerationStore

WORDS = {
    "judge_prompt": "the {answer} first {prompt}",
    "caption_prompt": "what is it",
    "template": "{caption} {prompt}",
    "answer_tokens": 3,
    "judge_tokens": 2,
}


def answer(lvlm, example, tokens=3):
    return lvlm.generate(lvlm.prepare(dataclasses.replace(example, response=None)), max_new_tokens=tokens).texts[0]


def judgement(lvlm, example, said):
    asked = dataclasses.replace(example, prompt=f"the {said} first {example.prompt}")
    return answer(lvlm, asked, tokens=2).strip().lower()


def test_self_reminder_is_asked_by_evaluation(world_model, requests):
    defence = SelfReminder(before="not the first", after="then it is")
    asked = [f"not the first {e.prompt} then it is" for e in requests]
    assert [e.prompt for e in defended(defence, requests)] == asked
    assert defended(SelfReminder(before="", after=""), requests) == requests == defended(None, requests)
    named = [dataclasses.replace(e, id=str(i), channel="a") for i, e in enumerate(requests)]
    store = GenerationStore()
    made = generate_all(world_model, named, store=store, repair=defence, max_new_tokens=4, progress=False)
    for example, prompt, stored in zip(requests, asked, made, strict=True):
        assert stored.response == answer(world_model, dataclasses.replace(example, prompt=prompt), 4)
        assert stored.prompt == example.prompt  # the request itself is what is stored


def test_fidelity_compares_the_answers_of_prompts_of_another_length(world_model, requests):
    defence = SelfReminder(before="not the first", after="")
    found = next_token_kl(
        world_model, requests, ["the first", "it is", "a", "no"], repairs={"r": defence}, progress=False
    )
    for row, (example, text) in enumerate(zip(requests, ["the first", "it is", "a", "no"], strict=True)):
        sides = []
        for prompt in (example.prompt, f"not the first {example.prompt}"):
            inputs = world_model.prepare(dataclasses.replace(example, prompt=prompt, response=text), responses=True)
            last, n = inputs.spans.last_index()[0], int(inputs.spans.response.sum())
            with torch.no_grad():
                sides.append(world_model(inputs)[0, last : last + n].log_softmax(-1))
        kl = (sides[0].exp() * (sides[0] - sides[1])).sum(-1)
        assert found["r"][row].tolist() == pytest.approx([float(kl[0]), float(kl.mean())], rel=1e-2, abs=1e-4)


def test_second_look_asks_again_in_words_where_the_model_finds_its_answer_harmful(world_model, kinds, requests):
    said = [answer(world_model, e) for e in requests]
    judged = [judgement(world_model, e, text) for e, text in zip(requests, said, strict=True)]
    defence = SecondLook(**WORDS, harmful=(judged[0],))
    with pytest.raises(NotOnModelError, match="must be on a model"):
        defence.examples(requests)
    with defence.on(world_model):
        made = defence.examples(requests)
    changed = 0
    for example, text, rewritten in zip(requests, judged, made, strict=True):
        if example.image is not None and text.startswith(judged[0]):
            caption = answer(world_model, dataclasses.replace(example, prompt="what is it"))
            assert rewritten.image is None and rewritten.prompt == f"{caption} {example.prompt}"
            changed += 1
        else:
            assert rewritten == example
    assert changed >= 1
    off = dataclasses.replace(defence, enabled=False)
    with off.on(world_model):
        assert off.examples(requests) == requests
    with pytest.raises(NotOnModelError):
        defence.examples(requests)  # off the model again


def test_a_model_that_cannot_judge_is_said_to_be_one(world_model, kinds):
    sets = {"benign": kinds["benign"][:2], "malicious": kinds["malicious"][:2]}
    with pytest.raises(CannotJudgeError, match="cannot judge its own answers"):
        SecondLook.fit(world_model, **sets, **WORDS, harmful=("zzz",))
    # A random model's judgements mean nothing, but they differ: what it says of some answers it does not say of others.
    everything = [*kinds["malicious"], *kinds["benign"]]
    judged = [judgement(world_model, e, e.response) for e in everything]
    word = min(judged, key=lambda text: sum(other.startswith(text) for other in judged))
    telling = [e for e, text in zip(everything, judged, strict=True) if text.startswith(word)]
    others = [e for e, text in zip(everything, judged, strict=True) if not text.startswith(word)]
    assert telling and others
    fit = {"benign": others[:3], "malicious": telling[:3], **WORDS}
    assert SecondLook.fit(world_model, **fit, harmful=(word,)).harmful == (word,)
    with pytest.raises(CannotJudgeError, match=r"got 0\.00 and 1\.00"):
        SecondLook.fit(world_model, benign=telling[:3], malicious=others[:3], **WORDS, harmful=(word,))


def test_another_number_of_requests_is_refused(requests):
    class Doubling(NoDefence):
        def examples(self, examples):
            return [*examples, *examples]

    with pytest.raises(ValueError, match="one request for each of 4, got 8"):
        defended(Doubling(), requests)
