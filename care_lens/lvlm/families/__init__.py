"""How each family of vision-language models is laid out; a new one is added by registering one object."""

from care_lens.lvlm.families.base import (
    Dims,
    Family,
    ImageLayout,
    Pictured,
    PictureRegion,
    Tile,
    TowerMap,
    common_dims,
)
from care_lens.lvlm.families.llava import LLAVA
from care_lens.lvlm.families.registry import families, family_of, register_family

register_family(LLAVA)

__all__ = [
    "LLAVA",
    "Dims",
    "Family",
    "ImageLayout",
    "PictureRegion",
    "Pictured",
    "Tile",
    "TowerMap",
    "common_dims",
    "families",
    "family_of",
    "register_family",
]
