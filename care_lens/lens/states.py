"""What a lens reads: residual streams of the language tower, and of the vision tower through the model's own projector.

A state of the language tower is the residual stream at a position. A state of the vision tower after block l is what the language
model would be given if the tower ended there: every later block's output is replaced by that of block l, and the model's own final
norm, merger, projector and placement in the sequence do the rest. So the states of all towers are vectors [d_model] at positions of
the sequence, whatever the family makes of a picture (a grid, tiles, merged patches).

Features that a model adds to later language blocks (DeepStack) are in the states of those blocks, and not in those of the vision tower.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from care_lens.core import Site, SiteLike
from care_lens.lens.errors import LensError
from care_lens.lvlm import HookedLVLM, LVLMInputs

START = Site("language", 0, "hook_resid_pre")
"""What the language model is given."""

STREAMS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")


class _EnoughError(Exception):
    """Ends a forward pass as soon as what enters the language tower is there."""


def stream_sites(lvlm: HookedLVLM, *, vision: bool = True) -> list[Site]:
    """The residual streams that a lens reads by default: after every vision block, before every language block, and the last one.

    Args:
        lvlm: The model.
        vision: Whether those of the vision tower are among them.
    """
    last = Site("language", lvlm.n_layers() - 1, "hook_resid_post")
    language = [*lvlm.sites(tower="language", component="hook_resid_pre"), last]
    return [*(lvlm.sites(tower="vision", component="hook_resid_post") if vision else ()), *language]


def require_streams(lvlm: HookedLVLM, sites: Sequence[SiteLike] | None, *, vision: bool = True) -> list[Site]:
    """The sites, if a lens can read them.

    Raises:
        LensError: If one is no residual stream.
        ValueError: If the model has no such site.
    """
    if sites is None:
        return stream_sites(lvlm, vision=vision)
    wanted = list(dict.fromkeys(Site.parse(site) for site in sites))
    for site in wanted:
        lvlm.site_info(site)
        readable = ("hook_resid_post",) if site.tower == "vision" else STREAMS
        if site.tower == "projector" or site.component not in readable:
            raise LensError(
                f"sites must be residual streams, 'blocks.3.hook_resid_pre' or 'vision.blocks.1.hook_resid_post', got {site}; what the "
                f"projector gives is {START} at the image's positions"
            )
    if not wanted:
        raise LensError("sites must hold at least one site, got none; leave it out for all residual streams")
    return sorted(wanted)


def states(
    lvlm: HookedLVLM, inputs: LVLMInputs, sites: Sequence[Site]
) -> Iterator[tuple[Site, Float[Tensor, "batch pos d_model"]]]:
    """The states of a batch at some sites, one site at a time.

    Args:
        lvlm: The model; a repair that is on it acts.
        inputs: The batch.
        sites: Residual streams, as :func:`require_streams` gives them.

    Yields:
        Each site with its states. Those of the vision tower mean something at image positions only.
    """
    for site in (site for site in sites if site.tower == "vision"):
        yield site, _as_given(lvlm, inputs, site)
    language = [site for site in sites if site.tower == "language"]
    if language:
        with torch.no_grad():
            cache = lvlm.run_with_cache(inputs, sites=language, logits_to_keep=1)[1]
        for site in language:
            yield site, cache[str(site)]


def _as_given(lvlm: HookedLVLM, inputs: LVLMInputs, site: Site) -> Tensor:
    """What the language model would be given if the vision tower ended after a block."""
    held: list[Tensor] = []
    given: list[Tensor] = []

    def keep(activation: Tensor, hook: Any) -> None:
        held.append(activation.detach().clone())

    def instead(activation: Tensor, hook: Any) -> Tensor:
        return held[0]

    def stop(activation: Tensor, hook: Any) -> None:
        given.append(activation.detach().clone())
        raise _EnoughError

    later = [one for one in lvlm.sites(tower="vision", component="hook_resid_post") if one > site]
    hooks: list[tuple[Site, Callable[..., Any]]] = [(site, keep), *((one, instead) for one in later), (START, stop)]
    with torch.no_grad(), suppress(_EnoughError):
        lvlm.run_with_hooks(inputs, fwd_hooks=hooks, logits_to_keep=1)
    return given[0]


def positions_of(inputs: LVLMInputs, site: Site, span: str) -> Bool[Tensor, "batch pos"]:
    """Where a site has states of a span: those of the vision tower are of image tokens alone."""
    mask = inputs.spans.mask(span)
    return mask & inputs.spans.image if site.tower == "vision" else mask
