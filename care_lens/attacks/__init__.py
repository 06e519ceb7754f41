"""Attacks on the picture and on the words: gradient (PGD), its noise control, drawn text, text wrappers."""

from care_lens.attacks.noise import random_noise
from care_lens.attacks.pgd import PGDResult, pgd
from care_lens.attacks.pixels import PixelMap, as_seen
from care_lens.attacks.targets import TargetLoss
from care_lens.attacks.templates import TEMPLATES, wrap
from care_lens.attacks.typographic import TextStyle, draw_text, typographic
from care_lens.core.arguments import checked

__all__ = [
    "TEMPLATES",
    "PGDResult",
    "PixelMap",
    "TargetLoss",
    "TextStyle",
    "as_seen",
    "draw_text",
    "pgd",
    "random_noise",
    "typographic",
    "wrap",
]

checked(globals(), __all__)
