"""Examples: what a vision-language model is asked, and pairs of them that differ in their harm only."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from PIL import Image

from care_lens.core.conversation import (
    ExampleError,
    Turn,
    parse_messages,
    require_places,
    require_text,
    shown_pictures,
)
from care_lens.core.digests import examples_digest as examples_digest
from care_lens.core.display import LinesRepr


@dataclass(frozen=True)
class Example:
    """One request to a vision-language model.

    Attributes:
        prompt: What the user says, as plain text; the model's chat template and image placeholder are added
            by ``HookedLVLM.prepare``. Its pictures stand before it, or where it has the character
            :data:`~care_lens.core.conversation.PICTURE`.
        image: The picture that goes with it, or None for a request in words alone. It is kept as a viewer shows it, in RGB on
            white (:func:`~care_lens.core.pictures.shown_picture`).
        response: An answer to teacher-force, or None.
        harmful: Whether complying would be unsafe.
        channel: How the request is put ("plain", "typographic", ...); rows of a defence table.
        id: Identity of the example in stores and results.
        group: The item the request is about (a noun, a behaviour): intervals are clustered by it.
        meta: Anything else about it, as strings.
        more_images: Further pictures, after the first. Attacks and patch maps work on the first alone.
        behaviour: What the request is after, in plain words, where the prompt does not say it (a typographic attack asks about
            "the list in the picture"); judges read it. None: the prompt says it.
        system: The system prompt, or None.
        turns: Earlier turns of the conversation, in order.
        prefill: The beginning of the answer, which the model goes on from, or None. A response that is teacher-forced comes after it;
            stored answers and judges have it at the answer's beginning.

    Raises:
        ExampleError: If a field is of another type, there are further pictures and no first one, or the prompt has places for
            another number of pictures. It is a ValueError and a TypeError.

    Example:
        >>> Example("what is it?", turns=(Turn("user", "hello"), Turn("assistant", "hi"))).turns[1].text
        'hi'
    """

    prompt: str
    image: Image.Image | None = field(default=None, hash=False)
    response: str | None = None
    harmful: bool = False
    channel: str = ""
    id: str = ""
    group: str = ""
    meta: Mapping[str, str] = field(default_factory=dict, hash=False)
    more_images: tuple[Image.Image, ...] = field(default=(), hash=False)
    behaviour: str | None = None
    system: str | None = None
    turns: tuple[Turn, ...] = ()
    prefill: str | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "channel", "id", "group"):
            require_text(name, getattr(self, name))
        for name in ("response", "behaviour", "system", "prefill"):
            require_text(name, getattr(self, name), optional=True)
        if not isinstance(self.harmful, bool):
            raise ExampleError(f"harmful must be True or False, got {self.harmful!r}; write bool(value)")
        if not isinstance(self.meta, Mapping):
            raise ExampleError(f"meta must be a mapping of texts, got {type(self.meta).__name__}; give a dict")
        object.__setattr__(self, "turns", tuple(self.turns))
        if wrong := [type(turn).__name__ for turn in self.turns if not isinstance(turn, Turn)]:
            raise ExampleError(
                f"turns must be care_lens.Turn, got {wrong[0]}; see Example.from_messages for chat lists"
            )
        object.__setattr__(self, "more_images", tuple(self.more_images))
        if self.more_images and self.image is None:
            raise ExampleError("an example with more_images must have a first image, got None")
        if self.image is not None:
            first, *more = shown_pictures("image", (self.image, *self.more_images))
            object.__setattr__(self, "image", first)
            object.__setattr__(self, "more_images", tuple(more))
        require_places("prompt", self.prompt, len(self.own_images))

    @classmethod
    def from_messages(cls, messages: Sequence[Mapping[str, Any]], **fields: Any) -> "Example":
        """An example of a conversation in the form that Hugging Face's chat templates take.

        Args:
            messages: ``{"role": ..., "content": ...}`` each; content is a text, or a list of ``{"type": "text", "text": ...}`` and
                ``{"type": "image", "image": picture}`` in their places. A system message may come first; the last user message is
                the prompt; an assistant message after it is the beginning of the answer (``prefill``).
            **fields: The example's other fields.

        Returns:
            The example.

        Raises:
            ExampleError: Naming the message that is not as it must be.

        Example:
            >>> example = Example.from_messages([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}])
            >>> example.system, example.prompt
            ('be brief', 'hello')
        """
        return cls(**parse_messages(messages), **fields)

    @property
    def own_images(self) -> tuple[Image.Image, ...]:
        """The pictures of the prompt itself, in order."""
        return () if self.image is None else (self.image, *self.more_images)

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """All pictures of the conversation, in order: those of earlier turns, then the prompt's."""
        return tuple(image for turn in self.turns for image in turn.images) + self.own_images


def _is_one_request(one: Example, other: Example) -> bool:
    """Whether two examples are the same to a model, as far as can be seen without decoding pictures: texts are equal, pictures are one object."""
    if one is other:
        return True
    texts = ("prompt", "response", "system", "prefill")
    if any(getattr(one, name) != getattr(other, name) for name in texts) or len(one.images) != len(other.images):
        return False
    told = [[(turn.role, turn.text) for turn in example.turns] for example in (one, other)]
    return told[0] == told[1] and all(a is b for a, b in zip(one.images, other.images, strict=True))


@dataclass(frozen=True)
class PairedExamples(LinesRepr):
    """Counterfactual twins: ``safe[i]`` and ``unsafe[i]`` differ only in what makes the second one unsafe.

    Attributes:
        safe: The examples x.
        unsafe: Their twins x*, in the same order.

    Raises:
        ValueError: If the two differ in length.
        ExampleError: If an example is its own twin. It is a ValueError.
    """

    safe: tuple[Example, ...]
    unsafe: tuple[Example, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "safe", tuple(self.safe))
        object.__setattr__(self, "unsafe", tuple(self.unsafe))
        if len(self.safe) != len(self.unsafe):
            raise ValueError(
                f"safe and unsafe must be of the same length, got {len(self.safe)} and {len(self.unsafe)}; "
                "give every safe example its unsafe twin at the same index"
            )
        twins = zip(self.safe, self.unsafe, strict=True)
        if same := [i for i, (safe, unsafe) in enumerate(twins) if _is_one_request(safe, unsafe)]:
            raise ExampleError(
                f"twins must differ in what the model is given, got one request as safe and unsafe twin in pairs {same[:8]}; give the unsafe "
                "one its own words or picture, or leave the pair out"
            )

    def shown(self) -> tuple[str, dict[str, str]]:
        """How many pairs, and the first."""
        rows = {"of": f"{len(set(self.groups))} groups" if len(self) else ""}
        for name, twins in (("safe", self.safe), ("unsafe", self.unsafe)):
            if twins:
                picture = "" if twins[0].image is None else " (with a picture)"
                rows[name] = f"{twins[0].prompt!r}{picture}" + (", ..." if len(twins) > 1 else "")
        return f"PairedExamples: {len(self)} pairs", rows

    @classmethod
    def from_pairs(cls, pairs: Sequence[tuple[Example, Example]]) -> "PairedExamples":
        """Build from ``(safe, unsafe)`` tuples."""
        return cls(tuple(safe for safe, _ in pairs), tuple(unsafe for _, unsafe in pairs))

    @property
    def groups(self) -> tuple[str, ...]:
        """The group of each pair: the unsafe twin's, else the safe one's, else the pair's own index."""
        pairs = zip(self.safe, self.unsafe, strict=True)
        return tuple(unsafe.group or safe.group or str(i) for i, (safe, unsafe) in enumerate(pairs))

    def __len__(self) -> int:
        return len(self.safe)

    def __iter__(self) -> Iterator[tuple[Example, Example]]:
        return iter(zip(self.safe, self.unsafe, strict=True))

    @overload
    def __getitem__(self, index: int) -> tuple[Example, Example]: ...
    @overload
    def __getitem__(self, index: slice) -> "PairedExamples": ...
    def __getitem__(self, index: int | slice) -> "tuple[Example, Example] | PairedExamples":
        if isinstance(index, slice):
            return PairedExamples(self.safe[index], self.unsafe[index])
        return self.safe[index], self.unsafe[index]
