"""From the pixels of a picture to what the model is given, with a gradient, for every family.

Processors resize, crop, pad, cut in tiles and lay out in rows of patches. Their torchvision code does all of that with tensors, so that it
is run here as it stands, on a copy of the image processor that takes pixels with a gradient. One step is not differentiable:
resizing 8-bit pixels rounds and clips. There the copy computes the processor's own 8-bit result, and the gradient of the same
resizing without rounding (a straight-through gradient, zero where the result is clipped). So

    path = PicturePath(lvlm, examples)
    values = path(pixels, torch.arange(len(examples)))  # one tensor an example: its part of the batch's pixel_values

gives, for whole pixels in [0, 255], the numbers that ``lvlm.prepare`` gives for the saved pictures.

A processor that neither resizes nor crops is an affine map of the pixels (:class:`~care_lens.attacks.PixelMap`), which is quicker and
taken where it holds.
"""

import copy
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from care_lens.attacks.pixels import PixelMap, require_image, to_pixels
from care_lens.core.conversation import ExampleError
from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example
from care_lens.lvlm.hooked import HookedLVLM
from care_lens.lvlm.inputs import LVLMInputs

_LEVEL = 1.05
"""Most that a value may differ from the processor's own, in 8-bit steps: a step where another library resizes, and float error."""


class PreprocessingError(CareLensError, ValueError):
    """What a processor makes of a picture cannot be had with a gradient; the message names the processor and why."""


class PicturePath:
    """The way of each example's first own picture through the model's processor.

    Args:
        lvlm: The model.
        examples: Examples with pictures of one size. Their further pictures stay as they are.

    Attributes:
        pixels: [image, channel, height, width] the pictures' own pixels in [0, 255], on the model's device.
        affine: Whether the processor neither resizes nor crops them.

    Raises:
        ValueError: If a picture is missing or they differ in size.
        PreprocessingError: If the processor's result cannot be had with a gradient.
    """

    def __init__(self, lvlm: HookedLVLM, examples: Sequence[Example]) -> None:
        self.pixels = to_pixels([require_image(example) for example in examples]).to(lvlm.device)
        self._lvlm, self._examples = lvlm, [replace(example, response=None, prefill=None) for example in examples]
        inputs = lvlm.prepare(self._examples)
        self._map = PixelMap.of(lvlm.processor.image_processor, device=lvlm.device)
        given = inputs.pixel_values
        if given is None:
            raise PreprocessingError(f"the processor {_named(lvlm)} must give pixel_values of a picture, got none")
        self._dtype = given.dtype
        self.affine = self._map.fits(self.pixels, given)
        if not self.affine:
            self._require_same(inputs)

    def __call__(
        self, pixels: Float[Tensor, "kept channel height width"], index: Int[Tensor, " kept"]
    ) -> list[Float[Tensor, "..."]]:
        """What the model is given of some of the examples with other pixels.

        Args:
            pixels: [kept, channel, height, width] pixels in [0, 255] of the examples ``index``.
            index: [kept] which examples.

        Returns:
            For each its part of ``pixel_values`` (of all its pictures), differentiable in the pixels.
        """
        if self.affine:
            return list(self._map.encode(pixels).to(self._dtype).split(1))
        examples = [self._examples[i] for i in index.tolist()]
        with _through_tensors(self._lvlm.processor, list(pixels), examples):
            inputs = self._lvlm.prepare(examples)
        return parts_of(inputs)

    def same(self, made: Float[Tensor, "..."], held: Float[Tensor, "..."]) -> bool:
        """Whether two parts are the same to a hundredth of an 8-bit step (to bfloat16's rounding, where that is the dtype)."""
        return made.shape == held.shape and bool(((made - held).abs() <= self._slack(held, levels=0.01)).all())

    def _slack(self, values: Float[Tensor, "..."], *, levels: float) -> float:
        step = float(self._map.scale.abs().max()) * levels
        coarse = 2.0**-7 if values.dtype == torch.bfloat16 else 2.0**-10 if values.dtype == torch.float16 else 0.0
        return max(step, coarse * float(values.abs().max()))

    def _require_same(self, inputs: LVLMInputs) -> None:
        """Compare with what the processor makes of the pictures themselves.

        Raises:
            PreprocessingError: If it is something else, or has no gradient.
        """
        pixels = self.pixels[:1].clone().requires_grad_()
        with torch.enable_grad():
            (made,) = self(pixels, torch.tensor([0]))
        wanted = parts_of(inputs)[0]
        if not made.requires_grad:
            raise PreprocessingError(
                f"the processor {_named(self._lvlm)} must pass gradients on, got a result without one; it turns tensors into arrays"
            )
        step = self._slack(wanted, levels=_LEVEL)
        if made.shape != wanted.shape or bool(((made - wanted).abs() > step).any()):
            largest = "another shape" if made.shape != wanted.shape else f"{float((made - wanted).abs().max()):.3g}"
            raise PreprocessingError(
                f"the processor {_named(self._lvlm)} must give the same for pixels as for pictures, got a difference of {largest}; "
                "resize the pictures first with care_lens.attacks.as_seen(lvlm, examples)"
            )


def parts_of(inputs: LVLMInputs) -> list[Float[Tensor, "..."]]:
    """Each row's part of ``pixel_values``; all rows must have a picture."""
    return [inputs.rows([row]).pixel_values for row in range(inputs.batch_size)]  # type: ignore[misc]


def joined_parts(parts: Sequence[Float[Tensor, "..."]], like: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Parts of rows after one another, each padded with zeros at the end of its axes to the batch's size."""
    made = []
    for part in parts:
        if part.shape[1:] != like.shape[1:]:
            wider = part.new_zeros(len(part), *like.shape[1:])
            wider[(slice(None), *(slice(n) for n in part.shape[1:]))] = part
            part = wider
        made.append(part)
    return torch.cat(made).to(like.dtype)


class _Straight:
    """In front of an image processor's class: it takes tensors in place of the pictures, and resizes with a straight-through gradient."""

    _pictures: "Iterator[Tensor]"

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
        """What the class itself makes of the tensors that stand for the pictures."""
        return super().preprocess(self._swapped(images), *args, **kwargs)  # type: ignore[misc]

    def resize(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own 8-bit result, with the gradient of the result that is not rounded."""
        name = next((key for key in ("image", "images") if key in kwargs), None)
        image = args[0] if name is None else kwargs[name]

        def resized(given: Tensor) -> Tensor:
            own: Any = super(_Straight, self)
            if name is None:
                return own.resize(given, *args[1:], **kwargs)
            return own.resize(*args, **{**kwargs, name: given})

        if not image.is_floating_point():
            return resized(image)
        exact = resized(image.detach().round().clamp(0, 255).to(torch.uint8)).to(image.dtype)
        smooth = resized(image).clamp(0, 255)
        return smooth + (exact - smooth).detach()

    def _swapped(self, images: Any) -> Any:
        if isinstance(images, (list, tuple)):
            return [self._swapped(one) for one in images]
        if (picture := next(self._pictures, None)) is None:
            raise PreprocessingError(f"{type(self).__name__} must take each picture once, it asked for more")
        return picture


@contextmanager
def _through_tensors(processor: Any, pixels: Sequence[Tensor], examples: Sequence[Example]) -> Iterator[None]:
    """The processor with tensors in place of the first own picture of each example, in a ``with`` block.

    Raises:
        PreprocessingError: If the processor has not taken each picture once.
    """
    own = processor.image_processor
    queue = []
    for value, example in zip(pixels, examples, strict=True):
        before = len(example.images) - len(example.own_images)
        others = [to_pixels([image])[0].to(value) for image in example.images]
        queue += [value if i == before else other for i, other in enumerate(others)]
    left = iter(queue)
    processor.image_processor = _copy(own, left)
    try:
        yield
    except ExampleError as error:
        if isinstance(error.__cause__, PreprocessingError):
            raise error.__cause__ from None
        raise
    finally:
        processor.image_processor = own
    if next(left, None) is not None:
        raise PreprocessingError(f"{type(own).__name__} must take each picture once, it left some out")


def _copy(image_processor: Any, pictures: Iterator[Tensor]) -> Any:
    """The image processor's differentiable copy.

    Raises:
        PreprocessingError: If it has no torchvision code.
    """
    cls = _torchvision(type(image_processor))
    made = copy.copy(image_processor)
    made.__class__ = type(cls.__name__, (_Straight, cls), {})
    made._pictures = pictures
    return made


def _torchvision(cls: type) -> type:
    """The class with torchvision code: itself, or the sibling of one that works with Pillow."""
    from transformers.image_processing_backends import TorchvisionBackend

    if issubclass(cls, TorchvisionBackend):
        return cls
    if cls.__module__.startswith("transformers.models.") and cls.__name__.endswith("Pil"):
        home = importlib.import_module(cls.__module__.replace("image_processing_pil_", "image_processing_"))
        sibling = getattr(home, cls.__name__.removesuffix("Pil"), None)
        if sibling is not None and issubclass(sibling, TorchvisionBackend):
            return sibling
    raise PreprocessingError(
        f"the image processor must have torchvision code to be attacked through, got {cls.__name__}; load it with "
        "AutoImageProcessor.from_pretrained(..., backend='torchvision'), or resize the pictures first with "
        "care_lens.attacks.as_seen(lvlm, examples)"
    )


def _named(lvlm: HookedLVLM) -> str:
    return type(lvlm.processor.image_processor).__name__
