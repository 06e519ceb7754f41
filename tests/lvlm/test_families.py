"""Families are registered objects; what an image processor keeps of a picture."""

import pytest
from transformers import CLIPImageProcessor, SiglipImageProcessor

from care_lens.lvlm.families import LLAVA, families, family_of, registry
from care_lens.lvlm.families.llava import picture_region


def test_a_subclass_belongs_to_the_family_and_others_can_be_registered(llava_maker, monkeypatch):
    from dataclasses import replace

    model, _ = llava_maker("clip")
    assert family_of(model) is LLAVA and LLAVA in families()
    subclass = type("MyLlava", (type(model),), {})
    model.__class__ = subclass
    assert family_of(model) is LLAVA
    monkeypatch.setattr(registry, "_FAMILIES", dict(registry._FAMILIES))
    mine = registry.register_family(replace(LLAVA, name="mine", architectures=("MyLlava",)))
    assert family_of(model) is mine


@pytest.mark.parametrize("size", [(30, 20), (20, 30), (20, 20)])
def test_the_region_is_what_a_centre_crop_keeps(size):
    processor = CLIPImageProcessor(size={"shortest_edge": 10}, crop_size={"height": 10, "width": 10})
    left, top, width, height = picture_region(processor, *size)
    assert (width, height) == pytest.approx((20, 20))
    assert (left, top) == pytest.approx(((size[0] - 20) / 2, (size[1] - 20) / 2))


def test_the_region_of_a_stretched_and_of_a_padded_picture():
    stretch = SiglipImageProcessor(size={"height": 8, "width": 8})
    assert picture_region(stretch, 30, 20) == (0, 0, 30, 20)
    pad = CLIPImageProcessor(size={"shortest_edge": 10}, crop_size={"height": 10, "width": 10})
    pad.do_pad = True
    assert picture_region(pad, 30, 20) == pytest.approx((0, -5, 30, 30))
