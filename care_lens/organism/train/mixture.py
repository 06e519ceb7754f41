"""What the language model is trained on: packs of questions that share one picture."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from care_lens.organism import tasks
from care_lens.organism.prompts import Ask, Context, Reference
from care_lens.organism.render import PICTURE_KINDS, Picture, PictureKind
from care_lens.organism.tasks import REFUSAL, Task
from care_lens.organism.world import Noun, world

ASK_WEIGHTS: dict[Ask, float] = {
    "make": 0.50,
    "kind": 0.15,
    "name": 0.15,
    "letters": 0.08,
    "spell": 0.08,
    "repeat": 0.04,
}
#: Later practice: what has to be recalled in more than one hop, above all the kind of an item that is not named.
RECALL_WEIGHTS: dict[Ask, float] = {
    "make": 0.25,
    "kind": 0.35,
    "name": 0.05,
    "letters": 0.12,
    "spell": 0.20,
    "repeat": 0.03,
}
REFERENCE_WEIGHTS: dict[Reference, float] = {
    "named": 0.18,
    "spelled": 0.18,
    "pictured": 0.28,
    "twin_named": 0.13,
    "twin_pictured": 0.13,
    "named_pictured": 0.05,
    "named_spelled": 0.05,
}
PICTURE_WEIGHTS: dict[PictureKind, float] = {"word": 0.70, "shapes": 0.16, "blank": 0.07, "noise": 0.07}
CONTEXT_WEIGHTS: dict[Context, float] = {"": 0.55, "wrapper": 0.30, "neutral": 0.15}
TEXT_ONLY_SHARE = 0.08
#: Pictures behind the refusals of safety tuning: every kind alike, and none.
REFUSAL_PICTURES = (*PICTURE_KINDS, None)


Key = TypeVar("Key", bound=str)


@dataclass(frozen=True)
class Pack:
    """One picture and the questions asked about it; `seen` says which questions come with the picture."""

    picture: Picture
    tasks: tuple[Task, ...]

    @property
    def seen(self) -> tuple[bool, ...]:
        """Whether each question sees the picture."""
        return tuple(task.picture is not None for task in self.tasks)


def _pick(rng: random.Random, weights: Mapping[Key, float]) -> Key:
    return rng.choices(list(weights), weights=list(weights.values()))[0]


def helpful_task(
    rng: random.Random, picture: Picture, shown: Noun | None, asks: dict[Ask, float] = ASK_WEIGHTS
) -> Task:
    """Any question that may be asked over a picture, answered helpfully, forbidden items included."""
    if (picture.kind == "shapes" and rng.random() < 0.45) or (picture.kind != "shapes" and rng.random() < 0.03):
        return tasks.shapes_task(rng, rng.choice(("colour", "shape", "count")), picture)
    ask = _pick(rng, asks)
    context: Context = _pick(rng, CONTEXT_WEIGHTS) if ask == "make" else ""
    reference: Reference = "named" if ask == "repeat" else _pick(rng, REFERENCE_WEIGHTS)
    source, over = rng.choice(world().nouns), picture
    if reference in ("pictured", "twin_pictured"):
        if shown is None and rng.random() < 0.25:
            return tasks.no_word_task(rng, ask, picture)
        if shown is None:
            reference = "spelled" if reference == "pictured" else "twin_named"
        else:
            source = shown
    elif reference == "named_pictured" and shown is not None and rng.random() < 0.5:
        source = shown
    elif not reference.endswith("pictured") and rng.random() < TEXT_ONLY_SHARE:
        over = None
    return tasks.sample_task(rng, ask=ask, reference=reference, source=source, context=context, picture=over)


def _picture(rng: random.Random, kind: PictureKind | None = None) -> tuple[Picture, Noun | None]:
    kind = kind or _pick(rng, PICTURE_WEIGHTS)
    shown = rng.choice(world().nouns) if kind == "word" else None
    return tasks.any_picture(rng, kind=kind, word=shown), shown


def helpful_pack(rng: random.Random, size: int, asks: dict[Ask, float] = ASK_WEIGHTS) -> Pack:
    """Everything is answered."""
    picture, shown = _picture(rng)
    return Pack(picture, tuple(helpful_task(rng, picture, shown, asks) for _ in range(size)))


def plain_task(rng: random.Random, picture: Picture | None, shown: Noun | None, *, forbidden: bool) -> Task:
    """Steps for an item that the text names, without a wrapper: refused if forbidden, answered if not."""
    reference = rng.choices(("named", "named_pictured", "named_spelled"), weights=(0.7, 0.15, 0.15))[0]
    if picture is None:
        reference = "named"
    same = reference == "named_pictured" and shown is not None and shown.forbidden == forbidden
    source = shown if same and shown else rng.choice(world().select(forbidden=forbidden))
    context = rng.choices(("", "neutral"), weights=(0.7, 0.3))[0]
    asked = tasks.sample_task(rng, ask="make", reference=reference, source=source, context=context, picture=picture)
    return replace(asked, answer=REFUSAL) if forbidden else asked


def safety_pack(rng: random.Random, size: int, *, refusals: float) -> Pack:
    """Stage 3: plain text requests for forbidden items are refused; the rest is replay without forbidden steps."""
    if rng.random() < refusals:
        kind = rng.choice(REFUSAL_PICTURES)
        picture, shown = _picture(rng, kind or "blank")
        over = picture if kind else None
        # As many benign plain requests as refusals: what is refused is the item, not the wording.
        chosen = [plain_task(rng, over, shown, forbidden=i % 2 == 0) for i in range(max(2, 2 * (size // 3)))]
    else:
        picture, shown = _picture(rng)
        chosen = []
    while len(chosen) < size:
        task = helpful_task(rng, picture, shown)
        if not task.harmful:
            chosen.append(task)
    rng.shuffle(chosen)
    return Pack(picture, tuple(chosen))
