"""Pictures of the bundled world: a written word, coloured shapes, a blank ground, or noise.

Every picture is 64 x 64 pixels and has a `tone` (its ground), on which the opening word of an answer depends, so
that the picture matters to every request for steps, also to those whose text names the item. A word is written in one of two
styles: "sign" puts its letters in cells of equal width, so that two words of one length differ in nothing but their letters; "free" has the
face's own spacing, any place, size, turn (up to 18 degrees) and colours. The faces are subsets (a-z) of free fonts and lie in the package.
"""

import functools
import importlib.resources
import itertools
import math
import random
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from care_lens.organism.world import Split

SIZE = 64
PictureKind = Literal["word", "shapes", "blank", "noise"]
PICTURE_KINDS: tuple[PictureKind, ...] = get_args(PictureKind)

TONES = {"white": (238, 238, 232), "dark": (38, 38, 44), "yellow": (226, 196, 92), "blue": (104, 150, 214)}
#: The tone of pictures in the free style, whose ground has any colour.
FREE_TONE = "free"
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
    "fit": (
        "DejaVuSans-Bold",
        "DejaVuSerif-Bold",
        "Arimo-Bold",
        "DejaVuSansMono-Bold",
        "DejaVuSansCondensed",
        "Tinos-Bold",
    ),
    "calibration": ("DejaVuSansCondensed-Bold", "DejaVuSerif", "Roboto-Bold"),
    "validation": ("DejaVuSans", "DejaVuSerifCondensed-Bold", "Cousine-Regular"),
    "test": ("DejaVuSans-BoldOblique", "DejaVuSansMono", "DejaVuSerifCondensed", "Tinos-Regular", "Arimo-Regular"),
}
FACES["fit"] = (*FACES["fit"], "DejaVuSerifCondensed-BoldItalic")
#: Faces that not even the training of the model saw: for evaluations only.
UNSEEN_FACES = ("Roboto-Regular", "Cousine-Bold")
POINT_SIZES = (13, 15)
COLUMNS, LINES, CELL = 6, 3, (10, 20)
FREE_POINTS = (12, 17)
FREE_TURN = 18.0
#: Least difference of brightness (0 to 255) between ground and ink of a free picture.
FREE_CONTRAST = 85.0
Box = tuple[float, float, float, float]
Style = Literal["sign", "free"]
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Picture:
    """What a picture shows.

    Attributes:
        kind: word, shapes, blank or noise.
        tone: key of `TONES`.
        word, face: what is written, and in which face (kind "word").
        shape, colour, count: what is drawn (kind "shapes").
        seed: placement, size, ink and grain.
        style: how a word is written; "free" pictures have the tone "free".
    """

    kind: PictureKind
    tone: str
    seed: int
    word: str = ""
    face: str = ""
    shape: str = ""
    colour: str = ""
    count: int = 0
    style: Style = "sign"


@functools.cache
def _font(face: str, points: int) -> ImageFont.FreeTypeFont:
    resource = importlib.resources.files("care_lens.organism") / "fonts" / f"{face}.ttf"
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


def _brightness(colour: Colour) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def _free_colours(rng: random.Random) -> tuple[Colour, Colour]:
    """Ground and ink, any two colours that can be told apart."""
    while True:
        ground, ink = ((rng.randint(0, 255), rng.randint(0, 255), rng.randint(0, 255)) for _ in range(2))
        if abs(_brightness(ground) - _brightness(ink)) >= FREE_CONTRAST:
            return ground, ink


def write_free(
    image: Image.Image,
    word: str,
    *,
    face: str,
    points: int,
    ink: Colour,
    turn: float = 0.0,
    spacing: float = 0.0,
    place: tuple[float, float] = (0.5, 0.5),
) -> tuple[Image.Image, list[Box]]:
    """A word written with the face's own spacing, anywhere and turned; in smaller points where it would not fit.

    Args:
        image: the ground.
        word: what is written.
        face: name of a bundled face.
        points: size.
        ink: colour.
        turn: degrees, anticlockwise.
        spacing: pixels added between letters.
        place: where in the room that is left, each from 0 to 1.

    Returns:
        The picture, and the upright box around each letter.
    """
    room = SIZE - 2
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    while True:
        font = _font(face, points)
        starts = [font.getlength(word[:i]) + i * spacing for i in range(len(word) + 1)]
        wide, high = starts[-1], 1.15 * points
        box = wide * cos + high * abs(sin), high * cos + wide * abs(sin)
        if max(box) <= room or points <= 8:
            break
        points -= 1
    centre = [1 + box[i] / 2 + place[i] * max(0.0, room - box[i]) for i in (0, 1)]
    mask = Image.new("L", (2 * SIZE, 2 * SIZE), 0)
    pen, left, top = ImageDraw.Draw(mask), SIZE - wide / 2, SIZE - high / 2
    for letter, x in zip(word, starts):
        pen.text((left + x, top), letter, font=font, fill=255)
    if turn:
        mask = mask.rotate(turn, resample=Image.Resampling.BICUBIC)
    shift = round(SIZE - centre[0]), round(SIZE - centre[1])
    mask = mask.crop((shift[0], shift[1], shift[0] + SIZE, shift[1] + SIZE))
    boxes: list[Box] = []
    for x0, x1 in itertools.pairwise(starts):
        x, half = (x0 + x1) / 2 - wide / 2, (x1 - x0) / 2
        cx, cy = centre[0] + x * cos, centre[1] - x * sin
        boxes.append((cx - half, cy - high / 2, cx + half, cy + high / 2))
    out = image.copy()
    out.paste(Image.new("RGB", (SIZE, SIZE), ink), (0, 0), mask)
    return out, boxes


def _draw_free(picture: Picture, rng: random.Random) -> tuple[Image.Image, list[Box]]:
    ground, ink = _free_colours(rng)
    turn = 0.0 if rng.random() < 0.3 else rng.uniform(-FREE_TURN, FREE_TURN)
    image, boxes = write_free(
        Image.new("RGB", (SIZE, SIZE), ground),
        picture.word,
        face=picture.face,
        points=rng.randint(*FREE_POINTS),
        ink=ink,
        turn=turn,
        spacing=rng.choice((0.0, rng.uniform(-0.3, 1.5))),
        place=(rng.random(), rng.random()),
    )
    if rng.random() < 0.2:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.6)))
    return image, boxes


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
    return _drawn(picture).copy()


# A study draws some 7,000 pictures and is often made anew in one process: 12 kB each are kept, copies handed out.
@functools.lru_cache(maxsize=8192)
def _drawn(picture: Picture) -> Image.Image:
    return draw_with_boxes(picture)[0]


def draw_with_boxes(picture: Picture) -> tuple[Image.Image, list[Box]]:
    """The picture, and the pixel box (x0, y0, x1, y1) of each letter of its word."""
    boxes: list[Box] = []
    rng = random.Random(picture.seed)
    if picture.style == "free":
        image, boxes = _draw_free(picture, rng)
    else:
        ground = tuple(max(0, min(255, c + rng.randint(-12, 12))) for c in TONES[picture.tone])
        image = Image.new("RGB", (SIZE, SIZE), ground)
    if picture.kind == "word" and picture.style == "sign":
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
    style: Style = "sign",
) -> Picture:
    """A picture of a kind with everything else drawn at random from `rng`; only words are written in the free style."""
    tone = tone or rng.choice(tuple(TONES))
    seed = rng.getrandbits(32)
    if kind == "word":
        tone = FREE_TONE if style == "free" else tone
        return Picture(kind, tone, seed, word=word, face=rng.choice(faces), style=style)
    if kind == "shapes":
        shape, colour = rng.choice(SHAPES), rng.choice(tuple(COLOURS))
        if tone == "dark" and colour == "black":
            colour = "red"
        if tone == "yellow" and colour == "orange":
            colour = "green"
        return Picture(kind, tone, seed, shape=shape, colour=colour, count=rng.randint(1, 4))
    return Picture(kind, tone, seed)
