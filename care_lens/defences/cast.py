"""CAST (conditional activation steering, Lee et al. 2024): a vector is added only to requests that meet a condition.

At the last prompt token of one block: ``s = cos(h, tanh(P_c h))``, P_c the projector onto the condition vector c, the difference
of the means of malicious and benign requests. Where s passes a threshold, ``h + alpha v`` at the steered blocks, at every token from
the prompt on, and the result is scaled down to the norm that h had if it grew. The decision is made once a request.

    defence = CAST.fit(lvlm, benign=harmless, malicious=attacks, refused=plain, condition_layer=1, layers=[2, 3])

The published code decides by row 0 of a batch for all of its rows; here each row decides for itself.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from care_lens.core.examples import Example
from care_lens.core.gates import gradient_wanted, stepped
from care_lens.core.site import Site
from care_lens.defences.base import Batch, HookDefence, block_output, last_states
from care_lens.defences.stored import FitError, require_examples, require_finite
from care_lens.lvlm import HookedLVLM
from care_lens.repair.base import HookPair
from care_lens.repair.plan import PlanPart


def condition_score(h: Float[Tensor, "*batch d"], condition: Float[Tensor, "d"]) -> Float[Tensor, "*batch"]:
    """``cos(h, tanh(P_c h))``; 0 where a vector is 0."""
    unit = (condition / condition.norm()).to(h)
    return torch.cosine_similarity(h, torch.tanh((h @ unit)[..., None] * unit), dim=-1)


def best_threshold(benign: Float[Tensor, "n"], malicious: Float[Tensor, "m"]) -> tuple[float, bool]:
    """The threshold and the side of it on which malicious scores are, by the largest F1 of malicious requests.

    Args:
        benign: [n] scores.
        malicious: [m] scores.

    Returns:
        The threshold (between two scores), and whether malicious requests are above it. Of equal F1 the first, from below.
    """
    scores = torch.cat([benign, malicious]).double().unique()
    edges = torch.cat([scores[:1] - 1e-6, (scores[1:] + scores[:-1]) / 2, scores[-1:] + 1e-6])
    best = (-1.0, 0.0, True)
    for above in (True, False):
        for edge in edges.tolist():
            hits, false = ((s > edge) if above else (s < edge) for s in (malicious.double(), benign.double()))
            tp, fp = int(hits.sum()), int(false.sum())
            f1 = 2 * tp / (tp + fp + len(malicious)) if tp else 0.0
            if f1 > best[0]:
                best = (f1, edge, above)
    return best[1], best[2]


@dataclass(frozen=True, eq=False, kw_only=True)
class CAST(HookDefence):
    """Steers requests that meet a condition.

    Attributes:
        condition: [d] c.
        condition_layer: The block at whose output the condition is looked at.
        vectors: By block [d] v, added at its output.
        threshold: Of the score.
        above: Whether requests above it are steered, else those below.
        alpha: Strength.
        name: Row of a defence table.

    Raises:
        ValueError: If a steered block comes before the condition's.
    """

    gated: ClassVar[bool] = True

    condition: Float[Tensor, "d"]
    condition_layer: int
    vectors: Mapping[int, Float[Tensor, "d"]]
    threshold: float
    above: bool = True
    alpha: float = 1.0
    name: str = "CAST"

    def __post_init__(self) -> None:
        super().__post_init__()
        if early := sorted(layer for layer in self.vectors if layer < self.condition_layer):
            raise ValueError(
                f"layers must not come before condition_layer {self.condition_layer}, got {early}: the condition is not known there yet"
            )
        require_finite(condition=self.condition, **{f"vector_{layer}": v for layer, v in self.vectors.items()})

    @classmethod
    def fit(
        cls,
        lvlm: HookedLVLM,
        *,
        benign: Sequence[Example],
        malicious: Sequence[Example],
        refused: Sequence[Example],
        condition_layer: int,
        layers: Sequence[int],
        alpha: float = 1.0,
        batch_size: int = 32,
    ) -> "CAST":
        """Fit condition, threshold and vectors.

        Args:
            lvlm: The model, without a defence on it.
            benign: Harmless requests.
            malicious: Harmful requests that the model complies with.
            refused: Harmful requests that it refuses; v is the difference of the means of refused and malicious states.
            condition_layer: Block of the condition.
            layers: Steered blocks, none before the condition's.
            alpha: Strength.
            batch_size: Examples a forward pass.

        Raises:
            FitError: If a set is empty, or the benign and malicious means are the same.
        """
        require_examples(benign=benign, malicious=malicious, refused=refused)
        site = block_output(condition_layer)
        sites = list(dict.fromkeys([site, *map(block_output, layers)]))
        b, m, r = (last_states(lvlm, e, sites, batch_size=batch_size) for e in (benign, malicious, refused))
        condition = m[site].mean(dim=0) - b[site].mean(dim=0)
        if not float(condition.norm()) > 0:
            raise FitError("benign and malicious requests must differ in their mean state, got the same one")
        threshold, above = best_threshold(condition_score(b[site], condition), condition_score(m[site], condition))
        vectors = {n: (r[block_output(n)].mean(dim=0) - m[block_output(n)].mean(dim=0)).float() for n in layers}
        return cls(
            condition=condition.float(),
            condition_layer=condition_layer,
            vectors=vectors,
            threshold=threshold,
            above=above,
            alpha=alpha,
        )

    def widths(self) -> dict[Site, int]:
        """Outputs of its blocks."""
        return {block_output(n): len(self.condition) for n in (self.condition_layer, *self.vectors)}

    def met(self, h: Float[Tensor, "batch d"]) -> Bool[Tensor, "batch"]:
        """Which states meet the condition."""
        scores = condition_score(h, self.condition)
        return scores > self.threshold if self.above else scores < self.threshold

    def plan_parts(self) -> list[PlanPart]:
        """What it does, for ``explain``."""
        sign = "above" if self.above else "below"
        return [
            PlanPart(
                name=str(block_output(layer)),
                site=block_output(layer),
                positions="all",
                writer="adds a vector, and keeps the norm from growing",
                rank=1,
                width=len(vector),
                rank_rule="one direction",
                alpha=self.alpha,
                reader="cosine with the condition (last)",
                reader_site=str(block_output(self.condition_layer)),
                gate=f"opens {sign} the threshold",
                threshold=self.threshold,
                multiply_adds=3 * len(vector),
            )
            for layer, vector in self.vectors.items()
        ]

    def edits(self, batch: Batch) -> list[HookPair]:
        """A hook that decides, and one a steered block."""
        decided: dict[str, Tensor] = {}

        def decide(h: Tensor, prefill: bool) -> None:
            if prefill:
                state = batch.at_last(h)
                score = condition_score(state, self.condition)
                decided["met"] = stepped(self.met(state), score, self.threshold, above=self.above)

        def steer(h: Tensor, v: Tensor) -> Tensor:
            steered = h + self.alpha * v.to(h)
            before, after = h.norm(dim=-1, keepdim=True), steered.norm(dim=-1, keepdim=True)
            steered = torch.where(after > before, steered * (before / after), steered)
            met = decided["met"].to(h)[:, None, None]
            if gradient_wanted():
                return h + met * (steered - h)
            return torch.where(met != 0, steered, h)

        pairs = [batch.read(block_output(self.condition_layer), decide)]
        for layer, vector in self.vectors.items():
            pairs.append(batch.edit(block_output(layer), lambda h, v=vector: steer(h, v)))
        return pairs
