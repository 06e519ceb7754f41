"""What a report calls things: words for keys of settings, columns of frames, positions and numbers."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from care_lens.pipeline.settings import RunSettings
from care_lens.plots import short_site

NOTHING = "none in the study"
"""Where there is nothing to take a share of, as without held-out channels."""

WORDS: dict[str, str] = {
    "alpha": "strength",
    "alphas": "strengths tried",
    "ablated": "attacks per seen channel that are ablated",
    "acting": "edits already on the model",
    "acts_through": "acts through",
    "answer_tokens": "answer tokens a reader may read",
    "asr": "attack success",
    "batch_size": "batch size",
    "benign_after": "right answers, benign, after",
    "asr_recalibrated": "attack success, gate calibrated anew",
    "benign_before": "right answers, benign, before",
    "benign_loss": "right answers that may be lost (share)",
    "candidates": "settings tried",
    "carrier_score": "score from which a place carries the answer",
    "component": "component",
    "data": "digest of the study",
    "learn_limit": "examples a channel that are learned from, at most",
    "rivals": "rivals",
    "epsilons": "shares of benign prompts a gate may touch, tried",
    "fidelity": "prompts per channel for semantic fidelity",
    "judge": "judge",
    "limit": "examples per channel, at most",
    "max_new_tokens": "tokens of an answer, at most",
    "n_boot": "bootstrap resamples",
    "pairs": "pairs of twins per pair set",
    "pgd_epsilon": "largest change of a pixel (of 255) by PGD",
    "pgd_examples": "requests attacked by PGD",
    "pgd_steps": "steps of PGD",
    "printed_alphas": "strengths of published CARE, tried",
    "printed_layers": "layers of published CARE",
    "printed_rank": "rank of published CARE",
    "random_seeds": "draws of the random writer",
    "reader_classifier": "logistic regressions tried as readers",
    "reader_depths": "blocks that such a reader reads at once, tried",
    "reader_ranks": "ranks of readers, tried",
    "refused": "attacks refused",
    "restarts": "restarts of PGD",
    "seed": "seed",
    "steering": "coefficients of steering, tried",
    "transformer_lens": "TransformerLens",
    "weights": "digest of the weights",
    "worst": "attacks detected, worst channel",
}
POSITIONS = {"image": "image tokens", "text": "text tokens", "last": "last prompt token", "all": "all tokens"}
DEFENCES = {"none": "undefended"}


def words(key: str) -> str:
    """A key in words."""
    return WORDS.get(key, key.replace("_", " "))


def per_cent(share: float, *, unit: str = " %") -> str:
    """A share in per cent, with as many digits as tell 99.5 from 100: one, and none where it is a whole number."""
    if not math.isfinite(share):
        return NOTHING
    text = f"{100 * share:.1f}"
    return text.removesuffix(".0") + unit


def number(value: Any, *, digits: int = 3) -> str:
    """A number to so many significant digits; whole numbers whole; words for what is missing."""
    if value is None or value is pd.NA or (isinstance(value, float) and not math.isfinite(value)):
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def interval(row: Mapping[str, Any], *, value: str = "value", shares: bool = False) -> str:
    """A value with its interval: "9.19 [7.32, 13.1]", or "98.2 [94, 100]" of shares in per cent."""
    if not math.isfinite(float(row[value])):
        return "not measured"
    if shares:
        low, high = (f"{100 * float(row[end]):.0f}" for end in ("ci_low", "ci_high"))
        return f"{per_cent(float(row[value]), unit='')} [{low}, {high}]"
    return f"{number(float(row[value]))} [{number(float(row['ci_low']))}, {number(float(row['ci_high']))}]"


def plain(value: Any) -> str:
    """A value of settings or of a record in words: no braces, no quotes."""
    if isinstance(value, Mapping):
        return "; ".join(f"{words(str(key))} {plain(part)}" for key, part in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(part) for part in value) or "none"
    return "no limit" if value is None else number(value)


def tuned_text(record: Mapping[str, Any]) -> str:
    """What was chosen of a baseline on validation, and what it reached there."""
    chosen = {key: value for key, value in record.items() if key != "validation"}
    reached = record.get("validation", {})
    told = plain(chosen)
    if reached:
        told += (
            f"; on validation, attack success {per_cent(reached['asr'])}, right answers {per_cent(reached['benign_before'])} "
            f"before and {per_cent(reached['benign_after'])} after; {reached['candidates']} settings tried"
        )
        if not reached.get("within", True):
            told += "; NO setting kept right answers as the repair must: it is the one with the largest sum of attacks stopped and right answers"
    return told


def place(row: Mapping[str, Any]) -> str:
    """A site in short, with the tokens: "L6 MLP, last prompt token"."""
    named = row.get("mediator")
    if not isinstance(named, str) or not named:
        named = str(row["component"])
    tokens = (
        "" if str(named).startswith(("vision", "projector")) else f", {POSITIONS.get(row['position'], row['position'])}"
    )
    return short_site(named) + tokens


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    caption: str = "",
    left: int = 1,
    strong: int | None = None,
    prose: int | None = None,
) -> str:
    """A table within a wrapper that scrolls by itself, so that the page never does; on a narrow screen the rows of a wide one are lists.

    Args:
        head: Names of the columns, text.
        rows: Cells, text; the first of each is the row's name.
        caption: Text above it.
        left: So many columns are set to the left.
        strong: A column that is set apart, such as that of the repair.
        prose: A column of sentences, which are broken into lines.
    """

    def named_of(at: int) -> str:
        named = {"l": at < left, "own": at == strong, "w": at == prose}
        classes = " ".join(name for name, holds in named.items() if holds)
        return f' class="{classes}"' if classes else ""

    def cell(text: str, at: int) -> str:
        named = named_of(at)
        if at == 0:
            return f"<th scope='row'{named}>{html.escape(text)}</th>"
        label = f' data-label="{html.escape(head[at])}"' if wide else ""
        return f"<td{named}{label}>{html.escape(text)}</td>"

    def title(text: str, at: int) -> str:
        return f"<th scope='col'{named_of(at)}>{html.escape(text)}</th>"

    wide = len(head) > 3
    kind = "wide" if wide else "plain"
    body = "\n".join("<tr>" + "".join(cell(str(text), i) for i, text in enumerate(row)) + "</tr>" for row in rows)
    told = f"<p class='caption'>{html.escape(caption)}</p>" if caption else ""
    return (
        f"{told}<div class='scroll' tabindex='0'><table class='{kind}'><thead><tr>{''.join(title(h, i) for i, h in enumerate(head))}</tr></thead>"
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def fold(title: str, body: str, *, opened: bool = False) -> str:
    """A part of the page that can be folded."""
    return f"<details{' open' if opened else ''}><summary>{html.escape(title)}</summary>\n{body}\n</details>"


def part_said(settings: RunSettings) -> str:
    """That a run is of a part of its study, in a sentence; nothing where it is of all."""
    learned = settings.limit if settings.learn_limit is None else settings.learn_limit
    said = [
        f"at most {limit} examples per channel {where}"
        for limit, where in ((settings.limit, "in validation and test"), (learned, "to learn and calibrate from"))
        if limit is not None
    ]
    return f"A run on a part of its study, with {' and '.join(said)}: not figures to quote." if said else ""


def part_text(settings: RunSettings) -> str:
    """:func:`part_said` as a paragraph of the report."""
    said = part_said(settings)
    return f"<p><b>{said}</b></p>" if said else ""
