"""Draws of an example do not depend on what it is run with."""

import numpy as np
import torch

from care_lens.attacks import random_noise as noise
from care_lens.core import Example
from care_lens.core.draws import example_generator


def test_a_generator_is_of_the_seed_the_example_and_the_label():
    one, other = Example("a", id="x"), Example("b", id="x")

    def draw(*arguments):
        return torch.rand(4, generator=example_generator(*arguments)).tolist()

    assert draw(0, one) == draw(0, Example("a", id="x"))
    assert len({tuple(draw(*key)) for key in ((0, one), (1, one), (0, other), (0, one, "site"))}) == 4


def test_noise_of_a_picture_is_the_same_in_any_company(examples):
    pictured = [example for example in examples if example.image is not None]
    for kind in ("sign", "uniform"):
        whole = noise(pictured, epsilon=8, kind=kind, seed=1)
        turned = noise(pictured[::-1], epsilon=8, kind=kind, seed=1)[::-1]
        alone = [noise([example], epsilon=8, kind=kind, seed=1)[0] for example in pictured]
        for first, *rest in zip(whole, turned, alone, strict=True):
            assert all(np.array_equal(first.image, other.image) for other in rest)
        assert not np.array_equal(noise(pictured[:1], epsilon=8, kind=kind, seed=2)[0].image, whole[0].image)
