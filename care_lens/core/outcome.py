"""What is measured about an answer, and what stands between the model and it: outcomes, judges, repairs.

An :class:`Outcome` is a number read off the logits of one forward pass, larger where the model is less safe
(:mod:`care_lens.core.outcome_kinds`; those of the house are in :mod:`care_lens.core.margins`). A :class:`Judge` reads generated texts. A
:class:`Repair` is anything that can be put on a model for a while (:mod:`care_lens.core.protocols`). All three are protocols: no base class
is needed.
"""

from care_lens.core.margins import (
    KLDivergence,
    LogitDifference,
    PrefixMargin,
    ResponseLogProb,
    UnsafeMargin,
    require_ids,
)
from care_lens.core.outcome_kinds import (
    BaseOutcome,
    GeneratedOutcome,
    HasSpans,
    HasTokens,
    Outcome,
    OutcomeError,
    as_outcome,
    given_outcome,
    logits_outcome,
)
from care_lens.core.protocols import Judge, Repair, Verdict

__all__ = [
    "BaseOutcome",
    "GeneratedOutcome",
    "HasSpans",
    "HasTokens",
    "Judge",
    "KLDivergence",
    "LogitDifference",
    "Outcome",
    "OutcomeError",
    "PrefixMargin",
    "Repair",
    "ResponseLogProb",
    "UnsafeMargin",
    "Verdict",
    "as_outcome",
    "given_outcome",
    "logits_outcome",
    "require_ids",
]
