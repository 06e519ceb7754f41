"""Mediators: what is exchanged between twins at once, a site, some of its heads or neurons, or several sites.

Patched one at a time, components that stand in for one another all look harmless; groups patched together show it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from care_lens.core import Site, SiteLike
from care_lens.core.site import Tower
from care_lens.lvlm import HookedLVLM

HEADS, NEURONS = "attn.hook_z", "mlp.hook_post"
SEVERAL = "several"
_NAMED = 4


@dataclass(frozen=True)
class Mediator:
    """One or several sites, whole or in part, whose activations are exchanged together.

    Attributes:
        sites: The sites, in the order of the forward pass.
        units: Heads of ``attn.hook_z`` or neurons of ``mlp.hook_post``, counted from 0, that are exchanged at every
            one of the sites; None: all of the activation.
        name: What it is called in results; empty: its sites and units.

    Raises:
        ValueError: If there are no sites, or units at sites that have none.
    """

    sites: tuple[Site, ...]
    units: tuple[int, ...] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        sites = tuple(sorted({Site.parse(site) for site in self.sites}))
        if not sites:
            raise ValueError("a mediator must have at least one site, got none")
        if self.units is not None:
            units = tuple(sorted(set(self.units)))
            if not units or units[0] < 0:
                raise ValueError(f"units must be indices of heads or neurons, got {self.units}; None stands for all")
            if others := [str(site) for site in sites if site.component not in (HEADS, NEURONS)]:
                raise ValueError(f"units must be of {HEADS} (heads) or {NEURONS} (neurons), got them at {others}")
            object.__setattr__(self, "units", units)
        object.__setattr__(self, "sites", sites)
        object.__setattr__(self, "name", self.name or self._own_name())

    @classmethod
    def of(cls, place: "SiteLike | Mediator") -> "Mediator":
        """A site as a mediator; a mediator is returned as it is."""
        return place if isinstance(place, Mediator) else cls((Site.parse(place),))

    @property
    def key(self) -> str:
        """What tells it from others, whatever their names: sites and units in full."""
        units = "" if self.units is None else f"[{','.join(map(str, self.units))}]"
        return "+".join(map(str, self.sites)) + units

    @property
    def towers(self) -> frozenset[Tower]:
        """The towers it is in."""
        return frozenset(site.tower for site in self.sites)

    @property
    def in_language(self) -> bool:
        """Whether one of its sites is in the language tower, where it has positions."""
        return "language" in self.towers

    def columns(self) -> dict[str, Any]:
        """Tower, layer, component, head, neuron and name, for a frame; "several" or missing where sites differ."""
        only = self.units[0] if self.units is not None and len(self.units) == 1 else None
        component = _shared(site.component for site in self.sites)
        return {
            "tower": _shared(site.tower for site in self.sites),
            "layer": self.sites[0].layer if len({site.layer for site in self.sites}) == 1 else None,
            "component": component,
            "head": only if component == HEADS else None,
            "neuron": only if component == NEURONS else None,
            "mediator": self.name,
        }

    def _own_name(self) -> str:
        components, layers = {site.component for site in self.sites}, [site.layer for site in self.sites]
        blocks = [layer for layer in layers if layer is not None]
        name = "+".join(map(str, self.sites))
        run = len(blocks) == len(layers) > 1 and blocks == list(range(blocks[0], blocks[-1] + 1))
        if run and len(components) == len(self.towers) == 1:
            name = str(self.sites[0]).replace(f"blocks.{blocks[0]}.", f"blocks.{blocks[0]}-{blocks[-1]}.")
        if self.units is None:
            return name
        some = ",".join(map(str, self.units[:_NAMED])) + (",..." if len(self.units) > _NAMED else "")
        return f"{name}[{some}]"


def heads(lvlm: HookedLVLM, *, tower: Tower = "language", layers: Sequence[int] | None = None) -> list[Mediator]:
    """Every attention head of a tower, one mediator each.

    Args:
        lvlm: The model.
        tower: "language" or "vision".
        layers: Which layers; None: all.

    Raises:
        ValueError: If the tower has no such sites.
    """
    config = lvlm.hf_model.config
    dims = (lvlm.family.vision if tower == "vision" else lvlm.family.language).dims(config)
    chosen = range(lvlm.n_layers(tower)) if layers is None else layers
    sites = [Site(tower, layer, HEADS) for layer in chosen]
    for site in sites:
        lvlm.site_info(site)
    return [Mediator((site,), (head,)) for site in sites for head in range(dims.heads)]


def neurons(site: SiteLike, sets: Iterable[int | Sequence[int]]) -> list[Mediator]:
    """Neurons of an MLP, or sets of them that are exchanged together, one mediator each.

    Args:
        site: A site ``mlp.hook_post``.
        sets: Indices of neurons, or sequences of them.

    Raises:
        ValueError: If the site has no neurons, or a set is empty.
    """
    place = Site.parse(site)
    if place.component != NEURONS:
        raise ValueError(f"site must be a {NEURONS}, got {place}")
    return [Mediator((place,), (some,) if isinstance(some, int) else tuple(some)) for some in sets]


def cumulative(sites: Sequence[SiteLike]) -> list[Mediator]:
    """The lowest of the sites, the lowest two, and so on to all of them: how far up the effect is complete.

    Args:
        sites: The sites, in any order.
    """
    ordered = sorted({Site.parse(site) for site in sites})
    return [Mediator(tuple(ordered[: n + 1])) for n in range(len(ordered))]


def windows(sites: Sequence[SiteLike], size: int, *, step: int = 1) -> list[Mediator]:
    """Runs of neighbouring sites.

    Args:
        sites: The sites, in any order; usually one component of all layers.
        size: Sites of a window.
        step: Sites from the start of one window to the next.

    Raises:
        ValueError: If there are fewer sites than a window has, or an option is below 1.
    """
    ordered = sorted({Site.parse(site) for site in sites})
    if size < 1 or step < 1 or size > len(ordered):
        raise ValueError(
            f"size must be in [1, {len(ordered)}] (the number of sites) and step above 0, got {size}, {step}"
        )
    return [Mediator(tuple(ordered[at : at + size])) for at in range(0, len(ordered) - size + 1, step)]


def _shared(values: Iterable[str]) -> str:
    found = set(values)
    return found.pop() if len(found) == 1 else SEVERAL
