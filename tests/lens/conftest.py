"""A model for the tests of the lens."""

import pytest

from care_lens.core import UnsafeMargin
from care_lens.lvlm import HookedLVLM


@pytest.fixture(scope="session")
def model(llava_maker):
    """A HookedLVLM with a CLIP tower, of which 3 layers are read, and 3 language layers."""
    return HookedLVLM.from_hf(*llava_maker("clip"))


@pytest.fixture(scope="session")
def margin(model):
    words = model.tokenizer.convert_tokens_to_ids(["sure", "yes", "sorry"])
    return UnsafeMargin(comply=tuple(words[:2]), refuse=(words[2],))
