"""Evaluation: the store of answers, judges, metrics with intervals, fidelity, tuning on validation, and the
table of defences by channels."""

from care_lens.core.arguments import checked
from care_lens.core.renames import moved
from care_lens.evaluation.abnormal import abnormal_trials
from care_lens.evaluation.agreement import cohen_kappa, fleiss_kappa, judge_agreement
from care_lens.evaluation.answering import answer_verdicts, share, spread
from care_lens.evaluation.asked import EndpointJudge, MMVetGrader
from care_lens.evaluation.attack_table import AttackTableError, attack_table
from care_lens.evaluation.captions import CaptionGrader
from care_lens.evaluation.choice_letters import chosen_letter
from care_lens.evaluation.classifier import ClassifierJudge, published_template
from care_lens.evaluation.comparison import compare, rank
from care_lens.evaluation.correction import CorrectedRate, corrected_rates, ppi_rate, rogan_gladen, sample_for_labels
from care_lens.evaluation.defence_tuning import tune_defence
from care_lens.evaluation.drift import language_drift
from care_lens.evaluation.endpoint import ChatEndpoint, CostError, CostEstimate
from care_lens.evaluation.evaluate import evaluate
from care_lens.evaluation.fidelity import fidelity_trials, next_token_kl
from care_lens.evaluation.frontier import Frontier
from care_lens.evaluation.functions import FunctionJudge
from care_lens.evaluation.generate import generate_all
from care_lens.evaluation.graders import ChoiceGrader, OpenAnswerGrader, VQAGrader
from care_lens.evaluation.grading import Grader, grade_store, graded_trials
from care_lens.evaluation.guard import GuardJudge
from care_lens.evaluation.judging import JudgeError, judge_answers, judge_name, judge_store, verdict_frame
from care_lens.evaluation.metrics import (
    TooManyMissingError,
    interval,
    paired_difference,
    summarise,
    verdict_trials,
)
from care_lens.evaluation.paper import paper_table
from care_lens.evaluation.posting import EndpointError
from care_lens.evaluation.refusal import NOT_REFUSALS, PUBLISHED_REFUSALS, REFUSALS, SubstringRefusalJudge
from care_lens.evaluation.responses import AnswerNotes, AnswersError, answered_study, with_answers
from care_lens.evaluation.sampling import MissingOptunaError
from care_lens.evaluation.searching import MissingVerdictsError, NoSettingError, Search, search
from care_lens.evaluation.settings import GenerationSettings
from care_lens.evaluation.sharded import evaluate_sharded, generate_sharded
from care_lens.evaluation.splits import TestSplitError, refuse_test
from care_lens.evaluation.store import GenerationStore, StoredAnswer
from care_lens.evaluation.table import DefenceTable
from care_lens.evaluation.tuning import Choice, NoCandidateError, tune

__all__ = [
    "NOT_REFUSALS",
    "PUBLISHED_REFUSALS",
    "REFUSALS",
    "AnswerNotes",
    "AnswersError",
    "AttackTableError",
    "CaptionGrader",
    "ChatEndpoint",
    "Choice",
    "ChoiceGrader",
    "ClassifierJudge",
    "CorrectedRate",
    "CostError",
    "CostEstimate",
    "DefenceTable",
    "EndpointError",
    "EndpointJudge",
    "Frontier",
    "FunctionJudge",
    "GenerationSettings",
    "GenerationStore",
    "Grader",
    "GuardJudge",
    "JudgeError",
    "MMVetGrader",
    "MissingOptunaError",
    "MissingVerdictsError",
    "NoCandidateError",
    "NoSettingError",
    "OpenAnswerGrader",
    "Search",
    "StoredAnswer",
    "SubstringRefusalJudge",
    "TestSplitError",
    "TooManyMissingError",
    "VQAGrader",
    "abnormal_trials",
    "answer_verdicts",
    "answered_study",
    "attack_table",
    "chosen_letter",
    "cohen_kappa",
    "compare",
    "corrected_rates",
    "evaluate",
    "evaluate_sharded",
    "fidelity_trials",
    "fleiss_kappa",
    "generate_all",
    "generate_sharded",
    "grade_store",
    "graded_trials",
    "interval",
    "judge_agreement",
    "judge_answers",
    "judge_name",
    "judge_store",
    "language_drift",
    "next_token_kl",
    "paired_difference",
    "paper_table",
    "ppi_rate",
    "published_template",
    "rank",
    "refuse_test",
    "rogan_gladen",
    "sample_for_labels",
    "search",
    "share",
    "spread",
    "summarise",
    "tune",
    "tune_defence",
    "verdict_frame",
    "verdict_trials",
    "with_answers",
]

checked(globals(), __all__)
__getattr__ = moved(__name__, {"TooManyMissing": "care_lens.evaluation.TooManyMissingError"})
