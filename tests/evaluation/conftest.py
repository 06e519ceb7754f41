"""A small model, defences that do something, and suites for the evaluation."""

import zlib
from contextlib import contextmanager

import pytest
import torch

from care_lens.core import Example, Verdict


class Scaled:
    """Scales the projector's output and the last residual stream."""

    def __init__(self, factor: float, name: str = "scaled") -> None:
        self.factor, self.name = factor, name
        self.weights = torch.full((3,), float(factor))

    @contextmanager
    def on(self, lvlm):
        with lvlm.hooks([("blocks.0.hook_resid_post", lambda activation, hook: activation * self.factor)]):
            yield

    def describe(self):
        return {"kind": "scaled"}


class ByText:
    """Complied, refused or other, as a checksum of the text has it."""

    name = "by-text"

    def __call__(self, examples, texts):
        kinds = (Verdict.COMPLIED, Verdict.REFUSED, Verdict.OTHER)
        return [kinds[zlib.crc32(text.encode()) % 3] for text in texts]


@pytest.fixture(scope="session")
def small(llava_maker):
    """A HookedLVLM with a CLIP tower."""
    from care_lens.lvlm import HookedLVLM

    return HookedLVLM.from_hf(*llava_maker("clip"))


@pytest.fixture(scope="session")
def scaled():
    """The class of defences."""
    return Scaled


@pytest.fixture(scope="session")
def judge():
    """A judge with all kinds of verdicts."""
    return ByText()


@pytest.fixture(scope="session")
def suites(picture):
    """Two harmful channels and a benign one; the benign one has two examples a group."""
    words = ("red", "blue", "yes", "no", "picture", "first")
    return {
        "plain": [Example(f"how to make a {w}", harmful=True, id=w, group=w) for w in words],
        "shown": [
            Example(f"what is in the {w}", image=picture(i), harmful=True, id=w, group=w) for i, w in enumerate(words)
        ],
        "benign": [
            Example(f"{ask} {w} then", image=picture(i), id=f"{ask}-{w}", group=w)
            for i, w in enumerate(words)
            for ask in ("what", "is the")
        ],
    }
