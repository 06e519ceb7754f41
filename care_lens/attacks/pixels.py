"""The way from 8-bit pictures to what a model is given, and back.
 An image processor that neither resizes nor crops a picture is an affine map of its pixels, channel by
channel: ``value = (pixel * rescale_factor - mean) / std``. Attacks work on pixels in [0, 255] and go through
that map, so that a bound on pixels means what it says and what is found survives being saved as a picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from care_lens.core.display import ShortRepr
from care_lens.core.examples import Example
from care_lens.core.pictures import shown_picture
from care_lens.lvlm.hooked import HookedLVLM

_TOLERANCE = 0.05


@dataclass(frozen=True)
class PixelMap(ShortRepr):
    """The affine map of an image processor.

    Attributes:
        scale: [channel, 1, 1] model values per 8-bit step.
        shift: [channel, 1, 1] model value of a pixel of 0.
    """

    scale: Float[Tensor, "channel 1 1"]
    shift: Float[Tensor, "channel 1 1"]

    @classmethod
    def of(cls, image_processor: Any, *, device: torch.device | str = "cpu") -> "PixelMap":
        """Read the map off a Hugging Face image processor (``do_rescale``, ``do_normalize`` and their
        options)."""
        rescale = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        normalise = image_processor.do_normalize
        mean = torch.tensor(image_processor.image_mean if normalise else [0.0] * 3, dtype=torch.float64)
        std = torch.tensor(image_processor.image_std if normalise else [1.0] * 3, dtype=torch.float64)
        scale, shift = (rescale / std).float(), (-mean / std).float()
        return cls(scale.view(-1, 1, 1).to(device), shift.view(-1, 1, 1).to(device))

    def encode(
        self, pixels: Float[Tensor, "image channel height width"]
    ) -> Float[Tensor, "image channel height width"]:
        """Pixels in [0, 255] to model values; differentiable."""
        return pixels * self.scale + self.shift

    def decode(
        self, values: Float[Tensor, "image channel height width"]
    ) -> Float[Tensor, "image channel height width"]:
        """Model values to pixels in [0, 255], not rounded."""
        return (values - self.shift) / self.scale

    def fits(self, pixels: Float[Tensor, "image channel height width"], values: Float[Tensor, "..."]) -> bool:
        """Whether the processor gave the model these pixels, one by one."""
        return pixels.shape == values.shape and bool(((self.decode(values) - pixels).abs() < _TOLERANCE).all())

    def require(
        self,
        pixels: Float[Tensor, "image channel height width"],
        values: Float[Tensor, "image channel rows cols"],
    ) -> None:
        """Check that the processor gave the model these pixels, one by one.

        Args:
            pixels: [image, channel, height, width] pixels in [0, 255].
            values: What the processor made of the same pictures.

        Raises:
            ValueError: If it resized, cropped or otherwise changed them.
        """
        if self.fits(pixels, values):
            return
        given, made = (f"{part.shape[-1]} x {part.shape[-2]}" for part in (pixels, values))
        raise ValueError(
            f"pictures must reach the model pixel by pixel, got {given} pixels of which the processor makes "
            f"{made} others; resize them first with care_lens.attacks.as_seen(lvlm, examples)"
        )


def to_pixels(images: Sequence[Image.Image]) -> Float[Tensor, "image channel height width"]:
    """[image, 3, height, width] pixels in [0, 255] of pictures of one size, taken as RGB.

    Raises:
        ValueError: If the pictures differ in size.
    """
    if len(sizes := {image.size for image in images}) != 1:
        raise ValueError(
            f"pictures must be of one size, got {sorted(sizes)}; resize them first with "
            "care_lens.attacks.as_seen(lvlm, examples)"
        )
    arrays = [np.asarray(shown_picture(image)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float()


def to_images(pixels: Float[Tensor, "image channel height width"]) -> list[Image.Image]:
    """8-bit RGB pictures of pixels in [0, 255], rounded to the nearest."""
    arrays = pixels.detach().round().clamp(0, 255).to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]


def require_image(example: Example) -> Image.Image:
    """The example's picture.

    Raises:
        ValueError: If it has none.
    """
    if example.image is None:
        raise ValueError(
            f"example {example.id!r} must have an image, got None; give it one to perturb, such as a blank"
        )
    return example.image


def as_seen(lvlm: HookedLVLM, examples: Sequence[Example]) -> list[Example]:
    """The examples with their pictures as the model sees them: resized, cropped and padded by its processor.

    Args:
        lvlm: The model.
        examples: Examples with pictures of any size.

    Returns:
        The same examples with 8-bit RGB pictures that the processor passes on pixel by pixel.

    Raises:
        ValueError: If an example has no picture, or the model takes it in tiles or in rows of patches.
    """
    seen = []
    for example in examples:
        image = require_image(example)
        values = lvlm.prepare(replace(example, image=image, more_images=())).pixel_values
        assert values is not None
        if values.ndim != 4 or values.shape[:2] != (1, 3):
            raise ValueError(
                f"the model must be given a picture as one tensor [1, 3, height, width], got {tuple(values.shape)} for "
                f"{example.id!r}: pictures that are cut in tiles or rows of patches cannot be attacked by pixel here"
            )
        pixels = PixelMap.of(lvlm.processor.image_processor, device=values.device).decode(values)
        seen.append(replace(example, image=to_images(pixels)[0]))
    return seen
