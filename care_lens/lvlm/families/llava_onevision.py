"""LLaVA-OneVision: LLaVA-NeXT with two differences in what becomes of a picture.

Joined crops of many more tokens than ``config.vision_aspect_ratio`` ("anyres_max_9": nine tiles) allows are resampled
to fewer. And an example with several pictures shows each of them once, padded to a square, with no crops and one
newline token. Videos are not supported.
"""

from collections.abc import Sequence

from care_lens.lvlm.families.base import Family, ImageLayout, Pictured, PictureRegion
from care_lens.lvlm.families.llava import (
    DECODER,
    ENCODER,
    OUTSIDE,
    PLAIN_OUTSIDE,
    class_tokens,
    projector_width,
    vision_depth,
)
from care_lens.lvlm.families.llava_next import DROPPED, image_layout, overview, require_settings, tiles


def _layout(about: Pictured) -> Sequence[ImageLayout]:
    require_settings(about)
    config = about.config
    if len(about.sizes) == 1:
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        return [image_layout(config, about.sizes[0], most)]
    bases = [overview(config, _square(*size)) for size in about.sizes]
    return [ImageLayout(base.rows * base.cols + 1, (base,)) for base in bases]


def _square(width: int, height: int) -> PictureRegion:
    """The square around a picture that is padded to one; an odd pixel goes to the right or below."""
    side = max(width, height)
    return PictureRegion(float(-((side - width) // 2)), float(-((side - height) // 2)), float(side), float(side))


def _entries(about: Pictured) -> int:
    return tiles(about) if len(about.sizes) == 1 else len(about.sizes)


LLAVA_ONEVISION = Family(
    name="llava_onevision",
    architectures=("LlavaOnevisionForConditionalGeneration",),
    language=DECODER,
    vision=ENCODER,
    outside=OUTSIDE,
    vision_depth=vision_depth,
    projector_width=projector_width,
    layout=_layout,
    class_tokens=class_tokens,
    entries=_entries,
    nested_images=True,
    plain_outside=PLAIN_OUTSIDE,
    extra_inputs=("image_sizes", "batch_num_images"),
    notes={"projector.hook_out": f"{DROPPED}; a large picture's joined crops are resampled after it"},
)
"""The LLaVA-OneVision family."""
