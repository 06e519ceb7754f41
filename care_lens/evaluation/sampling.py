"""Which settings a search tries: a grid, a draw from it, or what optuna proposes."""

import itertools
import math
import random
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Literal

from care_lens.core.errors import CareLensError

Sampler = Literal["grid", "random", "optuna"]
Setting = Mapping[str, Any]
Proposals = Generator[Setting, tuple[float, float] | None, None]
"""Settings, one after the other; what each reached (attack success, right answers) is sent back."""


class MissingOptunaError(CareLensError, ImportError):
    """The package optuna, which proposes settings, is not installed."""


def proposals(axes: Mapping[str, Sequence[Any]], n: int, *, sampler: Sampler, seed: int) -> Proposals:
    """Settings to be tried, each once.

    Args:
        axes: The values of each axis.
        n: How many; at most as many as the grid has.
        sampler: "grid", "random" or "optuna".
        seed: Of the two latter.

    Raises:
        MissingOptunaError: If the sampler is "optuna" and it is not installed.

    Example:
        >>> [dict(setting) for setting in proposals({"layer": [1, 2], "alpha": [0.5, 1.0]}, 2, sampler="grid", seed=0)]
        [{'layer': 1, 'alpha': 1.0}, {'layer': 2, 'alpha': 0.5}]
    """
    if sampler == "optuna":
        return _by_optuna(axes, n, seed, require_optuna())
    return _of_grid(axes, n, None if sampler == "grid" else seed)


def _of_grid(axes: Mapping[str, Sequence[Any]], n: int, seed: int | None) -> Proposals:
    if seed is None:
        lengths = [len(values) for values in axes.values()]
        picked = [
            {name: values[i] for (name, values), i in zip(axes.items(), at, strict=True)} for at in balanced(lengths, n)
        ]
    else:
        grid = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
        picked = random.Random(seed).sample(grid, n)
    for setting in picked:
        _ = yield setting  # what is sent back does not matter here


def balanced(lengths: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """n cells of a grid, in its order, such that each axis has its values as evenly as can be: all of them wherever n is the axis's length or more.

    Cell by cell each axis takes the value that was taken least often, of these the one that was least often taken with those of the axes before.

    Args:
        lengths: Number of values of each axis.
        n: How many cells; at most the grid's.

    Example:
        >>> balanced([4, 4], 4)
        [(0, 1), (1, 3), (2, 0), (3, 2)]
    """
    orders = [_order(length, n, axis) for axis, length in enumerate(lengths)]
    rest = [math.prod(lengths[axis + 1 :]) for axis in range(len(lengths))]
    taken: Counter[tuple[int, ...]] = Counter()  # cells behind each beginning
    alone: Counter[tuple[int, int]] = Counter()
    pairs: Counter[tuple[int, int, int, int]] = Counter()
    cells = []
    for _ in range(n):
        cell: tuple[int, ...] = ()
        for axis, order in enumerate(orders):
            free = [i for i in order if taken[(*cell, i)] < rest[axis]]
            value = min(free, key=lambda i: (alone[axis, i], sum(pairs[a, v, axis, i] for a, v in enumerate(cell))))
            cell = (*cell, value)
        for axis, value in enumerate(cell):
            taken[cell[: axis + 1]] += 1
            alone[axis, value] += 1
            pairs.update((a, v, axis, value) for a, v in enumerate(cell[:axis]))
        cells.append(cell)
    return sorted(cells)


def _order(length: int, n: int, axis: int) -> list[int]:
    """The values of an axis, those at even distances first if there are more than cells; each axis in another order, so that they do not rise together."""
    spaced = [i * length // n for i in range(n)] if n < length else list(range(length))
    shuffled = sorted(enumerate(spaced), key=lambda at: axis * (at[0] + 1) * 0.6180339887498949 % 1)
    spaced = [i for _, i in shuffled]
    return [*spaced, *(i for i in range(length) if i not in {*spaced})]


def _by_optuna(axes: Mapping[str, Sequence[Any]], n: int, seed: int, optuna: Any) -> Proposals:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(1, n // 3))
        found = optuna.create_study(directions=["minimize", "maximize"], sampler=sampler)
        ranges = {name: list(range(len(values))) for name, values in axes.items()}
        ordered = {name for name, values in axes.items() if _ascending(values)}
        known: dict[tuple[int, ...], tuple[float, float]] = {}
        while len(known) < n:
            for again in range(21):
                if again == 20:  # it proposes nothing new: the first that is
                    new = next(at for at in itertools.product(*ranges.values()) if at not in known)
                    found.enqueue_trial(dict(zip(axes, new, strict=True)))
                trial = found.ask()
                at = tuple(
                    trial.suggest_int(name, 0, len(indices) - 1)
                    if name in ordered
                    else trial.suggest_categorical(name, indices)
                    for name, indices in ranges.items()
                )
                if at not in known:
                    break
                found.tell(trial, known[at])
            reached = yield {name: values[i] for (name, values), i in zip(axes.items(), at, strict=True)}
            known[at] = reached or (1.0, 0.0)
            found.tell(trial, known[at])
    finally:
        optuna.logging.set_verbosity(before)


def _ascending(values: Sequence[Any]) -> bool:
    """Whether they are numbers in ascending order, so that neighbours are alike."""
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return numbers and list(values) == sorted(values)


def require_optuna() -> Any:
    """The package optuna.

    Raises:
        MissingOptunaError: If it is not installed; the message says how to install it.
    """
    try:
        import optuna
    except ImportError as error:
        raise MissingOptunaError(
            f'optuna must be installed for sampler="optuna", got "{error}"; install it with: pip install "care-lens[search]" (or: pip '
            'install optuna), or take sampler="random"'
        ) from None
    return optuna
