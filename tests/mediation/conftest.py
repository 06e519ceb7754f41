"""A model, pairs of twins and an outcome for the tests of mediation."""

import pytest
from twins import margin, model, pairs, pictured  # noqa: F401

from care_lens.core import Example, PairedExamples


@pytest.fixture(scope="session")
def same_text(picture):
    """Pairs that differ in their pictures alone; one item, so that there are no intervals."""
    return PairedExamples.from_pairs(
        [
            (
                Example(text, image=picture(seed), group="one"),
                Example(text, image=picture(seed + 10), group="one"),
            )
            for seed, text in enumerate(["what is in the picture", "make a red", "yes"])
        ]
    )


def value(result, site, position, effect):
    """One number of a mediation frame."""
    from care_lens.core import Site

    place = Site.parse(site)
    frame = result.frame
    at = frame[(frame.tower == place.tower) & (frame.component == place.component)]
    at = at[at.layer.isna() if place.layer is None else at.layer == place.layer]
    rows = at[(at.position == position) & (at.effect == effect)]
    assert len(rows) == 1
    return rows.iloc[0]["value"]


@pytest.fixture(scope="session")
def read():
    """``read(result, site, position, effect)``: one number of a mediation frame."""
    return value
