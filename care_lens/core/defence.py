"""What a defence is: anything that is put on a model for a while, and may change what the model is asked.

:class:`Defence` is a protocol, so no base class is needed. Everything that takes a defence accepts the smaller
:class:`~care_lens.core.outcome.Repair` too (name, on, describe): what has no ``examples`` leaves requests as they are.
"""

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example


class DefenceError(CareLensError, TypeError, ValueError):
    """What was given as a defence is none. The message says what it lacks."""


@runtime_checkable
class Defence(Protocol):
    """A defence under the one protocol that evaluation, attacks and tables use.

    Attributes:
        name: Its row in a defence table.
    """

    @property
    def name(self) -> str: ...

    def examples(self, examples: Sequence[Example]) -> list[Example]:
        """The requests as the model is given them, one for each, in order; the same ones unless the defence rewrites them.

        It is asked while the defence is on the model.
        """
        ...

    def on(self, lvlm: Any) -> AbstractContextManager[Any]:
        """Put the defence on a HookedLVLM for the duration of a ``with`` block."""
        ...

    def check(self, lvlm: Any) -> None:
        """Refuse a model on which the defence cannot work, with an error that says why."""
        ...

    def describe(self) -> dict[str, Any]:
        """Its settings, as JSON-able values."""
        ...

    def save(self, directory: str | Path) -> None:
        """Write it into a directory, made if it does not exist."""
        ...

    @classmethod
    def load(cls, directory: str | Path) -> Any:
        """Read what :meth:`save` wrote."""
        ...


def require_defences(defences: Mapping[str, Any]) -> None:
    """Refuse what cannot be a defence in a table, before anything is run.

    Args:
        defences: Defences by name; None is the model as it is.

    Raises:
        DefenceError: Naming what the first of them lacks.

    Example:
        >>> require_defences({"none": None})
    """
    needs = {
        "name": "name = 'mine'",
        "on": "a method on(lvlm) that returns a context manager",
        "describe": "a method describe() that returns its settings",
    }
    for name, defence in defences.items():
        if isinstance(defence, (str, os.PathLike)):
            raise DefenceError(
                f"defence {name!r} must be an object, got the path {str(defence)!r}; read what is saved there: "
                "care_lens.defences.load_defence(path)"
            )
        if defence is not None and (lacking := [needed for needed in needs if not hasattr(defence, needed)]):
            raise DefenceError(
                f"defence {name!r} must have {', '.join(needs)}, got {type(defence).__name__} without {', '.join(lacking)}; give it "
                + ", ".join(needs[one] for one in lacking)
            )


def defended(defence: Any, examples: Sequence[Example]) -> list[Example]:
    """The requests as a defence would have them; the same ones for None and for what does not rewrite requests.

    Args:
        defence: A defence, a repair, or None.
        examples: The requests.

    Raises:
        ValueError: If the defence returns another number of requests.
    """
    rewrite = getattr(defence, "examples", None)
    made = list(examples) if rewrite is None else list(rewrite(examples))
    if len(made) != len(examples):
        raise ValueError(
            f"{defence.name}.examples must return one request for each of {len(examples)}, got {len(made)}"
        )
    return made
