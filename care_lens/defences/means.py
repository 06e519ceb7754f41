"""Vectors that are added to the residual stream, always and to every request: difference of means, CAA, ActAdd.

- :class:`MeanDifference`: ``h + alpha (mean of refused - mean of complied requests)`` at the last prompt token, added at every
  token but padding.
- :class:`CAA` (contrastive activation addition, Rimsky et al. 2024): the same requests answered by a refusal and by a
  compliance, teacher-forced; the difference of the means over the answers' tokens is added from the last prompt token on.
- :class:`ActAdd` (activation addition, Turner et al. 2023): one prompt minus another, position by position, added at the first
  positions of every request.

    defence = MeanDifference.fit(lvlm, refused=plain, complied=attacks, layer=3, alpha=1.5)
    with defence.on(lvlm):
        answers = lvlm.generate(lvlm.prepare(requests))
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.examples import Example
from care_lens.core.site import Site
from care_lens.defences.base import Batch, HookDefence, block_output, last_states
from care_lens.defences.folding import added_vector_part
from care_lens.defences.stored import FitError, require_examples, require_finite
from care_lens.lvlm import HookedLVLM
from care_lens.repair.base import HookPair
from care_lens.repair.linear import LinearPart
from care_lens.repair.plan import PlanPart
from care_lens.repair.positions import Positions


@dataclass(frozen=True, eq=False, kw_only=True)
class AddedVector(HookDefence):
    """Adds ``alpha`` times a vector at a site.

    Attributes:
        vector: [d] what is added.
        site: Where.
        scope: At which positions.
        alpha: Strength; 0 does nothing, below 0 it is subtracted.
        name: Row of a defence table.
    """

    vector: Float[Tensor, "d"]
    site: Site
    scope: Positions = "all"
    alpha: float = 1.0
    name: str = "added vector"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_finite(vector=self.vector)

    def widths(self) -> dict[Site, int]:
        """Its site."""
        return {self.site: len(self.vector)}

    def plan_parts(self) -> list[PlanPart]:
        """What it does, for ``explain``."""
        return [
            PlanPart(
                name=str(self.site),
                site=self.site,
                positions=self.scope,
                writer=f"adds a vector ({type(self).__name__})",
                rank=1,
                width=len(self.vector),
                rank_rule="one direction",
                alpha=self.alpha,
                multiply_adds=len(self.vector),
            )
        ]

    def edits(self, batch: Batch) -> list[HookPair]:
        """One hook, at its site."""
        return [batch.edit(self.site, lambda h: h + self.alpha * self.vector.to(h), positions=self.scope)]

    def linear_parts(self) -> list[LinearPart]:
        """Its vector, a bias of the map that adds to the stream there."""
        if self.off:
            return []
        return [added_vector_part(self.name, self.site, self.alpha * self.vector.double(), scope=self.scope)]


@dataclass(frozen=True, eq=False, kw_only=True)
class MeanDifference(AddedVector):
    """Adds the difference of means of refused and complied requests at every token."""

    name: str = "difference of means"

    @classmethod
    def fit(
        cls,
        lvlm: HookedLVLM,
        *,
        refused: Sequence[Example],
        complied: Sequence[Example],
        layer: int,
        alpha: float = 1.0,
        scope: Positions = "all",
        batch_size: int = 32,
    ) -> "MeanDifference":
        """Take the difference of the means at the last prompt token.

        Args:
            lvlm: The model, without a defence on it.
            refused: Harmful requests that the model refuses.
            complied: Harmful requests that it complies with (attacks).
            layer: Of the language tower; read and added at the output of this block.
            alpha: Strength.
            scope: Where it is added.
            batch_size: Examples a forward pass.

        Raises:
            FitError: If a set is empty or an activation is not finite.
        """
        require_examples(refused=refused, complied=complied)
        site = block_output(layer)
        towards, away = (last_states(lvlm, e, [site], batch_size=batch_size)[site] for e in (refused, complied))
        return cls.of_rows(towards, away, site=site, scope=scope, alpha=alpha)

    @classmethod
    def of_rows(
        cls,
        refused: Float[Tensor, "n_refused d"],
        complied: Float[Tensor, "n_complied d"],
        *,
        site: Site,
        scope: Positions = "all",
        alpha: float = 1.0,
        name: str = "difference of means",
    ) -> "MeanDifference":
        """The same from activations that are captured already.

        Args:
            refused: One row for each request that the model refuses.
            complied: One row for each request that it complies with.
            site: Where they were taken, and where the difference is added.
            scope: Where it is added.
            alpha: Strength.
            name: Row of a defence table.

        Raises:
            FitError: If a set is empty, the widths differ, or an activation is not finite.

        Example:
            >>> made = MeanDifference.of_rows(torch.ones(3, 4), torch.zeros(2, 4), site=Site.parse("blocks.1.hook_resid_post"))
            >>> made.vector.tolist()
            [1.0, 1.0, 1.0, 1.0]
        """
        if not len(refused) or not len(complied) or refused.shape[1] != complied.shape[1]:
            raise FitError(
                f"refused and complied must be rows of one width, one or more each, got {list(refused.shape)} and {list(complied.shape)}"
            )
        vector = (refused.mean(dim=0) - complied.mean(dim=0)).float()
        return cls(vector=vector, site=site, scope=scope, alpha=alpha, name=name)


@dataclass(frozen=True, eq=False, kw_only=True)
class CAA(AddedVector):
    """Adds the mean difference between a refusal and a compliance to the same requests, from the last prompt token on."""

    scope: Positions = ("last", "generated")
    name: str = "CAA"

    @classmethod
    def fit(
        cls,
        lvlm: HookedLVLM,
        *,
        malicious: Sequence[Example],
        refusal: str,
        layer: int,
        alpha: float = 1.0,
        batch_size: int = 32,
    ) -> "CAA":
        """Take the difference of the means over the answers' tokens.

        Args:
            lvlm: The model, without a defence on it.
            malicious: Harmful requests with a compliant answer as response.
            refusal: The answer that they should have.
            layer: Of the language tower; read and added at the output of this block.
            alpha: Strength.
            batch_size: Examples a forward pass.

        Raises:
            FitError: If there are no examples, one has no response, or an activation is not finite.
        """
        require_examples(malicious=malicious)
        if missing := [example.id for example in malicious if example.response is None]:
            raise FitError(f"malicious examples must have a compliant response, got none for {missing[:3]}")
        site = block_output(layer)
        both = ([replace(example, response=refusal) for example in malicious], malicious)
        towards, away = (
            last_states(lvlm, e, [site], batch_size=batch_size, positions="response")[site].mean(dim=0) for e in both
        )
        return cls(vector=(towards - away).float(), site=site, alpha=alpha)


@dataclass(frozen=True, eq=False, kw_only=True)
class ActAdd(HookDefence):
    """Adds the difference of two prompts, position by position, at the first positions of every request.

    Attributes:
        vectors: [n, d] what is added at the first n positions that are not padding.
        site: Where.
        alpha: Strength.
        name: Row of a defence table.
    """

    vectors: Float[Tensor, "n d"]
    site: Site
    alpha: float = 1.0
    name: str = "ActAdd"

    @classmethod
    def fit(
        cls, lvlm: HookedLVLM, *, towards: str = "no", away: str = "yes", layer: int, alpha: float = 1.0
    ) -> "ActAdd":
        """Take the difference of two prompts' activations; the longer one's further positions are left out.

        Args:
            lvlm: The model, without a defence on it.
            towards: What the model should be like.
            away: What it should not be like.
            layer: Of the language tower; read and added at the input of this block, as the method's authors do.
            alpha: Strength.

        Raises:
            FitError: If the two prompts have the same activations.
        """
        site = Site("language", layer, "hook_resid_pre")
        with torch.no_grad():
            states = []
            for prompt in (towards, away):
                _, cache = lvlm.run_with_cache(lvlm.prepare(Example(prompt)), sites=[site], logits_to_keep=1)
                states.append(cache[str(site)][0].double().cpu())
        n = min(len(state) for state in states)
        vectors = (states[0][:n] - states[1][:n]).float()
        if not bool((vectors != 0).any()):
            raise FitError(
                f"towards and away must differ to the model, got {towards!r} and {away!r}; are they words it knows?"
            )
        require_finite(vectors=vectors)
        return cls(vectors=vectors, site=site, alpha=alpha)

    def widths(self) -> dict[Site, int]:
        """Its site."""
        return {self.site: self.vectors.shape[1]}

    def plan_parts(self) -> list[PlanPart]:
        """What it does, for ``explain``."""
        n, width = self.vectors.shape
        return [
            PlanPart(
                name=str(self.site),
                site=self.site,
                positions="prompt",
                writer="adds a vector of its own at each position (ActAdd)",
                rank=1,
                width=width,
                rank_rule="one direction",
                alpha=self.alpha,
                multiply_adds=width,
                note=f"the first {n} tokens of the prompt alone",
            )
        ]

    def edits(self, batch: Batch) -> list[HookPair]:
        """One hook, which acts on prompts only."""
        order = (~batch.inputs.spans.padding).long().cumsum(dim=1) - 1
        reached = (order >= 0) & (order < len(self.vectors))

        def add(h: Tensor) -> Tensor:
            vectors = self.vectors.to(h)[order.clamp(0, len(self.vectors) - 1).to(h.device)]
            return torch.where(reached.to(h.device)[..., None], h + self.alpha * vectors, h)

        return [batch.edit(self.site, add, positions="prompt")]
