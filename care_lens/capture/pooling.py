"""One forward pass a batch, pooled at every site as it runs: what capture and the streaming of moments share."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from care_lens.capture.activations import Activations, Key
from care_lens.capture.attribution import TokenAttribution
from care_lens.capture.gradients import token_gradients
from care_lens.core import (
    BaseOutcome,
    Example,
    Outcome,
    Site,
    SiteLike,
    content_digest,
    examples_digest,
    package_versions,
)
from care_lens.core.details import describe_outcome
from care_lens.core.identity import model_fingerprint
from care_lens.core.outcome import logits_outcome
from care_lens.core.spans import SPAN_NAMES
from care_lens.lvlm import HookedLVLM, LVLMInputs

ATTRIBUTED = ("image:attributed", "text:attributed")
SELECTIONS: tuple[str, ...] = (*SPAN_NAMES, *ATTRIBUTED)
"""What ``positions`` may name."""

_VISUAL = ("image", "all")
_Pooled = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class PooledRun:
    """A model, examples, and what is pooled of them, checked before anything runs.

    Attributes:
        lvlm: The model; a repair that is on it acts.
        examples: The examples.
        taken: The selections at each site.
        attribution: Of the attributed selections.
        outcome: What its method "gradient" differentiates.
        responses: Whether responses are appended.
        batch_size: Examples a forward pass.
    """

    lvlm: HookedLVLM
    examples: tuple[Example, ...]
    taken: Mapping[Site, tuple[str, ...]]
    attribution: TokenAttribution
    outcome: Outcome | BaseOutcome | None
    responses: bool
    batch_size: int

    @classmethod
    def of(
        cls,
        lvlm: HookedLVLM,
        examples: Sequence[Example],
        sites: Sequence[SiteLike],
        *,
        positions: Sequence[str],
        attribution: TokenAttribution | None,
        outcome: Outcome | BaseOutcome | None,
        responses: bool,
        batch_size: int,
    ) -> "PooledRun":
        """Check the arguments of :func:`~care_lens.capture.capture`, which says what they are.

        Raises:
            ValueError: As there.
        """
        if not examples:
            raise ValueError("examples must hold at least one example, got none")
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        how = attribution or TokenAttribution()
        taken = {site: _selections_at(lvlm, site, positions) for site in dict.fromkeys(map(Site.parse, sites))}
        if not taken:
            raise ValueError("sites must hold at least one site, got none")
        seeing = [str(site) for site in taken if site.tower != "language"]
        if seeing and not any(example.images for example in examples):
            raise ValueError(
                f"examples must include one with an image to have activations at {seeing[0]}, got text alone"
            )
        if outcome is not None and how.method != "gradient":
            raise ValueError(
                f"outcome is differentiated by attribution of method 'gradient' alone, got method {how.method!r}; pass "
                "attribution=TokenAttribution(method='gradient')"
            )
        if how.method == "gradient" and outcome is None and any(name in ATTRIBUTED for name in positions):
            raise ValueError(
                "outcome must be given for attribution of method 'gradient', got None; it is differentiated"
            )
        if outcome is not None:
            logits_outcome(outcome)
        return cls(lvlm, tuple(examples), taken, how, outcome, responses, batch_size)

    @property
    def keys(self) -> tuple[Key, ...]:
        """Every site and selection."""
        return tuple((site, name) for site, names in self.taken.items() for name in names)

    def batches(self) -> list[range]:
        """Indices of the examples of each batch."""
        n, size = len(self.examples), self.batch_size
        return [range(start, min(start + size, n)) for start in range(0, n, size)]

    def activations(self, batch: range) -> Activations:
        """The pooled activations of one batch."""
        examples = [self.examples[i] for i in batch]
        inputs = self.lvlm.prepare(examples, responses=self.responses)
        slopes = self._slopes(inputs, examples)
        pooled: dict[Key, _Pooled] = {}
        seen = [site for site in self.taken if site.tower == "language" or inputs.pixel_values is not None]
        hooks = [(site, self._reader(inputs, site, slopes.get(site), pooled)) for site in seen]
        with torch.no_grad():
            self.lvlm.run_with_hooks(inputs, fwd_hooks=hooks, logits_to_keep=1)
        held = {key: pooled[key] if key in pooled else self._nothing(key, len(batch)) for key in self.keys}
        return Activations(
            values={key: rows for key, (rows, _) in held.items()},
            present={key: present for key, (_, present) in held.items()},
            ids=tuple(example.id for example in examples),
            groups=tuple(example.group or example.id or str(i) for i, example in zip(batch, examples, strict=True)),
            provenance=self.provenance(),
        )

    def provenance(self) -> dict[str, Any]:
        """What made the activations, JSON-able."""
        return {
            "model": type(self.lvlm.hf_model).__name__,
            "responses": self.responses,
            "attribution": asdict(self.attribution),
            "outcome": None if self.outcome is None else describe_outcome(self.outcome),
            "n": len(self.examples),
            "versions": package_versions(),
        }

    def settings(self) -> dict[str, Any]:
        """What a checkpoint must agree with, JSON-able."""
        return {
            "keys": [[str(site), name] for site, name in self.keys],
            "examples": examples_digest(self.examples),
            "weights": model_fingerprint(self.lvlm.hf_model),
            "acting": self.lvlm.acting(),
            "outcome_digest": content_digest(self.outcome),
            "batch_size": self.batch_size,
            **{name: value for name, value in self.provenance().items() if name != "versions"},
        }

    def _slopes(self, inputs: LVLMInputs, examples: Sequence[Example]) -> dict[Site, Tensor]:
        """Gradients at the sites whose tokens are chosen by them; nothing where none are."""
        wanted = [site for site, names in self.taken.items() if any(name in ATTRIBUTED for name in names)]
        if not wanted or self.attribution.method != "gradient" or self.outcome is None:
            return {}
        own = logits_outcome(self.outcome).with_examples(examples)
        return token_gradients(self.lvlm, inputs, wanted, own)[1]

    def _reader(
        self, inputs: LVLMInputs, site: Site, gradient: Tensor | None, pooled: dict[Key, _Pooled]
    ) -> Callable[..., None]:
        """A hook that pools the activation for each selection and keeps nothing else."""
        names = self.taken[site]

        def read(activation: Tensor, hook: object) -> None:
            kept = None
            if any(name in ATTRIBUTED for name in names):
                kept = self._attributed(activation, inputs, names, gradient)
            for name in names:
                if site.tower == "language":
                    mask = inputs.spans.mask(name.removesuffix(":attributed"))
                    if name in ATTRIBUTED and kept is not None:
                        mask = mask.to(kept.device) & kept
                    pooled[site, name] = pool(activation, mask)
                else:
                    mask = self.lvlm.patch_mask(site, activation, class_tokens=name == "all")
                    pooled[site, name] = pool_images(activation, mask, inputs)

        return read

    def _attributed(
        self, activation: Tensor, inputs: LVLMInputs, names: Sequence[str], gradient: Tensor | None
    ) -> Tensor:
        """[batch, pos] the tokens that attribution keeps, scored for the whole batch at once."""
        spans = inputs.spans
        # Image tokens are scored against the text, so that its mask is needed for either kind.
        image = spans.image if "image:attributed" in names else torch.zeros_like(spans.image)
        return self.attribution.keep(activation, image=image, text=spans.text, gradient=gradient)

    def _nothing(self, key: Key, n: int) -> _Pooled:
        """The rows of a batch at a site that did not run, for want of an image."""
        return torch.full((n, self.lvlm.width(key[0])), torch.nan), torch.zeros(n, dtype=torch.bool)


def pool(
    activation: Float[Tensor, "batch pos d"], mask: Bool[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch d"], Bool[Tensor, " batch"]]:
    """The mean of each row's activation over a mask.

    Args:
        activation: [batch, pos, d].
        mask: [batch, pos].

    Returns:
        [batch, d] float32 on the CPU, NaN where the mask is empty; [batch] where it is not.
    """
    mask = mask.to(activation.device)
    counts = mask.sum(dim=1)
    sums = activation.detach().float().masked_fill(~mask[..., None], 0.0).sum(dim=1)
    return (sums / counts[:, None]).cpu(), (counts > 0).cpu()


def pool_images(
    activation: Float[Tensor, "image patch d"], mask: Bool[Tensor, "image patch"], inputs: LVLMInputs
) -> tuple[Float[Tensor, "batch d"], Bool[Tensor, " batch"]]:
    """The mean over the patches of each row's images (or tiles), each patch counting once.

    Args:
        activation: [image, patch, d].
        mask: [image, patch] what to pool over.
        inputs: The batch.

    Returns:
        [batch, d] float32 on the CPU, NaN where a row has no image; [batch] where it has.
    """
    owner = torch.tensor(inputs.image_rows, device=activation.device)
    sums = activation.detach().float().masked_fill(~mask[..., None], 0.0).sum(dim=1)
    total = torch.zeros(inputs.batch_size, sums.shape[1], device=activation.device).index_add_(0, owner, sums)
    counts = torch.zeros(inputs.batch_size, device=activation.device).index_add_(0, owner, mask.sum(dim=1).float())
    return (total / counts[:, None]).cpu(), (counts > 0).cpu()


def _selections_at(lvlm: HookedLVLM, site: Site, positions: Sequence[str]) -> tuple[str, ...]:
    axes = lvlm.site_info(site).axes
    if len(axes) != 3:
        raise ValueError(f"sites must have activations of three axes to be pooled, got {site} with {axes}")
    if unknown := [name for name in positions if name not in SELECTIONS]:
        raise ValueError(f"positions must name some of {SELECTIONS}, got {unknown}")
    names = tuple(name for name in dict.fromkeys(positions) if site.tower == "language" or name in _VISUAL)
    if not names:
        raise ValueError(f"positions must include one of {_VISUAL} for {site}, got {tuple(positions)}")
    return names
