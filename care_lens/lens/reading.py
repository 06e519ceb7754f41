"""A picture patch by patch: what is legible there, what it is like, and whether it acts.

A word that a lens reads at a patch is in the patch's state; it need not be what the model goes by. The natural indirect effect (NIE) of
the patch (``care_lens.mediation.patch_map``) says what its state changes of the outcome. Side by side they tell three things apart:
patches that are legible and act (read), that are legible and do not act (merely legible), and that act without being legible.

By default a patch acts where its effect is at least a tenth of the largest effect of the same map. Such a share is always reached by some
patch, also in a picture that does nothing. ``min_effect`` (an absolute size, in the outcome's unit) and ``significant`` (the interval of the patch's
mean effect over the pairs must exclude 0) demand more.

    words = logit_lens(lvlm, pairs.unsafe, targets=[...], positions=("image",))
    near = nearest_text(lvlm, pairs.unsafe, bank)
    effects = patch_map(lvlm, pairs, outcome=outcome)
    picture_reading(words, effects, example=0, neighbours=near, image=pairs.unsafe[0].image).plot()
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy.stats import rankdata

from care_lens.core import Example, SiteLike, cluster_bootstrap
from care_lens.core.details import DetailedResult
from care_lens.core.results import FrameResult, package_versions
from care_lens.core.site import Site
from care_lens.lens.errors import LensError
from care_lens.lens.measures import LensMeasures, thumbnails

if TYPE_CHECKING:
    import plotly.graph_objects as go

COLUMNS = (
    "grid", "row", "col", "x0", "y0", "x1", "y1", "word", "probability", "target_rank", "neighbour", "context", "similarity",
    "effect", "legible", "acts", "kind",
)  # fmt: skip
READ, MERELY, UNREAD, NEITHER = "read", "merely legible", "acts, not legible", "neither"
_SHARE = 0.1


@dataclass(frozen=True, repr=False)
class PictureReading(FrameResult):
    """What is legible at each patch of one picture, and what the patch does.

    Attributes:
        frame: One row a patch: grid, row, col, x0, y0, x1, y1 (its rectangle in pixels), word and probability (the lens's first word),
            target_rank (rank of the example's target among the words kept, 0 where it is not among them), neighbour, context and
            similarity (the nearest word), effect (NIE, in the outcome's unit), legible, acts, kind ("read", "merely legible",
            "acts, not legible", "neither").
        settings: Example, site, where effects were measured, the rank correlation of the target's legibility with the effect over
            patches with its interval ("correlation"), numbers of patches by kind, what was demanded of a patch that acts (acts, min_effect,
            significant), and the largest effect in size ("largest").
        image: The picture; None: not given. It is not saved.
    """

    image: Image.Image | None = field(default=None, compare=False)

    def plot(self) -> "go.Figure":
        """Three panels over the picture: the lens's word, the neighbour, and the effect of each patch."""
        from care_lens.plots.lens import plot_picture_reading

        return plot_picture_reading(self, image=self.image)


def picture_reading(
    words: LensMeasures,
    effects: DetailedResult,
    *,
    example: int = 0,
    site: SiteLike = "blocks.0.hook_resid_pre",
    neighbours: LensMeasures | None = None,
    image: Image.Image | None = None,
    acts: float | int = _SHARE,
    min_effect: float | int = 0.0,
    significant: bool = False,
    n_boot: int = 1000,
    seed: int = 0,
) -> PictureReading:
    """Put a lens, neighbours and patch effects of one picture side by side.

    Args:
        words: What :func:`~care_lens.lens.logit_lens` gave.
        effects: What :func:`~care_lens.mediation.patch_map` gave, whose pair ``example`` has the picture.
        example: Which one.
        site: The site whose words and neighbours are taken.
        neighbours: What :func:`~care_lens.lens.nearest_text` gave of the same examples; None: the column is empty.
        image: The picture, for the figure.
        acts: A patch acts where its effect is at least this share of the largest effect of this picture, in size. In a picture without any
            effect the largest is small too, so that some patch is always above the share.
        min_effect: Besides, its effect must have at least this size, in the outcome's unit (nats for log probabilities). 0: no such demand.
        significant: Besides, the interval of the patch's mean effect over all pairs of ``effects`` must exclude 0, and that mean must have the
            sign of the effect in this picture. It is a statement about a place that all pairs share, not about this picture alone: use it
            where what differs between the twins is at the same place in every pair.
        n_boot: Resamples of the patches for the correlation's interval.
        seed: Their seed.

    Returns:
        The patches. A patch is legible where a target of the example is among its words (``logit_lens(targets=...)``); without targets
        where the first word's probability is above that of the median patch's.

    Warns:
        UserWarning: If the results are told to be of different items or pictures: the item (group) of the example and of the pair, the example that
            the neighbours are of, the picture that is given. The warning names what differs.

    Raises:
        LensError: If the results do not hold that example and site, or their patches differ; if ``acts`` is no share, ``min_effect`` is below 0,
            or ``significant`` is asked for and ``effects`` has no intervals.
    """
    if not (0 <= acts <= 1 and 0 <= min_effect < np.inf):
        raise LensError(f"acts must be from 0 to 1 and min_effect 0 or more, got {acts} and {min_effect}")
    place = Site.parse(site)
    lens = _patches(words, example, place)
    first = lens[lens["rank"] == 1].set_index(["grid", "row", "col"])
    if first.empty:
        raise LensError(
            f"words must hold image tokens of example {example} at {place}, got none; run logit_lens there, with keep above {example}"
        )
    held = effects.details[effects.details["pair"] == example]
    held = held.assign(grid=held["grid"] if "grid" in held.columns else 0).set_index(["grid", "row", "col"])
    if not first.index.isin(held.index).all():
        raise LensError(
            f"effects must hold the patches of example {example}, {len(first)} of them, got {len(held)} of pair {example}; measure "
            "them with patch_map on the same examples, in the same order"
        )
    _warn_of_others(words, effects, neighbours, image, example)
    targets = words.settings.get("targets") or []
    own = set(targets[example]) if targets else set()
    ranks = _target_ranks(lens, own, first.index)
    near = _nearest(neighbours, example, place, first.index)
    effect = held["value"].reindex(first.index).to_numpy(dtype=float)
    probability = first["value"].to_numpy(dtype=float)
    legible = ranks > 0 if own else probability > np.median(probability)
    most = float(np.nanmax(np.abs(effect), initial=0.0))
    acting = (np.abs(effect) >= max(acts * most, min_effect)) & (np.abs(effect) > 0)
    if significant:
        acting &= _significant(effects, first.index) == np.sign(effect)
    kind = np.select([legible & acting, legible, acting], [READ, MERELY, UNREAD], NEITHER)
    frame = pd.DataFrame(
        {
            **{name: first.index.get_level_values(name).to_numpy() for name in ("grid", "row", "col")},
            **{name: first[name].to_numpy(dtype=float) for name in ("x0", "y0", "x1", "y1")},
            "word": first["word"].to_numpy(),
            "probability": probability,
            "target_rank": ranks,
            "neighbour": near["word"].to_numpy(),
            "context": near["context"].to_numpy(),
            "similarity": near["value"].to_numpy(dtype=float),
            "effect": effect,
            "legible": legible,
            "acts": acting,
            "kind": kind,
        }
    )[list(COLUMNS)]
    strength = np.where(ranks > 0, 1 / np.maximum(ranks, 1), 0.0) if own else probability
    settings: dict[str, Any] = {
        "example": example,
        "site": str(place),
        "effects_at": effects.settings.get("site", ""),
        "targets": sorted(own),
        "acts": acts,
        "min_effect": float(min_effect),
        "significant": significant,
        "largest": most,
        "correlation": _correlation(strength, effect, n_boot, seed),
        "counts": {name: int((kind == name).sum()) for name in (READ, MERELY, UNREAD, NEITHER)},
        "n": len(frame),
        "seed": seed,
        "versions": package_versions(),
    }
    return PictureReading(pd.DataFrame(frame), settings, image)


def _warn_of_others(
    words: LensMeasures,
    effects: DetailedResult,
    neighbours: LensMeasures | None,
    image: Image.Image | None,
    example: int,
) -> None:
    """Warn where what stands side by side is not of one item and one picture, as far as the results say of what they are."""

    def said(result: DetailedResult, column: str, number: str = "example") -> str:
        details = result.details
        rows = pd.DataFrame(details[details[number] == example])
        return "" if column not in details.columns or rows.empty else str(rows[column].iloc[0])

    differ = []
    item, pair = said(words, "group"), said(effects, "group", "pair")
    # Examples without an item go by their id or their number, pairs by their number: these say nothing of each other.
    named = item not in ("", said(words, "id"), str(example)) and pair not in ("", str(example))
    if named and item != pair:
        differ.append(f"words are of item {item!r}, effects of item {pair!r}")
    if neighbours is not None:
        for column, what in (("group", "item"), ("id", "example")):
            one, other = said(words, column), said(neighbours, column)
            if one and other and one != other:
                differ.append(f"words are of {what} {one!r}, neighbours of {what} {other!r}")
                break
        differ += _pictures_differ(words, neighbours.pictures, example, "the picture of neighbours")
    if image is not None:
        shown = thumbnails([Example("", image=image)]).assign(example=example)
        differ += _pictures_differ(words, shown, example, "image")
    if differ:
        warnings.warn(
            f"the results must be of one picture and item to be read side by side, got others at example {example}: {'; '.join(differ)}; "
            "give every step the same examples in the same order (patch_map: pairs whose unsafe twins are these examples)",
            stacklevel=3,
        )


def _pictures_differ(words: LensMeasures, others: pd.DataFrame, example: int, name: str) -> list[str]:
    """That pictures of two results are not the same, where both have kept theirs."""
    if not {"example", "image", "data"} <= {*words.pictures.columns} & {*others.columns}:
        return []
    kept = [
        pd.DataFrame(table[(table["example"] == example) & (table["image"] == 0)]) for table in (words.pictures, others)
    ]
    if any(table.empty for table in kept) or kept[0]["data"].iloc[0] == kept[1]["data"].iloc[0]:
        return []
    sizes = [f"{table['width'].iloc[0]} x {table['height'].iloc[0]}" for table in kept]
    return [f"{name} ({sizes[1]} pixels) is not the picture of words ({sizes[0]})"]


def _patches(result: LensMeasures, example: int, site: Site) -> pd.DataFrame:
    details = result.details
    at = (details["example"] == example) & (details["grid"] >= 0)
    at &= (details["tower"] == site.tower) & (details["component"] == site.component) & (details["layer"] == site.layer)
    return pd.DataFrame(details[at.fillna(False).astype(bool)])


def _target_ranks(lens: pd.DataFrame, own: set[int], index: pd.Index) -> np.ndarray:
    if not own:
        return np.zeros(len(index), dtype=int)
    hits = lens[lens["word_id"].isin(list(own))].groupby(["grid", "row", "col"])["rank"].min()
    return hits.reindex(index).fillna(0).to_numpy(dtype=int)


def _nearest(neighbours: LensMeasures | None, example: int, site: Site, index: pd.Index) -> pd.DataFrame:
    if neighbours is None:
        return pd.DataFrame({"word": "", "context": "", "value": np.nan}, index=index)
    near = _patches(neighbours, example, site)
    near = near[near["rank"] == 1].set_index(["grid", "row", "col"])[["word", "context", "value"]].reindex(index)
    if near["word"].isna().any():
        raise LensError(f"neighbours must hold the same patches of example {example} at {site}; run nearest_text there")
    return near


def _significant(effects: DetailedResult, index: pd.Index) -> np.ndarray:
    """The sign of the mean effect over pairs where its interval excludes 0, else 0."""
    mean = effects.frame.assign(grid=effects.frame["grid"] if "grid" in effects.frame.columns else 0)
    low, high = (mean.set_index(["grid", "row", "col"])[name].reindex(index) for name in ("ci_low", "ci_high"))
    low, high = low.to_numpy(dtype=float), high.to_numpy(dtype=float)
    if not np.isfinite(low).any():
        raise LensError(
            f"effects must have intervals for significant=True, got none for {len(low)} patches; measure patch_map on pairs "
            "about two items or more, or give min_effect"
        )
    return np.where(low > 0, 1, np.where(high < 0, -1, 0))


def _correlation(strength: np.ndarray, effect: np.ndarray, n_boot: int, seed: int) -> dict[str, float | None]:
    """Spearman's, with its interval over patches; chance is 0."""
    kept = np.isfinite(effect)
    x, y = strength[kept], effect[kept]
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"value": None, "ci_low": None, "ci_high": None}
    found = cluster_bootstrap({"x": x, "y": y}, statistic=_spearman, bounds=(-1, 1), n_boot=n_boot, seed=seed)
    return dict(zip(("value", "ci_low", "ci_high"), map(float, found), strict=True))


def _spearman(values: dict[str, np.ndarray]) -> float:
    x, y = (rankdata(values[name]) for name in ("x", "y"))
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / scale if scale > 0 else float("nan")


def kinds_of(readings: Sequence[PictureReading]) -> pd.DataFrame:
    """Shares of patches by kind, one row a picture.

    Args:
        readings: Of several pictures.
    """
    return pd.DataFrame(
        [{name: count / one.settings["n"] for name, count in one.settings["counts"].items()} for one in readings]
    )
