"""What calls of a model may be given: numbers of logits, sites as one or as a list."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from care_lens.core.site import Site, SiteLike
from care_lens.lvlm.errors import HookError
from care_lens.lvlm.inputs import LVLMInputs


def count_of(logits_to_keep: Any, inputs: LVLMInputs) -> int:
    """The number of positions whose logits are computed, if it is one."""
    n_pos = inputs.input_ids.shape[1]
    if isinstance(logits_to_keep, bool) or not isinstance(logits_to_keep, int) or not 0 <= logits_to_keep <= n_pos:
        raise ValueError(
            f"logits_to_keep must be a whole number from 0 (all positions) to {n_pos}, the batch's positions, got {logits_to_keep!r}"
        )
    return logits_to_keep


class NotGiven(tuple[()]):
    """What stands where no sites were named at all: another object than any empty tuple."""


NOT_GIVEN: Any = NotGiven()


def listed(sites: Any) -> Sequence[SiteLike]:
    """One site as a list of one; a list of sites as it is."""
    if isinstance(sites, (str, Site)):
        return [sites]
    if isinstance(sites, (bytes, Mapping)) or not isinstance(sites, Iterable):
        raise HookError(f"sites must be a site or a list of sites, got {type(sites).__name__}; see lvlm.sites()")
    found = list(sites)
    if wrong := [site for site in found if not isinstance(site, (str, Site))]:
        raise HookError(f"sites must be a list of sites or their names, got {wrong[0]!r} in it; see lvlm.sites()")
    if len(found) > 1 and all(isinstance(site, str) and len(site) == 1 for site in found):
        raise HookError(
            f"sites must be a list of sites, got the characters of {''.join(map(str, found))!r}; put the name in a list"
        )
    return found
