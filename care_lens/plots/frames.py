"""What every figure does with a result: take its frame, check its columns, write intervals and names."""

from collections.abc import Iterable, Sequence
from typing import cast

import numpy as np
import pandas as pd

from care_lens.core.results import FrameResult
from care_lens.core.site import BLOCK_COMPONENTS, TOWERS

INTERVAL = ("value", "ci_low", "ci_high")
_COMPONENT_ORDER = (*BLOCK_COMPONENTS, "hook_embed", "hook_in", "hook_out")


def frame_of(result: FrameResult | pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """The tidy frame of a result, or the frame itself.

    Args:
        result: A result or its frame.
        columns: Columns that must be there.

    Returns:
        The frame, not a copy.

    Raises:
        ValueError: If columns are lacking or the frame is empty.
    """
    frame = result.frame if isinstance(result, FrameResult) else result
    lacking = [column for column in columns if column not in frame.columns]
    if lacking:
        raise ValueError(f"frame must have the columns {list(columns)}, got none called {lacking}")
    if frame.empty:
        raise ValueError("frame must hold at least one row, got none")
    return frame


def where(frame: pd.DataFrame, **values: str) -> pd.DataFrame:
    """The rows that have these values in these columns; none, if there are none."""
    masks = [frame[column].to_numpy() == value for column, value in values.items()]
    return cast(pd.DataFrame, frame.loc[np.logical_and.reduce(masks)])


def only(frame: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    """The rows with that value in a column.

    Raises:
        ValueError: If there are none.
    """
    kept = where(frame, **{column: value})
    if kept.empty:
        raise ValueError(f"{column} must be one of {sorted(set(frame[column]))}, got {value!r}")
    return kept


def half_widths(frame: pd.DataFrame) -> dict[str, object]:
    """Plotly's asymmetric error bars from the columns value, ci_low and ci_high."""
    value, low, high = (frame[column].astype(float) for column in INTERVAL)
    return {
        "type": "data",
        "symmetric": False,
        "array": (high - value).tolist(),
        "arrayminus": (value - low).tolist(),
    }


def excludes_zero(frame: pd.DataFrame) -> pd.Series:
    """Whether each row's interval lies on one side of 0; False where there is no interval."""
    return (frame["ci_low"].astype(float) > 0) | (frame["ci_high"].astype(float) < 0)


MARK = "\N{BLACK CIRCLE}"
"""Drawn in a cell whose interval excludes 0, unless it is next to nothing beside the largest."""

NEGLIGIBLE = 0.05
"""Cells below this share of the largest one are not marked, whatever their interval: next to nothing, surely not 0, is next to nothing."""


def marked(frame: pd.DataFrame, largest: float) -> pd.Series:
    """Whether a cell is marked: its interval excludes 0, and it is at least 5 % of the largest cell in size."""
    return excludes_zero(frame) & (frame["value"].astype(float).abs() >= NEGLIGIBLE * largest)


def largest_of(values: object) -> float:
    """The largest size of some values, 0 where there are none."""
    return float(np.nanmax(np.abs(np.asarray(values, dtype=float)), initial=0.0))


def is_token(position: object) -> bool:
    """Whether a position is that of one token: an index, not the name of a span."""
    return isinstance(position, str) and position.lstrip("-").isdigit()


LONGEST_TOKEN = 16
"""Characters of a token under an axis; longer ones are cut."""


def literal(text: str) -> str:
    """A text that plotly is to write as it stands: it takes <s>, <b> and others for marks, and writes nothing for a token that is called so."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def token_label(token: str) -> str:
    """The text of a token as an axis writes it: without the spaces around it, long ones cut, white space and what cannot be printed as its code."""
    text = token.strip()
    text = (text if text.isprintable() else repr(text)[1:-1]) if text else repr(token)
    return literal(text if len(text) <= LONGEST_TOKEN else f"{text[: LONGEST_TOKEN - 1]}\N{HORIZONTAL ELLIPSIS}")


def n_text(frame: pd.DataFrame, what: str = "") -> str:
    """How many the values are of: "n = 10 pairs", "n = 24 to 56"; empty where the frame does not say."""
    if "n" not in frame.columns:
        return ""
    n = frame["n"].dropna().astype(int)
    n = n[n > 0]
    if n.empty:
        return ""
    counted = str(n.min()) if n.min() == n.max() else f"{n.min()} to {n.max()}"
    what = what.removesuffix("s") if counted == "1" else what
    return f"n = {counted}{' ' + what if what else ''}"


def with_n(title: str, frame: pd.DataFrame, what: str = "") -> str:
    """A title with the number that the values are of."""
    told = n_text(frame, what)
    return f"{title} ({told})" if told and title else title or told


def component_label(component: str) -> str:
    """A component's name without "hook_": "mlp_out", "attn.z"."""
    return component.replace("hook_", "")


def in_order(components: Iterable[str]) -> list[str]:
    """Components in the order in which a block computes them, each once."""
    return sorted(set(components), key=_COMPONENT_ORDER.index)


def towers_in_order(towers: Iterable[str]) -> list[str]:
    """Towers in the order of the forward pass, each once."""
    return sorted(set(towers), key=TOWERS.index)
