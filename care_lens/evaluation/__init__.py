"""Evaluation: the store of answers, judges, metrics with intervals, fidelity, and the table of defences by
channels."""

from care_lens.core.arguments import checked
from care_lens.evaluation.classifier import ClassifierJudge
from care_lens.evaluation.evaluate import evaluate
from care_lens.evaluation.fidelity import fidelity_trials, next_token_kl
from care_lens.evaluation.generate import generate_all
from care_lens.evaluation.judging import JudgeError, judge_answers, judge_name, judge_store, verdict_frame
from care_lens.evaluation.metrics import (
    TooManyMissing,
    interval,
    paired_difference,
    summarise,
    verdict_trials,
)
from care_lens.evaluation.refusal import NOT_REFUSALS, PUBLISHED_REFUSALS, REFUSALS, SubstringRefusalJudge
from care_lens.evaluation.store import GenerationStore, StoredAnswer
from care_lens.evaluation.table import DefenceTable

__all__ = [
    "NOT_REFUSALS",
    "PUBLISHED_REFUSALS",
    "REFUSALS",
    "ClassifierJudge",
    "DefenceTable",
    "GenerationStore",
    "JudgeError",
    "StoredAnswer",
    "SubstringRefusalJudge",
    "TooManyMissing",
    "evaluate",
    "fidelity_trials",
    "generate_all",
    "interval",
    "judge_answers",
    "judge_name",
    "judge_store",
    "next_token_kl",
    "paired_difference",
    "summarise",
    "verdict_frame",
    "verdict_trials",
]

checked(globals(), __all__)
