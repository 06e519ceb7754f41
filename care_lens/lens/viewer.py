"""A page that shows what a lens reads over the pictures: layers by slider, words on hover, any family's grids and tiles.

The page is one file without references to others: pictures, words and script are in it, so that it opens from a mail as from a disk.
Words are kept as indices in a table and values as bytes, which takes about three bytes a token, site and rank.
"""

import base64
import json
import logging
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from care_lens.core.details import DetailedResult
from care_lens.core.files import write_whole
from care_lens.core.require import require_path
from care_lens.core.site import Site
from care_lens.lens.errors import LensError
from care_lens.lens.measures import LensMeasures

log = logging.getLogger(__name__)

_BUDGET = 500_000
"""Characters of the words' tables of a page, about; further examples are left out."""
_MOST_WORDS = 65_535


def write_viewer(
    result: LensMeasures,
    path: str | Path,
    *,
    neighbours: LensMeasures | None = None,
    effects: DetailedResult | None = None,
    ranks: int = 5,
) -> Path:
    """Write the page.

    Args:
        result: Words or neighbours by token and site.
        path: Where to; .html is added where there is no suffix.
        neighbours: Further words of the same examples, shown on hover beside the first.
        effects: A ``PatchMapResult`` whose pairs are the examples, in order: patches can be coloured by its NIE.
        ranks: Words of a token and site that the page holds, at most.

    Returns:
        The path written.

    Raises:
        LensError: If the result holds no words, or the path ends in another suffix.
    """
    path = require_path(path)
    path = path.with_suffix(".html") if not path.suffix else path
    if path.suffix.lower() not in (".html", ".htm"):
        raise LensError(f"path must end in .html, got {path.name!r}; a lens's viewer is a page")
    page = files("care_lens.lens").joinpath("viewer.html").read_text(encoding="utf-8")
    # A closing tag inside a text must not end the script that holds it.
    data = json.dumps(_data(result, neighbours, effects, ranks), ensure_ascii=False, allow_nan=False).replace(
        "<", "\\u003c"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(path, page.replace("/*DATA*/", data))


def _data(
    result: LensMeasures, neighbours: LensMeasures | None, effects: DetailedResult | None, ranks: int
) -> dict[str, Any]:
    if result.details.empty:
        raise LensError("result must hold the words of at least one token, got none")
    layers = [_Layer(one, ranks) for one in (result, neighbours) if one is not None]
    shown: list[dict[str, Any]] = []
    used = 0
    numbers = list(dict.fromkeys(result.details["example"].tolist()))
    for number in numbers:
        one = _example(result, number, layers, effects)
        size = sum(len(table["w"]) + len(table["v"]) for kind in one["layers"] for table in kind)
        if shown and used + size > _BUDGET:
            log.warning("the page holds %d of %d examples, to stay small", len(shown), len(numbers))
            break
        shown.append(one)
        used += size
    pictures = [
        {
            "example": int(row["example"]),
            "image": int(row["image"]),
            "w": int(row["width"]),
            "h": int(row["height"]),
            "src": row["data"],
        }
        for row in result.pictures.to_dict("records")
        if int(row["example"]) in {one["number"] for one in shown}
    ]
    return {
        "kinds": [
            {"title": layer.title, "value": layer.value, "sites": layer.sites, "ranks": layer.ranks} for layer in layers
        ],
        "words": [layer.words for layer in layers],
        "examples": shown,
        "pictures": pictures,
    }


class _Layer:
    """The words of one result, by example and site, as tables of bytes."""

    def __init__(self, result: LensMeasures, ranks: int) -> None:
        frame = pd.DataFrame(result.details[result.details["rank"] <= ranks])
        neighbours = "context" in frame.columns
        self.title = "nearest words in context" if neighbours else "words of the lens"
        self.value = "similarity" if neighbours else "probability"
        self.ranks = int(frame["rank"].max())
        names = [_site(row) for row in frame[["tower", "layer", "component"]].drop_duplicates().itertuples(index=False)]
        self.sites = [str(site) for site in sorted(names)]
        texts = frame["word"].astype(str)
        if neighbours:
            texts = texts + "\t" + frame["context"].astype(str) + " (layer " + frame["bank_layer"].astype(str) + ")"
        counted = texts.value_counts()
        if len(counted) > _MOST_WORDS:
            log.warning("the page holds the %d most frequent words of %d", _MOST_WORDS, len(counted))
        self.words = ["", *counted.index[: _MOST_WORDS - 1].tolist()]
        index = {word: i for i, word in enumerate(self.words)}
        where = frame["tower"] + "/" + frame["layer"].astype(str) + "/" + frame["component"]
        self._frame = frame.assign(at=texts.map(index).fillna(0).astype(int), where=where)
        self._groups = dict(list(self._frame.groupby(["example", "where"], sort=False)))

    def tables(self, example: int, tokens: Sequence[int]) -> list[dict[str, str]]:
        """For each site the indices of words, 16 bits each, and values in 255 steps, as base64 of [token, rank]."""
        rows = {token: row for row, token in enumerate(tokens)}
        out = []
        for name in self.sites:
            site = Site.parse(name)
            words = np.zeros((len(tokens), self.ranks), dtype="<u2")
            values = np.zeros((len(tokens), self.ranks), dtype="u1")
            layer = "<NA>" if site.layer is None else site.layer
            part = self._groups.get((example, f"{site.tower}/{layer}/{site.component}"))
            if part is not None:
                part = pd.DataFrame(part[part["token_index"].isin(rows)])
                at = part["token_index"].map(rows).to_numpy(dtype=int), part["rank"].to_numpy(dtype=int) - 1
                words[at] = part["at"].to_numpy()
                values[at] = np.round(np.clip(part["value"].to_numpy(dtype=float), 0, 1) * 255).astype("u1")
            out.append({"w": _text(words), "v": _text(values)})
        return out


def _example(
    result: LensMeasures, number: int, layers: Sequence[_Layer], effects: DetailedResult | None
) -> dict[str, Any]:
    mine = result.details[result.details["example"] == number]
    first = pd.DataFrame(mine).drop_duplicates(subset=["token_index"]).sort_values("token_index")
    tokens = [
        [row["token"], int(row["image"]), int(row["grid"]), int(row["row"]), int(row["col"])]
        + ([round(float(row[edge]), 3) for edge in ("x0", "y0", "x1", "y1")] if row["grid"] >= 0 else [])
        for row in first.to_dict("records")
    ]
    label = str(first["id"].iloc[0]) or f"example {number}"
    one: dict[str, Any] = {"number": number, "label": label, "tokens": tokens, "index": first["token_index"].tolist()}
    one["layers"] = [layer.tables(number, first["token_index"].tolist()) for layer in layers]
    if effects is not None:
        held = effects.details[effects.details["pair"] == number]
        grid = held["grid"] if "grid" in held.columns else pd.Series(0, index=held.index)
        one["nie"] = {
            f"{g},{r},{c}": round(float(value), 4)
            for g, r, c, value in zip(grid, held["row"], held["col"], held["value"], strict=True)
        }
    return one


def _site(row: Any) -> Site:
    return Site(row.tower, None if pd.isna(row.layer) else int(row.layer), row.component)


def _text(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()
