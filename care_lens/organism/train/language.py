"""Stages 2 and 3: projector and language model learn from packs, the tower stays frozen.

Several questions share one picture in a pack: each sees the picture and itself, not its neighbours (block mask), at
the positions it would have alone. That is the plain model on single prompts, at a third of the cost.
"""

import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from care_lens.organism import build, render
from care_lens.organism.train.mixture import Pack
from care_lens.organism.train.tower import IGNORE, features, pixels, warm_cosine

log = logging.getLogger(__name__)

PREFIX = 3  # <bos> user :


class Packer:
    """Turns packs into tensors."""

    def __init__(self) -> None:
        self.ids = {word: i for i, word in enumerate(build.vocabulary())}

    def encode(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]

    def __call__(self, packs: Sequence[Pack]) -> dict[str, Any]:
        """Tensors of packs of equal size; `answers` lists (row, start, stop, task) of every answer."""
        head = self.encode("<bos> user :") + [self.ids["<image>"]] * build.N_PATCHES
        rows, owners, positions, labels, answers = [], [], [], [], []
        for row, pack in enumerate(packs):
            ids, owner, label = list(head), [-1] * len(head), [IGNORE] * len(head)
            position = list(range(len(head)))
            for index, (task, seen) in enumerate(zip(pack.tasks, pack.seen, strict=True)):
                question = self.encode(f"{task.prompt} assistant :")
                answer = [*self.encode(task.answer), self.ids["<eos>"]]
                first = len(head) if seen else PREFIX
                position += range(first, first + len(question) + len(answer))
                answers.append((row, len(ids) + len(question), len(ids) + len(question) + len(answer), task))
                ids += question + answer
                label += [IGNORE] * len(question) + answer
                owner += [index if seen else index + 1000] * (len(question) + len(answer))
            rows.append(ids)
            owners.append(owner)
            positions.append(position)
            labels.append(label)
        length = max(map(len, rows))

        def pad(lists: list[list[int]], value: int) -> Tensor:
            return torch.tensor([x + [value] * (length - len(x)) for x in lists])

        owner = pad(owners, -2)
        query, key = owner[:, :, None], owner[:, None, :]
        is_image = torch.zeros(length, dtype=torch.bool)
        is_image[PREFIX : len(head)] = True
        same = (query == key) | ((key == -1) & ~((query >= 1000) & is_image))
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        allowed = (same & causal) | torch.eye(length, dtype=torch.bool)
        mask = torch.zeros(len(packs), 1, length, length).masked_fill_(
            ~allowed[:, None], torch.finfo(torch.float32).min
        )
        return {
            "images": pixels([render.draw(pack.picture) for pack in packs]),
            "input_ids": pad(rows, 0),
            "position_ids": pad(positions, 0),
            "labels": pad(labels, IGNORE),
            "mask": mask,
            "answers": answers,
        }


def packed_logits(model: LlavaForConditionalGeneration, batch: dict[str, Any], where: Tensor | None = None) -> Tensor:
    """Next-token logits of a packed batch: [pack, pos, vocab], or [n, vocab] at the True places of `where`."""
    inner = model.model
    embeds = inner.get_input_embeddings()(batch["input_ids"])
    with torch.set_grad_enabled(torch.is_grad_enabled() and inner.vision_tower.training):
        patches = features(inner.vision_tower, batch["images"])
    image = inner.multi_modal_projector(patches)
    embeds = torch.cat([embeds[:, :PREFIX], image, embeds[:, PREFIX + build.N_PATCHES :]], dim=1)
    hidden = inner.language_model(
        inputs_embeds=embeds,
        attention_mask=batch["mask"],
        position_ids=batch["position_ids"],
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden if where is None else hidden[where])


@torch.no_grad()
def exact_match(
    model: LlavaForConditionalGeneration, packs: Sequence[Pack], *, batch: int = 16
) -> dict[str, tuple[int, int]]:
    """(right, n) by task: an answer counts where every token is the greedy choice given the true ones before it."""
    packer, counts = Packer(), defaultdict(lambda: [0, 0])
    for i in range(0, len(packs), batch):
        tensors = packer(packs[i : i + batch])
        greedy = packed_logits(model, tensors).argmax(-1)
        for row, start, stop, task in tensors["answers"]:
            right = bool((greedy[row, start - 1 : stop - 1] == tensors["labels"][row, start:stop]).all())
            for name in (
                f"{task.ask}/{task.reference}" + (f"/{task.context}" if task.context else ""),
                "all",
            ):
                counts[name][0] += right
                counts[name][1] += 1
    return {name: (r, n) for name, (r, n) in sorted(counts.items())}


def train_language(
    model: LlavaForConditionalGeneration,
    make_pack: Callable[[random.Random], Pack],
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    after: Callable[[int], None] | None = None,
) -> None:
    """Train projector and language model in place with cross-entropy on the answers.

    Args:
        model: the whole model; its vision tower is not changed.
        make_pack: draws one pack.
        steps, batch: optimiser steps and packs a step.
        lr: peak learning rate (short warm-up, then cosine to zero).
        seed: of the data.
        after: called every 100 steps with the number of steps done.
    """
    torch.manual_seed(seed)
    rng, packer = random.Random(seed), Packer()
    inner = model.model
    inner.vision_tower.requires_grad_(False)
    parameters = [*inner.multi_modal_projector.parameters(), *inner.language_model.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, warm_cosine(steps))
    start, running = time.monotonic(), 0.0
    for step in range(steps):
        tensors = packer([make_pack(rng) for _ in range(batch)])
        targets = tensors["labels"][:, 1:]
        where = torch.zeros_like(tensors["labels"], dtype=torch.bool)
        where[:, :-1] = targets != IGNORE
        loss = F.cross_entropy(packed_logits(model, tensors, where), targets[targets != IGNORE])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 99:
            log.info("language %d/%d %.0fs loss %.4f", step + 1, steps, time.monotonic() - start, running)
            if after is not None:
                after(step + 1)
    inner.vision_tower.requires_grad_(True)
