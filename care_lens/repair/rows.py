"""Rows to learn from: activations of the last prompt token and of the first tokens of the answers.

What a picture asks for is often not legible at the end of the prompt and becomes so while the model answers, so a repair is learned
from both places. Answers are teacher-forced: an example's ``response`` is read as if the model had said it.

    rows = fit_rows(lvlm, benign=benign, malicious={"visual": attacks}, refused=refusals)
    rows.benign.at(site, 0)  # [n, d], last prompt tokens
    rows.complied(site, 5)  # [n, d], the fifth answer token of the attacks

A study's fit split gives all three sets: ``study_rows(lvlm, study)``. Cost: one forward pass an example; memory n x (1 + tokens) x d
float32 a site, on the CPU.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from care_lens.core.display import ShortRepr
from care_lens.core.examples import Example
from care_lens.core.identity import examples_digest
from care_lens.core.progress import Steps
from care_lens.core.require import require_examples
from care_lens.core.site import Site
from care_lens.data.study import Study
from care_lens.lvlm import HookedLVLM
from care_lens.repair.errors import RepairError
from care_lens.subspace import Modality

MODALITIES: tuple[Modality, ...] = get_args(Modality)


@dataclass(frozen=True)
class TokenRows(ShortRepr):
    """Activations of single tokens: the last prompt token, then the tokens of the answer.

    Attributes:
        rows: By site [n, 1 + tokens, d]; index 0 is the last prompt token, k the k-th token of the answer.
        valid: [n, 1 + tokens] which of them exist; the token that ends an answer is left out, since generation
            never reads it.
        groups: The item of each row.
    """

    rows: Mapping[Site, Float[Tensor, "n tokens d"]]
    valid: Bool[Tensor, "n tokens"]
    groups: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """How many tokens of an answer were kept."""
        return self.valid.shape[1] - 1

    def at(self, site: Site, offset: int) -> Float[Tensor, "m d"]:
        """Rows at one offset, where the answer is that long.

        Args:
            site: One of those captured.
            offset: 0 for the last prompt token, k for the k-th token of the answer.
        """
        return self.rows[site][:, offset][self.valid[:, offset]]

    def answers(self, site: Site) -> Float[Tensor, "m d"]:
        """Rows at all tokens of the answers.

        Args:
            site: One of those captured.
        """
        return self.rows[site][:, 1:][self.valid[:, 1:]]

    def everything(self, site: Site) -> Float[Tensor, "m d"]:
        """Rows at all tokens.

        Args:
            site: One of those captured.
        """
        return self.rows[site][self.valid]


@dataclass(frozen=True)
class FitRows(ShortRepr):
    """Token activations of the examples that a repair is learned from.

    Attributes:
        benign: Of harmless requests and their right answers, hard ones included.
        malicious: Of attacks with compliant answers, by the modality through which they act.
        refused: Of plain requests that the model refuses: the refusal mean is that of their last prompt token.

    Raises:
        RepairError: If no modality has malicious rows.
    """

    benign: TokenRows
    malicious: Mapping[Modality, TokenRows]
    refused: TokenRows
    fitted: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What has been fitted on these rows and is asked for again, by what it is; :func:`~care_lens.repair.refusal_reader` keeps its readers here, and
    :func:`rows_beside` the rows of calibration prompts."""

    def __post_init__(self) -> None:
        if not self.modalities:
            raise RepairError(
                f"malicious must hold rows of one modality of {MODALITIES} or more, got none; give attacks"
            )

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Those that have malicious rows."""
        return tuple(m for m in MODALITIES if m in self.malicious)

    @property
    def tokens(self) -> int:
        """How many tokens of an answer were kept."""
        return self.benign.tokens

    def require(self, site: Site, *, modality: Modality | None = None, offset: int = 0) -> None:
        """Refuse a part that these rows do not hold.

        Raises:
            RepairError: If there is no such modality, site or offset; the message says what to capture.
        """
        if modality is not None and modality not in self.malicious:
            raise RepairError(f"modality must be one of {list(self.modalities)}, got {modality!r}; give such attacks")
        if site not in self.benign.rows:
            raise RepairError(f"site must be one of the rows', got {site}; capture it: fit_rows(..., sites=[...])")
        if not 0 <= offset <= self.tokens:
            raise RepairError(
                f"offset must be from 0 to {self.tokens}, the answer tokens captured, got {offset}; capture more tokens"
            )

    def harmless(self, site: Site, offset: int) -> Float[Tensor, "m d"]:
        """What a reader at an offset must not react to: last prompt tokens of benign requests (offset 0); for generated
        tokens every token of benign answers and of refusals, so that a refusal under way is left alone.

        Args:
            site: One of those captured.
            offset: 0, or which token of the answer.
        """
        if offset == 0:
            return self.benign.at(site, 0)
        refusals = self.refused.rows[site][:, 1:][self.refused.valid[:, 1:]]
        return torch.cat([self.benign.everything(site), refusals])

    def complied(self, site: Site, offset: int) -> Float[Tensor, "m d"]:
        """Malicious rows of all modalities at an offset.

        Args:
            site: One of those captured.
            offset: 0, or which token of the answer.
        """
        return torch.cat([self.malicious[m].at(site, offset) for m in self.modalities])


def residual_sites(lvlm: HookedLVLM) -> list[Site]:
    """The residual stream after every block of the language tower.

    Args:
        lvlm: The model.
    """
    return [Site("language", layer, "hook_resid_post") for layer in range(lvlm.n_layers())]


def token_rows(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    sites: Sequence[Site],
    *,
    tokens: int = 6,
    batch_size: int = 32,
    progress: bool = True,
    desc: str = "reading rows",
) -> TokenRows:
    """Activations at the last prompt token and the first tokens of the teacher-forced answers; one forward a batch.

    Args:
        lvlm: The model.
        examples: With responses.
        sites: Residual sites of the language tower.
        tokens: How many answer tokens to keep.
        batch_size: Examples per forward pass.
        progress: Whether to show a progress bar.
        desc: What the bar says.

    Raises:
        RepairError: If there is no example, or ``tokens`` is below 0 or ``batch_size`` below 1.
        ExampleError: If an example has no response.
    """
    require_examples(examples)
    if not examples:
        raise RepairError("examples must hold at least one, got none; give requests with their answers")
    if tokens < 0 or batch_size < 1:
        raise RepairError(f"tokens must be 0 or more and batch_size 1 or more, got {tokens} and {batch_size}")
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    valid: list[Tensor] = []
    for start in Steps(range(0, len(examples), batch_size), desc=desc, disable=not progress):
        inputs = lvlm.prepare(examples[start : start + batch_size], responses=True)
        with torch.no_grad():
            _, cache = lvlm.run_with_cache(inputs, sites=sites, logits_to_keep=1)
        length = inputs.input_ids.shape[1]
        index = torch.tensor(inputs.spans.last_index())[:, None] + torch.arange(1 + tokens)
        answered = inputs.spans.response.sum(1).cpu()[:, None]
        valid.append(torch.arange(1 + tokens)[None] < answered.clamp(min=1))
        row = torch.arange(inputs.batch_size)[:, None]
        for site in sites:
            parts[site].append(cache[str(site)].float().cpu()[row, index.clamp(max=length - 1)])
    groups = tuple(example.group or example.id for example in examples)
    return TokenRows({site: torch.cat(part) for site, part in parts.items()}, torch.cat(valid), groups)


def rows_beside(
    rows: "FitRows",
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    *,
    tokens: int = 6,
    batch_size: int = 32,
    progress: bool = True,
) -> TokenRows:
    """:func:`token_rows` after every block, kept with the rows that a repair is learned from: a control that is calibrated on the same prompts reads no second time.

    Args:
        rows: Those that it is kept with.
        lvlm: The model.
        examples: With responses.
        tokens: How many answer tokens to keep.
        batch_size: Examples per forward pass.
        progress: Whether to show a progress bar.
    """
    key = ("token rows", weakref.ref(lvlm), tuple(lvlm.acting()), examples_digest(examples), tokens, batch_size)
    if key not in rows.fitted:
        rows.fitted[key] = token_rows(
            lvlm, examples, residual_sites(lvlm), tokens=tokens, batch_size=batch_size, progress=progress
        )
    return rows.fitted[key]


def fit_rows(
    lvlm: HookedLVLM,
    *,
    benign: Sequence[Example],
    malicious: Mapping[Modality, Sequence[Example]],
    refused: Sequence[Example],
    sites: Sequence[Site] | None = None,
    tokens: int = 6,
    batch_size: int = 32,
    progress: bool = True,
) -> FitRows:
    """Token activations of three sets of examples, all with responses.

    Args:
        lvlm: The model.
        benign: Harmless requests with right answers; take hard ones too, which look like attacks and are none.
        malicious: Attacks with compliant answers, by the modality through which they act; empty sets are left out.
        refused: Requests that the model refuses, with a refusal as response.
        sites: Where; None: the residual stream after every block of the language tower.
        tokens: How many answer tokens to keep.
        batch_size: Examples per forward pass.
        progress: Whether to show progress bars.

    Raises:
        RepairError: If a set is empty (of ``malicious``: all), or a modality is unknown.
        ExampleError: If an example has no response.
    """
    if unknown := [m for m in malicious if m not in MODALITIES]:
        raise RepairError(f"malicious must be by modalities out of {MODALITIES}, got {unknown}; name them so")
    where = residual_sites(lvlm) if sites is None else list(sites)

    def rows(examples: Sequence[Example], what: str) -> TokenRows:
        desc = f"reading {what} rows"
        return token_rows(lvlm, examples, where, tokens=tokens, batch_size=batch_size, progress=progress, desc=desc)

    return FitRows(
        benign=rows(benign, "benign"),
        malicious={m: rows(malicious[m], m) for m in MODALITIES if malicious.get(m)},
        refused=rows(refused, "refused"),
    )


def study_rows(
    lvlm: HookedLVLM, study: Study, *, tokens: int = 6, batch_size: int = 32, progress: bool = True
) -> FitRows:
    """Token activations of a study's fit split: its benign channels, seen attack channels, and plain requests with its refusal.

    Args:
        lvlm: The model.
        study: Its fit split is read, and no other.
        tokens: How many answer tokens to keep.
        batch_size: Examples per forward pass.
        progress: Whether to show progress bars.

    Raises:
        RepairError: If the split lacks one of these.
        ExampleError: If an example has no response.
    """
    return fit_rows(
        lvlm,
        benign=study.benign("fit"),
        malicious={m: study.malicious("fit", m) for m in MODALITIES},
        refused=[replace(e, response=study.refusal) for e in study.refused("fit")],
        tokens=tokens,
        batch_size=batch_size,
        progress=progress,
    )
