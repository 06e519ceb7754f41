"""Repair: corrections that read, gate and write, and their fusion into a defence that is put on a model."""

from care_lens.core.arguments import checked
from care_lens.repair.attach import Attachment, attach
from care_lens.repair.bake import BakeCertificate, bake
from care_lens.repair.base import HookPair, HookRepair, NoRepair
from care_lens.repair.controls import random_control, shuffled_labels
from care_lens.repair.correction import Correction
from care_lens.repair.errors import (
    AttachError,
    BakeError,
    KindError,
    RepairError,
    RepairFileError,
    RepairMismatchError,
    TooFewCalibrationError,
)
from care_lens.repair.fusion import HybridFusion
from care_lens.repair.gate import AlwaysOpen, ConformalGate, Gate, TooFewCalibration
from care_lens.repair.kinds import register_kind
from care_lens.repair.linear import LinearPart, linear_part
from care_lens.repair.positions import Positions
from care_lens.repair.reader import EnergyReader, LinearReader, MaxReader, Reader, SiteReader
from care_lens.repair.reading import read_scores
from care_lens.repair.store import load_repair, save_repair
from care_lens.repair.writer import Writer

__all__ = [
    "AlwaysOpen",
    "AttachError",
    "Attachment",
    "BakeCertificate",
    "BakeError",
    "ConformalGate",
    "Correction",
    "EnergyReader",
    "Gate",
    "HookPair",
    "HookRepair",
    "HybridFusion",
    "KindError",
    "LinearPart",
    "LinearReader",
    "MaxReader",
    "NoRepair",
    "Positions",
    "Reader",
    "RepairError",
    "RepairFileError",
    "RepairMismatchError",
    "SiteReader",
    "TooFewCalibration",
    "TooFewCalibrationError",
    "Writer",
    "attach",
    "bake",
    "linear_part",
    "load_repair",
    "random_control",
    "read_scores",
    "register_kind",
    "save_repair",
    "shuffled_labels",
]

checked(globals(), __all__)
