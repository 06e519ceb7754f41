"""What the results of a lens have in common: measures with intervals and chance lines, and the pictures they are of."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from care_lens.core import Example, cluster_bootstrap
from care_lens.core.cells import restored
from care_lens.core.details import DetailedResult, site_columns, tidy
from care_lens.core.pictures import shown_picture
from care_lens.core.site import Site

COLUMNS = ("tower", "layer", "component", "span", "metric", "value", "ci_low", "ci_high", "chance", "n", "seed")
PICTURE_COLUMNS = ("example", "image", "width", "height", "data")
_SIDE = 384

Result = TypeVar("Result", bound="LensMeasures")


@dataclass(frozen=True, repr=False)
class LensMeasures(DetailedResult):
    """A result of a lens.

    Attributes:
        frame: One row a site, span of tokens and measure: tower, layer, component, span, metric, value (mean over examples), ci_low,
            ci_high (over the examples' groups), chance (what the measure is where words and pictures are dealt at random), n, seed.
        settings: What made it.
        details: One row a token, site and rank, as the subclass says.
        pictures: The pictures it is of, small: example, image, width and height of the original in pixels, data (a data URI).
    """

    pictures: pd.DataFrame = field(default_factory=pd.DataFrame)

    def parts(self) -> dict[str, pd.DataFrame]:
        """The details and the pictures."""
        return {"details": self.details, "pictures": self.pictures}

    @classmethod
    def from_parts(
        cls: type[Result], frame: pd.DataFrame, settings: dict[str, Any], texts: Mapping[str, str]
    ) -> Result:
        """Build from what was saved."""
        held = DetailedResult.from_parts.__func__(cls, frame, settings, texts)  # type: ignore[attr-defined]
        pictures = restored(pd.read_csv(io.StringIO(texts["pictures"]), dtype="str", keep_default_na=False))
        whole = {name: "int64" for name in ("example", "image", "width", "height")}
        return cls(held.frame, settings, held.details, pictures.astype(whole))


def thumbnails(examples: Sequence[Example], *, most: int = 50) -> pd.DataFrame:
    """The pictures of the first examples, made small enough to be sent around.

    Args:
        examples: The examples.
        most: Pictures that are kept.
    """
    rows = []
    for number, example in enumerate(examples):
        for image, picture in enumerate(example.images):
            if len(rows) == most:
                break
            shown = shown_picture(picture).convert("RGB")
            scale = min(1.0, _SIDE / max(shown.size))
            small = shown.resize((max(1, round(shown.width * scale)), max(1, round(shown.height * scale))))
            # Small flat pictures are smaller, and sharper, as PNG.
            made = []
            for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 80})):
                buffer = io.BytesIO()
                small.save(buffer, format=kind, **options)
                made.append((buffer.getvalue(), kind))
            data, kind = made[0] if len(made[0][0]) < 60_000 else min(made)
            text = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
            rows.append((number, image, picture.width, picture.height, text))
    return pd.DataFrame(rows, columns=list(PICTURE_COLUMNS))


@dataclass
class Measured:
    """The measures of one site and span, example by example.

    Attributes:
        values: By metric [n] values, one an example; missing where it has no such token.
        chance: By metric [n] values by chance; a metric without them has none.
    """

    values: dict[str, Float[ndarray, " n"]] = field(default_factory=dict)
    chance: dict[str, Float[ndarray, " n"]] = field(default_factory=dict)


_BOUNDED = ("agreement", "target hit")


def measure_rows(
    found: Mapping[tuple[Site, str], Measured], groups: Sequence[str], *, n_boot: int, seed: int
) -> pd.DataFrame:
    """The frame of a result: means over examples with intervals over their groups, and chance lines.

    Args:
        found: Measures by site and span.
        groups: The examples' groups.
        n_boot: Bootstrap resamples.
        seed: Their seed.
    """
    rows = []
    for (site, span), measured in found.items():
        for metric, values in measured.values.items():
            kept = np.flatnonzero(np.isfinite(values))
            if not len(kept):
                continue
            kind = "rates" if metric in _BOUNDED else "numbers"
            labels = [groups[i] for i in kept.tolist()]
            value, low, high = cluster_bootstrap(values[kept], labels, kind=kind, n_boot=n_boot, seed=seed)
            chance = measured.chance.get(metric)
            known = chance is not None and bool(np.isfinite(chance[kept]).any())
            rows.append(
                {**site_columns(site), "span": span, "metric": metric, "value": value, "ci_low": low, "ci_high": high}
                | {"chance": float(np.nanmean(chance[kept])) if known and chance is not None else np.nan}
                | {"n": len(kept), "seed": seed}
            )
    return tidy(rows, COLUMNS)


def against_others(table: Float[ndarray, "n n"], same: ndarray) -> tuple[Float[ndarray, " n"], Float[ndarray, " n"]]:
    """What a measure is of each example's own target, and on average of the other examples' targets.

    Args:
        table: [example, target] the measure of every example with every example's target.
        same: [example, target] whether the two targets are the same.

    Returns:
        [n] own values, and [n] values by chance; missing where all targets are the same.
    """
    own = np.diag(table).copy()
    other = np.where(same, np.nan, table)
    chance = np.array([np.nanmean(row) if np.isfinite(row).any() else np.nan for row in other])
    return own, chance
