"""The one engine under mediate, ablate, patch_map, paths, knockout, attribute and verify: which cells are run, and where they are kept.

A sweep is a series of parts. A part is a pass, or several that belong together, and gives the values of one or more cells; a cell that
the checkpoint holds is not run again, and one that is run is kept before the next begins. Whatever has been finished when a sweep is
stopped, going on from it gives the numbers of one that was never stopped: parts depend on nothing but the model, the examples and the
settings that the checkpoint is of.

    sweep = Sweep(checkpoint, settings=settings)
    for place, values in sweep.run(parts(), total=10, desc="mediating", progress=True):
        table[place] = values

:func:`require_options` and :func:`require_positions` refuse wrong arguments before anything is run.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from care_lens.core import BaseOutcome, Example, Outcome, examples_digest
from care_lens.core.details import describe_outcome
from care_lens.core.options import require_options as require_options
from care_lens.core.progress import Steps
from care_lens.core.spans import SPAN_NAMES
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.checkpoint import CellLog, Probe, made_by
from care_lens.mediation.errors import MediationError

EACH = "each"
"""Stands for every token of the language tower by itself."""

Place = TypeVar("Place")


@dataclass(frozen=True, eq=False)
class Part(Generic[Place]):
    """Cells that are run together.

    Attributes:
        place: Where the values belong, for whoever made the part.
        cells: The keys of the cells.
        run: ``run(todo, bar)``: the JSON-able values of those keys that are not there yet, as mappings; the cells of one mapping are kept
            together or not at all, since cells that share a forward pass depend on one another in the last bits.
        steps: By how much the part moves the progress bar; what ``run`` has moved it already counts.
    """

    place: Place
    cells: Sequence[str]
    run: Callable[[Sequence[str], Any], Iterable[Mapping[str, Any]]]
    steps: int = 1


class Sweep:
    """The cells of one sweep, and where they are kept.

    Args:
        checkpoint: The file; None: nothing is kept.
        settings: JSON-able; the file must be of the same.
        probe: Numbers that tell the model and the examples apart, or what computes them: it is called when the file's settings have been
            found to be the same.

    Raises:
        ArtifactError: If the file is of another sweep, or damaged; it is left as it is.
        MediationError: If it is a folder.
    """

    def __init__(self, checkpoint: str | Path | None, *, settings: Mapping[str, Any], probe: Probe = ()) -> None:
        self._resume = (
            "give checkpoint='cells.jsonl' from the start: a file in which finished cells are kept"
            if checkpoint is None
            else f"make the same call with checkpoint={str(checkpoint)!r} again"
        )
        self._done = CellLog(checkpoint, settings=dict(settings), probe=probe)

    def todo(self, cells: Iterable[str]) -> list[str]:
        """Those of the cells that are still to be run."""
        return [cell for cell in cells if cell not in self._done]

    def run(
        self, parts: Iterable[Part[Place]], *, total: int, desc: str, progress: bool
    ) -> Iterator[tuple[Place, list[Any]]]:
        """Run what is not there yet, part by part.

        Args:
            parts: The parts, made one at a time, so that what one holds can go before the next is made.
            total: Steps of all parts.
            desc: What the progress bar says.
            progress: Whether to show one.

        Returns:
            For each part its place and the values of its cells, in their order.
        """
        with Steps(total=total, desc=desc, disable=not progress, resume=self._resume) as bar:
            for part in parts:
                before = bar.n
                if todo := self.todo(part.cells):
                    for found in part.run(todo, bar):
                        self._done.add_all(found)
                bar.update(before + part.steps - bar.n)
                yield part.place, [self._done[cell] for cell in part.cells]


def one_cell(make: Callable[[], Any]) -> Callable[[Sequence[str], Any], Iterator[dict[str, Any]]]:
    """What runs a part of one cell."""

    def run(todo: Sequence[str], bar: Any) -> Iterator[dict[str, Any]]:
        yield {todo[0]: make()}

    return run


def sweep_settings(
    lvlm: HookedLVLM, *, outcome: Outcome | BaseOutcome, examples: Sequence[Example], batch_size: int
) -> dict[str, Any]:
    """What the cells of every sweep that reads an outcome depend on.

    Args:
        lvlm: The model, with what is on it.
        outcome: The outcome.
        examples: The examples; of pairs the safe ones, then the unsafe ones.
        batch_size: Of a forward pass: the last bits depend on it.
    """
    return {
        "outcome": describe_outcome(outcome),
        "examples": examples_digest(examples),
        "batch_size": batch_size,
        **made_by(lvlm, outcome=outcome),
    }


def require_positions(positions: Sequence[str], *, each: bool = False) -> tuple[str, ...]:
    """Positions that are names of spans or indices of tokens.

    Args:
        positions: The positions.
        each: Whether "each" is allowed.

    Raises:
        MediationError: If they are a single text, or one of them is no such name.
    """
    if isinstance(positions, str):
        raise MediationError(f"positions must be several names, got the text {positions!r}; write ({positions!r},)")
    known = (*SPAN_NAMES, EACH) if each else SPAN_NAMES
    if unknown := [name for name in positions if not (isinstance(name, str) and (name in known or name.isdecimal()))]:
        raise MediationError(
            f"positions must be some of {known}, or indices of tokens such as '0', got {unknown}; leave those out"
        )
    return tuple(positions)
