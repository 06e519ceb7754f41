"""Examples: what a vision-language model is asked, and pairs of them that differ in their harm only."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import overload

from PIL import Image

from care_lens.core.digests import examples_digest as examples_digest


@dataclass(frozen=True)
class Example:
    """One request to a vision-language model.

    Attributes:
        prompt: What the user says, as plain text; the model's chat template and image placeholder are added
            by ``HookedLVLM.prepare``.
        image: The picture that goes with it, or None for a request in words alone.
        response: An answer to teacher-force, or None.
        harmful: Whether complying would be unsafe.
        channel: How the request is put ("plain", "typographic", ...); rows of a defence table.
        id: Identity of the example in stores and results.
        group: The item the request is about (a noun, a behaviour): intervals are clustered by it.
        meta: Anything else about it, as strings.
        more_images: Further pictures, after the first. Attacks and patch maps work on the first alone.

    Raises:
        ValueError: If there are further pictures and no first one.
        TypeError: If a picture is not a PIL image.
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

    def __post_init__(self) -> None:
        if self.more_images and self.image is None:
            raise ValueError("an example with more_images must have a first image, got None")
        if wrong := [type(image).__name__ for image in self.images if not isinstance(image, Image.Image)]:
            raise TypeError(
                f"image must be a PIL image, got {wrong[0]}; make one with PIL.Image.fromarray or Image.open"
            )

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """All its pictures, in order; none for a request in words alone."""
        return () if self.image is None else (self.image, *self.more_images)


@dataclass(frozen=True)
class PairedExamples:
    """Counterfactual twins: ``safe[i]`` and ``unsafe[i]`` differ only in what makes the second one unsafe.

    Attributes:
        safe: The examples x.
        unsafe: Their twins x*, in the same order.

    Raises:
        ValueError: If the two differ in length.
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
