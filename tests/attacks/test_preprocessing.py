"""Pixels to what a model is given, in every family, against the processor's own tensors."""

import importlib
import pkgutil
from dataclasses import replace

import pytest
import torch
import zoo

from care_lens.attacks import PGD, PicturePath, PreprocessingError
from care_lens.attacks.pixels import to_images, to_pixels
from care_lens.attacks.preprocessing import parts_of
from care_lens.core import Example
from care_lens.lvlm import HookedLVLM

SPECIMENS = {
    specimen.name: specimen
    for module in pkgutil.iter_modules(zoo.__path__)
    for specimen in getattr(importlib.import_module(f"zoo.{module.name}"), "SPECIMENS", [])
}


@pytest.fixture(scope="module", params=SPECIMENS)
def lvlm(request):
    model = HookedLVLM.from_hf(*SPECIMENS[request.param].make())
    yield model
    model.close()


@pytest.mark.parametrize("size", [(56, 28), (37, 61)])
def test_whole_pixels_give_what_the_processor_makes_of_the_picture(lvlm, picture, size):
    examples = [Example("what is", image=picture(i, size)) for i in range(2)]
    path = PicturePath(lvlm, examples)
    assert not path.affine
    # other pixels than those it was made with, read back from 8-bit pictures
    pixels = to_pixels([picture(i + 7, size) for i in range(2)])
    held = lvlm.prepare([replace(e, image=im) for e, im in zip(examples, to_images(pixels), strict=True)])
    pixels.requires_grad_()
    made = path(pixels, torch.tensor([0, 1]))
    for a, b in zip(made, parts_of(held), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(sum(part.square().sum() for part in made), pixels)
    reached = (gradient != 0).float().mean()
    assert float(reached) > (0.9 if lvlm.family.name != "llava" else 0.5)  # that one crops


def test_the_gradient_is_that_of_the_values_and_pgd_goes_down_on_it(lvlm, picture):
    example = Example("what is", image=picture(3, (40, 24)), response="sure")
    path = PicturePath(lvlm, [example])
    # along a smooth change, which rounding does not hide, a difference of values is what the gradient says
    ramp = torch.linspace(-1, 1, 40).expand(3, 24, 40)[None].contiguous()
    grey = torch.full((1, 3, 24, 40), 120.0, requires_grad=True)
    weight = torch.rand(path(grey, torch.tensor([0]))[0].shape, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad((path(grey, torch.tensor([0]))[0] * weight).sum(), grey)
    high, low = ((path((120 + 40 * s * ramp).round(), torch.tensor([0]))[0] * weight).sum() for s in (1, -1))
    assert float(high - low) == pytest.approx(float((slope * 80 * ramp).sum()), rel=0.1, abs=0.05 * float(weight.sum()))
    result = PGD(epsilon=8, steps=2, step_size=4, random_start=False).run(lvlm, [example])
    assert result.frame.loss[0] < result.frame.clean_loss[0]


def test_further_pictures_stay(picture, llava_maker):
    lvlm = HookedLVLM.from_hf(*llava_maker("clip"))
    example = Example("what is", image=picture(0, (24, 20)), more_images=(picture(1),), response="sure")
    path = PicturePath(lvlm, [example])
    made = path((path.pixels + 3).clamp(0, 255), torch.tensor([0]))[0]
    held = lvlm.prepare(example).pixel_values
    assert torch.equal(made[1], held[1]) and not torch.equal(made[0], held[0])


def test_a_processor_without_tensors_is_refused_by_name(picture, llava_maker):
    model, processor = llava_maker("clip")

    class Own(type(processor.image_processor)):
        def preprocess(self, images, *args, **kwargs):
            made = super().preprocess(images, *args, **kwargs)
            return type(made)({k: [v.detach() for v in values] for k, values in made.items()})

    processor.image_processor.__class__ = Own
    lvlm = HookedLVLM.from_hf(model, processor)
    with pytest.raises(PreprocessingError, match="Own must pass gradients on"):
        PicturePath(lvlm, [Example("what is", image=picture(0, (24, 20)))])
    assert type(lvlm.processor.image_processor) is Own


def test_the_pillow_processor_goes_through_its_torchvision_sibling(picture, llava_maker):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    model, processor = llava_maker("clip")
    processor.image_processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    lvlm = HookedLVLM.from_hf(model, processor)
    smooth = picture(0, (4, 4)).resize((48, 32))
    path = PicturePath(lvlm, [Example("what is", image=smooth)])
    held = lvlm.prepare(Example("what is", image=smooth)).pixel_values[0]
    made = path(path.pixels, torch.tensor([0]))[0][0]
    assert float((made - held).abs().max()) < 1.05 / 255 / 0.26
