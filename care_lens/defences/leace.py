"""LEACE (least-squares concept erasure, Belrose et al. 2023, arXiv:2306.03819) as a defence.

After ``h - alpha W^+ P W (h - mu)`` with alpha = 1 no linear reader can tell the two classes apart on the rows of the fit, and no
other affine map that achieves this changes the rows less. ``W = C^(-1/2)`` whitens all rows, mu is their mean, and P projects onto
``W (mean_m - mean_b)``, the whitened direction between the classes.

    defence = LEACE.fit(lvlm, benign=harmless, malicious=attacks, sites=["blocks.2.hook_resid_post"])

With fewer rows than dimensions C is singular; Ledoit and Wolf's shrinkage (the default) makes it regular, and without shrinkage
the pseudo-inverse is used. Each site is fitted on the undefended model. The package concept-erasure is the oracle of the tests.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from care_lens.core.examples import Example
from care_lens.core.site import Site, SiteLike
from care_lens.defences.base import Batch, HookDefence, last_states
from care_lens.defences.stored import FitError, StoredPart, require_examples
from care_lens.lvlm import HookedLVLM
from care_lens.repair.base import HookPair
from care_lens.repair.linear import LinearPart, linear_part
from care_lens.repair.plan import PlanPart
from care_lens.repair.positions import Positions

_TOLERANCE = 1e-10
"""Eigenvalues of the covariance below this share of the largest count as 0."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Eraser(StoredPart):
    """The erasure at one site: ``h - write (read . (h - mean))``.

    Attributes:
        write: [d] the oblique projector's column.
        read: [d] its row; ``read . write`` is 1.
        mean: [d] mean of all rows.
    """

    write: Float[Tensor, "d"]
    read: Float[Tensor, "d"]
    mean: Float[Tensor, "d"]

    def edit(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """What is added at strength 1."""
        return -((h - self.mean.to(h)) @ self.read.to(h))[..., None] * self.write.to(h)


def eraser(
    benign: Float[Tensor, "n_benign d"],
    malicious: Float[Tensor, "n_malicious d"],
    *,
    shrinkage: Literal["ledoit_wolf", "none"] = "ledoit_wolf",
) -> Eraser:
    """The erasure that makes two classes of rows linearly indistinguishable.

    Args:
        benign: [n_benign, d] rows.
        malicious: [n_malicious, d] rows.
        shrinkage: Of the covariance of all rows.

    Returns:
        Tensors in float64.

    Raises:
        FitError: If the class means are the same, or shrinkage is not known.

    Notes:
        With z the class, ``Sigma_xz`` is proportional to ``delta = mean_m - mean_b``, so that P has rank 1:
        ``W^+ P W = W^+ u u^T W / (u^T u)`` with ``u = W delta``.
    """
    if shrinkage not in ("ledoit_wolf", "none"):
        raise FitError(f"shrinkage must be 'ledoit_wolf' or 'none', got {shrinkage!r}")
    rows = torch.cat([benign, malicious]).double().cpu()
    delta = (malicious.double().mean(dim=0) - benign.double().mean(dim=0)).cpu()
    mean = rows.mean(dim=0)
    numbers = rows.numpy()
    covariance = ledoit_wolf(numbers)[0] if shrinkage == "ledoit_wolf" else np.cov(numbers.T, bias=True)
    values, vectors = torch.linalg.eigh(torch.from_numpy(np.atleast_2d(covariance)))
    kept = values > _TOLERANCE * values[-1]
    values, vectors = values[kept], vectors[:, kept]
    u = (vectors.T @ delta) / values.sqrt()  # W delta in the eigenbasis
    if not float(u.norm()) > 0:
        raise FitError(
            "benign and malicious rows must differ in their means, got the same mean; nothing is to be erased"
        )
    return Eraser(write=vectors @ (values.sqrt() * u) / u.square().sum(), read=vectors @ (u / values.sqrt()), mean=mean)


@dataclass(frozen=True, eq=False, kw_only=True)
class LEACE(HookDefence):
    """Erases what tells malicious from benign requests linearly.

    Attributes:
        erasers: By site.
        scope: At which positions.
        alpha: 1 erases, 0 does nothing.
        name: Row of a defence table.
    """

    erasers: Mapping[Site, Eraser]
    scope: Positions = "all"
    alpha: float = 1.0
    name: str = "LEACE"

    @classmethod
    def fit(
        cls,
        lvlm: HookedLVLM,
        *,
        benign: Sequence[Example],
        malicious: Sequence[Example],
        sites: Sequence[SiteLike],
        scope: Positions = "all",
        alpha: float = 1.0,
        shrinkage: Literal["ledoit_wolf", "none"] = "ledoit_wolf",
        batch_size: int = 32,
    ) -> "LEACE":
        """Fit an eraser a site on last prompt tokens.

        Args:
            lvlm: The model, without a defence on it.
            benign: Harmless requests.
            malicious: Harmful ones.
            sites: [batch, pos, d] sites of the language tower.
            scope: Where it erases.
            alpha: Strength.
            shrinkage: Of the covariance.
            batch_size: Examples a forward pass.

        Raises:
            FitError: If a set is empty, there are no sites, or the class means are the same.
        """
        require_examples(benign=benign, malicious=malicious)
        if not sites:
            raise FitError("sites must hold at least one site, got none")
        held = [last_states(lvlm, e, sites, batch_size=batch_size) for e in (benign, malicious)]
        erasers = {site: eraser(held[0][site], held[1][site], shrinkage=shrinkage) for site in held[0]}
        return cls(erasers=erasers, scope=scope, alpha=alpha)

    def widths(self) -> dict[Site, int]:
        """Its sites."""
        return {site: len(of.mean) for site, of in self.erasers.items()}

    def plan_parts(self) -> list[PlanPart]:
        """What it does, for ``explain``."""
        return [
            PlanPart(
                name=str(site),
                site=site,
                positions=self.scope,
                writer="erases what tells the classes apart",
                rank=1,
                width=len(of.mean),
                rank_rule="one direction for two classes",
                alpha=self.alpha,
                multiply_adds=2 * len(of.mean),
            )
            for site, of in self.erasers.items()
        ]

    def edits(self, batch: Batch) -> list[HookPair]:
        """A hook a site."""
        pairs = []
        for site, of in self.erasers.items():
            pairs.append(batch.edit(site, lambda h, e=of: h + self.alpha * e.edit(h), positions=self.scope))
        return pairs

    def linear_parts(self) -> list[LinearPart]:
        """Its erasers."""
        parts = []
        for site, of in ({} if self.off else self.erasers).items():
            parts.append(linear_part(self.name, site, lambda rows, e=of: self.alpha * e.edit(rows), scope=self.scope))
        return parts
