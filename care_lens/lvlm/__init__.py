"""The model: HookedLVLM, its inputs, and how families of models are described."""

from care_lens.core.arguments import checked
from care_lens.lvlm.bound import BoundLVLM
from care_lens.lvlm.cache import LVLMCache
from care_lens.lvlm.hooked import HookedLVLM
from care_lens.lvlm.hooks import FwdHooks, HookFn
from care_lens.lvlm.inputs import Generation, LVLMInputs
from care_lens.lvlm.replay import Edit, Replay
from care_lens.lvlm.sites import SiteInfo
from care_lens.lvlm.unknown import UnknownWordsWarning

__all__ = [
    "BoundLVLM",
    "Edit",
    "FwdHooks",
    "Generation",
    "HookFn",
    "HookedLVLM",
    "LVLMCache",
    "LVLMInputs",
    "Replay",
    "SiteInfo",
    "UnknownWordsWarning",
]

checked(globals(), __all__)
