"""Patching: run rows of a batch with an activation's positions replaced, several replacements in one forward pass.

The hook returns a new tensor and writes nowhere in place. Memory of a pass: ``cells x rows`` sequences.
"""

from collections.abc import Callable, Sequence
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


def swap_hook(
    donor: Float[Tensor, "rows donor_pos *rest"], swaps: Sequence[Swap]
) -> Callable[..., Tensor]:
    """A hook for a batch that holds the same rows once for every swap, one after the other.

    Args:
        donor: [rows, donor_pos, ...] one donor a row, the same for every swap.
        swaps: What is replaced in each copy of the rows.

    Returns:
        ``fn(activation, hook)`` that returns a new activation [swaps x rows, pos, ...].
    """

    def replace_positions(activation: Tensor, hook: Any) -> Tensor:
        copies = activation.unflatten(0, (len(swaps), len(donor)))
        return torch.cat([swap.apply(copy, donor) for copy, swap in zip(copies, swaps)])

    return replace_positions


def patched_outcomes(
    lvlm: HookedLVLM,
    inputs: LVLMInputs,
    *,
    site: Site,
    donor: Float[Tensor, "rows donor_pos *rest"],
    swaps: Sequence[Swap],
    outcome: Outcome,
    logits_to_keep: int = 0,
) -> Float[Tensor, "swaps rows"]:
    """Outcomes of a batch under each swap at one site, in a single forward pass.

    Args:
        lvlm: The model.
        inputs: The rows; at a vision or projector site each must have exactly one image.
        site: Where.
        donor: [rows, donor_pos, ...] the activation that replaces each row's, in the order of the rows.
        swaps: What is replaced in each run.
        outcome: The outcome.
        logits_to_keep: As in ``HookedLVLM.__call__``.

    Returns:
        [swaps, rows] float64 on the CPU.

    Raises:
        ValueError: If the outcome is not one finite number a row, or the site is not the model's.
    """
    copies = inputs.rows(list(range(inputs.batch_size)) * len(swaps)) if len(swaps) > 1 else inputs
    with torch.no_grad():
        logits = lvlm.run_with_hooks(copies, fwd_hooks=[(site, swap_hook(donor, swaps))], logits_to_keep=logits_to_keep)
        return read_outcome(outcome, logits, copies).unflatten(0, (len(swaps), inputs.batch_size))


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
            f"outcome must give one finite number a row ({inputs.batch_size}), got shape {tuple(values.shape)} with "
            f"{int((~torch.isfinite(values)).sum())} not finite"
        )
    return values.detach().to("cpu", torch.float64)
