"""Pictures of the bundled world: a written word, coloured shapes, a blank ground, or noise.

Every picture is 64 x 64 pixels and has a `tone` (its ground), on which the opening word of an answer depends, so
that the picture matters to every request for steps, also to those whose text names the item. The twelve faces are subsets (a-z)
of the DejaVu fonts and lie in the package.
"""

import functools
import importlib.resources
import random
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from care_lens.organism.world import Split

SIZE = 64
PictureKind = Literal["word", "shapes", "blank", "noise"]
PICTURE_KINDS: tuple[PictureKind, ...] = get_args(PictureKind)

TONES = {"white": (238, 238, 232), "dark": (38, 38, 44), "yellow": (226, 196, 92), "blue": (104, 150, 214)}
COLOURS = {
    "red": (205, 40, 40),
    "green": (30, 140, 60),
    "purple": (130, 50, 165),
    "orange": (240, 125, 20),
    "pink": (245, 130, 185),
    "black": (8, 8, 8),
}
SHAPES = ("circle", "square", "triangle", "cross")
INKS = {
    "white": ((15, 15, 20), (120, 20, 30), (20, 60, 130)),
    "dark": ((240, 240, 235), (250, 215, 90), (150, 220, 250)),
}
INKS |= {"yellow": INKS["white"], "blue": ((10, 10, 25), (250, 250, 250), (70, 10, 20))}

FACES: dict[Split, tuple[str, ...]] = {
    "fit": ("Sans-Bold", "Serif-Bold", "SansMono-Bold", "SansCondensed", "SerifCondensed-BoldItalic"),
    "calibration": ("SansCondensed-Bold", "Serif"),
    "validation": ("Sans", "SerifCondensed-Bold"),
    "test": ("Sans-BoldOblique", "SansMono", "SerifCondensed"),
}
POINT_SIZES = (13, 15)
COLUMNS, LINES, CELL = 6, 3, (10, 20)
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Picture:
    """What a picture shows.

    Attributes:
        kind: word, shapes, blank or noise.
        tone: key of `TONES`.
        word, face: what is written, and in which face (kind "word").
        shape, colour, count: what is drawn (kind "shapes").
        seed: placement, size, ink and grain.
    """

    kind: PictureKind
    tone: str
    seed: int
    word: str = ""
    face: str = ""
    shape: str = ""
    colour: str = ""
    count: int = 0


@functools.cache
def _font(face: str, points: int) -> ImageFont.FreeTypeFont:
    resource = importlib.resources.files("care_lens.organism") / "fonts" / f"DejaVu{face}.ttf"
    with importlib.resources.as_file(resource) as path:
        return ImageFont.truetype(str(path), points)


def _draw_word(draw: ImageDraw.ImageDraw, picture: Picture, rng: random.Random) -> list[Box]:
    """Letters stand in cells of equal width, as in a sign: six columns, three lines, a pixel or two of jitter."""
    font = _font(picture.face, rng.randint(*POINT_SIZES))
    first = rng.randint(0, COLUMNS - len(picture.word)) * CELL[0] + 2 + rng.uniform(-1.5, 1.5)
    top = rng.randrange(LINES) * CELL[1] + 3 + rng.uniform(-1.5, 1.5)
    ink = rng.choice(INKS[picture.tone])
    boxes: list[Box] = []
    for index, letter in enumerate(picture.word):
        x = first + index * CELL[0]
        left, _, right, _ = font.getbbox(letter)
        draw.text((round(x + (CELL[0] - (right - left)) / 2 - left), round(top)), letter, font=font, fill=ink)
        boxes.append((x, top, x + CELL[0], top + CELL[1]))
    return boxes


def _draw_shapes(draw: ImageDraw.ImageDraw, picture: Picture, rng: random.Random) -> None:
    cells = [(x, y) for x in (0, 1) for y in (0, 1)]
    for cx, cy in rng.sample(cells, picture.count):
        size = rng.randint(16, 24)
        x, y = 32 * cx + rng.randint(3, 29 - size), 32 * cy + rng.randint(3, 29 - size)
        box, fill = (x, y, x + size, y + size), COLOURS[picture.colour]
        if picture.shape == "circle":
            draw.ellipse(box, fill=fill)
        elif picture.shape == "square":
            draw.rectangle(box, fill=fill)
        elif picture.shape == "triangle":
            draw.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=fill)
        else:
            third = size // 3
            draw.rectangle((x + third, y, x + size - third, y + size), fill=fill)
            draw.rectangle((x, y + third, x + size, y + size - third), fill=fill)


def draw(picture: Picture) -> Image.Image:
    """The picture as an RGB image of 64 x 64 pixels; equal descriptions give equal pixels."""
    return draw_with_boxes(picture)[0]


def draw_with_boxes(picture: Picture) -> tuple[Image.Image, list[Box]]:
    """The picture, and the pixel box (x0, y0, x1, y1) of each letter of its word."""
    boxes: list[Box] = []
    rng = random.Random(picture.seed)
    ground = tuple(max(0, min(255, c + rng.randint(-12, 12))) for c in TONES[picture.tone])
    image = Image.new("RGB", (SIZE, SIZE), ground)
    if picture.kind == "word":
        boxes = _draw_word(ImageDraw.Draw(image), picture, rng)
    elif picture.kind == "shapes":
        _draw_shapes(ImageDraw.Draw(image), picture, rng)
    grain = {"noise": 48.0, "blank": 0.0}.get(picture.kind, rng.uniform(0.0, 5.0))
    if grain:
        noise = np.random.default_rng(picture.seed).normal(0.0, grain, (SIZE, SIZE, 3))
        image = Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))
    return image, boxes


def sample_picture(
    rng: random.Random,
    *,
    kind: PictureKind,
    faces: tuple[str, ...],
    word: str = "",
    tone: str | None = None,
) -> Picture:
    """A picture of a kind with everything else drawn at random from `rng`."""
    tone = tone or rng.choice(tuple(TONES))
    seed = rng.getrandbits(32)
    if kind == "word":
        return Picture(kind, tone, seed, word=word, face=rng.choice(faces))
    if kind == "shapes":
        shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
        if tone == "dark" and colour == "black":
            colour = "red"
        if tone == "yellow" and colour == "orange":
            colour = "green"
        return Picture(kind, tone, seed, shape=shape, colour=colour, count=rng.randint(1, 4))
    return Picture(kind, tone, seed)
