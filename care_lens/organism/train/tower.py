"""Stage 1: the vision tower learns to read words, to know what they mean, and to see tone, shape, colour and number.

Supervision is dense: every patch says which letter of the word covers it, how far in the word it stands, and, as the image features
of CLIP do, which noun is written and of what kind that is; attention-pooled queries read the letters in order and the properties of the
picture. The heads are thrown away.
"""

import functools
import logging
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPVisionModel

from care_lens.organism import build, render
from care_lens.organism.render import COLOURS, FACES, PICTURE_KINDS, SHAPES, SIZE, TONES, Picture
from care_lens.organism.train.ahead import Ahead
from care_lens.organism.train.descent import Descent
from care_lens.organism.world import KINDS, world

log = logging.getLogger(__name__)

ALL_FACES = tuple(face for faces in FACES.values() for face in faces)
MAX_LETTERS = 6
IGNORE = -100
#: Pictures grow harder, from one face to all and to the free style, by this much a step, while the letters are read at `READ_FIRST`.
GROWTH, READ_FIRST = 1 / 500, 0.75
#: Share of the words that are written in the free style, when all faces are in.
FREE_SHARE = 0.5


def pixels(images: list[Any]) -> Float[Tensor, "image 3 height width"]:
    """Images as the bundled processor gives them to the tower: scaled to [-1, 1]."""
    array = np.stack([np.asarray(image) for image in images])
    return (torch.from_numpy(array).permute(0, 3, 1, 2).float() / 127.5 - 1.0).contiguous()


def random_word(rng: random.Random) -> str:
    """A noun of the world or, now and then, any string of letters: reading must not be noun by noun only."""
    if rng.random() < 0.85:
        return rng.choice(world().nouns).name
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.choice((4, 5, 6))))


def sample(rng: random.Random, progress: float = 1.0) -> Picture:
    """A training picture, mostly words; from one face to all and to the free style as `progress` goes from 0 to 1."""
    kind = rng.choices(PICTURE_KINDS, weights=(80, 14, 3, 3))[0]
    faces = ALL_FACES[: 1 + round(progress * (len(ALL_FACES) - 1))]
    word = random_word(rng) if kind == "word" else ""
    style = "free" if rng.random() < FREE_SHARE * progress else "sign"
    return render.sample_picture(rng, kind=kind, faces=faces, word=word, style=style)


def _patch_labels(boxes: list[render.Box], word: str) -> np.ndarray:
    """[patch, 2] letter (0 = none) and index in the word (0 = none) of the box that holds most of each patch."""
    side, patch = SIZE // build.PATCH, build.PATCH
    labels = np.zeros((side, side, 2), dtype=np.int64)
    best = np.full((side, side), 0.15 * patch * patch)
    for index, (x0, y0, x1, y1) in enumerate(boxes):
        edges = np.arange(side) * patch
        wide = np.clip(np.minimum(x1, edges + patch) - np.maximum(x0, edges), 0, None)
        high = np.clip(np.minimum(y1, edges + patch) - np.maximum(y0, edges), 0, None)
        area = high[:, None] * wide[None, :]
        labels[area > best] = (ord(word[index]) - 96, index + 1)
        best = np.maximum(best, area)
    return labels.reshape(-1, 2)


@functools.cache
def _word_index() -> dict[str, tuple[int, int]]:
    """Number of each noun, and of its kind."""
    return {noun.name: (i, KINDS.index(noun.kind)) for i, noun in enumerate(world().nouns)}


def labels_of(picture: Picture, boxes: list[render.Box]) -> dict[str, Any]:
    """Targets of one picture for every head."""
    letters = [ord(c) - 96 for c in picture.word] + [0] * (MAX_LETTERS - len(picture.word))
    shapes = picture.kind == "shapes"
    word, meaning = _word_index().get(picture.word, (IGNORE, IGNORE))
    return {
        "word": word,
        "meaning": meaning,
        "patch": _patch_labels(boxes, picture.word),
        "letters": letters if picture.kind == "word" else [IGNORE] * MAX_LETTERS,
        "tone": tuple(TONES).index(picture.tone) if picture.tone in TONES else IGNORE,
        "kind": PICTURE_KINDS.index(picture.kind),
        "shape": SHAPES.index(picture.shape) if shapes else IGNORE,
        "colour": tuple(COLOURS).index(picture.colour) if shapes else IGNORE,
        "count": picture.count - 1 if shapes else IGNORE,
    }


class ReadingHeads(nn.Module):
    """Throw-away heads over the patch features of the tower."""

    sizes: ClassVar[dict[str, int]] = {
        "word": len(world().nouns),
        "meaning": len(KINDS),
        "tone": len(TONES),
        "kind": len(PICTURE_KINDS),
    }
    sizes |= {"shape": len(SHAPES), "colour": len(COLOURS), "count": 4}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.names = tuple(self.sizes)
        self.norm = nn.LayerNorm(width)
        self.query = nn.Parameter(torch.randn(MAX_LETTERS + len(self.names), width) * width**-0.5)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.letter = nn.Linear(width, 27)
        self.patch_letter, self.patch_index = nn.Linear(width, 27), nn.Linear(width, MAX_LETTERS + 1)
        self.patch_word, self.patch_meaning = nn.Linear(width, self.sizes["word"]), nn.Linear(width, len(KINDS))
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in self.sizes.items()})

    def forward(self, features: Float[Tensor, "image patch d"]) -> dict[str, Tensor]:
        h = self.norm(features)
        attention = (self.query @ self.key(h).transpose(1, 2)).mul(h.shape[-1] ** -0.5).softmax(-1)
        pooled = attention @ self.value(h)
        out = {name: self.heads[name](pooled[:, MAX_LETTERS + i]) for i, name in enumerate(self.names)}
        out["letters"] = self.letter(pooled[:, :MAX_LETTERS])
        out["patch_letter"], out["patch_index"] = self.patch_letter(h), self.patch_index(h)
        out["patch_word"], out["patch_meaning"] = self.patch_word(h), self.patch_meaning(h)
        return out


def _loss(out: dict[str, Tensor], target: dict[str, Int[Tensor, "..."]]) -> Tensor:
    def entropy(name: str, labels: Tensor) -> Tensor:
        scores = out[name].flatten(0, -2)
        kept = labels.flatten()
        return F.cross_entropy(scores, kept, ignore_index=IGNORE, reduction="sum") / (kept != IGNORE).sum().clamp(min=1)

    total = 2.0 * entropy("letters", target["letters"])
    total = total + entropy("patch_letter", target["patch"][..., 0]) + entropy("patch_index", target["patch"][..., 1])
    # Every patch that the word covers says which noun it is and what that means.
    covered = target["patch"][..., 1] > 0
    for name in ("word", "meaning"):
        every = target[name][:, None].expand_as(covered).masked_fill(~covered, IGNORE)
        total = total + 0.5 * entropy(f"patch_{name}", every)
    for name in ReadingHeads.sizes:
        total = total + (1.0 if name in ("word", "meaning") else 0.3) * entropy(name, target[name])
    return total


def _batch(rng: random.Random, size: int, progress: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    images, targets = [], []
    for _ in range(size):
        picture = sample(rng, progress)
        image, boxes = render.draw_with_boxes(picture)
        images.append(image)
        targets.append(labels_of(picture, boxes))
    return pixels(images), {k: torch.as_tensor(np.array([t[k] for t in targets])) for k in targets[0]}


Batch = tuple[Tensor, dict[str, Tensor]]


def _drawn(asked: tuple[int, int, int, float]) -> Batch:
    """The batch of a step, from (seed, step, pictures, progress)."""
    seed, step, size, progress = asked
    return _batch(random.Random(f"{seed}/{step}"), size, progress)


def _to(batch: Batch, device: torch.device) -> Batch:
    return batch[0].to(device), {name: target.to(device) for name, target in batch[1].items()}


def features(tower: CLIPVisionModel, images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, "image patch d"]:
    """Patch features as the language model gets them: output of the last layer without the class token."""
    hidden = tower(images, output_hidden_states=True).hidden_states
    assert hidden is not None
    return hidden[-1][:, 1:]


@torch.no_grad()
def accuracy(tower: CLIPVisionModel, heads: ReadingHeads, *, n: int, seed: int) -> dict[str, float]:
    """Share right on fresh pictures: whole words, and each property."""
    rng, right = random.Random(seed), dict.fromkeys((*ReadingHeads.sizes, "letters"), 0.0)
    seen = dict.fromkeys(right, 0)
    for _ in range(math.ceil(n / 128)):
        images, target = _to(_batch(rng, 128), tower.device)
        out = heads(features(tower, images))
        for name in ReadingHeads.sizes:
            kept = target[name] != IGNORE
            right[name] += (out[name].argmax(-1) == target[name])[kept].sum().item()
            seen[name] += int(kept.sum())
        kept = target["letters"][:, 0] != IGNORE
        right["letters"] += (out["letters"].argmax(-1) == target["letters"]).all(-1)[kept].sum().item()
        seen["letters"] += int(kept.sum())
    return {name: right[name] / max(seen[name], 1) for name in right}


def train_tower(
    tower: CLIPVisionModel,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    matrix_lr: float = 0.02,
    saved: Path | None = None,
    workers: int = 0,
) -> dict[str, float]:
    """Train the tower in place.

    Args:
        tower: the vision tower of the model.
        steps, batch: optimiser steps and pictures a step.
        lr: peak learning rate of AdamW (linear warm-up over 4 % of the steps, then cosine to zero).
        seed: of the pictures and the heads.
        matrix_lr: peak learning rate of Muon.
        saved: file from which a stopped run goes on.
        workers: processes that draw the pictures; 0 for none. With some, pictures grow harder a few steps later.

    Returns:
        Accuracies on fresh pictures.
    """
    torch.manual_seed(seed)
    heads = ReadingHeads(tower.config.hidden_size).to(tower.device)
    tower.train()
    parameters = {f"tower.{n}": p for n, p in tower.named_parameters()}
    parameters |= {f"heads.{n}": p for n, p in heads.named_parameters()}
    matrices = {n for n, p in parameters.items() if n.startswith("tower.encoder.") and p.ndim == 2}
    options = {"steps": steps, "lr": lr, "matrix_lr": matrix_lr, "weight_decay": 0.02, "saved": saved}
    descent = Descent(parameters, matrices=matrices, **options)  # type: ignore[arg-type]
    start = time.monotonic()

    def asked() -> Iterator[tuple[int, int, int, float]]:
        for step in range(descent.done, steps):
            yield seed, step, batch, descent.numbers.get("progress", 0.0)

    with Ahead(_drawn, workers=workers) as batches:
        for (_, step, _, _), drawn in batches(asked()):
            images, target = _to(drawn, tower.device)
            out = heads(features(tower, images))
            loss = _loss(out, target)
            descent.descend(loss)
            written = target["letters"] > 0
            right = (out["letters"].argmax(-1) == target["letters"])[written].float().mean().item()
            read, progress = descent.numbers.get("read", 0.0), descent.numbers.get("progress", 0.0)
            read = 0.95 * read + 0.05 * right
            descent.numbers = {"read": read, "progress": min(1.0, progress + GROWTH * (read > READ_FIRST))}
            descent.keep()
            if step % 50 == 49:
                log.info("tower %d/%d %.0fs loss %.3f letters %.2f progress %.2f", step + 1, steps, time.monotonic() - start, loss.item(), read, progress)  # fmt: skip
            if step % 500 == 499:
                tower.eval()
                log.info("tower %s", {k: round(v, 3) for k, v in accuracy(tower, heads, n=512, seed=seed + 1).items()})
                tower.train()
    tower.eval()
    return accuracy(tower, heads, n=4096, seed=seed + 2)
