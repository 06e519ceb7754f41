"""Runs between twins: what is attributed to, and gradients times differences there.

``care_lens.mediation.attribution`` says what they mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from care_lens.core import BaseOutcome, Site, SiteLike, require_outcome
from care_lens.core.details import metric_name
from care_lens.core.verdicts import read_out
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.mediators import HEADS, NEURONS
from care_lens.mediation.pairs import PairBatch, bound, logits_needed

Path = Literal["inputs", "embeddings"]
WORDS, PATCHES = Site("language", 0, "hook_resid_pre"), Site("vision", None, "hook_embed")
"""Where words and patches enter."""

DEFAULT = (HEADS, NEURONS, "hook_attn_out", "hook_mlp_out", "hook_out")
"""Components attributed to where no sites are named."""


def nodes_of(points: int) -> tuple[tuple[float, float], ...]:
    """Nodes and weights of Gauss-Legendre quadrature on [0, 1].

    Args:
        points: How many, 1 or more.

    Returns:
        Pairs of a node in (0, 1) and its weight; weights add up to 1.
    """
    at, weights = np.polynomial.legendre.leggauss(points)
    return tuple(zip(((at + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))


@dataclass(frozen=True)
class Plan:
    """What is attributed to, and where inputs are interpolated.

    Attributes:
        sites: Sites with one attribution a unit and position.
        patches: Sites with one a picture patch.
        positions: Of the sites of the language tower.
        by_patch_embedding: Whether pictures are interpolated where patches enter the vision tower.
    """

    sites: tuple[Site, ...]
    patches: tuple[Site, ...]
    positions: tuple[str, ...]
    by_patch_embedding: bool

    @classmethod
    def of(
        cls,
        lvlm: HookedLVLM,
        sites: Sequence[SiteLike] | None,
        patches: Sequence[SiteLike] | None,
        positions: Sequence[str],
        path: Path,
        pictured: bool,
    ) -> "Plan":
        """The plan of a call of :func:`~care_lens.mediation.attribution.attribute`, whose arguments these are.

        Args:
            lvlm: The model.
            sites: As there.
            patches: As there.
            positions: As there.
            path: As there.
            pictured: Whether a pair has two pictures.

        Raises:
            ValueError: If a site is not there, cannot be edited, or is none that the path or the pairs allow.
        """
        listed = lvlm.sites()
        by_patch = path == "inputs" and PATCHES in listed and lvlm.site_info(PATCHES).editable
        able = [
            site
            for site in listed
            if lvlm.site_info(site).editable and (site.tower == "language" or (by_patch and pictured))
        ]
        wanted = (
            [Site.parse(site) for site in sites]
            if sites is not None
            else [site for site in able if site.component in DEFAULT]
        )
        split = (
            [Site.parse(site) for site in patches]
            if patches is not None
            else [site for site in able if pictured and site in (WORDS, PATCHES)]
        )
        for site in (*wanted, *split):
            info = lvlm.site_info(site)
            if not info.editable or site.component == "attn.hook_pattern":
                raise ValueError(f"sites must be editable and have positions, got {site}: {info.note or info.axes}")
            if site.tower != "language" and not pictured:
                raise ValueError(f"pairs must have images for {site}, got text alone")
            if site.tower != "language" and not by_patch:
                raise ValueError(
                    f"sites must be of the language tower where {WORDS} is interpolated, got {site}: it has no effect "
                    "there; use path='inputs' (on a model whose vision.hook_embed can be edited)"
                )
        if split and not pictured:
            raise ValueError("pairs must have images for patches, got text alone; use patches=()")
        if not wanted and not split:
            raise ValueError("sites must hold at least one site, got none")
        return cls(tuple(dict.fromkeys(wanted)), tuple(dict.fromkeys(split)), tuple(positions), by_patch)

    def entries(self, has_images: bool) -> tuple[Site, ...]:
        """Where the inputs of a batch enter."""
        return (PATCHES, WORDS) if has_images and self.by_patch_embedding else (WORDS,)

    def read(self, has_images: bool) -> list[Site]:
        """All sites of which a batch's gradients are needed."""
        wanted = dict.fromkeys((*self.entries(has_images), *self.sites, *self.patches))
        return [site for site in wanted if has_images or site.tower == "language"]


@dataclass(frozen=True, eq=False)
class Found:
    """Attributions of one batch of n pairs.

    Attributes:
        scores: By site [n or entry, pos] or [n or entry, pos, unit].
        picture: By vision or projector site [entry, pos] which are patches of the picture.
        untouched: [2, n] outcomes of the safe and the unsafe run.
        entering: [n] sum over what enters.
    """

    scores: dict[Site, Tensor]
    picture: dict[Site, Tensor]
    untouched: ndarray
    entering: ndarray


def attributed(
    lvlm: HookedLVLM, batch: PairBatch, outcome: BaseOutcome, plan: Plan, nodes: Sequence[tuple[float, float]], bar: Any
) -> Found:
    """Attributions of one batch: two runs without gradients, then one forward and one backward pass a node.

    Args:
        lvlm: The model; a repair that is on it acts.
        batch: n aligned pairs, as 2n rows.
        outcome: Larger where the model is less safe; differentiable in the logits.
        plan: What is attributed to.
        nodes: Pairs of a node in [0, 1] between the twins and its weight.
        bar: A progress bar, moved once a node.

    Returns:
        The attributions, in the outcome's unit.

    Raises:
        ValueError: If the outcome has no gradient in the logits, or does not depend on a site.
    """
    sites, entries = plan.read(batch.has_images), plan.entries(batch.has_images)
    keep = logits_needed(outcome, batch.inputs)
    with torch.no_grad():
        logits, cache = lvlm.run_with_cache(batch.inputs, sites=sites, logits_to_keep=keep)
        outcome = bound(outcome, batch, logits)
        untouched = _outcomes(outcome, logits, batch.inputs, 2 * batch.n)
    differences, starts = {}, {}
    for site in sites:
        safe, unsafe = halves(cache[str(site)], site)
        differences[site] = unsafe - safe
        if site in entries:
            starts[site] = safe.clone()
    del cache, logits
    inputs = batch.inputs.rows(range(batch.n))
    outcome = outcome.for_rows(list(range(batch.n)))
    image = inputs.spans.image if PATCHES in entries else None
    sums: dict[Site, Tensor] = {}
    picture: dict[Site, Tensor] = {}
    for at, weight in nodes:
        held: dict[Site, Tensor] = {}
        hooks = [
            (site, entry_hook(starts[site] + at * differences[site], image if site == WORDS else None))
            for site in entries
        ]
        hooks += [(site, _keep(held, picture, lvlm, site)) for site in sites]
        with torch.enable_grad():
            value = read_out(outcome, lvlm.run_with_hooks(inputs, fwd_hooks=hooks, logits_to_keep=keep), inputs)
            if not value.requires_grad:
                raise ValueError(
                    f"outcome must be differentiable in the logits, got {metric_name(outcome)} without gradient"
                )
            gradients = torch.autograd.grad(value.sum(), [held[site] for site in sites], allow_unused=True)
        for site, gradient in zip(sites, gradients, strict=True):
            if gradient is None:
                raise ValueError(f"sites must have an effect on the outcome, got {site}, through which it does not go")
            sums[site] = gradient.float() * weight + sums.get(site, 0.0)
        del held, value, gradients
        bar.update()
    scores = {site: _reduce(sums.pop(site), differences.pop(site), site) for site in sites}
    entering = torch.zeros(batch.n, dtype=torch.float64)
    for site in entries:
        score = scores[site].cpu()
        kept = score if site != WORDS or image is None else score * ~image.cpu()
        entering.index_add_(0, owners(batch, site), kept.sum(dim=1))
    return Found(scores, picture, untouched.reshape(2, -1), entering.numpy())


def _outcomes(outcome: BaseOutcome, logits: Tensor, inputs: Any, rows: int) -> ndarray:
    values = require_outcome(read_out(outcome, logits, inputs), rows, outcome=outcome)
    return values.detach().double().cpu().numpy()


def halves(activation: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """The safe and the unsafe half of a batch's activation; images are in the order of rows."""
    if len(activation) % 2:
        raise ValueError(f"twins must have equally many images or tiles at {site}, got {len(activation)} in all")
    safe, unsafe = activation.split(len(activation) // 2)
    return safe, unsafe


def entry_hook(value: Tensor, image: Tensor | None):
    """A hook that puts an input there, a leaf of the graph; image positions stay as they are where a mask is given."""
    leaf = value.detach().requires_grad_()

    def enter(activation: Tensor, hook: Any) -> Tensor:
        placed = leaf.to(activation.device, activation.dtype)
        return placed if image is None else torch.where(image.to(activation.device)[..., None], activation, placed)

    return enter


def _keep(held: dict[Site, Tensor], picture: dict[Site, Tensor], lvlm: HookedLVLM, site: Site):
    """A hook that keeps the activation and returns it, so that what follows depends on the very tensor that is kept."""

    def keep(activation: Tensor, hook: Any) -> Tensor:
        activation.retain_grad()
        held[site] = activation
        if site.tower != "language" and site not in picture:
            picture[site] = lvlm.patch_mask(site, activation).cpu()
        return activation

    return keep


def _reduce(gradient: Tensor, difference: Tensor, site: Site) -> Float[Tensor, "rows pos *unit"]:
    """[rows, pos], or [rows, pos, unit] at sites that have heads or neurons; float64."""
    product = gradient.double() * difference.to(gradient.device).double()
    return product if site.component == NEURONS else product.sum(dim=-1)


def owners(batch: PairBatch, site: Site) -> Tensor:
    """[entry] which pair each row of a safe half's activation is of."""
    if site.tower == "language":
        return torch.arange(batch.n)
    safe = batch.inputs.rows(range(batch.n)).image_rows
    if batch.inputs.image_rows != (*safe, *(row + batch.n for row in safe)):
        raise ValueError(f"twins must have equally many images or tiles at {site}; leave out pairs that have not")
    return torch.tensor(safe)
