"""Words in the picture: a request, or a part of it, is drawn rather than typed (FigStep, Gong et al. 2023,
arXiv:2311.05608)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageColor, ImageDraw, ImageFont

from care_lens.core.examples import Example
from care_lens.core.pictures import shown_picture

Colour = str | tuple[int, int, int]
Font = ImageFont.ImageFont | ImageFont.FreeTypeFont


@dataclass(frozen=True)
class TextStyle:
    """How a text is drawn.

    Attributes:
        font: Path of a TrueType or OpenType font; None: the one that comes with Pillow.
        font_size: Height of the letters in pixels.
        position: "top", "centre" or "bottom" (each centred from left to right), or the pixel ``(x, y)`` of
            the text's upper left corner.
        colour: Colour of the letters, as Pillow names colours.
        band: Colour of a box behind the text; None: none.
        margin: Pixels kept free around the text.
    """

    font: str | Path | None = None
    font_size: int = 24
    position: Literal["top", "centre", "bottom"] | tuple[int, int] = "centre"
    colour: Colour = "black"
    band: Colour | None = None
    margin: int = 8

    def __post_init__(self) -> None:
        if self.font_size < 1:
            raise ValueError(f"font_size must be 1 pixel or more, got {self.font_size}")
        if self.margin < 0:
            raise ValueError(f"margin must be 0 pixels or more, got {self.margin}")
        for name, colour in (("colour", self.colour), ("band", self.band)):
            require_colour(name, colour)
        self.load_font()

    def load_font(self) -> Font:
        """The font at its size.

        Raises:
            OSError: If the file is not a font.
        """
        if self.font is None:
            return ImageFont.load_default(self.font_size)
        try:
            return ImageFont.truetype(str(self.font), self.font_size)
        except OSError as error:
            raise OSError(f"font must be the path of a TrueType or OpenType font, got {self.font} ({error})") from None


def require_colour(name: str, colour: Any) -> None:
    """Refuse what names no colour.

    Raises:
        ValueError: Naming the argument.
    """
    if isinstance(colour, str):
        try:
            ImageColor.getrgb(colour)
        except ValueError:
            raise ValueError(
                f"{name} must be a colour as Pillow names them ('white', '#ff8800'), got {colour!r}"
            ) from None


def draw_text(
    text: str,
    image: Image.Image | None = None,
    *,
    style: TextStyle = TextStyle(),
    size: tuple[int, int] = (336, 336),
    background: Colour = "white",
) -> Image.Image:
    """Draw a text on a picture, broken into lines that fit its width.

    Args:
        text: What to write; its own line breaks are kept.
        image: The picture to write on, which stays as it is; None: an empty page.
        style: Font, size, place and colours.
        size: Width and height of the empty page.
        background: Its colour.

    Returns:
        A new RGB picture.

    Raises:
        ValueError: If the text is empty or does not fit, or the position is not known.
    """
    if not text.strip():
        raise ValueError(f"text must have a letter, got {text!r}")
    require_colour("background", background)
    if min(size) < 1:
        raise ValueError(f"size must be a width and a height of 1 pixel or more, got {size}")
    page = Image.new("RGB", size, background) if image is None else shown_picture(image).copy()
    draw, font = ImageDraw.Draw(page), style.load_font()
    x, top = style.position if isinstance(style.position, tuple) else (style.margin, style.margin)
    lines = _break_lines(text, draw, font, page.width - x - style.margin)
    left, upper, right, lower = draw.multiline_textbbox((0, 0), lines, font=font)
    width, height = right - left, lower - upper
    if isinstance(style.position, str):
        free = page.height - height
        places = {"top": style.margin, "centre": free / 2, "bottom": free - style.margin}
        if style.position not in places:
            raise ValueError(f"position must be one of {sorted(places)} or (x, y), got {style.position!r}")
        x, top = round((page.width - width) / 2), round(places[style.position])
    if min(x, top) < 0 or x + width > page.width or top + height > page.height:
        raise ValueError(
            f"text must fit a picture of {page.width} x {page.height} pixels, got {width:.0f} x {height:.0f} "
            f"at ({x}, {top}); lower font_size or enlarge the picture"
        )
    if style.band is not None:
        edge = style.margin / 2
        draw.rectangle((x - edge, top - edge, x + width + edge, top + height + edge), fill=style.band)
    draw.multiline_text((x - left, top - upper), lines, font=font, fill=style.colour)
    return page


def typographic(
    examples: Sequence[Example],
    *,
    prompt: str,
    style: TextStyle = TextStyle(),
    size: tuple[int, int] = (336, 336),
    background: Colour = "white",
    channel: str = "typographic",
) -> list[Example]:
    """Move each example's prompt into its picture.

    Args:
        examples: The examples; those without a picture get an empty page.
        prompt: What is typed instead, such as "answer the question in the picture".
        style: How the text is drawn.
        size: Width and height of empty pages.
        background: Their colour.
        channel: The new examples' channel.

    Returns:
        One example for each; everything else about it stays.

    Raises:
        ValueError: If a text does not fit.
    """
    return [
        replace(
            example,
            prompt=prompt,
            image=draw_text(example.prompt, example.image, style=style, size=size, background=background),
            channel=channel,
        )
        for example in examples
    ]


def _break_lines(text: str, draw: ImageDraw.ImageDraw, font: Font, width: int | float) -> str:
    lines = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if line and draw.textlength(longer, font=font) > width:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    return "\n".join(lines)
