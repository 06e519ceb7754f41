"""Masks of positions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from care_lens.core import PatchGrid, TokenSpans

#        . . u i i t p r r      padding, text, image, text, prompt's end, response
ROW = "PPTIITTRR"
OTHER = "TTTTTTTTR"


def spans_of(*rows):
    letters = [list(row) for row in rows]
    mask = lambda letter: torch.tensor([[x == letter for x in row] for row in letters])  # noqa: E731
    grids = [(PatchGrid(row.index("I"), 1, 2, 8, 4),) if "I" in row else () for row in letters]
    return TokenSpans.from_masks(image=mask("I"), padding=mask("P"), response=mask("R"), grids=grids)


def test_masks_are_derived_from_three():
    spans = spans_of(ROW, OTHER)
    where = {
        name: ["".join("x" if x else "." for x in row) for row in spans.mask(name).tolist()]
        for name in ("all", "image", "text", "prompt", "response", "generated", "last")
    }
    assert where == {
        "all": ["..xxxxxxx", "xxxxxxxxx"],
        "image": ["...xx....", "........."],
        "text": ["..x..xxxx", "xxxxxxxxx"],
        "prompt": ["..xxxxx..", "xxxxxxxx."],
        "response": [".......xx", "........x"],
        "generated": [".......xx", "........x"],
        "last": ["......x..", ".......x."],
    }
    assert spans.last_index() == (6, 7)
    with pytest.raises(ValueError, match="span must be one of"):
        spans.mask("middle")


def test_right_padding_has_the_same_last_position():
    assert spans_of("TIITPP").last_index() == (3,)


def test_rows_and_devices():
    spans = spans_of(ROW, OTHER)
    swapped = spans.rows([1, 0])
    assert torch.equal(swapped.text, spans.text.flip(0)) and swapped.grids == spans.grids[::-1]
    assert spans.to("cpu").grids == spans.grids


def test_what_contradicts_itself_is_refused():
    good = spans_of(ROW)
    fields = {name: getattr(good, name) for name in ("image", "text", "prompt", "response", "last", "padding", "grids")}
    none = torch.zeros_like(good.image)
    for change, message in [
        ({"text": good.text | good.image}, "one of image, text and padding"),
        ({"prompt": good.prompt & ~good.last}, "one of prompt, response and padding"),
        ({"last": none}, "last must be one position"),
        ({"last": good.response & good.response.flip(1).flip(1)}, "last must be one position"),
        ({"grids": ()}, "grids must have one tuple a row"),
    ]:
        with pytest.raises(ValueError, match=message):
            TokenSpans(**{**fields, **change})


def test_positions_and_rectangles_are_inverse():
    grid = PatchGrid(start=5, rows=2, cols=3, width=30, height=10, left=-6, top=4)
    assert grid.stop == 11 and grid.rectangle(9) == (4.0, 9.0, 14.0, 14.0)
    for position in range(5, 11):
        x0, y0, x1, y1 = grid.rectangle(position)
        assert {grid.position(x0, y0), grid.position(x1 - 0.1, y1 - 0.1)} == {position}
    for outside in (4, 11):
        with pytest.raises(ValueError, match=r"\[5, 11\)"):
            grid.rectangle(outside)
    for x, y in [(-7, 5), (24, 5), (0, 3), (0, 14)]:
        with pytest.raises(ValueError, match="does not see"):
            grid.position(x, y)


GRIDS = st.builds(
    PatchGrid,
    start=st.integers(0, 3000),
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    width=st.one_of(st.integers(1, 5000), st.floats(0.5, 5000)),
    height=st.one_of(st.integers(1, 5000), st.floats(0.5, 5000)),
    left=st.one_of(st.integers(-500, 500), st.floats(-500, 500)),
    top=st.one_of(st.integers(-500, 500), st.floats(-500, 500)),
    stride=st.none() | st.integers(40, 45),
)


@settings(max_examples=150, deadline=None)
@given(grid=GRIDS, data=st.data())
def test_each_point_is_of_one_token_and_rectangles_lead_back_to_it(grid, data):
    tokens = grid.positions()
    assert all(grid.position(*grid.rectangle(p)[:2]) == p for p in tokens)
    boxes = {p: grid.rectangle(p) for p in tokens}
    first, last = boxes[tokens[0]], boxes[tokens[-1]]
    assert first[:2] == (grid.left, grid.top)
    assert last[2:] == (float(grid.left + grid.width), float(grid.top + grid.height))
    x = data.draw(st.floats(first[0], last[2], exclude_max=True))
    y = data.draw(st.floats(first[1], last[3], exclude_max=True))
    holders = [p for p, (x0, y0, x1, y1) in boxes.items() if x0 <= x < x1 and y0 <= y < y1]
    assert holders == [grid.position(x, y)]


def test_the_grid_of_a_real_picture_leads_back_everywhere():
    grid = PatchGrid(start=0, rows=27, cols=27, width=760, height=760)
    assert [grid.position(*grid.rectangle(p)[:2]) for p in grid.positions()] == grid.positions()
    found = [grid.position(x, 0) for x in range(760)]
    assert found == sorted(found) and set(found) == set(range(27))


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": 0},
        {"cols": -1},
        {"start": -1},
        {"width": 0},
        {"height": float("nan")},
        {"left": float("inf")},
        {"stride": 2},
    ],
)
def test_grids_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be|must have"):
        PatchGrid(**{"start": 0, "rows": 3, "cols": 3, "width": 9, "height": 9} | wrong)
