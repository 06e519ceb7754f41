"""Activations kept while a model generates."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from care_lens.core.held import Named
from care_lens.core.site import Site


class Recorder:
    """Keeps what goes on at some sites, step after step.

    Args:
        sites: The sites.

    Raises:
        ValueError: If one of them is an attention pattern, whose axes grow with each token.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        if patterns := [str(site) for site in sites if site.component == "attn.hook_pattern"]:
            raise ValueError(
                f"sites must keep their shape from token to token, got {patterns}; run the prompt with its response through "
                "run_with_cache to have patterns"
            )
        self._steps: dict[Site, list[Tensor]] = {site: [] for site in dict.fromkeys(sites)}

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites."""
        return tuple(self._steps)

    def hooks(self) -> list[tuple[Site, Callable[..., None]]]:
        """Pairs of a site and a hook that reads there."""

        def reader(site: Site):
            def read(activation: Tensor, hook: HookPoint) -> None:
                self._steps[site].append(activation.detach().clone())

            return read

        return [(site, reader(site)) for site in self._steps]

    def activations(self) -> dict[str, Tensor]:
        """What was kept, by name of the site; along the positions in the language tower."""
        made = {
            str(site): torch.cat(steps, dim=1) if site.tower == "language" else steps[0]
            for site, steps in self._steps.items()
            if steps
        }
        return Named(made, what="site that was kept (generate's sites=[...])")
