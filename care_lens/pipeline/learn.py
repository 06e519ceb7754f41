"""Step 2: activations of the fit split, and what is learned from them: readers, writers, and the paper's printed form."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from care_lens.capture import capture
from care_lens.core import Example, Site
from care_lens.data.study import Modality, Study
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline.settings import RunSettings
from care_lens.repair import (
    Correction,
    EnergyReader,
    HybridFusion,
    LinearReader,
    SiteReader,
    Writer,
    shuffled_labels,
)
from care_lens.subspace import SafetySubspace

MODALITIES: tuple[Modality, ...] = get_args(Modality)
#: The span whose mean stands for a modality in the paper's form.
SPAN: Mapping[Modality, str] = {"visual": "image:attributed", "textual": "text:attributed"}


@dataclass(frozen=True)
class TokenRows:
    """Activations of single tokens: the last prompt token, then the tokens of the answer.

    Attributes:
        rows: by site [n, 1 + tokens, d]; index 0 is the last prompt token, k the k-th token of the answer.
        valid: [n, 1 + tokens] which of them exist; the token that ends an answer is left out, since generation
            never reads it.
        groups: the item of each row.
    """

    rows: Mapping[Site, Float[Tensor, "n tokens d"]]
    valid: Bool[Tensor, "n tokens"]
    groups: tuple[str, ...]

    def at(self, site: Site, offset: int) -> Float[Tensor, "m d"]:
        """Rows at one offset, where the answer is that long."""
        return self.rows[site][:, offset][self.valid[:, offset]]

    def everything(self, site: Site) -> Float[Tensor, "m d"]:
        """Rows at all tokens."""
        return self.rows[site][self.valid]


def token_rows(
    lvlm: HookedLVLM, examples: Sequence[Example], sites: Sequence[Site], *, tokens: int, batch_size: int
) -> TokenRows:
    """Activations at the last prompt token and the first tokens of the teacher-forced answers; one forward a batch.

    Memory: n x (1 + tokens) x d float32 a site, on the CPU.

    Args:
        lvlm: the model.
        examples: with responses.
        sites: residual sites of the language tower.
        tokens: how many answer tokens to keep.
        batch_size: examples a forward pass.
    """
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    valid: list[Tensor] = []
    for start in range(0, len(examples), batch_size):
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


@dataclass(frozen=True)
class FitRows:
    """Token activations of the fit split.

    Attributes:
        benign: of harmless requests and their right answers, hard ones included.
        malicious: of the seen attack channels with compliant answers, by modality.
        refused: of plain requests that the model refuses: the refusal mean is that of their last prompt token.
    """

    benign: TokenRows
    malicious: Mapping[Modality, TokenRows]
    refused: TokenRows

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Those that have malicious rows."""
        return tuple(m for m in MODALITIES if m in self.malicious)

    def harmless(self, site: Site, offset: int) -> Float[Tensor, "m d"]:
        """What a reader at an offset must not react to: last prompt tokens of benign requests (offset 0); for generated
        tokens every token of benign answers and of refusals, so that a refusal under way is left alone."""
        if offset == 0:
            return self.benign.at(site, 0)
        refusals = self.refused.rows[site][:, 1:][self.refused.valid[:, 1:]]
        return torch.cat([self.benign.everything(site), refusals])

    def complied(self, site: Site, offset: int) -> Float[Tensor, "m d"]:
        """Malicious rows of all modalities at an offset."""
        return torch.cat([self.malicious[m].at(site, offset) for m in self.modalities])


def residual_sites(lvlm: HookedLVLM) -> list[Site]:
    """The residual stream after every block of the language tower."""
    return [Site("language", layer, "hook_resid_post") for layer in range(lvlm.n_layers())]


def capture_fit(lvlm: HookedLVLM, study: Study, settings: RunSettings) -> FitRows:
    """Token activations of the fit split.

    Args:
        lvlm: the model.
        study: its example sets.
        settings: of the run.
    """

    def rows(examples: Sequence[Example]) -> TokenRows:
        return token_rows(
            lvlm, examples, residual_sites(lvlm), tokens=settings.answer_tokens, batch_size=settings.batch_size
        )

    malicious: dict[Modality, list[Example]] = {m: study.malicious("fit", m) for m in MODALITIES}
    return FitRows(
        benign=rows(study.benign("fit")),
        malicious={m: rows(malicious[m]) for m in MODALITIES if malicious[m]},
        refused=rows([replace(e, response=study.refusal) for e in study.refused("fit")]),
    )


def fit_reader_subspace(
    rows: FitRows, site: Site, modality: Modality, *, offset: int, rank: int, shuffle_seed: int | None = None
) -> SafetySubspace:
    """The subspace that a reader reads: rank 0 is the discriminant direction, else the top generalised eigenvectors.

    At the last prompt token (offset 0) it is fitted on last prompt tokens; for the answer, on the malicious token at the
    offset against every token of benign prompts' ends and answers, since the reader will look at all of them.

    Args:
        rows: activations of the fit split.
        site, modality: which of them.
        offset: 0, or which token of the answer.
        rank: 0 or the number of eigenvectors.
        shuffle_seed: deal the rows to the classes at random first: the control fit.
    """
    benign = rows.harmless(site, offset)
    malicious = rows.malicious[modality].at(site, offset)
    if shuffle_seed is not None:
        benign, malicious = shuffled_labels(benign, malicious, seed=shuffle_seed)
    token = "last prompt token" if offset == 0 else f"answer token {offset}"
    return SafetySubspace.fit(
        benign,
        malicious,
        rank=max(rank, 1),
        contrast="second_moment" if rank else "mean",
        projection="oblique",
        site=site,
        modality=modality,
        provenance={"rows": token, "split": "fit", "shuffled": shuffle_seed is not None},
    )


def reader_of(subspace: SafetySubspace, *, offset: int, rank: int) -> SiteReader:
    """The reader of such a subspace: of the last prompt token, or of every generated token."""
    kind = EnergyReader if rank else LinearReader
    return kind.from_subspace(subspace, positions="generated" if offset else "last")


def refusal_writer(rows: FitRows, site: Site, *, offset: int, alpha: float) -> Writer:
    """Moves a token to where the model stands before a refusal, along the line from where it stands when it complies.

    Args:
        rows: of the fit split; the complied mean is that of all seen attack channels, so that one writer serves both
            modalities and the fusion has to say only how they share it.
        site: where to write.
        offset: 0: written at the last prompt token; else at a generated one, from the malicious mean at that offset.
        alpha: strength.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a strength beyond 1 is tried on validation, and reported
        return Writer.towards(
            site,
            target=rows.refused.at(site, 0).mean(0),
            source=rows.complied(site, offset).mean(0),
            alpha=alpha,
            scope="generated" if offset else "last",
        )


def printed_subspaces(
    lvlm: HookedLVLM,
    study: Study,
    layers: Sequence[int],
    settings: RunSettings,
    *,
    checkpoint: Path | None = None,
) -> dict[tuple[Modality, int], SafetySubspace]:
    """Subspaces of CARE as printed: covariance contrast at MLP outputs, orthogonal projection.

    Visual rows: harmless requests with their answers against visual attacks with compliant answers, image tokens chosen by
    the paper's attribution. Textual rows: the same harmful requests with a refusal against a compliance.

    Args:
        lvlm: the model.
        study: its fit split is used.
        layers: of the language tower.
        settings: of the run.
        checkpoint: a folder in which captured batches are kept.

    Returns:
        By modality and layer.
    """
    sites = [Site("language", layer, "hook_mlp_out") for layer in layers]
    textual, visual = study.malicious("fit", "textual"), study.malicious("fit", "visual")
    classes: dict[Modality, tuple[list[Example], list[Example]]] = {
        "visual": ([e for e in study.benign("fit") if e.image is not None][: 4 * len(visual)], visual),
        "textual": ([replace(e, response=study.refusal) for e in textual], textual),
    }
    made: dict[tuple[Modality, int], SafetySubspace] = {}
    for modality in MODALITIES:
        benign, malicious = classes[modality]
        if not benign or not malicious:
            continue
        span = SPAN[modality]
        held = [
            capture(
                lvlm,
                rows,
                sites,
                select=(span,),
                responses=True,
                batch_size=settings.batch_size,
                progress=False,
                checkpoint=None if checkpoint is None else checkpoint / f"{modality}.{label}",
            )
            for label, rows in (("benign", benign), ("malicious", malicious))
        ]
        for site in sites:
            assert site.layer is not None
            made[modality, site.layer] = SafetySubspace.fit(
                held[0].rows(site, span),
                held[1].rows(site, span),
                rank=settings.printed_rank,
                contrast="covariance",
                projection="orthogonal",
                site=site,
                modality=modality,
                provenance={"rows": span, "split": "fit", "form": "printed"},
            )
    return made


def printed_form(
    subspaces: Mapping[tuple[Modality, int], SafetySubspace], layers: Sequence[int], *, alpha: float
) -> HybridFusion:
    """CARE as printed: benign mean, adaptive fusion, no gate.

    Args:
        subspaces: from `printed_subspaces`.
        layers: where to correct.
        alpha: strength; 1 projects, published runs use 4 to 4.5.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # published strengths go past the target
        sides = {
            m: tuple(Correction.care(subspaces[m, layer], alpha=alpha) for layer in layers if (m, layer) in subspaces)
            for m in MODALITIES
        }
    about = {"layers": list(layers), "alpha": alpha}
    return HybridFusion(visual=sides["visual"], textual=sides["textual"], name="CARE as printed", provenance=about)
