"""What a subspace writes towards: tokens, by the logit lens, and neurons that write the same way.

A direction u has no logits of its own, because the final norm is not linear. Taken is what a small step along it changes at
a point h (the benign mean): the derivative J u of ``unembed(norm(h))``, centred over the vocabulary, in logits per unit length, before a soft cap
where the model has one. Points (the means, targets of a repair) have logits, centred likewise. Both assume, as the logit lens does, that what the layer
writes reaches the end as it is; what later blocks make of it is a question for mediation.

Neurons are compared by the cosine of u and the neuron's column of W_out, before any norm or scale of the branch: where there is
one (Gemma3, PaliGemma2, Granite) that is not quite what enters the stream. ``chance`` is what the largest of as many random ones
would have, to first order: ``s sqrt(2 ln n)`` with s their standard deviation (``1 / sqrt(d)`` of cosines). Activations and weights are
not uniform, so a figure little above it says nothing.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; Geva et al. 2022, "Transformer feed-forward layers build
predictions by promoting concepts in the vocabulary space".
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core import FrameResult, Site, package_versions
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.mediators import NEURONS
from care_lens.subspace import SafetySubspace

if TYPE_CHECKING:
    import plotly.graph_objects as go

Directions = Literal["write", "basis", "read"]
COLUMNS = ("kind", "of", "sign", "rank", "unit", "layer", "value", "chance")
_STREAM = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")


@dataclass(frozen=True)
class Writing(FrameResult):
    """What a subspace writes towards.

    Attributes:
        frame: kind ("token", "neuron"), of ("direction 0" and so on, or a point's name), sign ("+" for what rises along it, "-" for what
            falls), rank (from 1), unit (the token, or the neuron's name), layer (of a neuron), value (centred logit, or its
            change per unit length; cosine of a neuron), chance (what the largest of as many random ones would have).
        settings: Site, modality, directions, k, versions.
    """

    def plot(self) -> "go.Figure":
        """The leading tokens and neurons of each direction and point."""
        from care_lens.plots import plot_writing

        return plot_writing(self)


def writes_towards(
    lvlm: HookedLVLM,
    subspace: SafetySubspace,
    *,
    directions: Directions = "write",
    points: Mapping[str, Float[Tensor, " d"]] | None = None,
    neurons: bool = True,
    k: int = 10,
) -> Writing:
    """The tokens and the neurons that lie along a subspace's directions, and the tokens of its points.

    Args:
        lvlm: The model.
        subspace: Of a site of the residual stream (or an attention or MLP output) of either tower, or of the projector's output. Of the
            vision tower there are no tokens.
        directions: Its columns "write" (what the projector writes along), "basis" or "read"; each is normalised.
        points: Further points [d] by name, such as the target of a repair; the benign and the malicious mean are always there.
        neurons: Whether neurons are compared: all of the tower's layers.
        k: How many of each sign.

    Returns:
        The tokens and neurons.

    Raises:
        ValueError: If the subspace names no site, is of another width than the stream, a point has another width, or
            weights are packed (quantised).

    Example:
        >>> import torch
        >>> from care_lens import SafetySubspace, organism
        >>> from care_lens.lvlm import HookedLVLM
        >>> lvlm = HookedLVLM.from_hf(*organism.untrained(seed=0))
        >>> rows = torch.randn(60, 32, generator=torch.Generator().manual_seed(0))
        >>> subspace = SafetySubspace.fit(rows[:30], rows[30:], rank=1, site="blocks.1.hook_resid_post")
        >>> found = writes_towards(lvlm, subspace, k=2)
        >>> sorted(set(found.frame["of"]))
        ['benign mean', 'direction 0', 'malicious mean']
    """
    site = _site_of(lvlm, subspace)
    columns = getattr(subspace, directions).float()
    columns = columns / columns.norm(dim=0)
    rows: list[dict[str, Any]] = []
    if site.tower != "vision":
        means = {"benign mean": subspace.mean_benign, "malicious mean": subspace.mean_malicious}
        lens, put = _lens(lvlm)
        for name, values in _token_values(lens, put, columns, {**means, **(points or {})}):
            rows += _both_ends("token", name, values, _tokens(lvlm), k)
    if neurons:
        units = list(neuron_directions(lvlm, "vision" if site.tower == "vision" else "language"))
        names = [f"{place}[{i}]" for place, write in units for i in range(write.shape[1])]
        layers = [place.layer for place, write in units for _ in range(write.shape[1])]
        unit = torch.cat([write / write.norm(dim=0).clamp(min=1e-12) for _, write in units], dim=1) if units else None
        for j in range(columns.shape[1] if unit is not None else 0):
            assert unit is not None
            cosines = unit.T @ columns[:, j].to(unit)
            spread = 1 / math.sqrt(len(columns))
            rows += _both_ends("neuron", f"direction {j}", cosines, names.__getitem__, k, spread, layers)
    settings = {
        "site": str(site), "modality": subspace.modality, "directions": directions, "k": k, "versions": package_versions(),
    }  # fmt: skip
    frame = pd.DataFrame(rows, columns=list(COLUMNS)).astype({"layer": "Int64"})
    return Writing(frame, settings)


def neuron_directions(
    lvlm: HookedLVLM, tower: Literal["language", "vision"] = "language"
) -> Iterator[tuple[Site, Float[Tensor, "d d_mlp"]]]:
    """What each neuron of a tower writes: the columns of W_out, before any norm or scale of the branch.

    Args:
        lvlm: The model.
        tower: Which tower.

    Yields:
        The site of a layer's neurons and [d, d_mlp] float32, on the weights' device; layers of experts have none.

    Raises:
        ValueError: If weights are packed (quantised), so that they are no matrix.
    """
    where = lvlm.family.vision if tower == "vision" else lvlm.family.language
    blocks = lvlm.bridge.get_submodule(where.blocks)
    for site in lvlm.sites(tower=tower, component=NEURONS):
        assert site.layer is not None
        module: Any = blocks[site.layer].get_submodule(where.points[NEURONS].rpartition(".")[0])
        weight = getattr(module, "original_component", module).weight.detach()
        if weight.ndim != 2 or weight.shape[1] != lvlm.width(site) or not weight.is_floating_point():
            raise ValueError(
                f"the weights of {site} must be a matrix of floats, got {tuple(weight.shape)} of {weight.dtype}; load the model "
                "without quantisation, or pass neurons=False"
            )
        yield site, weight.float()


def _site_of(lvlm: HookedLVLM, subspace: SafetySubspace) -> Site:
    if subspace.site is None:
        raise ValueError("subspace must name its site, got None; fit it with site=...")
    info = lvlm.site_info(subspace.site)
    if info.width != len(subspace.basis) or subspace.site.component not in (*_STREAM, "hook_out"):
        raise ValueError(
            f"subspace must be of a stream that tokens and neurons share ({', '.join(_STREAM)}, projector.hook_out), got "
            f"{subspace.site} of width {len(subspace.basis)}"
        )
    return subspace.site


def _lens(lvlm: HookedLVLM) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """[..., d] to logits; and how a tensor gets to where the norm's weights are, in their dtype."""
    norm, weight = lvlm.bridge.ln_final, next(lvlm.bridge.ln_final.parameters())
    return (lambda h: lvlm.bridge.unembed(norm(h)).float()), (lambda h: h.to(weight.device, weight.dtype))


def _token_values(
    lens: Callable[[Tensor], Tensor],
    put: Callable[[Tensor], Tensor],
    columns: Float[Tensor, "d k"],
    points: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Name and centred values over the vocabulary of each direction and point."""
    at = put(points["benign mean"])[None, None]
    for j in range(columns.shape[1]):
        change = torch.func.jvp(lens, (at,), (put(columns[:, j])[None, None],))[1]
        yield f"direction {j}", _centred(change)
    for name, point in points.items():
        if point.shape != columns.shape[:1]:
            raise ValueError(f"points must be of width {len(columns)}, got {tuple(point.shape)} for {name!r}")
        with torch.no_grad():
            yield name, _centred(lens(put(point)[None, None]))


def _centred(logits: Tensor) -> Tensor:
    values = logits.detach()[0, 0].cpu()
    return values - values.mean()


def _tokens(lvlm: HookedLVLM) -> Callable[[int], str]:
    return lambda i: str(lvlm.tokenizer.convert_ids_to_tokens(i))


def _both_ends(
    kind: str,
    name: str,
    values: Tensor,
    unit: Callable[[int], str],
    k: int,
    spread: float | None = None,
    layers: list[int | None] | None = None,
) -> list[dict[str, Any]]:
    """The k largest and the k smallest."""
    n = min(k, len(values))
    chance = (float(values.std()) if spread is None else spread) * math.sqrt(2 * math.log(max(len(values), 2)))
    rows = []
    for sign, order in (("+", values.topk(n).indices), ("-", (-values).topk(n).indices)):
        rows += [
            {"kind": kind, "of": name, "sign": sign, "rank": rank, "unit": unit(i), "layer": None if layers is None else layers[i],
             "value": float(values[i]), "chance": chance}
            for rank, i in enumerate(order.tolist(), 1)
        ]  # fmt: skip
    return rows
