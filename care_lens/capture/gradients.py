"""Gradients of an outcome in the activations of many sites, from one forward and one backward pass.

Each site gets an added zero that the outcome is differentiated in: the gradient is that of the activation, and what
lies downstream is differentiated through. Weights get no gradient. Memory: the graph of one batch.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.outcome import BaseOutcome, Outcome
from care_lens.core.site import Site, SiteLike
from care_lens.core.verdicts import read_out, require_outcome
from care_lens.lvlm import HookedLVLM, LVLMInputs


def token_gradients(
    lvlm: HookedLVLM, inputs: LVLMInputs, sites: Sequence[SiteLike], outcome: Outcome | BaseOutcome
) -> tuple[dict[Site, Float[Tensor, "batch pos d"]], dict[Site, Float[Tensor, "batch pos d"]]]:
    """Activations and the gradients of an outcome in them.

    Args:
        lvlm: The model; a repair that is on it acts.
        inputs: The batch.
        sites: Sites of the language tower.
        outcome: Of each row; rows do not depend on each other, so that their sum gives each row's gradient.

    Returns:
        By site: the [batch, pos, d] activations, and the gradients of the outcome in them; detached.

    Raises:
        ValueError: If there are no sites, one is not of the language tower or is not there, the outcome does not
            depend on one of them, or torch is in inference mode.

    Example:
        >>> from care_lens import organism
        >>> from care_lens.core import UnsafeMargin
        >>> from care_lens.lvlm import HookedLVLM
        >>> lvlm = HookedLVLM.from_hf(*organism.untrained(seed=0))
        >>> inputs = lvlm.prepare(organism.examples("typographic", "fit", n=2))
        >>> site = "blocks.1.hook_resid_post"
        >>> held, slopes = token_gradients(lvlm, inputs, [site], UnsafeMargin((5,), (6,)))
        >>> [tensor.shape == inputs.input_ids.shape + (32,) for tensor in (*held.values(), *slopes.values())]
        [True, True]
    """
    wanted = [Site.parse(site) for site in dict.fromkeys(sites)]
    if not wanted or any(site.tower != "language" for site in wanted):
        raise ValueError(f"sites must be one or more of the language tower, got {[str(site) for site in wanted]}")
    if torch.is_inference_mode_enabled():
        raise ValueError("gradients cannot be taken in torch.inference_mode(); leave it, or use torch.no_grad()")
    held: dict[Site, Tensor] = {}
    added: dict[Site, Tensor] = {}

    def probe(site: Site) -> Callable[..., Tensor]:
        def hook(activation: Tensor, hook: object) -> Tensor:
            held[site] = activation.detach()
            added[site] = torch.zeros_like(activation, requires_grad=True)
            return activation + added[site]

        return hook

    with torch.enable_grad():
        logits = lvlm.run_with_hooks(inputs, fwd_hooks=[(site, probe(site)) for site in wanted])
        total = require_outcome(read_out(outcome, logits, inputs), inputs.batch_size, outcome=outcome).sum()
        found = torch.autograd.grad(total, [added[site] for site in wanted], allow_unused=True)
    if unused := [str(site) for site, slope in zip(wanted, found, strict=True) if slope is None]:
        raise ValueError(f"the outcome must depend on every site, got none for {unused}; leave them out")
    slopes = {site: slope.detach() for site, slope in zip(wanted, found, strict=True) if slope is not None}
    return {site: held[site].clone() for site in wanted}, slopes
