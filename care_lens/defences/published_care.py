"""Published CARE: what the code that came with the paper does, its faults included, each of them a switch.

Question: what does the method do as it was published, and what does each of its faults cost?

At the MLP output h of each chosen block, at every token that is not padding and at every step:
``D_v = -alpha_v U_v U_v^T (h - beta mu_v)``, D_t likewise, and ``h + w D_v + (1 - w) D_t`` with
``w = ||D_v|| / (||D_v|| + ||D_t||)`` of these edits ("adaptive"). U and mu are fitted on the blocks' OUTPUTS, as the published
code does (:mod:`care_lens.defences.care_fit` has the formulas). Visual rows: harmless pictures with ordinary answers against attacks
by picture with compliant answers. Textual rows: the same harmful requests, answered by refusals and by compliances.

    care = PublishedCARE.fit(lvlm, benign=harmless, malicious=attacks, refusals=["sorry i cannot help"], layers=[1, 2, 3], rank=8)
    sound = PublishedCARE.sound(lvlm, benign=harmless, malicious=attacks, refusals=["sorry i cannot help"], layers=[1, 2, 3], rank=8)

Not the same as the published code: the fit is in float64 and the edit in float32 or better (the code runs in half precision, which
can overflow), and padding is not edited (the code's edits there have no effect on the answer).

Source: Fu et al., CVPR 2026 (arXiv:2603.27240). Cost of the fit: scipy's sqrtm of a d x d matrix for each block and modality, minutes
at d = 3584. Cost of the edit: O(d k) a token and block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.examples import Example
from care_lens.core.progress import Steps
from care_lens.core.site import Site
from care_lens.defences.base import Batch, HookDefence
from care_lens.defences.care_fit import CAREFaults, VisualScore, care_columns, image_row, text_row, text_span
from care_lens.defences.stored import FitError, StoredPart, require_examples
from care_lens.lvlm import HookedLVLM
from care_lens.repair.base import HookPair
from care_lens.repair.linear import LinearPart, linear_part
from care_lens.repair.plan import PlanPart

Side = Literal["visual", "textual"]


@dataclass(frozen=True, eq=False, kw_only=True)
class CARESubspace(StoredPart):
    """The subspace of one modality at one block.

    Attributes:
        columns: [d, k] U.
        mean: [d] the benign mean.
        eigenvalues: [k], largest first.
    """

    columns: Float[Tensor, "d k"]
    mean: Float[Tensor, "d"]
    eigenvalues: Float[Tensor, "k"]

    def edit(self, h: Float[Tensor, "*batch d"], *, beta: float) -> Float[Tensor, "*batch d"]:
        """``-U U^T (h - beta mu)``."""
        columns = self.columns.to(h)
        return -((h - beta * self.mean.to(h)) @ columns) @ columns.T


@dataclass(frozen=True, eq=False, kw_only=True)
class PublishedCARE(HookDefence):
    """CARE as published.

    Attributes:
        visual: Visual subspaces by block.
        textual: Textual ones.
        alpha_visual: Strength of the visual edit; published runs use 4 to 4.5.
        alpha_textual: Of the textual one.
        beta: How much of the benign mean takes the place of what is removed.
        faults: Which faults of the published code it has.
        provenance: Of the fit.
        name: Row of a defence table.
    """

    visual: Mapping[int, CARESubspace]
    textual: Mapping[int, CARESubspace]
    alpha_visual: float = 4.0
    alpha_textual: float = 4.0
    beta: float = 1.0
    faults: CAREFaults = field(default_factory=CAREFaults)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    name: str = "published CARE"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.visual and not self.textual:
            raise ValueError(
                "visual or textual must hold a subspace, got none; fit it on examples of a modality, or take care_lens.repair.NoRepair for "
                "the model as it is"
            )

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks at whose MLP outputs it acts."""
        return tuple(sorted({*self.visual, *self.textual}))

    @property
    def off(self) -> bool:
        """Whether both strengths are 0."""
        return self.alpha_visual == 0 and self.alpha_textual == 0

    @classmethod
    def fit(
        cls,
        lvlm: HookedLVLM,
        *,
        benign: Sequence[Example],
        malicious: Sequence[Example],
        refusals: Sequence[str],
        compliances: Sequence[str] = (),
        requests: Sequence[Example] | None = None,
        layers: Sequence[int],
        rank: int | tuple[int, int] = 64,
        alpha_visual: float = 4.0,
        alpha_textual: float = 4.0,
        beta: float = 1.0,
        visual_score: VisualScore = "cross_hsic",
        faults: CAREFaults | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> "PublishedCARE":
        """Fit the subspaces of both modalities.

        Args:
            lvlm: The model, without a defence on it.
            benign: Harmless requests with ordinary answers; those with a picture are the benign visual samples.
            malicious: Attacks with compliant answers; those with a picture are the malicious visual samples.
            refusals: One refusal, or a list that is cycled over the requests.
            compliances: Likewise; none: each request's own response.
            requests: Harmful requests of the textual samples; None: ``malicious``.
            layers: Blocks of the language tower.
            rank: k of both modalities, or of the visual and the textual one; published runs use 64, 128 or 256.
            alpha_visual: Strength of the visual edit.
            alpha_textual: Strength of the textual edit.
            beta: How much of the benign mean takes the place of what is removed.
            visual_score: How image tokens are scored.
            faults: Which faults of the published code are kept; None: all.
            batch_size: Examples a forward pass.
            progress: Whether to show a progress bar.

        Returns:
            The defence. A modality that has no samples (no pictures) is left out.

        Raises:
            FitError: If there are too few examples of each modality, or one lacks the response that is teacher-forced.

        Warns:
            UserWarning: If the rank goes past what the rows span.
        """
        faults = CAREFaults() if faults is None else faults
        require_examples(malicious=malicious)
        if not layers or not refusals:
            raise FitError(f"layers and refusals must not be empty, got {list(layers)} and {list(refusals)}")
        asked = list(malicious if requests is None else requests)
        component = "hook_resid_post" if faults.foreign_site else "hook_mlp_out"
        sites = [Site("language", layer, component) for layer in dict.fromkeys(layers)]
        samples: dict[Side, tuple[list[Example], list[Example]]] = {
            "visual": ([e for e in benign if e.images], [e for e in malicious if e.images]),
            "textual": (_answered(asked, refusals), _answered(asked, compliances)),
        }
        ranks = dict(zip(samples, (rank, rank) if isinstance(rank, int) else rank, strict=True))
        found: dict[Side, dict[int, CARESubspace]] = {"visual": {}, "textual": {}}
        counts: dict[str, list[int]] = {}
        for side, classes in samples.items():
            if not all(classes):
                continue
            counts[side] = [len(examples) for examples in classes]
            rows = [
                _rows(lvlm, e, sites, side, visual_score, faults.clipped_distances, batch_size, progress)
                for e in classes
            ]
            for site in sites:
                assert site.layer is not None
                columns, values, mean = care_columns(rows[0][site], rows[1][site], rank=ranks[side], faults=faults)
                found[side][site.layer] = CARESubspace(columns=columns, mean=mean, eigenvalues=values)
        if not any(found.values()):
            raise FitError(
                "benign and malicious must both have pictures, or requests must be given; got no samples of either modality"
            )
        provenance = {"visual_score": visual_score, "rank": list(ranks.values()), "n": counts, "fitted_at": component}
        return cls(
            visual=found["visual"],
            textual=found["textual"],
            alpha_visual=alpha_visual,
            alpha_textual=alpha_textual,
            beta=beta,
            faults=faults,
            provenance=provenance,
            name="published CARE"
            if faults == CAREFaults()
            else "CARE, sound"
            if faults == CAREFaults.none()
            else "CARE, mended in part",
        )

    @classmethod
    def sound(cls, lvlm: HookedLVLM, **options: Any) -> "PublishedCARE":
        """The same method without its faults; options as of :meth:`fit`.

        Raises:
            FitError: As :meth:`fit`; also if the rank goes past what the rows span.
        """
        return cls.fit(lvlm, faults=CAREFaults.none(), **options)

    def restricted(
        self,
        *,
        layers: Sequence[int] | None = None,
        rank: int | None = None,
        alpha_visual: float | None = None,
        alpha_textual: float | None = None,
    ) -> "PublishedCARE":
        """The same fit at some of its blocks, with its first directions, or at other strengths: no new fit is needed to tune.

        Args:
            layers: Some of the fitted blocks; None: all.
            rank: Number of directions, at most the fitted one; None: all.
            alpha_visual: Another strength; None: as it is.
            alpha_textual: Another strength; None: as it is.

        Raises:
            ValueError: If a block was not fitted, or the rank is larger than the fitted one.
        """
        if layers is not None and (unknown := sorted(set(layers) - set(self.layers))):
            raise ValueError(f"layers must be of the fitted blocks {self.layers}, got {unknown}; fit those too")

        def part(subspaces: Mapping[int, CARESubspace]) -> dict[int, CARESubspace]:
            kept = {}
            for layer, of in subspaces.items():
                if layers is not None and layer not in layers:
                    continue
                k = of.columns.shape[1] if rank is None else rank
                if not 1 <= k <= of.columns.shape[1]:
                    raise ValueError(
                        f"rank must be from 1 to the fitted {of.columns.shape[1]}, got {rank}; fit more directions"
                    )
                kept[layer] = replace(
                    of, columns=of.columns[:, :k].contiguous(), eigenvalues=of.eigenvalues[:k].contiguous()
                )
            return kept

        return replace(
            self,
            visual=part(self.visual),
            textual=part(self.textual),
            alpha_visual=self.alpha_visual if alpha_visual is None else alpha_visual,
            alpha_textual=self.alpha_textual if alpha_textual is None else alpha_textual,
        )

    def widths(self) -> dict[Site, int]:
        """The MLP outputs at which it acts."""
        return {
            Site("language", layer, "hook_mlp_out"): len(of.mean)
            for side in (self.visual, self.textual)
            for layer, of in side.items()
        }

    def plan_parts(self) -> list[PlanPart]:
        """What it does, for ``explain``."""
        sides: list[tuple[Side, Mapping[int, CARESubspace], float]] = [
            ("visual", self.visual, self.alpha_visual),
            ("textual", self.textual, self.alpha_textual),
        ]
        of_what = "of the edits as applied" if self.faults.actual_weights else "of the edits at alpha 1"
        return [
            PlanPart(
                name=f"{side}[{layer}]",
                site=Site("language", layer, "hook_mlp_out"),
                positions="all",
                writer=f"projects towards {self.beta:g} times the benign mean",
                rank=of.columns.shape[1],
                width=len(of.mean),
                rank_rule="given to fit()",
                alpha=alpha,
                modality=side,
                fusion=f"adaptive, by the norms {of_what}",
                weighting="token",
                multiply_adds=2 * of.columns.numel(),
                note=f"fitted at {self.provenance.get('fitted_at', 'an unknown place')}",
            )
            for side, subspaces, alpha in sides
            for layer, of in subspaces.items()
        ]

    def linear_parts(self) -> list[LinearPart]:
        """The edits of blocks at which one modality acts; of the others each part with the reason why it is not linear."""
        parts: list[LinearPart] = []
        for layer in () if self.off else self.layers:
            site = Site("language", layer, "hook_mlp_out")
            sides = {"visual": self.visual, "textual": self.textual}
            here = [side for side, held in sides.items() if layer in held]
            strengths = {"visual": self.alpha_visual, "textual": self.alpha_textual}
            acting = [side for side in here if strengths[side] != 0]
            if not acting:
                continue
            # Weighed by the edits as applied, one of strength 0 has no weight; by those at alpha 1 it takes weight from the other.
            if len(acting) == 1 and (len(here) == 1 or self.faults.actual_weights):
                parts.append(
                    linear_part(f"{acting[0]}[{layer}]", site, lambda rows, at=layer: self.edit(rows, at), scope="all")
                )
                continue
            reason = (
                "visual and textual edits of this block are weighed by their norms at each token, which is not linear; keep one modality "
                "at each block, or attach the defence"
            )
            parts += [LinearPart(name=f"{side}[{layer}]", site=site, reason=reason) for side in here]
        return parts

    def edits(self, batch: Batch) -> list[HookPair]:
        """A hook a block."""
        pairs = []
        for layer in self.layers:
            pairs.append(batch.edit(Site("language", layer, "hook_mlp_out"), lambda h, at=layer: h + self.edit(h, at)))
        return pairs

    def edit(self, h: Float[Tensor, "*batch d"], layer: int) -> Float[Tensor, "*batch d"]:
        """What is added to an MLP output.

        Args:
            h: [..., d] MLP outputs of the block.
            layer: The block.
        """
        parts = [
            None if layer not in side else side[layer].edit(h, beta=self.beta) for side in (self.visual, self.textual)
        ]
        strengths = (self.alpha_visual, self.alpha_textual)
        seen, said = (None if p is None else alpha * p for p, alpha in zip(parts, strengths, strict=True))
        if seen is None or said is None:
            only = said if seen is None else seen
            return torch.zeros_like(h) if only is None else only
        assert parts[0] is not None and parts[1] is not None
        weighed = (seen, said) if self.faults.actual_weights else (parts[0], parts[1])
        v, t = (part.norm(dim=-1, keepdim=True) for part in weighed)
        w = v / (v + t).clamp(min=torch.finfo(h.dtype).tiny)
        return w * seen + (1 - w) * said


def _answered(examples: Sequence[Example], answers: Sequence[str]) -> list[Example]:
    """The requests with answers that are cycled over them."""
    if not answers:
        return list(examples)
    return [replace(example, response=answers[i % len(answers)]) for i, example in enumerate(examples)]


def _rows(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    sites: Sequence[Site],
    side: Side,
    score: VisualScore,
    clip: bool,
    batch_size: int,
    progress: bool,
) -> dict[Site, Float[Tensor, "n d"]]:
    """One row a sample and site: the mean of the tokens that are kept."""
    if missing := [example.id for example in examples if example.response is None]:
        raise FitError(f"{side} samples must have a response to teacher-force, got none for {missing[:3]}")
    rows: dict[Site, list[Tensor]] = {site: [] for site in sites}
    starts = range(0, len(examples), batch_size)
    for start in Steps(starts, desc=f"published CARE: {side}", disable=not progress):
        inputs = lvlm.prepare(examples[start : start + batch_size], responses=True)
        with torch.no_grad():
            _, cache = lvlm.run_with_cache(inputs, sites=sites, logits_to_keep=1)
        text = text_span(inputs.spans)
        for site in sites:
            tokens = cache[str(site)]
            tokens = tokens.cpu().double() if tokens.device.type == "mps" else tokens.double()
            for row in range(inputs.batch_size):
                words = tokens[row][text[row].to(tokens.device)]
                if not len(words):
                    raise FitError(
                        f"a sample must have text after its picture, got none in example {examples[start + row].id!r}"
                    )
                if side == "textual":
                    made = text_row(words, clip=clip)
                else:
                    made = image_row(
                        tokens[row][inputs.spans.image[row].to(tokens.device)], words, score=score, clip=clip
                    )
                rows[site].append(made.cpu())
    return {site: torch.stack(found) for site, found in rows.items()}
