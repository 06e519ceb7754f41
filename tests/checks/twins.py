"""A model, pairs of twins and an outcome, fixtures of more than one folder of tests: a ``conftest.py`` imports them."""

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
