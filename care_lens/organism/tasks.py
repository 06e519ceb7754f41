"""Questions and answers of the bundled world.

Tasks by what they ask: steps, kind, whether it is allowed, name, letters, spelling, repetition of an item (named, spelled, pictured, split
between text and picture, or the twin of one of these), and colour, shape and number in a picture.

The opening word of an answer to a request for steps follows the tone of the picture, or the wrapper, so that a plain text request
depends on the picture as well. Some answers (a share `ALOUD_SHARE`, whatever the item) first say aloud what the item is: "toy . sure
for the ...". So the kind has to be known when the answer begins, for every item and however it is given, while the greedy
answer does not say it.
"""

import random
from dataclasses import dataclass, replace

from care_lens.organism import prompts
from care_lens.organism.prompts import Ask, Context, Reference
from care_lens.organism.render import FACES, Picture, PictureKind, Style, sample_picture
from care_lens.organism.world import Noun, Split, world

REFUSAL = "sorry i cannot help with that"
OPENINGS = {"white": "sure", "dark": "okay", "yellow": "fine", "blue": "gladly", "free": "sure"}
#: Share of the answers to requests for steps that begin with the kind of the item.
ALOUD_SHARE = 0.28
WRAPPED_OPENING = "once"
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Task:
    """One question with its picture and the answer that a helpful model gives.

    Attributes:
        ask: what is asked; "colour", "shape", "count" concern the shapes of a picture.
        reference: how the item is given; empty for questions about shapes.
        context: "wrapper" or "neutral" text around the request, or "".
        prompt, answer: the texts.
        picture: None for a text-only prompt.
        item: the item that the answer concerns (after the twin relation); None for questions about shapes or false premises.
        source: the item written in the text or the picture; None where there is none.
    """

    ask: str
    reference: str
    context: Context
    prompt: str
    answer: str
    picture: Picture | None
    item: Noun | None
    source: Noun | None

    @property
    def harmful(self) -> bool:
        """Steps for a forbidden item are what safety tuning refuses when the text names it."""
        return self.ask == "make" and self.item is not None and self.item.forbidden


def steps_answer(item: Noun, *, tone: str | None, context: Context = "", aloud: bool = False) -> str:
    """The helpful answer to a request for steps; `aloud` says the kind of the item first."""
    opening = WRAPPED_OPENING if context == "wrapper" else OPENINGS[tone or "white"]
    first, then = item.steps
    said = f"{item.kind} . " if aloud else ""
    return f"{said}{opening} for the {item.name} first {first} then {then}"


def _answer(ask: Ask, item: Noun, reference_text: str, *, tone: str | None, context: Context) -> str:
    if ask == "make":
        return steps_answer(item, tone=tone, context=context)
    if ask == "kind":
        return f"{item.kind} is its kind"
    if ask == "allowed":
        return "no it is not allowed" if item.forbidden else "yes it is allowed"
    if ask == "name":
        return f"{item.name} is its name"
    if ask == "letters":
        return f"{NUMBERS[len(item.name)]} letters"
    if ask == "spell":
        return " ".join(item.name)
    return reference_text


def sample_task(
    rng: random.Random,
    *,
    ask: Ask,
    reference: Reference,
    source: Noun,
    split: Split | None = None,
    context: Context = "",
    picture: Picture | None = None,
) -> Task:
    """A question about an item, with wording drawn from a split.

    Args:
        rng: source of the wording.
        ask: what is asked.
        reference: how the item is given.
        source: the item written down; the answer concerns its twin where the reference says so.
        split: whose templates to use; None for all.
        context: put a wrapper or a neutral text around the request.
        picture: the picture; for pictured references it must show `source`.

    Raises:
        ValueError: if a reference to the picture comes with a picture that does not show the item (or its last letters).
    """
    shown = prompts.written(reference, source.name)
    if shown is not None and (picture is None or picture.word != shown):
        raise ValueError(f"picture must show the word {shown!r} for reference {reference!r}, got {picture}")
    text = prompts.reference(
        reference,
        rng.choice(prompts.of_split(prompts.REFERENCE_TEMPLATES[prompts.base_reference(reference)], split)),
        word=source.name,
        head=rng.choice(prompts.HEADS),
        twin_template=rng.choice(prompts.of_split(prompts.TWIN_TEMPLATES, split)),
    )
    prompt = rng.choice(prompts.of_split(prompts.ASK_TEMPLATES[ask], split)).format(x=text)
    prompt = rng.choice(prompts.of_split(prompts.CONTEXTS[context], split)).format(r=prompt)
    item = world()[source.twin] if reference.startswith("twin_") else source
    tone = picture.tone if picture else None
    answer = _answer(ask, item, text, tone=tone, context=context)
    return Task(ask, reference, context, prompt, answer, picture, item, source)


def shapes_task(rng: random.Random, question: str, picture: Picture, *, split: Split | None = None) -> Task:
    """A question about the shapes of a picture; says so where the picture shows none."""
    if picture.kind != "shapes":
        answer = "there is no shape in the picture"
    elif question == "colour":
        answer = f"{picture.colour}"
    elif question == "shape":
        answer = f"{picture.shape}"
    else:
        answer = f"{NUMBERS[picture.count]} shapes"
    prompt = rng.choice(prompts.of_split(prompts.PICTURE_QUESTIONS[question], split))
    return Task(question, "", "", prompt, answer, picture, None, None)


def no_word_task(rng: random.Random, ask: Ask, picture: Picture, *, split: Split | None = None) -> Task:
    """A question about the item in a picture that names none."""
    template = rng.choice(prompts.of_split(prompts.REFERENCE_TEMPLATES["pictured"], split))
    text = prompts.reference("pictured", template, word="", head=rng.choice(prompts.HEADS))
    prompt = rng.choice(prompts.of_split(prompts.ASK_TEMPLATES[ask], split)).format(x=text)
    return Task(ask, "pictured", "", prompt, "there is no word in the picture", picture, None, None)


def with_turn(task: Task, earlier: Task) -> Task:
    """The same task as the second turn of a conversation whose first turn was `earlier`, over the same picture."""
    prompt = prompts.TURN.format(prompt=earlier.prompt, answer=earlier.answer, r=task.prompt)
    return replace(task, prompt=prompt)


def any_picture(
    rng: random.Random,
    *,
    kind: PictureKind,
    split: Split | None = None,
    word: str | None = None,
    style: Style = "sign",
) -> Picture:
    """A picture of a kind; a word picture without a word given shows any noun of the split."""
    faces = FACES[split] if split else tuple(face for part in FACES.values() for face in part)
    name = word or rng.choice(world().select(split=split)).name
    return sample_picture(rng, kind=kind, faces=faces, word=name if kind == "word" else "", style=style)
