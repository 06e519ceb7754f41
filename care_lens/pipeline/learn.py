"""Step 2: activations of the fit split, and what is learned from them: readers, writers, and the paper's printed form."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.capture import Activations, capture
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
class FitRows:
    """Activations at the last prompt token of the fit split.

    Attributes:
        benign: of harmless requests, hard ones included.
        malicious: of the seen attack channels, by modality.
        refused: of plain requests that the model refuses: the refusal mean is theirs.
    """

    benign: Activations
    malicious: Mapping[Modality, Activations]
    refused: Activations

    def classes(
        self, site: Site, modality: Modality
    ) -> tuple[Float[Tensor, "n_benign d"], Float[Tensor, "n_malicious d"]]:
        """Benign and malicious rows at a site."""
        return self.benign.rows(site, "last"), self.malicious[modality].rows(site, "last")

    def groups(self, modality: Modality) -> tuple[Sequence[str], Sequence[str]]:
        """The items of those rows."""
        return self.benign.groups, self.malicious[modality].groups

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Those that have malicious rows."""
        return tuple(m for m in MODALITIES if m in self.malicious)


def residual_sites(lvlm: HookedLVLM) -> list[Site]:
    """The residual stream after every block of the language tower."""
    return [Site("language", layer, "hook_resid_post") for layer in range(lvlm.n_layers())]


def capture_fit(lvlm: HookedLVLM, study: Study, settings: RunSettings) -> FitRows:
    """One forward pass over the fit split.

    Args:
        lvlm: the model.
        study: its example sets.
        settings: of the run.
    """

    def rows(examples: Sequence[Example]) -> Activations:
        return capture(
            lvlm,
            examples,
            residual_sites(lvlm),
            select=("last",),
            batch_size=settings.batch_size,
            progress=False,
        )

    malicious = {m: study.malicious("fit", m) for m in MODALITIES}
    return FitRows(
        benign=rows(study.benign("fit")),
        malicious={m: rows(examples) for m, examples in malicious.items() if examples},
        refused=rows(study.refused("fit")),
    )


def fit_reader_subspace(
    rows: FitRows, site: Site, modality: Modality, *, rank: int, shuffle_seed: int | None = None
) -> SafetySubspace:
    """The subspace that a reader reads: rank 0 is the discriminant direction, else the top generalised eigenvectors.

    Args:
        rows: activations of the fit split.
        site, modality: which of them.
        rank: 0 or the number of eigenvectors.
        shuffle_seed: deal the rows to the classes at random first: the control fit.
    """
    benign, malicious = rows.classes(site, modality)
    if shuffle_seed is not None:
        benign, malicious = shuffled_labels(
            benign, malicious, seed=shuffle_seed, groups=rows.groups(modality)
        )
    return SafetySubspace.fit(
        benign,
        malicious,
        rank=max(rank, 1),
        contrast="second_moment" if rank else "mean",
        projection="oblique",
        site=site,
        modality=modality,
        provenance={"rows": "last prompt token", "split": "fit", "shuffled": shuffle_seed is not None},
    )


def reader_of(subspace: SafetySubspace, *, rank: int) -> SiteReader:
    """The reader of such a subspace."""
    return EnergyReader.from_subspace(subspace) if rank else LinearReader.from_subspace(subspace)


def refusal_writer(rows: FitRows, site: Site, *, alpha: float = 1.0) -> Writer:
    """Moves the last prompt token to where refused requests are, along the line from the complied ones.

    The complied mean is that of all seen attack channels together, so that one writer serves both modalities and the
    fusion has to say only how they share it.
    """
    complied = torch.cat([rows.malicious[m].rows(site, "last") for m in rows.modalities])
    return Writer.towards(
        site,
        target=rows.refused.rows(site, "last").mean(0),
        source=complied.mean(0),
        alpha=alpha,
        scope="last",
    )


def printed_form(
    lvlm: HookedLVLM, study: Study, layers: Sequence[int], settings: RunSettings
) -> tuple[HybridFusion, list[SafetySubspace]]:
    """CARE as printed: covariance contrast at MLP outputs, orthogonal projection, benign mean, adaptive fusion, no gate.

    Visual rows: harmless requests with their answers against visual attacks with compliant answers, image tokens chosen by
    the paper's attribution. Textual rows: the same harmful requests with a refusal against a compliance.

    Args:
        lvlm: the model.
        study: its example sets.
        layers: of the language tower.
        settings: of the run.

    Returns:
        The repair and its subspaces.
    """
    sites = [Site("language", layer, "hook_mlp_out") for layer in layers]
    textual = study.malicious("fit", "textual")
    classes: dict[Modality, tuple[list[Example], list[Example]]] = {
        "visual": (
            [e for e in study.benign("fit") if e.image is not None][
                : 4 * len(study.malicious("fit", "visual"))
            ],
            study.malicious("fit", "visual"),
        ),
        "textual": ([replace(e, response=study.refusal) for e in textual], textual),
    }
    corrections: dict[Modality, list[Correction]] = {"visual": [], "textual": []}
    subspaces: list[SafetySubspace] = []
    for modality, (benign, malicious) in classes.items():
        if not benign or not malicious:
            continue
        held = [
            capture(
                lvlm,
                rows,
                sites,
                select=(SPAN[modality],),
                responses=True,
                batch_size=settings.batch_size,
                progress=False,
            )
            for rows in (benign, malicious)
        ]
        for site in sites:
            subspace = SafetySubspace.fit(
                held[0].rows(site, SPAN[modality]),
                held[1].rows(site, SPAN[modality]),
                rank=settings.printed_rank,
                contrast="covariance",
                projection="orthogonal",
                site=site,
                modality=modality,
                provenance={"rows": SPAN[modality], "split": "fit", "form": "printed"},
            )
            subspaces.append(subspace)
            corrections[modality].append(Correction.care(subspace, alpha=settings.printed_alpha))
    fusion = HybridFusion(
        visual=tuple(corrections["visual"]), textual=tuple(corrections["textual"]), name="CARE as printed"
    )
    return fusion, subspaces
