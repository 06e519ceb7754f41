"""What a repair does, token by token: which gates are open, how the modalities are weighed, how large the edit is.

    with repair.recording(lvlm) as seen:
        lvlm.generate(inputs)
    seen.to_dataframe()

The frame has a row for each token and site; ``seen.plot(row=0)`` is the same as a figure.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import pandas as pd
import torch
from torch import Tensor

from care_lens.core.display import ShortRepr, listed
from care_lens.core.site import Site
from care_lens.core.spans import TokenSpans
from care_lens.lvlm import LVLMInputs
from care_lens.repair.errors import RepairError
from care_lens.repair.fuse import Fused, GatedWriter

if TYPE_CHECKING:
    import plotly.graph_objects as go

Keep: TypeAlias = Callable[[Site, Fused, Sequence[GatedWriter], Sequence[GatedWriter], bool], None]
"""Takes what was done at one site in one forward pass."""


@dataclass(frozen=True)
class _Pass:
    """One forward pass at one site: [row, pos] on the CPU."""

    batch: int
    step: int
    site: Site
    gate_visual: Tensor
    gate_textual: Tensor
    strength_visual: Tensor
    strength_textual: Tensor
    weight_visual: Tensor
    weight_textual: Tensor
    edit_norm: Tensor
    ended: Tensor  # [row] whether the answer had ended: what is fed then is its end and padding


@dataclass
class Recording(ShortRepr):
    """The record of a repair at work, one entry for each forward pass and site.

    Gate values are times scope: 0 where a token is out of the correction's reach, and the largest where several corrections of a modality
    write at the site. Everything kept is on the CPU, a few numbers for each token; neither activations nor pictures are kept.
    """

    _passes: list[_Pass] = field(default_factory=list)
    _spans: list[TokenSpans] = field(default_factory=list)

    def batch(self, inputs: LVLMInputs, *, ends: Sequence[int] = ()) -> tuple[Keep, Callable[[Tensor, bool], None]]:
        """Begin a batch.

        Args:
            inputs: The batch.
            ends: Ids of the tokens that end an answer; what comes from one on is left out.

        Returns:
            What takes its passes, and what takes the tokens of each pass before it, and whether they are those of the whole batch.
        """
        number = len(self._spans)
        ended = torch.zeros(len(inputs.input_ids), dtype=torch.bool)
        stops = torch.tensor(list(ends), dtype=torch.long)
        self._spans.append(inputs.spans.to("cpu"))
        steps: dict[Site, int] = {}

        def tokens(ids: Tensor, prefill: bool) -> None:
            nonlocal ended
            new = torch.zeros_like(ended) if prefill else torch.isin(ids[:, 0].cpu().long(), stops)
            ended = new if prefill else ended | new

        def keep(
            site: Site, fused: Fused, visual: Sequence[GatedWriter], textual: Sequence[GatedWriter], prefill: bool
        ) -> None:
            steps[site] = 0 if prefill else steps.get(site, 0) + 1
            norm = fused.edit.detach().norm(dim=-1)
            acts = norm != 0
            self._passes.append(
                _Pass(
                    number,
                    steps[site],
                    site,
                    gate_visual=_largest(visual, norm).float().cpu(),
                    gate_textual=_largest(textual, norm).float().cpu(),
                    strength_visual=_largest(visual, norm, strength=True).float().cpu(),
                    strength_textual=_largest(textual, norm, strength=True).float().cpu(),
                    weight_visual=fused.visual.detach().masked_fill(~acts, 0.0).float().cpu(),
                    weight_textual=fused.textual.detach().masked_fill(~acts, 0.0).float().cpu(),
                    edit_norm=norm.float().cpu(),
                    ended=ended,
                )
            )

        return keep, tokens

    def __len__(self) -> int:
        return len(self._passes)

    def shown(self) -> tuple[str, dict[str, str]]:
        """How much it holds."""
        sites = listed(dict.fromkeys(str(one.site) for one in self._passes))
        return "Recording", {"batches": str(len(self._spans)), "passes": str(len(self)), "sites": sites or "none"}

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each token and site that was written at, padding and what comes from an answer's end on left out.

        Returns:
            Columns batch, row, position (0 is the row's first token that is no padding; generated tokens go on counting), span ("image", "text" or
            "generated"), site, gate_visual, gate_textual, strength_visual, strength_textual (alpha times gate value times what the schedule says), weight_visual, weight_textual (0 where nothing is edited) and edit_norm (of the
            edit as applied, in units of the activation).
        """
        rows: list[dict[str, object]] = []
        for one in self._passes:
            spans = self._spans[one.batch]
            lengths = (~spans.padding).sum(dim=1).tolist()
            for row in (~one.ended).nonzero()[:, 0].tolist():
                columns = (~spans.padding[row]).nonzero()[:, 0].tolist() if one.step == 0 else [0]
                for order, column in enumerate(columns):
                    span = (
                        "generated"
                        if one.step or bool(spans.response[row, column])
                        else "image"
                        if bool(spans.image[row, column])
                        else "text"
                    )
                    rows.append(
                        {
                            "batch": one.batch,
                            "row": row,
                            "position": order if one.step == 0 else int(lengths[row]) + one.step - 1,
                            "span": span,
                            "site": str(one.site),
                            "gate_visual": float(one.gate_visual[row, column]),
                            "gate_textual": float(one.gate_textual[row, column]),
                            "strength_visual": float(one.strength_visual[row, column]),
                            "strength_textual": float(one.strength_textual[row, column]),
                            "weight_visual": float(one.weight_visual[row, column]),
                            "weight_textual": float(one.weight_textual[row, column]),
                            "edit_norm": float(one.edit_norm[row, column]),
                        }
                    )
        names = ["batch", "row", "position", "span", "site", "gate_visual", "gate_textual", "strength_visual"]
        names += ["strength_textual", "weight_visual", "weight_textual", "edit_norm"]
        return pd.DataFrame(rows, columns=names)

    def plot(self, *, batch: int = 0, row: int = 0) -> "go.Figure":
        """Gate values, weights and edit norm over the tokens of one row, and the edit norm over its picture.

        Args:
            batch: Which batch, in the order in which they ran.
            row: Which of its rows.

        Raises:
            RepairError: If nothing was recorded for that row.
        """
        from care_lens.plots.recording import plot_recording

        frame = self.to_dataframe()
        frame = frame.loc[(frame.batch == batch) & (frame.row == row)]
        if frame.empty:
            raise RepairError(
                f"batch and row must be of what was recorded, got batch {batch}, row {row} of {len(self._spans)} batches; "
                "run the model inside the block"
            )
        spans = self._spans[batch]
        padding = int(spans.padding[row].long().argmin())  # columns before the row's first token
        return plot_recording(pd.DataFrame(frame), grids=[(grid, grid.start - padding) for grid in spans.grids[row]])


def _largest(side: Sequence[GatedWriter], like: Tensor, *, strength: bool = False) -> Tensor:
    """[row, pos] the largest gate value of the writers, or the largest strength with which one acts; zeros if there are none."""
    if not side:
        return torch.zeros_like(like)
    if strength:
        values = [one.writer.alpha * one.openness for one in side]
    else:
        values = [one.openness if one.gate is None else one.gate for one in side]
    return torch.stack([value.detach().expand_as(like) for value in values]).amax(dim=0)
