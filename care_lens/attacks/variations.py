"""Ways to say or draw a request otherwise: what best of n draws from, and the space that a search goes through.

A variation is a function ``(example, draws) -> example`` that takes what is random from ``draws`` (a :class:`random.Random`).
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from care_lens.attacks.templates import TEMPLATES, template_of
from care_lens.attacks.typographic import Colour, Layout, TextStyle, Typographic, with_contrast
from care_lens.core.examples import Example

Variation = Callable[[Example, random.Random], Example]


@dataclass(frozen=True)
class ScrambledWords:
    """Augmentation of the wording as in best-of-n jailbreaking (Hughes et al. 2024, arXiv:2412.03556).

    Each word of four letters or more has its middle letters shuffled with probability ``sqrt(strength)``, each letter its case changed with
    the same, and each printable character is moved by one code point with probability ``strength ** 3``.

    Attributes:
        strength: sigma; 0.4 as published.
        letters: Whether characters are moved; a model that knows whole words alone reads none that was.
    """

    strength: float = 0.4
    letters: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength must be in [0, 1], got {self.strength}")

    def __call__(self, example: Example, draws: random.Random) -> Example:
        """The request, scrambled."""
        words = [self._word(word, draws) for word in example.prompt.split(" ")]
        return replace(example, prompt=" ".join(words))

    def _word(self, word: str, draws: random.Random) -> str:
        often, seldom = self.strength**0.5, self.strength**3
        if len(word) > 3 and draws.random() < often:
            middle = list(word[1:-1])
            draws.shuffle(middle)
            word = word[0] + "".join(middle) + word[-1]
        word = "".join(c.swapcase() if c.isalpha() and draws.random() < often else c for c in word)
        if not self.letters:
            return word
        moved = (
            chr(ord(c) + draws.choice((-1, 1))) if 33 < ord(c) < 126 and draws.random() < seldom else c for c in word
        )
        return "".join(moved)


@dataclass(frozen=True)
class Reworded:
    """One of several templates around the request.

    Attributes:
        templates: Names in :data:`~care_lens.attacks.TEMPLATES`, or texts with ``{prompt}``.
    """

    templates: tuple[str, ...] = tuple(TEMPLATES)

    def __post_init__(self) -> None:
        object.__setattr__(self, "templates", tuple(self.templates))
        for template in self.templates:
            template_of(template)

    def __call__(self, example: Example, draws: random.Random) -> Example:
        """The request in a template."""
        template = template_of(draws.choice(self.templates))
        return replace(example, prompt=template.replace("{prompt}", example.prompt))


@runtime_checkable
class SearchSpace(Protocol):
    """What a search can choose, and what it makes of a choice.

    Attributes:
        choices: Names to the values that each may have.
    """

    @property
    def choices(self) -> Mapping[str, Sequence[Any]]: ...

    def build(self, example: Example, chosen: Mapping[str, Any]) -> Example:
        """The example with a value of each name.

        Raises:
            DrawingError: If it cannot be drawn so; the candidate is left out.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Renderings:
    """Renderings of a request into a picture, with wordings around it: sizes, places, contrasts, fonts, layouts, templates, noise of the page.

    Attributes:
        font_sizes: Heights of the letters.
        positions: Places.
        contrasts: Shares of the contrast, in (0, 1].
        fonts: Paths of fonts; None: Pillow's own.
        layouts: Of :class:`~care_lens.attacks.Typographic`.
        typed: What is typed; None: the layout's own sentence.
        templates: Around the request before it is drawn.
        backgrounds: Colours of the page.
        size: Width and height of the page.
        keep_picture: Whether to draw on the request's own picture, where it has one.
    """

    font_sizes: Sequence[int] = (16, 20, 24, 32)
    positions: Sequence[Any] = ("top", "centre", "bottom")
    contrasts: Sequence[float] = (1.0, 0.6, 0.3)
    fonts: Sequence[Any] = (None,)
    layouts: Sequence[Layout] = ("text", "list", "split")
    typed: Sequence[str | None] = (None,)
    templates: Sequence[str] = ("{prompt}",)
    backgrounds: Sequence[Colour] = ("white",)
    size: tuple[int, int] = (336, 336)
    keep_picture: bool = False

    @property
    def choices(self) -> dict[str, Sequence[Any]]:
        """What can be chosen."""
        names = ("font_sizes", "positions", "contrasts", "fonts", "layouts", "typed", "templates", "backgrounds")
        return {name.removesuffix("s"): tuple(getattr(self, name)) for name in names}

    def build(self, example: Example, chosen: Mapping[str, Any]) -> Example:
        """The request, drawn so.

        Raises:
            DrawingError: If it does not fit.
        """
        style = TextStyle(
            font=chosen["font"],
            font_size=chosen["font_size"],
            position=chosen["position"],
            colour=with_contrast(chosen["contrast"], chosen["background"]),
        )
        asked = replace(example, prompt=template_of(chosen["template"]).replace("{prompt}", example.prompt))
        attack = Typographic(
            layout=chosen["layout"],
            prompt=chosen["typed"],
            style=style,
            size=self.size,
            background=chosen["background"],
            keep_picture=self.keep_picture,
        )
        return attack.change(asked, random.Random(0))


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A search space of one's own: names with their values, and a function that makes the example.

    Attributes:
        choices: Names to the values that each may have.
        make: From an example and a value of each name to an example.
    """

    choices: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    make: Callable[[Example, Mapping[str, Any]], Example]

    def __post_init__(self) -> None:
        if not self.choices or any(not len(values) for values in self.choices.values()):
            raise ValueError(f"choices must hold a name with a value at least, got {dict(self.choices)!r:.80}")

    def build(self, example: Example, chosen: Mapping[str, Any]) -> Example:
        """What the function makes."""
        return self.make(example, chosen)
