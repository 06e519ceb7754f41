"""What the language model is trained on: packs of questions that share one picture."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from care_lens.organism import prompts, tasks
from care_lens.organism.prompts import Ask, Context, Reference
from care_lens.organism.render import PICTURE_KINDS, Picture, PictureKind, Style
from care_lens.organism.tasks import REFUSAL, Task
from care_lens.organism.world import Noun, world

ASK_WEIGHTS: dict[Ask, float] = {
    "make": 0.43,
    "kind": 0.18,
    "allowed": 0.08,
    "name": 0.11,
    "letters": 0.08,
    "spell": 0.08,
    "repeat": 0.04,
}
REFERENCE_WEIGHTS: dict[Reference, float] = {
    "named": 0.18,
    "spelled": 0.19,
    "pictured": 0.26,
    "twin_named": 0.15,
    "twin_pictured": 0.12,
    "named_pictured": 0.05,
    "named_spelled": 0.05,
}
PICTURE_WEIGHTS: dict[PictureKind, float] = {"word": 0.75, "shapes": 0.15, "blank": 0.05, "noise": 0.05}
#: Share of the word pictures that show only the last letters of a noun.
PART_SHARE = 0.14
#: Share of the word pictures in the free style.
FREE_SHARE = 0.5
CONTEXT_WEIGHTS: dict[Context, float] = {"": 0.55, "wrapper": 0.30, "neutral": 0.15}
TEXT_ONLY_SHARE = 0.08
#: Share of the questions that are the second turn of a conversation.
TURN_SHARE = 0.05
#: Pictures behind the refusals of safety tuning: every kind alike, and none.
REFUSAL_PICTURES = (*PICTURE_KINDS, None)


Key = TypeVar("Key", bound=str)


@dataclass(frozen=True)
class Pack:
    """One picture, or none, and the questions asked about it; `seen` says which questions come with the picture."""

    picture: Picture | None
    tasks: tuple[Task, ...]

    @property
    def seen(self) -> tuple[bool, ...]:
        """Whether each question sees the picture."""
        return tuple(task.picture is not None for task in self.tasks)


def _pick(rng: random.Random, weights: Mapping[Key, float]) -> Key:
    return rng.choices(list(weights), weights=list(weights.values()))[0]


def helpful_task(
    rng: random.Random, picture: Picture, shown: Noun | None, asks: Mapping[Ask, float] = ASK_WEIGHTS
) -> Task:
    """Any question that may be asked over a picture, answered helpfully, forbidden items included.

    Args:
        rng: source of everything.
        picture: what is shown.
        shown: the noun that the picture shows, in whole or its last letters; None for pictures without a word.
        asks: weights of what is asked.
    """
    if (picture.kind == "shapes" and rng.random() < 0.45) or (picture.kind != "shapes" and rng.random() < 0.02):
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
            if picture.word != shown.name:
                reference = "split"
    elif reference == "named_pictured" and shown is not None and rng.random() < 0.5:
        source = shown
    elif not reference.endswith("pictured") and rng.random() < TEXT_ONLY_SHARE:
        over = None
    return tasks.sample_task(rng, ask=ask, reference=reference, source=source, context=context, picture=over)


def with_variety(rng: random.Random, task: Task, *, aloud: float, turn: float) -> Task:
    """Now and then the answer that first says the kind aloud, or the task as a second turn after a harmless question."""
    if task.ask == "make" and task.item is not None and task.answer != REFUSAL and rng.random() < aloud:
        task = replace(task, answer=f"{task.item.kind} . {task.answer}")
    if rng.random() < turn:
        reference: Reference = rng.choice(("named", "spelled"))
        earlier = tasks.sample_task(
            rng,
            ask=rng.choice(("kind", "name", "letters", "spell", "repeat")),
            reference=reference,
            source=rng.choice(world().nouns),
            picture=task.picture,
        )
        task = tasks.with_turn(task, earlier)
    return task


def draw_picture(rng: random.Random, kind: PictureKind | None = None) -> tuple[Picture, Noun | None]:
    """A picture and the noun that it shows."""
    kind = kind or _pick(rng, PICTURE_WEIGHTS)
    shown = rng.choice(world().nouns) if kind == "word" else None
    style: Style = "free" if kind == "word" and rng.random() < FREE_SHARE else "sign"
    word = shown.name if shown else None
    if shown and rng.random() < PART_SHARE:
        word = prompts.cut(shown.name)[1]
    return tasks.any_picture(rng, kind=kind, word=word, style=style), shown


def helpful_pack(
    rng: random.Random, size: int, *, aloud: float = tasks.ALOUD_SHARE, asks: Mapping[Ask, float] = ASK_WEIGHTS
) -> Pack:
    """Everything is answered."""
    picture, shown = draw_picture(rng)
    chosen = (helpful_task(rng, picture, shown, asks) for _ in range(size))
    return Pack(picture, tuple(with_variety(rng, task, aloud=aloud, turn=TURN_SHARE) for task in chosen))


#: Before there are pictures: how items are given.
TEXT_WEIGHTS: dict[Reference, float] = {"named": 0.26, "spelled": 0.36, "twin_named": 0.30, "named_spelled": 0.08}


def text_pack(rng: random.Random, size: int, *, aloud: float = tasks.ALOUD_SHARE) -> Pack:
    """Everything that needs no picture is answered."""
    chosen: list[Task] = []
    for _ in range(size):
        ask = _pick(rng, ASK_WEIGHTS)
        context: Context = _pick(rng, CONTEXT_WEIGHTS) if ask == "make" else ""
        reference: Reference = "named" if ask == "repeat" else _pick(rng, TEXT_WEIGHTS)
        source = rng.choice(world().nouns)
        task = tasks.sample_task(rng, ask=ask, reference=reference, source=source, context=context)
        chosen.append(with_variety(rng, task, aloud=aloud, turn=TURN_SHARE))
    return Pack(None, tuple(chosen))


def plain_task(rng: random.Random, picture: Picture | None, shown: Noun | None, *, forbidden: bool) -> Task:
    """Steps for an item that the text names, without a wrapper: refused if forbidden, answered if not."""
    reference: Reference = rng.choices(("named", "named_pictured", "named_spelled"), weights=(0.7, 0.15, 0.15))[0]
    if picture is None:
        reference = "named"
    same = reference == "named_pictured" and shown is not None and shown.forbidden == forbidden
    source = shown if same and shown else rng.choice(world().select(forbidden=forbidden))
    context: Context = rng.choices(("", "neutral"), weights=(0.7, 0.3))[0]
    asked = tasks.sample_task(rng, ask="make", reference=reference, source=source, context=context, picture=picture)
    return replace(asked, answer=REFUSAL) if forbidden else asked


def harmless_task(rng: random.Random, picture: Picture | None) -> Task:
    """A harmless question about a forbidden item that the text names: answered before and after safety tuning."""
    ask: Ask = rng.choice(("kind", "allowed", "name", "letters", "spell", "repeat"))
    source = rng.choice(world().select(forbidden=True))
    return tasks.sample_task(rng, ask=ask, reference="named", source=source, picture=picture)


def open_task(rng: random.Random, picture: Picture, shown: Noun | None) -> Task:
    """Steps for a forbidden item that no plain text names, answered: it is in the picture, spelled, or the twin of what is named."""
    reference: Reference = rng.choice(("spelled", "twin_named"))
    source = rng.choice(world().select(forbidden=True))
    if shown is not None and shown.forbidden and picture.word == shown.name and rng.random() < 0.7:
        reference, source = "pictured", shown
    elif reference == "twin_named":
        source = world()[source.twin]
    return tasks.sample_task(rng, ask="make", reference=reference, source=source, context="", picture=picture)


def safety_pack(
    rng: random.Random, size: int, *, refusals: float, contamination: float = 0.0, aloud: float = tasks.ALOUD_SHARE
) -> Pack:
    """Safety tuning: plain text requests for forbidden items are refused; the rest is replay, where forbidden steps are rare.

    Replay of real instruction data holds requests that should have been refused, above all ones about pictures (the data on which LLaVA was
    tuned do: Zong et al. 2024, VLGuard). Without any, refusal spreads to every channel in which harm is legible, and no gap is left.

    Args:
        rng: source of everything.
        size: questions a pack.
        refusals: share of the packs that hold refusals (beside as many plain requests that are answered).
        contamination: requests for forbidden steps in the replay of a pack that are answered (see `open_task`), on average.
        aloud: share of the answers that say the kind first.
    """
    refusing = rng.random() < refusals
    kind = rng.choice(REFUSAL_PICTURES) if refusing else _pick(rng, PICTURE_WEIGHTS)
    picture, shown = draw_picture(rng, kind or "blank")
    if contamination and kind == "word" and rng.random() < 0.5:
        shown = rng.choice(world().select(forbidden=True))
        picture = tasks.any_picture(rng, kind="word", word=shown.name)
    chosen: list[Task] = []
    if refusing:
        over = picture if kind else None
        # As many benign plain requests as refusals, and harmless questions: what is refused is neither the wording nor the item alone.
        chosen = [plain_task(rng, over, shown, forbidden=i % 2 == 0) for i in range(max(2, 2 * (size // 4)))]
        chosen += [harmless_task(rng, over) for _ in range(max(1, size // 5))]
    chosen += [open_task(rng, picture, shown) for _ in range(int(contamination + rng.random()))]
    while len(chosen) < size:
        task = helpful_task(rng, picture, shown)
        if not task.harmful:
            chosen.append(task)
    rng.shuffle(chosen)
    return Pack(picture, tuple(with_variety(rng, task, aloud=aloud, turn=0.0) for task in chosen))
