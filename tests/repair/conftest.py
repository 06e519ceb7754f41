"""The model and the batch that repairs are tested on."""

import pytest

from care_lens.lvlm import HookedLVLM


@pytest.fixture(scope="session")
def model(llava_maker):
    """A HookedLVLM of 3 language layers, 32 wide."""
    return HookedLVLM.from_hf(*llava_maker("clip"))


@pytest.fixture()
def inputs(model, examples):
    """Three rows of different lengths, left-padded; the second one has no image."""
    return model.prepare(examples)
