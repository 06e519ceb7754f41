"""Random noise of an attack's size: the control that a gradient attack is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from care_lens.attacks.common import described, require_requests, run_settings
from care_lens.attacks.kinds import register_attack
from care_lens.attacks.pixels import require_image, to_images, to_pixels
from care_lens.core.attack import AttackResult
from care_lens.core.draws import example_generator
from care_lens.core.examples import Example
from care_lens.lvlm.hooked import HookedLVLM


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


@register_attack
@dataclass(frozen=True, kw_only=True)
class RandomNoise:
    """Noise of an attack's size as an attack: what a gradient attack gains over it is what its gradient is worth.

    Attributes:
        epsilon: Size of the noise, of 255.
        kind: "sign" or "uniform", see :func:`random_noise`.
        channel: Channel of the examples made; None: as it was.
    """

    epsilon: float | int = 16
    kind: Literal["sign", "uniform"] = "sign"
    channel: str | None = None
    name: str = "random noise"
    searches: ClassVar[bool] = False

    def describe(self) -> dict[str, Any]:
        """Its settings, JSON-able."""
        return described(self)

    def run(
        self, lvlm: HookedLVLM | None, examples: Sequence[Example], defence: Any = None, seed: int = 0
    ) -> AttackResult:
        """Add noise to each example's picture.

        Args:
            lvlm: Not used; may be None.
            examples: Examples with pictures.
            defence: Noted in the settings; the noise does not depend on it.
            seed: Seed of the draws.

        Raises:
            ValueError: If an option is out of range, or an example has no picture.
        """
        require_requests(examples)
        made = random_noise(examples, epsilon=self.epsilon, kind=self.kind, seed=seed, channel=self.channel)
        return AttackResult.of(made, settings=run_settings(self, examples, defence, seed))
