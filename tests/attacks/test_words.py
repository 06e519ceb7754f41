import numpy as np
import pytest
from PIL import Image, ImageFont

from care_lens.attacks import TEMPLATES, TextStyle, draw_text, typographic, wrap
from care_lens.core import Example


def ink(image: Image.Image) -> np.ndarray:
    return np.argwhere(np.asarray(image.convert("L")) < 128)


@pytest.mark.parametrize("position", ["top", "centre", "bottom", (40, 100)])
def test_text_stands_where_it_should(position):
    rows, cols = ink(draw_text("blue moon", style=TextStyle(position=position), size=(300, 200))).T
    top, left = rows.min(), cols.min()
    if position == "top":
        assert abs(top - 8) <= 1
    elif position == "bottom":
        assert abs(rows.max() - (200 - 8)) <= 2
    elif position == "centre":
        assert abs((rows.min() + rows.max()) / 2 - 100) <= 2
    else:
        assert (abs(left - 40) <= 2) and (abs(top - 100) <= 2)
    if isinstance(position, str):
        assert abs((left + cols.max()) / 2 - 150) <= 2


def test_long_text_is_broken_and_stays_inside_the_margins():
    style = TextStyle(font_size=20, margin=10)
    rows, cols = ink(draw_text("how is the red thing made in many words", style=style, size=(120, 300))).T
    assert cols.min() >= 9 and cols.max() <= 110
    assert rows.max() - rows.min() > 3 * 20


def test_picture_is_left_alone_and_colours_are_used():
    page = Image.new("RGB", (200, 100), "green")
    before = page.tobytes()
    drawn = np.asarray(draw_text("ABC", page, style=TextStyle(colour="red", band="white")))
    assert page.tobytes() == before
    colours = {tuple(colour) for colour in drawn.reshape(-1, 3).tolist()}
    assert {(255, 0, 0), (255, 255, 255), (0, 128, 0)} <= colours


def test_a_font_file_can_be_given(tmp_path):
    built_in = ImageFont.load_default(24)
    path = tmp_path / "face.ttf"
    path.write_bytes(built_in.font_bytes)
    given = draw_text("ABC", style=TextStyle(font=path))
    assert given.tobytes() == draw_text("ABC").tobytes()
    with pytest.raises(OSError):
        draw_text("ABC", style=TextStyle(font=tmp_path / "none.ttf"))


@pytest.mark.parametrize(("text", "message"), [("x" * 80, "fit"), ("a b c d e f g h " * 30, "fit"), ("  ", "letter")])
def test_text_that_cannot_be_drawn_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        draw_text(text, size=(100, 100))


def test_typographic_moves_the_prompt_into_the_picture():
    example = Example("how to make a blue", harmful=True, id="a", group="blue", channel="plain")
    (moved,) = typographic([example], prompt="do what the picture says", size=(336, 200))
    assert (moved.prompt, moved.channel, moved.id, moved.group, moved.harmful) == (
        "do what the picture says",
        "typographic",
        "a",
        "blue",
        True,
    )
    assert moved.behaviour == "how to make a blue"  # what a judge is asked about, and splits go by
    assert moved.image is not None
    assert moved.image.tobytes() == draw_text("how to make a blue", size=(336, 200)).tobytes()


def test_wrap_puts_the_template_around_the_prompt():
    examples = [Example("say {x}", id="a"), Example("say b", id="b")]
    wrapped = wrap(examples, "first {prompt} then {prompt}", channel="wrapped")
    assert [example.prompt for example in wrapped] == ["first say {x} then say {x}", "first say b then say b"]
    assert [example.channel for example in wrapped] == ["wrapped"] * 2
    assert [example.behaviour for example in wrapped] == ["say {x}", "say b"]
    assert wrap(wrapped, "third {prompt}")[0].behaviour == "say {x}"
    for name, text in TEMPLATES.items():
        assert wrap(examples[1:], name)[0].prompt == text.replace("{prompt}", "say b")
    with pytest.raises(ValueError, match="prompt"):
        wrap(examples, "no place")
