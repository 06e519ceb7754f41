"""Calibrating: the gate's threshold from benign prompts that nothing was learned from or chosen on.

    comparing, calibrating = halves(study.benign("calibration"))
    repair = recalibrated(lvlm, repair, calibrating, epsilon=0.01, max_new_tokens=14)

Plans are compared at thresholds from one half, on teacher-forced answers (`captured_scores`); the final gate is set on the other, on
what the undefended model generates. Split conformal calibration: see :class:`~care_lens.repair.gate.ConformalGate`.
"""

import random
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.examples import Example
from care_lens.core.require import require_examples
from care_lens.lvlm import HookedLVLM
from care_lens.repair.errors import RepairError
from care_lens.repair.fusion import HybridFusion
from care_lens.repair.gate import ConformalGate
from care_lens.repair.reader import Reader
from care_lens.repair.reading import read_scores
from care_lens.repair.rows import TokenRows


def captured_scores(reader: Reader, rows: TokenRows) -> Float[Tensor, "n"]:
    """Largest score of a reader over the tokens it reads, on captured activations: no forward pass.

    Args:
        reader: Of the last prompt token ("last") or of generated tokens, or a combination of such.
        rows: Captured at the reader's sites.

    Returns:
        [n] scores; -inf for a row without such tokens.

    Raises:
        RepairError: If the rows lack a site of the reader, or it reads other positions.
    """
    scores = {}
    for leaf in reader.leaves:
        if leaf.site not in rows.rows:
            raise RepairError(f"rows must hold the reader's site {leaf.site}, got {list(map(str, rows.rows))}")
        if leaf.positions not in ("last", "generated", "response"):
            raise RepairError(
                f"reader must read 'last' or 'generated' to be scored on captured rows, got {leaf.positions!r}; use read_scores"
            )
        tokens = leaf.tokens(rows.rows[leaf.site])
        read = rows.valid.clone()
        read[:, 1 if leaf.positions == "last" else 0 : None if leaf.positions == "last" else 1] = False
        scores[leaf] = tokens.masked_fill(~read, -torch.inf).amax(1)
    return reader.combine(scores)


def halves(examples: Sequence[Example], *, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Examples cut in two, whole items (groups) on either side.

    Args:
        examples: An example without a group is an item of its own.
        seed: Of the cut.

    Example:
        >>> from care_lens import Example
        >>> from care_lens.repair import halves
        >>> one, other = halves([Example(f"cut {i}", group=str(i // 2)) for i in range(8)])
        >>> len(one), len(other), {e.group for e in one} & {e.group for e in other}
        (4, 4, set())
    """
    require_examples(examples)
    items = [e.group or e.id or f"#{i}" for i, e in enumerate(examples)]
    groups = sorted({*items})
    random.Random(seed).shuffle(groups)
    first = set(groups[: len(groups) // 2])
    return (
        [e for e, item in zip(examples, items) if item in first],
        [e for e, item in zip(examples, items) if item not in first],
    )


def recalibrated(
    lvlm: HookedLVLM,
    repair: HybridFusion,
    benign: Sequence[Example],
    *,
    epsilon: float,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    progress: bool = False,
) -> HybridFusion:
    """The repair with its gate calibrated on what the undefended model generates for benign prompts.

    Args:
        lvlm: The model, without a repair on it.
        repair: Its readers are read.
        benign: Prompts that nothing was learned from or chosen on; n >= 1/epsilon - 1 of them.
        epsilon: Share of benign prompts that the gate may touch.
        batch_size: Examples at a time.
        max_new_tokens: As many as the repaired model will generate.
        progress: Whether to show a progress bar.

    Returns:
        The same repair with one `ConformalGate` on every correction that has a reader.

    Raises:
        RepairError: If no correction has a reader.
        TooFewCalibrationError: If there are too few prompts for epsilon.
    """
    return recalibrated_together(
        lvlm,
        [repair],
        benign,
        epsilons=[epsilon],
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
    )[0]


def recalibrated_together(
    lvlm: HookedLVLM,
    repairs: Sequence[HybridFusion],
    benign: Sequence[Example],
    *,
    epsilons: Sequence[float],
    batch_size: int = 32,
    max_new_tokens: int = 32,
    progress: bool = False,
) -> list[HybridFusion]:
    """Several repairs, each as :func:`recalibrated` gives it: all their readers look at the same answers, which are generated once.

    Args:
        lvlm: As for :func:`recalibrated`.
        repairs: The repairs.
        benign: As for :func:`recalibrated`.
        epsilons: One for each repair.
        batch_size, max_new_tokens, progress: As for :func:`recalibrated`.

    Returns:
        The repairs with their gates, in order.

    Raises:
        RepairError: If a repair has no reader.
        TooFewCalibrationError: If there are too few prompts for an epsilon.
        ValueError: If there are not as many epsilons as repairs.
    """
    if len(epsilons) != len(repairs):
        raise ValueError(f"epsilons must be one for each of {len(repairs)} repairs, got {len(epsilons)}")
    if not all(repair.readers for repair in repairs):
        raise RepairError(
            "repair must have a reader to be calibrated, got none; corrections without one are always open"
        )
    if not repairs:
        return []
    readers = list(dict.fromkeys(reader for repair in repairs for reader in repair.readers))
    scores = read_scores(lvlm, benign, readers, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=progress)
    made = []
    for repair, epsilon in zip(repairs, epsilons, strict=True):
        own = [readers.index(reader) for reader in repair.readers]
        made.append(repair.with_gate(ConformalGate.calibrate(scores[:, own].amax(1), epsilon=epsilon)))
    return made
