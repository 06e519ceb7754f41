"""What comes back from a user's own judge or outcome, checked row by row before anything is counted.

A judge that returns True, or one verdict too few, would otherwise count as something: True is no verdict, and an answer without one is
neither safe nor unsafe.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from care_lens.core.errors import CareLensError
from care_lens.core.outcome import OutcomeError, Verdict, given_outcome, logits_outcome

_VERDICTS = [verdict.value for verdict in Verdict]


class JudgeError(CareLensError, ValueError):
    """A judge did not return one verdict for each answer; the message says which row is wrong."""


def named(function: Any) -> str:
    """What a judge or an outcome is called: its ``name``, else the name of its function or class."""
    function = given_outcome(function)
    return str(getattr(function, "name", None) or getattr(function, "__name__", None) or type(function).__name__)


def require_call(function: Any, *args: str, what: str, error: type[Exception], **kwargs: str) -> None:
    """Refuse a user's function that cannot be called as it will be, before anything is run.

    Args:
        function: The function.
        *args: What it is given, by position: names for the message.
        what: What it is used as, with its article.
        error: What is raised.
        **kwargs: What it is given by name.

    Raises:
        error: If its parameters do not take these; the message says which it is given.

    Example:
        >>> require_call(lambda logits, inputs: logits, "logits", "inputs", what="an outcome", error=OutcomeError)
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C, or not callable at all
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as mismatch:
        wanted = ", ".join([*args, *(f"{name}={value}" for name, value in kwargs.items())])
        raise error(
            f"{what} is called as function({wanted}), which {named(function)}{signature} does not take ({mismatch}); "
            + ("give it these parameters, under these names" if kwargs else "give it these parameters")
        ) from None


def read_out(outcome: Any, logits: Tensor, inputs: Any) -> Any:
    """What an outcome returns for a batch, not yet checked.

    Raises:
        OutcomeError: If it is no function of logits and inputs, such as a judge, which reads answers.
    """
    function = given_outcome(logits_outcome(outcome))
    require_call(function, "logits", "inputs", what="an outcome", error=OutcomeError)
    try:
        return function(logits, inputs)
    except JudgeError as error:
        raise OutcomeError(
            f"an outcome is a function of logits and inputs, got {named(outcome)!r}, which judges answers ({error}); for a judge take "
            "care_lens.mediation.JudgedCompliance(judge)"
        ) from error


def require_verdicts(
    made: Any, n: int, *, judge: Any = "judge", yes_no: bool = False, false: Verdict = Verdict.OTHER
) -> list[Verdict]:
    """The verdicts that a judge returned, if there is one for each answer.

    Args:
        made: What it returned: a sequence of `Verdict` or of their values ("complied", "refused", "other", "missing").
        n: Number of answers.
        judge: The judge, or what to call it.
        yes_no: Whether True stands for "complied" and False for the verdict ``false``, as for a function that says whether answers are right.
        false: What False stands for.

    Raises:
        JudgeError: If it is no sequence, is not as long as the answers, or holds something else; the message names the row.

    Example:
        >>> require_verdicts(["complied"], 1)
        [<Verdict.COMPLIED: 'complied'>]
    """
    name = judge if isinstance(judge, str) else named(judge)
    advice = f"return a list of care_lens.Verdict ({', '.join(_VERDICTS)})"
    if isinstance(made, (str, bytes)) or not hasattr(made, "__len__") or not hasattr(made, "__getitem__"):
        raise JudgeError(f"judge {name!r} must return a verdict for each of {n} answers, got {made!r:.60}; {advice}")
    if len(made) != n:
        raise JudgeError(f"judge {name!r} must return a verdict for each of {n} answers, got {len(made)}; {advice}")
    return [_verdict(value, row, name, yes_no, false, advice) for row, value in enumerate(made)]


def _verdict(value: Any, row: int, name: str, yes_no: bool, false: Verdict, advice: str) -> Verdict:
    if isinstance(value, str) and value in _VERDICTS:
        return Verdict(value)
    if yes_no and (isinstance(value, bool) or type(value).__name__ == "bool_" or type(value).__name__ == "bool"):
        return Verdict.COMPLIED if value else false
    what = "a verdict or True or False" if yes_no else "a verdict"
    raise JudgeError(f"judge {name!r} must return {what} for row {row}, got {value!r:.60}; {advice}")


def require_texts(examples: Sequence[Any], texts: Sequence[Any]) -> None:
    """Refuse what no judge can judge: another number of answers than of requests, or an answer that is neither a text nor None.

    Raises:
        JudgeError: Naming the row.
    """
    for what, given in (("examples", examples), ("texts", texts)):
        if not hasattr(given, "__len__"):
            raise JudgeError(f"{what} must be a list, got {type(given).__name__}; give one answer for each example")
    if isinstance(texts, (str, bytes)) or len(examples) != len(texts):
        got = "one text" if isinstance(texts, (str, bytes)) else f"{len(examples)} and {len(texts)}"
        raise JudgeError(f"examples and texts must be of one length, got {got}; give one answer for each example")
    for row, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise JudgeError(
                f"texts must be strings or None, got {type(text).__name__} in row {row}; decode the answers first"
            )


def require_outcome(values: Any, rows: int, *, outcome: Any = "outcome", missing: bool = False) -> Tensor:
    """The numbers that an outcome returned, if there is a finite one for each row.

    Args:
        values: What it returned.
        rows: Number of rows of the batch.
        outcome: The outcome, or what to call it.
        missing: Whether NaN stands for a row that nothing could be measured of.

    Raises:
        OutcomeError: If it is no tensor of shape [rows], is not of real numbers, or holds NaN or infinity; the message names the row.
    """
    name = outcome if isinstance(outcome, str) else named(outcome)
    if not isinstance(values, Tensor) or values.is_complex() or values.shape != (rows,):
        got = f"{values.dtype} of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        more = isinstance(values, Tensor) and values.ndim > 1
        advice = "take the mean or sum over the other axes" if more else "return a tensor such as logits[:, -1, token]"
        raise OutcomeError(
            f"outcome {name!r} must return one finite number a row, a tensor [{rows}] of real numbers, got {got}; {advice}"
        )
    held = values.detach()
    if wrong := torch.nonzero(~(held.isfinite() | held.isnan()) if missing else ~held.isfinite())[:, 0].tolist():
        raise OutcomeError(
            f"outcome {name!r} must return one finite number a row, got {values[wrong[0]].item()} in row {wrong[0]}; use log "
            "probabilities rather than logarithms of probabilities"
        )
    return values
