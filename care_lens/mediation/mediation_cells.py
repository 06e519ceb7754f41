"""The cells of a mediation sweep: which mediators are patched at which positions.

In the language tower every mediator is patched at every position that is asked for. Outside of it there are "all", for all patches of
the picture together, and regions. Cells about pictures are left out where no pair has one in both twins.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from care_lens.core import SiteLike
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.mediators import Mediator
from care_lens.mediation.pairs import PairBatch, is_index
from care_lens.mediation.regions import Region
from care_lens.mediation.sweep import EACH

log = logging.getLogger(__name__)

Cell = tuple[Mediator, str]
"""A mediator and a position."""


def editable(lvlm: HookedLVLM, sites: Sequence[SiteLike | Mediator]) -> list[Mediator]:
    """The mediators, each once, in the order of the forward pass.

    Raises:
        ValueError: If there are none, or a site cannot be edited or has no positions.
    """
    wanted = list(dict.fromkeys(Mediator.of(site) for site in sites))
    for site in {site for mediator in wanted for site in mediator.sites}:
        info = lvlm.site_info(site)
        if not info.editable or site.component == "attn.hook_pattern":
            raise ValueError(
                f"sites must be editable and have positions, got {site} with axes {info.axes}; {info.note}"
            )
    if not wanted:
        raise ValueError("sites must hold at least one site, got none")
    return sorted(wanted, key=lambda mediator: (mediator.sites, mediator.units or ()))


def each_token(positions: Sequence[str], batches: Sequence[PairBatch]) -> tuple[str, ...]:
    """Positions with every token's index in place of "each".

    Raises:
        ValueError: If an index is beyond the longest row.
    """
    longest = max(batch.length for batch in batches)
    indices = tuple(map(str, range(longest)))
    found = tuple(dict.fromkeys(name for given in positions for name in (indices if given == EACH else (given,))))
    if beyond := [name for name in found if is_index(name) and int(name) >= longest]:
        raise ValueError(f"positions must be below the longest row's {longest} tokens, got {beyond}")
    return found


def regions_of_run(regions: dict[str, Region], times: int) -> dict[str, Region]:
    """Regions for pairs that each stand so many times in a run, one after the other (once for each prefix)."""
    return {
        name: replace(region, members=tuple(one for one in region.members for _ in range(times)))
        for name, region in regions.items()
    }


def cells_of(
    mediators: Sequence[Mediator], positions: Sequence[str], regions: dict[str, Region], has_images: bool
) -> list[Cell]:
    """Every mediator at every position that it can be patched at.

    Args:
        mediators: The mediators.
        positions: Names of spans, indices of tokens and names of regions.
        regions: Regions by name.
        has_images: Whether some pair has a picture in both twins.

    Raises:
        ValueError: If all are about pictures and no pair has one.
    """
    # Outside the language tower only "all" and regions are positions.
    elsewhere = [*(["all"] if not regions or set(positions) - set(regions) else []), *regions]
    cells = [
        (mediator, position)
        for mediator in mediators
        for position in (positions if mediator.in_language else elsewhere)
    ]
    kept = [cell for cell in cells if has_images or not needs_image(cell, regions)]
    if not kept:
        raise ValueError(
            "pairs must have images in both twins for these sites and positions, got no such pair; give a twin without a picture a grey one, "
            "or take positions of the text such as 'last'"
        )
    if len(kept) < len(cells):
        log.warning("no pair has an image in both twins: %d cells about images are left out", len(cells) - len(kept))
    return kept


def needs_image(cell: Cell, regions: Mapping[str, Region]) -> bool:
    """Whether a cell says nothing of pairs without pictures."""
    mediator, position = cell
    return mediator.towers != {"language"} or position == "image" or position in regions
