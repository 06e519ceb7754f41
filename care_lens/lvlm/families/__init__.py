"""How each family of vision-language models is laid out; a new one is added by registering one object."""

from care_lens.lvlm.families.base import (
    Dims,
    Family,
    ImageLayout,
    Pictured,
    PictureRegion,
    PlainTower,
    Side,
    Tile,
    TowerMap,
    common_dims,
)
from care_lens.lvlm.families.gemma3 import GEMMA3
from care_lens.lvlm.families.glm4v import GLM4V
from care_lens.lvlm.families.idefics3 import IDEFICS3, SMOLVLM
from care_lens.lvlm.families.internvl import INTERNVL
from care_lens.lvlm.families.llama4 import LLAMA4
from care_lens.lvlm.families.llava import LLAVA
from care_lens.lvlm.families.llava_next import LLAVA_NEXT
from care_lens.lvlm.families.llava_onevision import LLAVA_ONEVISION
from care_lens.lvlm.families.mistral3 import MISTRAL3
from care_lens.lvlm.families.paligemma import PALIGEMMA
from care_lens.lvlm.families.qwen2_vl import QWEN2_5_VL, QWEN2_VL
from care_lens.lvlm.families.qwen3_vl import QWEN3_VL
from care_lens.lvlm.families.registry import families, family_of, register_family

register_family(LLAVA)
register_family(QWEN2_VL)
register_family(QWEN2_5_VL)
register_family(QWEN3_VL)
register_family(GLM4V)
register_family(LLAVA_NEXT)
register_family(LLAVA_ONEVISION)
register_family(MISTRAL3)
register_family(INTERNVL)
register_family(GEMMA3)
register_family(PALIGEMMA)
register_family(LLAMA4)
register_family(IDEFICS3)
register_family(SMOLVLM)

__all__ = [
    "GEMMA3",
    "GLM4V",
    "IDEFICS3",
    "INTERNVL",
    "LLAMA4",
    "LLAVA",
    "LLAVA_NEXT",
    "LLAVA_ONEVISION",
    "MISTRAL3",
    "PALIGEMMA",
    "QWEN2_5_VL",
    "QWEN2_VL",
    "QWEN3_VL",
    "SMOLVLM",
    "Dims",
    "Family",
    "ImageLayout",
    "PictureRegion",
    "Pictured",
    "PlainTower",
    "Side",
    "Tile",
    "TowerMap",
    "common_dims",
    "families",
    "family_of",
    "register_family",
]
