"""Readers of published benchmarks: each is a sequence of examples, out of the files as they are published. No content of theirs comes with the package.

    from care_lens.data import benchmarks

    rows = benchmarks.FigStep("FigStep/data")
    rows.problems  # rows that give no example, and what to do about each
    rows[0].behaviour, rows[0].image

:class:`Benchmark` says what all of them have; :data:`READERS` lists them by name.
"""

from care_lens.core.arguments import checked
from care_lens.data.benchmarks.advbench import AdvBench
from care_lens.data.benchmarks.astra import ASTRAPictures
from care_lens.data.benchmarks.coco import COCOCaptions
from care_lens.data.benchmarks.figstep import FigStep, FigStepPro
from care_lens.data.benchmarks.harmbench import HarmBenchMM
from care_lens.data.benchmarks.jailbreakbench import JailbreakBench
from care_lens.data.benchmarks.jailbreakv import JailBreakV, RedTeam2K
from care_lens.data.benchmarks.mmbench import MMBench
from care_lens.data.benchmarks.mmsafetybench import MMSafetyBench
from care_lens.data.benchmarks.mmvet import MMVet
from care_lens.data.benchmarks.mossbench import MOSSBench
from care_lens.data.benchmarks.msts import MSTS
from care_lens.data.benchmarks.orbench import ORBench
from care_lens.data.benchmarks.places import BenchmarkError, BenchmarkNotFoundError
from care_lens.data.benchmarks.reader import Benchmark, behaviour_key
from care_lens.data.benchmarks.rows import Problem
from care_lens.data.benchmarks.scienceqa import ScienceQA
from care_lens.data.benchmarks.siuo import SIUO
from care_lens.data.benchmarks.vlguard import VLGuard
from care_lens.data.benchmarks.vqa import VQAv2
from care_lens.data.benchmarks.xstest import XSTest

READERS: dict[str, type[Benchmark]] = {
    reader.name: reader
    for reader in (
        JailBreakV,
        RedTeam2K,
        MMSafetyBench,
        FigStep,
        FigStepPro,
        VLGuard,
        SIUO,
        MOSSBench,
        HarmBenchMM,
        MSTS,
        AdvBench,
        JailbreakBench,
        XSTest,
        ORBench,
        MMVet,
        MMBench,
        ScienceQA,
        VQAv2,
        COCOCaptions,
        ASTRAPictures,
    )
}
"""The readers by their short names, as ``care-lens preflight --format`` takes them."""

__all__ = [
    "MSTS",
    "READERS",
    "SIUO",
    "ASTRAPictures",
    "AdvBench",
    "Benchmark",
    "BenchmarkError",
    "BenchmarkNotFoundError",
    "COCOCaptions",
    "FigStep",
    "FigStepPro",
    "HarmBenchMM",
    "JailBreakV",
    "JailbreakBench",
    "MMBench",
    "MMSafetyBench",
    "MMVet",
    "MOSSBench",
    "ORBench",
    "Problem",
    "RedTeam2K",
    "ScienceQA",
    "VLGuard",
    "VQAv2",
    "XSTest",
    "behaviour_key",
]

checked(globals(), __all__)
