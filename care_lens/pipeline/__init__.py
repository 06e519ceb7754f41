"""Diagnose, learn, repair, prove: the steps in a row, for the command line and for notebooks."""

from care_lens.core.renames import moved
from care_lens.pipeline.choose import Choice, NoCandidateError
from care_lens.pipeline.diagnose import Diagnosis
from care_lens.pipeline.prove import Proof
from care_lens.pipeline.report import write_report
from care_lens.pipeline.run import Run, run
from care_lens.pipeline.settings import RunSettings

__all__ = ["Choice", "Diagnosis", "NoCandidateError", "Proof", "Run", "RunSettings", "run", "write_report"]
__getattr__ = moved(__name__, {"NoCandidate": "care_lens.evaluation.NoCandidateError"})
