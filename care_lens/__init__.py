"""CARE lens: diagnose, learn, repair and evaluate the unsafe channels of vision-language models.

Names are imported when they are first used, so that ``import care_lens`` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_ROOMS = {
    "care_lens.core": ("Example", "PairedExamples", "Site", "TokenSpans", "UnsafeMargin", "Verdict"),
    "care_lens.lvlm": ("HookedLVLM", "LVLMInputs"),
    "care_lens.subspace": ("SafetySubspace",),
    "care_lens.capture": ("Activations",),
    "care_lens.mediation": ("ablate", "mediate", "patch_map"),
    "care_lens.repair": ("ConformalGate", "Correction", "HybridFusion", "Reader", "Writer"),
}
_HOMES = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
