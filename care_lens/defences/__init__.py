"""Defences: every way to make a model safer that a repair is compared with, under one protocol, each with its own ``fit``.

A defence is put on a model by ``with defence.on(lvlm)``, may rewrite requests by ``examples``, and is described, saved and loaded.
``alpha`` 0 (or its own switch) is the undefended model to the bit. See ``docs/howto/add_a_defence.md`` for one of your own.
"""

from care_lens.core.arguments import checked
from care_lens.core.defence import Defence, defended
from care_lens.core.renames import moved
from care_lens.defences.ablation import MeanAblation
from care_lens.defences.alphasteer import AlphaSteer
from care_lens.defences.astra import ASTRA
from care_lens.defences.base import Batch, HookDefence, NoDefence
from care_lens.defences.care_fit import CAREFaults
from care_lens.defences.cast import CAST
from care_lens.defences.coca import CoCA
from care_lens.defences.controls import random_directions
from care_lens.defences.hiddendetect import HiddenDetect, NoSafetyLayersError
from care_lens.defences.leace import LEACE
from care_lens.defences.lora import MissingPeftError
from care_lens.defences.means import CAA, ActAdd, MeanDifference
from care_lens.defences.published_care import CARESubspace, PublishedCARE
from care_lens.defences.refusal_direction import NoRefusalDirectionError, RefusalDirection
from care_lens.defences.reminder import SelfReminder
from care_lens.defences.safesteer import SafeSteer
from care_lens.defences.safety_tuning import Adapter, SafetyTuning
from care_lens.defences.secondlook import CannotJudgeError, NotOnModelError, SecondLook
from care_lens.defences.shiftdc import ShiftDC
from care_lens.defences.stored import (
    FitError,
    StoredDefence,
    StoredPart,
    WrongModelError,
    load_defence,
)
from care_lens.repair import register_kind

__all__ = [
    "ASTRA",
    "CAA",
    "CAST",
    "LEACE",
    "ActAdd",
    "Adapter",
    "AlphaSteer",
    "Batch",
    "CAREFaults",
    "CARESubspace",
    "CannotJudgeError",
    "CoCA",
    "Defence",
    "FitError",
    "HiddenDetect",
    "HookDefence",
    "MeanAblation",
    "MeanDifference",
    "MissingPeftError",
    "NoDefence",
    "NoRefusalDirectionError",
    "NoSafetyLayersError",
    "NotOnModelError",
    "PublishedCARE",
    "RefusalDirection",
    "SafeSteer",
    "SafetyTuning",
    "SecondLook",
    "SelfReminder",
    "ShiftDC",
    "StoredDefence",
    "StoredPart",
    "WrongModelError",
    "defended",
    "load_defence",
    "random_directions",
    "register_kind",
]

checked(globals(), __all__)
__getattr__ = moved(__name__, {"NoRefusalDirection": "care_lens.defences.NoRefusalDirectionError"})
