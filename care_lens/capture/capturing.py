"""Capture: run a model over examples once and keep one pooled row an example for each site and selection.

One forward pass a batch gives every site and selection. Activations are pooled inside the hook, in float32,
and moved to the CPU, so that only ``n x d`` numbers a site and selection are ever kept; logits of one
position are computed. Padding is never read.

Selections at sites of the language tower ([batch, pos, d]):

- any span of ``TokenSpans.mask`` ("image", "text", "prompt", "response", "all", "last", ...): the mean over
  its positions;
- "image:attributed", "text:attributed": the mean over the tokens that the paper's attribution keeps, scored
  at that very site (``care_lens.capture.attribution``).

At sites of the vision tower and the projector ([image, patch, d]): "image", the mean over the patches
(without the class token), and "all", the mean over everything. Selections that have no meaning at a site are
not taken there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from care_lens.capture.activations import Activations, Key
from care_lens.capture.attribution import TokenAttribution
from care_lens.capture.gradients import token_gradients
from care_lens.core import Example, Outcome, Site, SiteLike, package_versions
from care_lens.core.spans import SPAN_NAMES
from care_lens.lvlm import HookedLVLM, LVLMInputs

ATTRIBUTED = ("image:attributed", "text:attributed")
SELECTIONS: tuple[str, ...] = (*SPAN_NAMES, *ATTRIBUTED)
"""What ``select`` may name."""

_VISUAL = ("image", "all")
_Pooled = tuple[Tensor, Tensor]


def capture(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    sites: Sequence[SiteLike],
    *,
    select: Sequence[str] = ("image", "text", "last"),
    attribution: TokenAttribution | None = None,
    outcome: Outcome | None = None,
    responses: bool = False,
    batch_size: int = 32,
    progress: bool = True,
) -> Activations:
    """Pooled activations of examples at many sites, from one forward pass a batch.

    Args:
        lvlm: The model; a repair that is on it acts.
        examples: The examples; with and without images can be mixed.
        sites: The sites, of any tower.
        select: What to pool over; see the module's docstring.
        attribution: How the attributed selections score tokens, and how many they keep; None: the paper's way, half of
            each kind.
        outcome: What method "gradient" of the attribution differentiates; costs a forward and a backward pass more a
            batch.
        responses: Whether to append the examples' responses, teacher-forced; "text" then includes them.
        batch_size: Examples a forward pass.
        progress: Whether to show a progress bar.

    Returns:
        The activations. Where an example has no such positions (no image), ``Activations.rows`` says so.

    Raises:
        ValueError: If the model has no such site, a selection is not known or has no meaning at a site, there
            are no examples, a site of the vision tower is asked for and no example has an image, or method "gradient"
            has no outcome.

    Example:
        >>> from care_lens import organism
        >>> from care_lens.lvlm import HookedLVLM
        >>> lvlm = HookedLVLM.from_hf(*organism.untrained(seed=0))
        >>> site = "blocks.1.hook_resid_post"
        >>> held = capture(lvlm, organism.examples("typographic", "fit", n=3), [site], progress=False)
        >>> held.rows(site, "image").shape
        torch.Size([3, 32])
    """
    if not examples:
        raise ValueError("examples must hold at least one example, got none")
    attribution = attribution or TokenAttribution()
    taken = {site: _selections_at(lvlm, site, select) for site in dict.fromkeys(map(Site.parse, sites))}
    held: dict[Key, list[_Pooled]] = {(site, name): [] for site, names in taken.items() for name in names}
    for start in tqdm(range(0, len(examples), batch_size), desc="capturing", disable=not progress):
        inputs = lvlm.prepare(examples[start : start + batch_size], responses=responses)
        pooled: dict[Key, _Pooled] = {}
        slopes = _slopes(lvlm, inputs, taken, attribution, outcome)
        hooks = [
            (site, _reader(lvlm, inputs, site, names, attribution, slopes.get(site), pooled))
            for site, names in taken.items()
        ]
        with torch.no_grad():
            lvlm.run_with_hooks(inputs, fwd_hooks=hooks, logits_to_keep=1)
        for key, parts in held.items():
            parts.append(pooled.get(key, _nothing(inputs.batch_size)))
    return Activations(
        values={key: _joined([rows for rows, _ in parts], key) for key, parts in held.items()},
        present={key: torch.cat([present for _, present in parts]) for key, parts in held.items()},
        ids=tuple(example.id for example in examples),
        groups=tuple(example.group or example.id or str(i) for i, example in enumerate(examples)),
        provenance={
            "model": type(lvlm.hf_model).__name__,
            "responses": responses,
            "attribution": asdict(attribution),
            "n": len(examples),
            "versions": package_versions(),
        },
    )


def _slopes(
    lvlm: HookedLVLM,
    inputs: LVLMInputs,
    taken: Mapping[Site, Sequence[str]],
    attribution: TokenAttribution,
    outcome: Outcome | None,
) -> dict[Site, Tensor]:
    """Gradients at the sites whose tokens are chosen by them; nothing where none are."""
    wanted = [site for site, names in taken.items() if any(name in ATTRIBUTED for name in names)]
    if not wanted or attribution.method != "gradient":
        return {}
    if outcome is None:
        raise ValueError("outcome must be given for attribution of method 'gradient', got None; it is differentiated")
    return token_gradients(lvlm, inputs, wanted, outcome)[1]


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


def _selections_at(lvlm: HookedLVLM, site: Site, select: Sequence[str]) -> tuple[str, ...]:
    axes = lvlm.site_info(site).axes
    if len(axes) != 3:
        raise ValueError(f"sites must have activations of three axes to be pooled, got {site} with {axes}")
    if unknown := [name for name in select if name not in SELECTIONS]:
        raise ValueError(f"select must name some of {SELECTIONS}, got {unknown}")
    names = tuple(name for name in dict.fromkeys(select) if site.tower == "language" or name in _VISUAL)
    if not names:
        raise ValueError(f"select must include one of {_VISUAL} for {site}, got {tuple(select)}")
    return names


def _reader(
    lvlm: HookedLVLM,
    inputs: LVLMInputs,
    site: Site,
    names: Sequence[str],
    attribution: TokenAttribution,
    gradient: Tensor | None,
    pooled: dict[Key, _Pooled],
) -> Callable[..., None]:
    """A hook that pools the activation for each selection and keeps nothing else."""

    def read(activation: Tensor, hook: object) -> None:
        kept = None
        if any(name in ATTRIBUTED for name in names):
            kept = _attributed(activation, inputs, names, attribution, gradient)
        for name in names:
            if site.tower == "language":
                mask = inputs.spans.mask(name.removesuffix(":attributed"))
                if name in ATTRIBUTED and kept is not None:
                    mask = mask.to(kept.device) & kept
                rows, present = pool(activation, mask)
            else:
                mask = lvlm.patch_mask(site, activation, class_tokens=name == "all")
                rows, present = pool_images(activation, mask, inputs)
            pooled[site, name] = rows, present

    return read


def _attributed(
    activation: Tensor,
    inputs: LVLMInputs,
    names: Sequence[str],
    attribution: TokenAttribution,
    gradient: Tensor | None,
) -> Tensor:
    """[batch, pos] the tokens that attribution keeps, of the kinds that are asked for, scored for the whole batch at once."""
    spans, nothing = inputs.spans, torch.zeros_like(inputs.spans.text)
    image = spans.image if "image:attributed" in names else nothing
    # Image tokens are scored against the text, so that its mask is needed for either kind.
    return attribution.keep(activation, image=image, text=spans.text, gradient=gradient)


def _nothing(batch: int) -> _Pooled:
    """The rows of a batch at a site that did not run, for want of an image."""
    return torch.empty(batch, 0), torch.zeros(batch, dtype=torch.bool)


def _joined(parts: list[Tensor], key: Key) -> Tensor:
    width = max(part.shape[1] for part in parts)
    if width == 0:
        raise ValueError(f"examples must include one with an image to have activations at {key[0]}, got text alone")
    missing = [part if part.shape[1] else torch.full((len(part), width), torch.nan) for part in parts]
    return torch.cat(missing)
