"""A small random model, and requests of all kinds for it."""

import pytest
from world_model import make_world_model

from care_lens import organism


@pytest.fixture(scope="session")
def world_model():
    """Four language layers, 24 wide."""
    return make_world_model(width=24, layers=4, mlp=48)


@pytest.fixture(scope="session")
def kinds():
    """Requests by kind, with responses; harmless and harmful ones both with and without pictures."""

    def some(channel, n):
        return organism.examples(channel, "fit", n=n)

    return {
        "benign": some("benign typographic", 5) + some("benign plain", 4),
        "malicious": some("typographic", 4) + some("wrapper", 4),
        "refused": some("plain", 6),
        "pictures": some("typographic", 2),
        "clean": some("benign shapes", 3),
    }


@pytest.fixture(scope="session")
def requests(kinds):
    """A batch of rows of different lengths, with and without pictures."""
    return [kinds["malicious"][0], kinds["malicious"][5], kinds["benign"][1], kinds["refused"][2]]
