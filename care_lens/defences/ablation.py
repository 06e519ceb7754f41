"""Mean ablation as a defence: what a site writes is replaced by what it writes for harmless requests.

``h + alpha (mean - h)`` at each given site, such as those that ``care_lens.mediation.localise`` names. It says whether the sites
that carry the unsafe answer can be done without.

    defence = MeanAblation.fit(lvlm, benign=harmless, sites=["blocks.2.hook_mlp_out"])
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from care_lens.core.examples import Example
from care_lens.core.site import Site, SiteLike
from care_lens.defences.base import Batch, HookDefence, last_states
from care_lens.defences.stored import FitError, require_examples
from care_lens.lvlm import HookedLVLM
from care_lens.repair.base import HookPair
from care_lens.repair.linear import LinearPart, linear_part
from care_lens.repair.plan import PlanPart
from care_lens.repair.positions import Positions, check_positions, check_site


@dataclass(frozen=True, eq=False, kw_only=True)
class MeanAblation(HookDefence):
    """Replaces activations by the mean over harmless requests.

    Attributes:
        means: By site [d].
        scope: At which positions.
        alpha: 1 replaces, 0 does nothing.
        name: Row of a defence table.
    """

    means: Mapping[Site, Float[Tensor, "d"]]
    scope: Positions = "last"
    alpha: float = 1.0
    name: str = "mean ablation"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positions(self.scope, name="scope")
        for site in self.means:
            check_site(site, name="site of a mean ablation")

    @classmethod
    def fit(
        cls,
        lvlm: HookedLVLM,
        *,
        benign: Sequence[Example],
        sites: Sequence[SiteLike],
        scope: str = "last",
        alpha: float = 1.0,
        batch_size: int = 32,
    ) -> "MeanAblation":
        """Take the means.

        Args:
            lvlm: The model, without a defence on it.
            benign: Harmless requests.
            sites: [batch, pos, d] sites of the language tower.
            scope: Over which positions of a request the mean is taken, and where it is put; each request counts once.
            alpha: Strength.
            batch_size: Examples a forward pass.

        Raises:
            FitError: If there are no examples or no sites.
        """
        require_examples(benign=benign)
        if not sites:
            raise FitError("sites must hold at least one site, got none; localise names them")
        rows = last_states(lvlm, benign, sites, batch_size=batch_size, positions=scope)
        return cls(means={site: found.mean(dim=0).float() for site, found in rows.items()}, scope=scope, alpha=alpha)

    def widths(self) -> dict[Site, int]:
        """Its sites."""
        return {site: len(mean) for site, mean in self.means.items()}

    def plan_parts(self) -> list[PlanPart]:
        """What it does, for ``explain``."""
        return [
            PlanPart(
                name=str(site),
                site=site,
                positions=self.scope,
                writer="goes to the mean of benign requests",
                rank=len(mean),
                width=len(mean),
                rank_rule="all directions",
                alpha=self.alpha,
                multiply_adds=len(mean),
            )
            for site, mean in self.means.items()
        ]

    def edits(self, batch: Batch) -> list[HookPair]:
        """A hook a site."""
        pairs = []
        for site, mean in self.means.items():
            pairs.append(batch.edit(site, lambda h, m=mean: h + self.alpha * (m.to(h) - h), positions=self.scope))
        return pairs

    def linear_parts(self) -> list[LinearPart]:
        """Its means, which take the place of what the weights make."""
        parts = []
        for site, mean in ({} if self.off else self.means).items():
            parts.append(
                linear_part(self.name, site, lambda rows, m=mean: self.alpha * (m.to(rows) - rows), scope=self.scope)
            )
        return parts
