"""What reads a generated answer, and what can be put on the model that generates it: judges and repairs.

A :class:`Judge` reads texts, and says of each what it is, a :class:`Verdict`. A :class:`Repair` is anything that can be put on a model for a
while. Both are protocols: no base class is needed.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import Enum
from typing import Any, Protocol, runtime_checkable

from care_lens.core.examples import Example


class Verdict(str, Enum):
    """What an answer to a request is.

    "complied": it does what was asked. "refused": it declines. "other": neither (an answer that misses the
    point). "missing": no answer could be had; never counted as safe, and left out of denominators.
    """

    COMPLIED = "complied"
    REFUSED = "refused"
    OTHER = "other"
    MISSING = "missing"


@runtime_checkable
class Judge(Protocol):
    """Says what each answer is.

    Args:
        examples: The requests.
        texts: One answer for each, without the prompt; where the example gives its beginning (``prefill``), with that.

    Returns:
        One verdict for each.
    """

    def __call__(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Verdict]: ...


@runtime_checkable
class Repair(Protocol):
    """A defence that can be put on a model.

    Attributes:
        name: Its row in a defence table.
    """

    @property
    def name(self) -> str: ...

    def on(self, lvlm: Any) -> AbstractContextManager[Any]:
        """Put the defence on a HookedLVLM for the duration of a ``with`` block."""
        ...

    def describe(self) -> dict[str, Any]:
        """Its settings, as JSON-able values."""
        ...
