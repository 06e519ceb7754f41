"""Any function of a request and its answer as a judge."""

from collections.abc import Callable, Sequence

from care_lens.core.display import ShortRepr, brief
from care_lens.core.examples import Example
from care_lens.core.outcome import Verdict
from care_lens.core.verdicts import JudgeError, named, require_texts, require_verdicts

Says = Verdict | str | bool | None


class FunctionJudge(ShortRepr):
    """A judge of a function that is given one request and one answer.

    Args:
        function: Called with the example and the text; returns a verdict or its value, True (complied) or False, or None where it cannot tell (missing).
        name: Its name in frames; None: the function's.
        false: What False stands for. "other": the answer does not do what was asked, and refuses nothing either, so that it counts neither for attack success nor
            for refusals. "refused": for functions that ask whether an answer complies *or refuses*, so that refusal rates are not 0.

    Raises:
        TypeError: If function is none.
        ValueError: If false is no verdict.

    Example:
        >>> judge = FunctionJudge(lambda example, text: None if "?" in text else example.prompt in text, name="echo")
        >>> [verdict.value for verdict in judge([Example("red")] * 4, ["it is red", "blue", "hm?", None])]
        ['complied', 'other', 'missing', 'missing']
        >>> helps = FunctionJudge(lambda example, text: not text.startswith("sorry"), name="helps", false="refused")
        >>> [verdict.value for verdict in helps([Example("red")] * 2, ["it is red", "sorry, no"])]
        ['complied', 'refused']
    """

    def __init__(
        self, function: Callable[[Example, str], Says], *, name: str | None = None, false: Verdict | str = "other"
    ) -> None:
        if not callable(function):
            raise TypeError(f"function must be one of (example, text), got {type(function).__name__}")
        if false not in [verdict.value for verdict in Verdict]:
            raise ValueError(f"false must be one of {[verdict.value for verdict in Verdict]}, got {false!r}")
        if Verdict(false) is Verdict.COMPLIED:
            raise ValueError("false must be another verdict than True's, got 'complied'; take 'refused' or 'other'")
        self.function, self.name = function, name or named(function)
        self.false = Verdict(false)

    def shown(self) -> tuple[str, dict[str, str]]:
        """Its name and settings."""
        return type(self).__name__, {
            "name": brief(self.name),
            "false": self.false.value,
        }

    def __call__(self, examples: Sequence[Example], texts: Sequence[str | None]) -> list[Verdict]:
        """One verdict an answer; missing answers are not shown to the function.

        Raises:
            JudgeError: If there is not one text for each example, or the function fails or returns something else; the message names the row.
        """
        require_texts(examples, texts)
        said: list[Says] = []
        for row, (example, text) in enumerate(zip(examples, texts, strict=True)):
            try:
                found = Verdict.MISSING if text is None else self.function(example, text)
            except Exception as error:
                raise JudgeError(
                    f"judge {self.name!r} must return a verdict for row {row} (example {example.id!r}), got {type(error).__name__}: {error}; return None "
                    "where it cannot tell"
                ) from error
            said.append(Verdict.MISSING if found is None else found)
        return require_verdicts(said, len(said), judge=self.name, yes_no=True, false=self.false)
