"""Arguments of the wrong type, named where they come in: "X must be ..., got ...; do ..."."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from care_lens.core.examples import Example


def require_path(path: Any, what: str = "path") -> Path:
    """A path.

    Raises:
        TypeError: If it is neither a text nor a Path.
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(
            f"{what} must be a str or a Path, got {type(path).__name__}; give the place of a file or folder"
        )
    return Path(path)


def require_examples(examples: Any, what: str = "examples") -> Sequence[Example]:
    """Examples, as a sequence.

    Raises:
        TypeError: If it is not a sequence of examples; one example or one text is none.
    """
    if isinstance(examples, (str, bytes)) or not isinstance(examples, Iterable):
        raise TypeError(
            f"{what} must be a list of care_lens.Example, got {type(examples).__name__}; give [example, ...]"
        )
    found = examples if isinstance(examples, Sequence) else list(examples)
    for index, example in enumerate(found):
        if not isinstance(example, Example):
            raise TypeError(
                f"{what} must be of care_lens.Example, got {type(example).__name__} at index {index}; make one with Example(prompt)"
            )
    return found
