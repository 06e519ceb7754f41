"""Where hooks go: the names of the hook points that a site, a name or a filter of names stands for."""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from care_lens.core.site import Site

if TYPE_CHECKING:
    from care_lens.lvlm.wrapped import WrappedBridge

#: Points of TransformerLens through which nothing flows in a bridge.
_UNUSED = (".attn.hook_hidden_states",)


def names_at(lvlm: "WrappedBridge", place: Site | str | Callable[[str], bool]) -> list[str]:
    """Names of the hook points that a place stands for.

    Args:
        lvlm: The model.
        place: A site, any hook name of the bridge, or a filter of names, which sees the sites' names and, of the language tower, the
            bridge's other names.

    Raises:
        ValueError: If the model has no such site or hook point.

    Warns:
        UserWarning: If it is TransformerLens's own name of a point at which an edit may do nothing.
    """
    if isinstance(place, Site):
        return [lvlm.hook_name(place)]
    if not isinstance(place, str):
        known = lvlm.bridge.hook_dict
        names = [str(site) for site in lvlm.sites()]
        names += [name for name in known if not name.startswith(_native(lvlm))]
        points = {id(known[name]): name for name in reversed(names) if place(name)}
        return list(points.values())[::-1]
    try:
        site = Site.parse(place)
    except ValueError as error:
        if place not in lvlm.bridge.hook_dict:
            raise ValueError(f"there is no hook point {place!r}: {error}") from None
        if place.startswith(_native(lvlm)) or place.endswith(_UNUSED):
            warnings.warn(
                f"{place!r} is TransformerLens's own hook point, at which an edit may do nothing; use the sites' names "
                "(lvlm.sites())",
                stacklevel=5,
            )
        return [place]
    return [lvlm.hook_name(site)]


def _native(lvlm: "WrappedBridge") -> tuple[str, ...]:
    """How TransformerLens's own names outside the language tower begin."""
    blocks = lvlm.family.vision.blocks
    return (f"{blocks.partition('.')[0]}.", "vision_projector.")
