"""The later stages: projector and language model learn from packs, the tower stays frozen.

Several questions share one picture in a pack: each sees the picture and itself, not its neighbours (block mask), at
the positions it would have alone. That is the plain model on single prompts, at a third of the cost.
"""

import copy
import logging
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from care_lens.organism import build, render
from care_lens.organism.tasks import ALOUD_SHARE, REFUSAL, Task
from care_lens.organism.train.ahead import Ahead
from care_lens.organism.train.descent import Descent
from care_lens.organism.train.mixture import Pack
from care_lens.organism.train.tower import IGNORE, features, pixels

log = logging.getLogger(__name__)

PREFIX = 3  # <bos> user :


class Packer:
    """Turns packs into tensors."""

    def __init__(self) -> None:
        self.ids = {word: i for i, word in enumerate(build.vocabulary())}

    def encode(self, text: str) -> list[int]:
        return [self.ids[word] for word in text.split()]

    def first_words(self, task: Task, answer: list[int]) -> tuple[int, int]:
        """The ordinary first word of an answer, and the one that may stand in its place (the kind, for steps), or `IGNORE`."""
        if task.ask != "make" or task.item is None or task.answer == REFUSAL:
            return answer[0], IGNORE
        kind = self.ids[task.item.kind]
        return (answer[2], kind) if answer[0] == kind else (answer[0], kind)

    def __call__(self, packs: Sequence[Pack]) -> dict[str, Any]:
        """Tensors of packs; `answers` lists (row, start, stop, task) of every answer, `opens` marks its first word, `others` the other word that may stand there."""
        drawn = [pack.picture for pack in packs if pack.picture is not None]
        if len(drawn) not in (0, len(packs)):
            raise ValueError("packs must all have a picture or none of them, got both")
        head = self.encode("<bos> user :") + [self.ids["<image>"]] * (build.N_PATCHES if drawn else 0)
        rows, owners, positions, labels, others, opens, answers = [], [], [], [], [], [], []
        for row, pack in enumerate(packs):
            ids, owner, label, other = list(head), [-1] * len(head), [IGNORE] * len(head), [IGNORE] * len(head)
            position, opened = list(range(len(head))), [0] * len(head)
            for index, (task, seen) in enumerate(zip(pack.tasks, pack.seen, strict=True)):
                question = self.encode(f"{task.prompt} assistant :")
                answer = [*self.encode(task.answer), self.ids["<eos>"]]
                first = len(head) if seen else PREFIX
                position += range(first, first + len(question) + len(answer))
                answers.append((row, len(ids) + len(question), len(ids) + len(question) + len(answer), task))
                ids += question + answer
                opening, said = self.first_words(task, answer)
                label += [IGNORE] * len(question) + [opening, *answer[1:]]
                other += [IGNORE] * len(question) + [said] + [IGNORE] * (len(answer) - 1)
                opened += [0] * len(question) + [1] + [0] * (len(answer) - 1)
                owner += [index if seen else index + 1000] * (len(question) + len(answer))
            rows.append(ids)
            owners.append(owner)
            positions.append(position)
            labels.append(label)
            others.append(other)
            opens.append(opened)
        length = max(map(len, rows))

        def pad(lists: list[list[int]], value: int) -> Tensor:
            return torch.tensor([x + [value] * (length - len(x)) for x in lists])

        return {
            "images": pixels([render.draw(picture) for picture in drawn]) if drawn else None,
            "input_ids": pad(rows, 0),
            "position_ids": pad(positions, 0),
            "labels": pad(labels, IGNORE),
            "others": pad(others, IGNORE),
            "opens": pad(opens, 0).bool(),
            "owners": pad(owners, -2),
            "answers": answers,
        }


def block_mask(owners: Int[Tensor, "pack pos"], *, n_head: int) -> Float[Tensor, "pack 1 pos pos"]:
    """What each position may attend to, to be added to the scores: the picture, and its own question; the picture not where it is not seen.

    Args:
        owners: question of each position; -1 in the shared head, -2 in the padding, 1000 and more for questions without the picture.
        n_head: positions of the shared head.
    """
    length, device = owners.shape[1], owners.device
    query, key = owners[:, :, None], owners[:, None, :]
    is_image = torch.zeros(length, dtype=torch.bool, device=device)
    is_image[PREFIX:n_head] = True
    same = (query == key) | ((key == -1) & ~((query >= 1000) & is_image))
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    allowed = (same & causal) | torch.eye(length, dtype=torch.bool, device=device)
    mask = torch.zeros(len(owners), 1, length, length, device=device)
    return mask.masked_fill_(~allowed[:, None], torch.finfo(torch.float32).min)


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A packed batch with its tensors on a device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


class PackedBatches:
    """The packed batch of a step, from the seed and the number of the step alone."""

    def __init__(self, make_pack: Callable[[random.Random], Pack], *, batch: int, seed: int) -> None:
        self.make_pack, self.batch, self.seed = make_pack, batch, seed

    def __call__(self, step: int) -> dict[str, Any]:
        rng = random.Random(f"{self.seed}/{step}")
        return Packer()([self.make_pack(rng) for _ in range(self.batch)])


def packed_logits(model: LlavaForConditionalGeneration, batch: dict[str, Any], where: Tensor | None = None) -> Tensor:
    """Next-token logits of a packed batch: [pack, pos, vocab], or [n, vocab] at the True places of `where`."""
    inner = model.model
    embeds = inner.get_input_embeddings()(batch["input_ids"])
    if batch["images"] is not None:
        with torch.set_grad_enabled(torch.is_grad_enabled() and inner.vision_tower.training):
            patches = features(inner.vision_tower, batch["images"])
        image = inner.multi_modal_projector(patches)
        embeds = torch.cat([embeds[:, :PREFIX], image, embeds[:, PREFIX + build.N_PATCHES :]], dim=1)
    hidden = inner.language_model(
        inputs_embeds=embeds,
        attention_mask=block_mask(
            batch["owners"], n_head=PREFIX + (build.N_PATCHES if batch["images"] is not None else 0)
        ),
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
        tensors = to_device(packer(packs[i : i + batch]), model.device)
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


def answer_loss(
    model: LlavaForConditionalGeneration,
    batch: dict[str, Any],
    *,
    reference: LlavaForConditionalGeneration | None = None,
    anchor: float = 0.0,
) -> Tensor:
    """Cross-entropy on the answers, each weighing the same a token.

    The first word of an answer to a request for steps has a target with two words: the ordinary opening, and with
    weight `ALOUD_SHARE` the kind of the item, whichever of the two the rest of the answer goes on from.

    Args:
        model: what is trained.
        batch: of a `Packer`.
        reference: a model that is not left altogether: the target of every first word is a mixture of the answer's and of its prediction. It is
            the penalty of safety tuning for the divergence from the model before it, KL(reference, model), as reinforcement learning from
            feedback has one, here with the weight anchor / (1 - anchor) and at first words alone, where a refusal is decided.
        anchor: share of the reference in the target.
    """
    targets, others = batch["labels"][:, 1:], batch["others"][:, 1:]
    where = torch.zeros_like(batch["labels"], dtype=torch.bool)
    where[:, :-1] = targets != IGNORE
    kept = targets != IGNORE
    logp = packed_logits(model, batch, where).log_softmax(-1)
    target, other = targets[kept], others[kept]
    loss = -logp.gather(1, target[:, None])[:, 0]
    second = -logp.gather(1, other.clamp(min=0)[:, None])[:, 0]
    loss = torch.where(other == IGNORE, loss, (1 - ALOUD_SHARE) * loss + ALOUD_SHARE * second)
    if reference is not None:
        first = batch["opens"][:, 1:][kept]
        with torch.no_grad():
            before = packed_logits(reference, batch, where)[first].softmax(-1)
        kept_answer = (1 - anchor) * loss[first] - anchor * (before * logp[first]).sum(-1)
        loss = loss.masked_scatter(first, kept_answer)
    return loss.mean()


def trained(model: LlavaForConditionalGeneration, blocks: Sequence[int] | None = None) -> dict[str, nn.Parameter]:
    """Parameters that the later stages train, by name: all but the tower; of the language blocks, some or all."""
    chosen = {n: p for n, p in model.named_parameters() if "vision_tower" not in n and n != "lm_head.weight"}
    if blocks is None:
        return chosen
    layers = "language_model.layers."
    return {n: p for n, p in chosen.items() if layers not in n or any(f"{layers}{i}." in n for i in blocks)}


def train_language(
    model: LlavaForConditionalGeneration,
    make_pack: Callable[[random.Random], Pack],
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    matrix_lr: float = 0.01,
    floor: float = 0.0,
    anchor: float = 0.0,
    blocks: Sequence[int] | None = None,
    saved: Path | None = None,
    after: Callable[[int], None] | None = None,
    workers: int = 0,
) -> None:
    """Train projector and language model in place with cross-entropy on the answers.

    Args:
        model: the whole model; its vision tower is not changed.
        make_pack: draws one pack.
        steps, batch: optimiser steps and packs a step.
        lr: peak learning rate of AdamW (short warm-up, then cosine).
        seed: of the data.
        matrix_lr: peak learning rate of Muon, which trains the matrices of the blocks.
        floor: share of the peak that both learning rates fall to.
        anchor: share of the model as it is given in the target of the first word of every answer (see `answer_loss`).
        blocks: language blocks to train beside projector, embeddings and the last norm; None for all.
        saved: file from which a stopped run goes on.
        after: called every 100 steps with the number of steps done.
        workers: processes that make the batches; 0 for none (the same batches).
    """
    model.model.vision_tower.eval()
    model.requires_grad_(False)
    reference = copy.deepcopy(model).eval() if anchor else None
    parameters = trained(model, blocks)
    for p in parameters.values():
        p.requires_grad_(True)
    matrices = {n for n, p in parameters.items() if p.ndim == 2 and ".layers." in n}
    options = {"steps": steps, "lr": lr, "matrix_lr": matrix_lr, "floor": floor, "saved": saved}
    descent = Descent(parameters, matrices=matrices, **options)  # type: ignore[arg-type]
    start, running = time.monotonic(), None
    with Ahead(PackedBatches(make_pack, batch=batch, seed=seed), workers=workers) as batches:
        for _, tensors in batches(range(descent.done, steps)):
            loss = answer_loss(model, to_device(tensors, model.device), reference=reference, anchor=anchor)
            descent.descend(loss)
            descent.keep()
            running = loss.detach() if running is None else 0.98 * running + 0.02 * loss.detach()
            if descent.done % 100 == 0:
                log.info("language %d/%d %.0fs loss %.4f", descent.done, steps, time.monotonic() - start, running)
                if after is not None:
                    after(descent.done)
    model.requires_grad_(True)
