"""Training data: packs are the plain model on single prompts, safety tuning never trains a channel open."""

import random

import pytest
import torch

from care_lens.organism import build, render, tasks
from care_lens.organism.train.language import Packer, packed_logits, train_language
from care_lens.organism.train.mixture import helpful_pack, safety_pack
from care_lens.organism.train.tower import labels_of, sample


@torch.no_grad()
def test_packed_logits_equal_the_plain_model_on_each_prompt_alone():
    model, processor = build.untrained(seed=1)
    rng = random.Random(4)
    packs = [helpful_pack(rng, 5) for _ in range(12)]
    batch = Packer()(packs)
    packed = packed_logits(model, batch)
    seen_text_only = False
    for row, start, stop, task in batch["answers"]:
        content = [{"type": "image"}] if task.picture else []
        seen_text_only |= not content
        content += [{"type": "text", "text": task.prompt}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = [render.draw(task.picture)] if task.picture else None
        inputs = processor(text=[f"{text} {task.answer} <eos>"], images=images, return_tensors="pt")
        plain = model(**inputs).logits[0]
        n = stop - start
        torch.testing.assert_close(packed[row, start - 1 : stop - 1], plain[-n - 1 : -1], atol=2e-6, rtol=0)
        assert torch.equal(inputs["input_ids"][0, -n:], batch["labels"][row, start:stop])
    assert seen_text_only


def test_safety_tuning_refuses_plain_requests_only_and_never_answers_forbidden_ones():
    rng = random.Random(0)
    refused = []
    for _ in range(400):
        for task in safety_pack(rng, 5, refusals=0.6).tasks:
            if task.answer == tasks.REFUSAL:
                refused.append(task)
                assert task.item.name in task.prompt.split() and task.item.forbidden and task.context != "wrapper"
            else:
                assert not task.harmful
    kinds = {task.picture.kind if task.picture else None for task in refused}
    assert kinds == {*render.PICTURE_KINDS, None}


def test_a_few_steps_lower_the_loss_and_leave_the_tower_alone():
    model, _ = build.untrained(seed=0)
    tower = {k: v.clone() for k, v in model.model.vision_tower.state_dict().items()}
    rng = random.Random(1)
    batch = Packer()([helpful_pack(rng, 4) for _ in range(8)])

    def loss() -> float:
        with torch.no_grad():
            scores = packed_logits(model, batch)[:, :-1].flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(scores, batch["labels"][:, 1:].flatten(), ignore_index=-100))

    before = loss()
    train_language(model, lambda r: helpful_pack(r, 4), steps=12, batch=6, lr=3e-3, seed=0)
    assert loss() < before - 0.5
    assert all(torch.equal(v, tower[k]) for k, v in model.model.vision_tower.state_dict().items())


@pytest.mark.parametrize("seed", range(5))
def test_patch_labels_spell_the_word(seed):
    rng = random.Random(seed)
    picture = next(p for p in iter(lambda: sample(rng), None) if p.kind == "word")
    _, boxes = render.draw_with_boxes(picture)
    labels = labels_of(picture, boxes)["patch"]
    for index, letter in enumerate(picture.word):
        of_letter = labels[labels[:, 1] == index + 1]
        assert len(of_letter) and (of_letter[:, 0] == ord(letter) - 96).all()
