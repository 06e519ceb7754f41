"""A model, pairs of twins and an outcome for the tests of mediation."""

import pytest

from care_lens.core import Example, PairedExamples, UnsafeMargin
from care_lens.lvlm import HookedLVLM


@pytest.fixture(scope="session")
def model(llava_maker):
    """A HookedLVLM with a CLIP tower, of which 3 layers are read, and 3 language layers."""
    return HookedLVLM.from_hf(*llava_maker("clip"))


@pytest.fixture(scope="session")
def margin(model):
    words = model.tokenizer.convert_tokens_to_ids(["sure", "yes", "sorry"])
    return UnsafeMargin(comply=tuple(words[:2]), refuse=(words[2],))


@pytest.fixture(scope="session")
def pairs(picture):
    """Two aligned pairs with pictures (words and pictures differ) of different lengths, and one without."""
    return PairedExamples.from_pairs(
        [
            (
                Example("what is red", image=picture(0), id="a", group="red"),
                Example("how is blue", image=picture(1), id="a*", group="red"),
            ),
            (
                Example("how to make a red picture", image=picture(2)),
                Example("how to make no blue picture", image=picture(3)),
            ),
            (Example("how to make a red", group="plain"), Example("how to make the blue", group="plain")),
        ]
    )


@pytest.fixture(scope="session")
def pictured(pairs):
    """The two pairs that have pictures."""
    return pairs[:2]


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
