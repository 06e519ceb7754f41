"""What is learned of refusals: the writer that moves a token to one, and the reader that sees one under way."""

import warnings
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from care_lens.core.site import Site
from care_lens.repair.errors import RepairError
from care_lens.repair.reader import LinearReader
from care_lens.repair.rows import FitRows
from care_lens.repair.writer import Writer
from care_lens.subspace import classifier_direction

Answers: TypeAlias = Literal["rearmed", "held"]
"""How a learned repair acts on the answer: see :func:`~care_lens.repair.assemble`."""


def require_answers(answers: Any) -> None:
    """Refuse another way than those of :data:`Answers`."""
    if answers not in get_args(Answers):
        raise RepairError(f"answers must be one of {list(get_args(Answers))}, got {answers!r}")


def refusal_writer(rows: FitRows, site: Site, *, offset: int, alpha: float = 1.0, answers: Answers = "held") -> Writer:
    """Moves a token to where the model stands before a refusal, along the line from where it stands when it complies.

    Args:
        rows: What to learn from; the complied mean is that of all attacks, so that one writer serves both modalities and the
            fusion has to say only how they share it.
        site: Where to write; one of the rows' sites.
        offset: 0: written at the last prompt token; else at a generated one, from the malicious mean at that offset.
        alpha: Strength; beyond 1 it goes past the refusal mean, without a warning here.
        answers: "rearmed": offset 0 is written at the last token that the model is given, of the prompt or of a begun answer; another
            offset along the lines from the malicious means at all answer tokens of the rows, since it may have to write at any of them.

    Raises:
        RepairError: If the rows have no such site or offset, or the two means are the same.
    """
    rows.require(site, offset=offset)
    require_answers(answers)
    rearmed = answers == "rearmed"
    source = _answer_means(rows, site) if rearmed and offset else rows.complied(site, offset).mean(0)
    prompt = "context_end" if rearmed else "last"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a strength beyond 1 is tried on validation, and reported
        return Writer.towards(
            site,
            target=rows.refused.at(site, 0).mean(0),
            source=source,
            alpha=alpha,
            scope="generated" if offset else prompt,
        )


def refusal_reader(rows: FitRows, site: Site) -> LinearReader | None:
    """Tells the tokens of a refusal from all other tokens of answers: above 0 by itself means that a refusal is under way.

    It is a linear classifier of refusal tokens against those of benign answers and of complied attacks. 0 lies halfway between what 99 % of the
    one are above and 99 % of the other below; where these overlap, at the latter, since to write into a refusal costs less than to spare
    an answer that complies.

    Args:
        rows: What to learn from.
        site: One of the rows' sites.

    Returns:
        The reader, for :attr:`Correction.unless <care_lens.repair.Correction>`; None if the rows hold no tokens of refusals or answers.

    Raises:
        RepairError: If the rows have no such site.
    """
    rows.require(site)
    key = ("refusal_reader", site)
    if key not in rows.fitted:
        rows.fitted[key] = _fitted_refusal_reader(rows, site)
    return rows.fitted[key]


def _fitted_refusal_reader(rows: FitRows, site: Site) -> LinearReader | None:
    refusals = rows.refused.answers(site)
    others = torch.cat([held.answers(site) for held in (rows.benign, *rows.malicious.values())])
    if len(refusals) < 2 or len(others) < 2:
        return None
    reader = LinearReader(
        site=site,
        direction=classifier_direction(others, refusals).to(others.dtype),
        centre=others.mean(0),
        positions="generated",
    )
    below, above = (reader.tokens(tokens[None])[0].double() for tokens in (others, refusals))
    most, least = float(below.quantile(0.99)), float(above.quantile(0.01))
    unit = float(above.mean() - below.mean()) / 2
    if not unit > 0:
        return None
    return replace(reader, location=max(most, (most + least) / 2), scale=unit)


def _answer_means(rows: FitRows, site: Site) -> Tensor:
    """[token, d] the malicious mean at every answer token that was captured."""
    held = (rows.complied(site, k) for k in range(1, rows.tokens + 1))
    return torch.stack([tokens.mean(0) for tokens in held if len(tokens)])
