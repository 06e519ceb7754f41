"""Patching: run rows of a batch with positions of an activation replaced, several replacements in one pass.

A replacement that would write what is there already is not run, since its outcome is the untouched one, and
replacements that come to the same are run once. (Twins that share their picture have the same activations in the
vision tower and, with a causal language model, at the image positions.) The hook returns a new tensor and writes
nowhere in place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from care_lens.core import Outcome, Site
from care_lens.lvlm import HookedLVLM, LVLMInputs


@dataclass(frozen=True, eq=False)
class Swap:
    """Which positions of each row are replaced, and which positions of the donor replace them.

    Attributes:
        mask: [rows, pos] positions replaced.
        source: [rows, pos] index of the donor's position for each; read where the mask is true.
    """

    mask: Bool[Tensor, "rows pos"]
    source: Int[Tensor, "rows pos"]

    @classmethod
    def everything(cls, rows: int, pos: int) -> "Swap":
        """Every position of every row by the same position of the donor."""
        return cls(torch.ones(rows, pos, dtype=torch.bool), torch.arange(pos).repeat(rows, 1))

    def apply(
        self, activation: Float[Tensor, "rows pos *rest"], donor: Float[Tensor, "rows donor_pos *rest"]
    ) -> Float[Tensor, "rows pos *rest"]:
        """The activation with the donor's values at the masked positions.

        Args:
            activation: [rows, pos, ...].
            donor: [rows, donor_pos, ...] one donor a row.

        Returns:
            A new tensor of the activation's shape.
        """
        device = activation.device
        rows = torch.arange(len(activation), device=device)[:, None]
        moved = donor.to(device)[rows, self.source.to(device)]
        mask = self.mask.to(device).reshape(*self.mask.shape, *(1 for _ in activation.shape[2:]))
        return torch.where(mask, moved, activation)

    def changes(
        self, activation: Float[Tensor, "rows pos *rest"], donor: Float[Tensor, "rows donor_pos *rest"]
    ) -> dict[int, bytes]:
        """What :meth:`apply` really changes, by row; rows that stay as they are have no entry.

        Args:
            activation: [rows, pos, ...].
            donor: [rows, donor_pos, ...].

        Returns:
            For each row that changes, a key of the positions and their sources: equal keys, equal results.
        """
        row, position = self.mask.nonzero(as_tuple=True)
        source = self.source[row, position]
        device = activation.device
        at, given = (row.to(device), position.to(device)), donor.to(device)[row.to(device), source.to(device)]
        differs = (given != activation[at]).flatten(1).any(dim=1).cpu()
        moves = torch.stack([position, source])
        return {
            int(changed): moves[:, differs & (row == changed)].numpy().tobytes() for changed in row[differs].unique()
        }


def patched_outcomes(
    lvlm: HookedLVLM,
    inputs: LVLMInputs,
    *,
    site: Site,
    own: Float[Tensor, "rows pos *rest"],
    donor: Float[Tensor, "rows donor_pos *rest"],
    swaps: Sequence[Swap],
    untouched: Float[Tensor, " rows"],
    outcome: Outcome,
    batch_size: int,
    logits_to_keep: int = 0,
) -> Float[Tensor, "swaps rows"]:
    """Outcomes of a batch under each swap at one site.

    Args:
        lvlm: The model.
        inputs: The rows; at a vision or projector site each must have exactly one image.
        site: Where.
        own: [rows, pos, ...] the rows' activation there in an untouched run.
        donor: [rows, donor_pos, ...] the activation that replaces each row's.
        swaps: What is replaced.
        untouched: [rows] outcomes of the untouched run.
        outcome: The outcome.
        batch_size: Rows of a forward pass; those of several swaps go together.
        logits_to_keep: As in ``HookedLVLM.__call__``.

    Returns:
        [swaps, rows] float64 on the CPU.

    Raises:
        ValueError: If the outcome is not one finite number a row, or the site is not the model's.
    """
    values = untouched.to(torch.float64).repeat(len(swaps), 1)
    same: dict[tuple[int, bytes], list[int]] = {}
    for i, swap in enumerate(swaps):
        for row, change in swap.changes(own, donor).items():
            same.setdefault((row, change), []).append(i)
    jobs = [(row, cells) for (row, _), cells in same.items()]
    for start in range(0, len(jobs), batch_size):
        some = jobs[start : start + batch_size]
        rows = [row for row, _ in some]
        swap = Swap(
            torch.stack([swaps[cells[0]].mask[row] for row, cells in some]),
            torch.stack([swaps[cells[0]].source[row] for row, cells in some]),
        )
        part, given = inputs.rows(rows), donor[rows]

        def replace_positions(activation: Tensor, hook: Any, swap: Swap = swap, given: Tensor = given) -> Tensor:
            return swap.apply(activation, given)

        with torch.no_grad():
            logits = lvlm.run_with_hooks(part, fwd_hooks=[(site, replace_positions)], logits_to_keep=logits_to_keep)
            found = read_outcome(outcome, logits, part)
        for (row, cells), value in zip(some, found, strict=True):
            values[cells, row] = value
    return values


def read_outcome(
    outcome: Outcome, logits: Float[Tensor, "rows pos vocab"], inputs: LVLMInputs
) -> Float[Tensor, " rows"]:
    """The outcome of each row, checked.

    Returns:
        [rows] float64 on the CPU.

    Raises:
        ValueError: If it is not one finite number a row.
    """
    values = outcome(logits, inputs)
    if values.shape != (inputs.batch_size,) or not bool(torch.isfinite(values).all()):
        raise ValueError(
            f"outcome must give one finite number a row ({inputs.batch_size}), got shape "
            f"{tuple(values.shape)} with {int((~torch.isfinite(values)).sum())} not finite"
        )
    return values.detach().to("cpu", torch.float64)
