"""Random noise of an attack's size: the control that a gradient attack is compared with."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from care_lens.attacks.pixels import require_image, to_images, to_pixels
from care_lens.core.draws import example_generator
from care_lens.core.examples import Example


def random_noise(
    examples: Sequence[Example],
    *,
    epsilon: int | float,
    kind: Literal["sign", "uniform"] = "sign",
    seed: int = 0,
    channel: str | None = None,
) -> list[Example]:
    """Add noise to each example's picture.

    Args:
        examples: Examples with pictures.
        epsilon: Size of the noise, of 255; rounded down to whole 8-bit steps.
        kind: "sign": every pixel changes by plus or minus epsilon, the corners where gradient attacks end up.
            "uniform": by a whole number drawn uniformly from [-epsilon, epsilon].
        seed: Seed of the draws; those of an example depend on it and the example alone.
        channel: Their new channel; None: as it was.

    Returns:
        The examples with 8-bit RGB pictures within epsilon of theirs (pixels are clipped to [0, 255]).

    Raises:
        ValueError: If an option is out of range, or an example has no picture.
    """
    if not 1 <= epsilon <= 255:
        raise ValueError(f"epsilon must be in [1, 255] (it is of 255), got {epsilon}")
    if kind not in ("sign", "uniform"):
        raise ValueError(f"kind must be 'sign' or 'uniform', got {kind!r}")
    radius = int(epsilon + 1e-6)
    noisy = []
    for example in examples:
        pixels = to_pixels([require_image(example)])
        generator = example_generator(seed, example)
        if kind == "sign":
            noise = radius * (2 * torch.randint(2, pixels.shape, generator=generator) - 1)
        else:
            noise = torch.randint(-radius, radius + 1, pixels.shape, generator=generator)
        image = to_images((pixels + noise).clamp(0, 255))[0]
        noisy.append(replace(example, image=image, channel=example.channel if channel is None else channel))
    return noisy
