"""AlphaSteer: a steering whose size is zero, by construction, on what benign requests look like.

With states h of last prompt tokens, P the projector onto the directions in which benign states vary least, X the malicious
states projected by P, and r the refusal direction: ``D = (X^T X + 10 P^T P)^+ X^T R`` with every row of R equal to r, and
``h + alpha h P D`` at the prompt's tokens. Since R has rank 1, ``h P D = (h . read) r`` with ``read = P (X^T X + 10 P)^+ X^T 1``.

    defence = AlphaSteer.fit(lvlm, benign=harmless, malicious=attacks, refused=plain, layers=[2, 3])

NullSteer (arXiv:2603.22094) is the same idea for vision-language models. Source of the formulas: the method's public code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.examples import Example
from care_lens.core.site import Site
from care_lens.defences.base import Batch, HookDefence, block_output, last_states
from care_lens.defences.stored import FitError, StoredPart, require_examples, require_finite
from care_lens.lvlm import HookedLVLM
from care_lens.repair.base import HookPair
from care_lens.repair.plan import PlanPart

_RIDGE = 10.0


@dataclass(frozen=True, eq=False, kw_only=True)
class NullSteering(StoredPart):
    """The steering at one block: ``(h . read) direction``.

    Attributes:
        read: [d].
        direction: [d] r.
    """

    read: Float[Tensor, "d"]
    direction: Float[Tensor, "d"]


def null_projector(benign: Float[Tensor, "n d"], share: float) -> Float[Tensor, "d d"]:
    """The projector onto the directions with the smallest singular values of the benign states.

    Args:
        benign: [n, d] states, not centred.
        share: How many directions, as a share of d.

    Raises:
        FitError: If no direction is left.
    """
    count = int(share * benign.shape[1])
    if not 0 < share < 1 or count < 1:
        raise FitError(f"null_share must leave a direction of {benign.shape[1]} and be below 1, got {share}")
    _, vectors = torch.linalg.eigh(benign.double().T @ benign.double())
    return vectors[:, :count] @ vectors[:, :count].T


def null_steering(
    benign: Float[Tensor, "n d"],
    malicious: Float[Tensor, "m d"],
    direction: Float[Tensor, "d"],
    *,
    null_share: float,
) -> NullSteering:
    """The steering of one block, from its states; float64."""
    projector = null_projector(benign, null_share)
    x = malicious.double() @ projector
    solved = torch.linalg.pinv(x.T @ x + _RIDGE * projector.T @ projector, hermitian=True) @ x.sum(dim=0)
    made = NullSteering(read=projector @ solved, direction=direction.double())
    require_finite(read=made.read, direction=made.direction)
    return made


@dataclass(frozen=True, eq=False, kw_only=True)
class AlphaSteer(HookDefence):
    """Adds the refusal direction by as much as a state leaves the benign states' span.

    Attributes:
        steerings: By block, at whose output it is added.
        alpha: Strength s.
        name: Row of a defence table.
    """

    steerings: Mapping[int, NullSteering]
    alpha: float = 1.0
    name: str = "AlphaSteer"

    @classmethod
    def fit(
        cls,
        lvlm: HookedLVLM,
        *,
        benign: Sequence[Example],
        malicious: Sequence[Example],
        refused: Sequence[Example],
        layers: Sequence[int],
        null_share: float = 0.5,
        alpha: float = 1.0,
        batch_size: int = 32,
    ) -> "AlphaSteer":
        """Solve for the steering of each block.

        Args:
            lvlm: The model, without a defence on it.
            benign: Harmless requests.
            malicious: Harmful requests that the model complies with.
            refused: Harmful requests that it refuses; r is the difference of the means of refused and malicious states.
            layers: Blocks of the language tower.
            null_share: Share of the directions that count as unused by benign states. With fewer benign requests than dimensions a
                small share is unused exactly; the method's authors set it by hand, a block at a time.
            alpha: Strength.
            batch_size: Examples a forward pass.

        Raises:
            FitError: If a set is empty or no direction is left.
        """
        require_examples(benign=benign, malicious=malicious, refused=refused)
        if not layers:
            raise FitError("layers must hold at least one block, got none")
        sites = [block_output(layer) for layer in layers]
        b, m, r = (last_states(lvlm, e, sites, batch_size=batch_size) for e in (benign, malicious, refused))
        steerings = {
            layer: null_steering(b[s], m[s], r[s].mean(dim=0) - m[s].mean(dim=0), null_share=null_share)
            for layer, s in zip(layers, sites, strict=True)
        }
        return cls(steerings=steerings, alpha=alpha)

    def widths(self) -> dict[Site, int]:
        """Outputs of its blocks."""
        return {block_output(layer): len(of.read) for layer, of in self.steerings.items()}

    def plan_parts(self) -> list[PlanPart]:
        """What it does, for ``explain``."""
        return [
            PlanPart(
                name=str(block_output(layer)),
                site=block_output(layer),
                positions="prompt",
                writer="adds a direction times a linear map of the token that is small on benign ones",
                rank=1,
                width=len(of.read),
                rank_rule="one direction",
                alpha=self.alpha,
                multiply_adds=2 * len(of.read),
            )
            for layer, of in self.steerings.items()
        ]

    def edits(self, batch: Batch) -> list[HookPair]:
        """A hook a block, which acts on prompts only."""

        def steer(h: Tensor, of: NullSteering) -> Tensor:
            return h + self.alpha * (h @ of.read.to(h))[..., None] * of.direction.to(h)

        pairs = []
        for layer, steering in self.steerings.items():
            pairs.append(batch.edit(block_output(layer), lambda h, of=steering: steer(h, of), positions="prompt"))
        return pairs
