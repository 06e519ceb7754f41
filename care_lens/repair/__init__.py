"""Repair: corrections that read, gate and write, their fusion into a defence that is put on a model, and how they are learned.

::

    repair = learn_repair(lvlm, study, ReaderPlan(layer=2, offsets=(0, 5)))  # or care_lens.evaluation.tune(lvlm, study).repair
    with repair.on(lvlm):
        lvlm.generate(inputs)
"""

from care_lens.core.arguments import checked
from care_lens.repair.attach import Attachment, attach
from care_lens.repair.bake import BakeCertificate, bake
from care_lens.repair.base import HookPair, HookRepair, NoRepair
from care_lens.repair.calibrating import captured_scores, halves, recalibrated, recalibrated_together
from care_lens.repair.combined import AllOf, AnyOf, SumReader, WeightedReader, in_threshold_units, modality_detector
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
from care_lens.repair.explaining import explain
from care_lens.repair.fusion import HybridFusion
from care_lens.repair.gate import AlwaysOpen, ConformalGate, Gate, SoftGate, ThresholdGate, TooFewCalibration
from care_lens.repair.kinds import register_kind
from care_lens.repair.learning import (
    FittedReaders,
    ReaderPlan,
    Readers,
    assemble,
    fit_joint_reader,
    fit_reader_subspace,
    reader_of,
    reader_plans,
    writer_rows,
)
from care_lens.repair.linear import LinearPart, linear_part
from care_lens.repair.method import learn_repair
from care_lens.repair.opening import Gated, Watch, opens, which_open
from care_lens.repair.plan import PlanPart, RepairPlan
from care_lens.repair.positions import Positions
from care_lens.repair.printed import printed_form, printed_subspaces
from care_lens.repair.reader import EnergyReader, LinearReader, MaxReader, Reader, SiteReader
from care_lens.repair.reading import read_scores
from care_lens.repair.recording import Recording
from care_lens.repair.refusing import refusal_reader, refusal_writer
from care_lens.repair.rows import FitRows, TokenRows, fit_rows, residual_sites, study_rows, token_rows
from care_lens.repair.schedule import ConstantSchedule, ExponentialDecay, FirstTokens, LinearDecay, Schedule
from care_lens.repair.store import load_repair, save_repair
from care_lens.repair.trace import ScoreTrace
from care_lens.repair.writer import Writer

__all__ = [
    "AllOf",
    "AlwaysOpen",
    "AnyOf",
    "AttachError",
    "Attachment",
    "BakeCertificate",
    "BakeError",
    "ConformalGate",
    "ConstantSchedule",
    "Correction",
    "EnergyReader",
    "ExponentialDecay",
    "FirstTokens",
    "FitRows",
    "FittedReaders",
    "Gate",
    "Gated",
    "HookPair",
    "HookRepair",
    "HybridFusion",
    "KindError",
    "LinearDecay",
    "LinearPart",
    "LinearReader",
    "MaxReader",
    "NoRepair",
    "PlanPart",
    "Positions",
    "Reader",
    "ReaderPlan",
    "Readers",
    "Recording",
    "RepairError",
    "RepairFileError",
    "RepairMismatchError",
    "RepairPlan",
    "Schedule",
    "ScoreTrace",
    "SiteReader",
    "SoftGate",
    "SumReader",
    "ThresholdGate",
    "TokenRows",
    "TooFewCalibration",
    "TooFewCalibrationError",
    "Watch",
    "WeightedReader",
    "Writer",
    "assemble",
    "attach",
    "bake",
    "captured_scores",
    "explain",
    "fit_joint_reader",
    "fit_reader_subspace",
    "fit_rows",
    "halves",
    "in_threshold_units",
    "learn_repair",
    "linear_part",
    "load_repair",
    "modality_detector",
    "opens",
    "printed_form",
    "printed_subspaces",
    "random_control",
    "read_scores",
    "reader_of",
    "reader_plans",
    "recalibrated",
    "recalibrated_together",
    "refusal_reader",
    "refusal_writer",
    "register_kind",
    "residual_sites",
    "save_repair",
    "shuffled_labels",
    "study_rows",
    "token_rows",
    "which_open",
    "writer_rows",
]

# explain says itself what it cannot explain: hooks that are functions, or the model in the repair's place.
checked(globals(), [name for name in __all__ if name != "explain"])
