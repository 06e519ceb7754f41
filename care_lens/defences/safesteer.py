"""SafeSteer: steers along what a safety sentence before the request changes, by as much as a classifier says.

With ``d = h(safety sentence, request) - h(request)`` at the last prompt token of a block, V the top right singular vectors of the d of
all fit requests and d their mean: ``u = unit(2 V^T V d + (d - V^T V d) / 2)``. At the last prompt token and the generated tokens after
it, for the first 30 steps: ``h + alpha (2 p - 1) |h| u``, p the probability that the request is harmful after a logistic regression of
the state at the last prompt token. A request that looks harmless is steered the other way.

    defence = SafeSteer.fit(lvlm, benign=harmless, malicious=attacks, layer=3, prefix="be safe")

The published code takes one p for the whole batch; here each row has its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from care_lens.core.examples import Example
from care_lens.core.site import Site
from care_lens.core.threads import one_blas_thread
from care_lens.defences.base import Batch, HookDefence, block_output, last_states
from care_lens.defences.stored import FitError, require_examples, require_finite
from care_lens.lvlm import HookedLVLM
from care_lens.repair.base import HookPair
from care_lens.repair.plan import PlanPart
from care_lens.repair.schedule import AnswerSteps


def steering_direction(differences: Float[Tensor, "n d"], *, rank: int) -> Float[Tensor, "d"]:
    """``unit(2 V^T V d + (d - V^T V d) / 2)``.

    Args:
        differences: [n, d] what the safety sentence changes, one row a request.
        rank: Number of right singular vectors.

    Raises:
        FitError: If the sentence changes nothing, or the rank is out of range.
    """
    n, width = differences.shape
    if not 1 <= rank <= min(n, width):
        raise FitError(f"rank must be from 1 to {min(n, width)}, got {rank}")
    v = torch.linalg.svd(differences.double(), full_matrices=False).Vh[:rank]
    mean = differences.double().mean(dim=0)
    inside = v.T @ (v @ mean)
    u = 2 * inside + (mean - inside) / 2
    if not float(u.norm()) > 0:
        raise FitError(
            "the safety sentence must change the model's state, got no difference; does the model know its words?"
        )
    return u / u.norm()


@dataclass(frozen=True, eq=False, kw_only=True)
class SafeSteer(HookDefence):
    """Steers by a classifier's confidence.

    Attributes:
        direction: [d] u.
        weights: [d] of the logistic regression.
        bias: Its intercept.
        layer: The block at whose output it is read and added.
        steps: How many steps are steered, the last prompt token being the first.
        alpha: Strength.
        name: Row of a defence table.
    """

    direction: Float[Tensor, "d"]
    weights: Float[Tensor, "d"]
    bias: float
    layer: int
    steps: int = 30
    alpha: float = 0.5
    name: str = "SafeSteer"

    @classmethod
    def fit(
        cls,
        lvlm: HookedLVLM,
        *,
        benign: Sequence[Example],
        malicious: Sequence[Example],
        layer: int,
        prefix: str = "You must answer safely and refuse harmful requests.",
        rank: int = 4,
        alpha: float = 0.5,
        batch_size: int = 32,
    ) -> "SafeSteer":
        """Fit direction and classifier.

        Args:
            lvlm: The model, without a defence on it.
            benign: Harmless requests.
            malicious: Harmful ones, on which the sentence's effect is taken.
            layer: Block of the language tower.
            prefix: The safety sentence.
            rank: Number of singular vectors.
            alpha: Strength.
            batch_size: Examples a forward pass.

        Raises:
            FitError: If a set is empty or the sentence changes nothing.
        """
        require_examples(benign=benign, malicious=malicious)
        site = block_output(layer)
        warned = [replace(example, prompt=f"{prefix} {example.prompt}") for example in malicious]
        b, m, w = (last_states(lvlm, e, [site], batch_size=batch_size)[site] for e in (benign, malicious, warned))
        direction = steering_direction(w - m, rank=min(rank, len(m)))
        rows, labels = torch.cat([b, m]).numpy(), [0] * len(b) + [1] * len(m)
        with one_blas_thread():
            classifier = LogisticRegression(max_iter=2000).fit(rows, labels)
        weights = torch.from_numpy(classifier.coef_[0]).float()
        require_finite(direction=direction, weights=weights)
        return cls(
            direction=direction.float(), weights=weights, bias=float(classifier.intercept_[0]), layer=layer, alpha=alpha
        )

    def widths(self) -> dict[Site, int]:
        """Output of its block."""
        return {block_output(self.layer): len(self.direction)}

    def probability(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """p of states at the last prompt token."""
        return torch.sigmoid(h @ self.weights.to(h) + self.bias)

    def plan_parts(self) -> list[PlanPart]:
        """What it does, for ``explain``."""
        site = block_output(self.layer)
        return [
            PlanPart(
                name=str(site),
                site=site,
                positions=("last", "generated"),
                writer="adds a direction times the token's norm",
                rank=1,
                width=len(self.direction),
                rank_rule="one direction",
                alpha=self.alpha,
                reader="logistic regression (last)",
                reader_site=str(site),
                gate="2 p - 1, negative for what looks harmless",
                multiply_adds=2 * len(self.direction),
                note=f"the first {self.steps} steps alone",
            )
        ]

    def edits(self, batch: Batch) -> list[HookPair]:
        """One hook that reads p at the prompt, and one that steers."""
        site = block_output(self.layer)
        state: dict[str, Tensor] = {}
        steps = AnswerSteps(batch)  # 0 at the last prompt token, then one an answer token, given or generated

        def see(h: Tensor, prefill: bool) -> None:
            if prefill:
                state["p"] = self.probability(batch.at_last(h))
            state["step"] = steps.next(h)

        def steer(h: Tensor) -> Tensor:
            here = state["step"]
            amount = self.alpha * (2 * state["p"] - 1)[:, None, None] * h.norm(dim=-1, keepdim=True)
            return torch.where((here < self.steps)[..., None], h + amount * self.direction.to(h), h)

        return [batch.read(site, see), batch.edit(site, steer, positions=("last", "generated"))]
