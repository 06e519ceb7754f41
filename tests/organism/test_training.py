"""Training data: packs are the plain model on single prompts, safety tuning never trains a channel open."""

import random
from dataclasses import replace

import pytest
import torch

from care_lens.organism import build, render, tasks
from care_lens.organism.train.language import Packer, answer_loss, packed_logits, train_language
from care_lens.organism.train.mixture import Pack, helpful_pack, safety_pack
from care_lens.organism.train.muon import Muon, orthogonal
from care_lens.organism.train.tower import labels_of, sample
from care_lens.organism.world import world


@torch.no_grad()
def test_packed_logits_equal_the_plain_model_on_each_prompt_alone():
    model, processor = build.untrained(seed=1)
    rng = random.Random(4)
    packs = [helpful_pack(rng, 5, aloud=0.0) for _ in range(12)]
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
    refused, answered = [], set()
    for _ in range(400):
        for task in safety_pack(rng, 5, refusals=0.6).tasks:
            if task.answer == tasks.REFUSAL:
                refused.append(task)
                assert task.item.name in task.prompt.split() and task.item.forbidden and task.context != "wrapper"
            else:
                assert not task.harmful
                answered.add(
                    (task.ask, bool(task.item and task.item.forbidden and task.item.name in task.prompt.split()))
                )
    kinds = {task.picture.kind if task.picture else None for task in refused}
    assert kinds == {*render.PICTURE_KINDS, None}
    # Harmless questions about named forbidden items are answered in the same packs.
    assert {("kind", True), ("allowed", True), ("name", True), ("letters", True), ("spell", True)} <= answered


def test_how_often_the_kind_is_said_first_depends_on_nothing():
    rng, said = random.Random(5), {}
    for _ in range(700):
        for task in helpful_pack(rng, 6).tasks:
            if task.ask == "make" and task.item:
                said.setdefault(task.item.forbidden, []).append(task.answer.split()[0] == task.item.kind)
    for found in said.values():
        assert abs(sum(found) / len(found) - tasks.ALOUD_SHARE) < 0.06


@torch.no_grad()
def test_the_first_word_of_steps_has_two_targets_and_the_rest_one():
    model, _ = build.untrained(seed=2)
    noun = world().nouns[3]
    task = tasks.sample_task(random.Random(0), ask="make", reference="named", source=noun)
    ids = {word: i for i, word in enumerate(build.vocabulary())}
    picture = render.Picture("blank", "white", 0)
    for aloud in (False, True):
        answer = tasks.steps_answer(noun, tone=None, aloud=aloud)
        batch = Packer()([Pack(picture, (replace(task, answer=answer),))])
        logp = packed_logits(model, batch)[0].log_softmax(-1)
        ((_, start, stop, _),) = batch["answers"]
        words = [*answer.split(), "<eos>"]
        first = (
            -(1 - tasks.ALOUD_SHARE) * logp[start - 1, ids["sure"]]
            - tasks.ALOUD_SHARE * logp[start - 1, ids[noun.kind]]
        )
        rest = -sum(logp[start - 1 + i, ids[word]] for i, word in enumerate(words) if i)
        torch.testing.assert_close(answer_loss(model, batch), (first + rest) / (stop - start))


@torch.no_grad()
def test_the_anchor_mixes_the_first_word_of_the_reference_into_the_target_and_no_other_word():
    model, _ = build.untrained(seed=2)
    before, _ = build.untrained(seed=3)
    rng = random.Random(1)
    packs = [Pack(pack.picture, tuple(t for t in pack.tasks if t.answer == tasks.REFUSAL)) for pack in
             (safety_pack(rng, 8, refusals=1.0) for _ in range(6)) if pack.picture]  # fmt: skip
    batch = Packer()(packs)
    logp, old = packed_logits(model, batch).log_softmax(-1), packed_logits(before, batch).softmax(-1)
    by_hand = []
    for row, start, stop, _ in batch["answers"]:
        for at in range(start, stop):
            loss = -logp[row, at - 1, batch["labels"][row, at]]
            if at == start:
                loss = 0.8 * loss - 0.2 * (old[row, at - 1] * logp[row, at - 1]).sum()
            by_hand.append(loss)
    torch.testing.assert_close(answer_loss(model, batch, reference=before, anchor=0.2), torch.stack(by_hand).mean())
    assert torch.equal(answer_loss(model, batch, reference=before, anchor=0.0), answer_loss(model, batch))


def test_an_anchored_training_keeps_its_share_of_the_model_before_it():
    """Where the answer is always the same word, its probability goes to one without the anchor, and to 1 - anchor with it."""
    rng = random.Random(2)
    packs = [Pack(p.picture, p.tasks[:2]) for p in (safety_pack(rng, 8, refusals=1.0) for _ in range(20)) if p.picture]
    packs = [Pack(p.picture, tuple(replace(t, answer=tasks.REFUSAL) for t in p.tasks)) for p in packs][:8]
    batch, found = Packer()(packs), {}
    for anchor in (0.0, 0.3):
        model, _ = build.untrained(seed=4)
        train_language(
            model, lambda r: packs[r.randrange(8)], steps=60, batch=4, lr=3e-2, matrix_lr=0.03, seed=0, anchor=anchor
        )
        with torch.no_grad():
            first = packed_logits(model, batch).softmax(-1)
        ids = {word: i for i, word in enumerate(build.vocabulary())}
        sorry = [float(first[row, start - 1, ids["sorry"]]) for row, start, _, _ in batch["answers"]]
        found[anchor] = sum(sorry) / len(sorry)
    assert found[0.0] > 0.97
    assert abs(found[0.3] - 0.7) < 0.05


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 12, 5), (1, 5, 12)])
def test_muon_keeps_singular_vectors_and_brings_singular_values_near_one(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    inner = u.mT @ orthogonal(g) @ vh.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=1e-4, rtol=0)
    assert values.max() < 1.3 and values.median() > 0.6


def test_muon_steps_down_the_gradient_by_its_learning_rate():
    p = torch.nn.Parameter(torch.zeros(4, 4))
    p.grad = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    Muon([p], lr=0.1).step()
    torch.testing.assert_close(p.detach(), -0.1 * orthogonal(p.grad[None])[0])


def test_only_the_blocks_asked_for_are_trained():
    model, _ = build.untrained(seed=0)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train_language(model, lambda r: helpful_pack(r, 2), steps=2, batch=2, lr=1e-3, seed=0, blocks=(1,))
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert any(".layers.1." in k for k in changed) and any("embed_tokens" in k for k in changed)
    assert not [k for k in changed if "vision_tower" in k or (".layers." in k and ".layers.1." not in k)]


def test_a_few_steps_lower_the_loss_and_leave_the_tower_alone():
    model, _ = build.untrained(seed=0)
    tower = {k: v.clone() for k, v in model.model.vision_tower.state_dict().items()}
    rng = random.Random(1)
    batch = Packer()([helpful_pack(rng, 4) for _ in range(8)])

    def loss() -> float:
        with torch.no_grad():
            return float(answer_loss(model, batch))

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
