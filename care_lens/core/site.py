"""Names of places in a vision-language model.

A :class:`Site` is a tower, a layer and a component. Its string form is the name of the hook point on the
TransformerBridge: the language tower keeps TransformerLens's names (``blocks.3.hook_mlp_out``), the vision
tower has the same names under ``vision.`` whatever the architecture calls its modules
(``vision.blocks.3.hook_mlp_out``), and the projector has ``projector.hook_in`` and ``projector.hook_out``.
``str(site)`` and :meth:`Site.parse` are inverse.
"""

import re
from dataclasses import dataclass
from functools import total_ordering
from typing import Literal, TypeAlias, get_args

Tower = Literal["vision", "projector", "language"]

TOWERS: tuple[str, ...] = get_args(Tower)
"""The towers, in the order in which a forward pass goes through them."""

BLOCK_COMPONENTS: tuple[str, ...] = (
    "hook_resid_pre",
    "attn.hook_pattern",
    "attn.hook_z",
    "hook_attn_out",
    "hook_resid_mid",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
)
"""Components of a transformer block, in the order in which it computes them."""

_TOWER_COMPONENTS: dict[str, tuple[str, ...]] = {
    "vision": ("hook_embed",),
    "projector": ("hook_in", "hook_out"),
    "language": (),
}
_BLOCK_NAME = re.compile(r"(?P<vision>vision\.)?blocks\.(?P<layer>\d+)\.(?P<component>.+)")


@total_ordering
@dataclass(frozen=True)
class Site:
    """A place in a vision-language model at which activations are read or edited.

    Sites sort in the order of the forward pass: vision tower, projector, language tower; then layer; then
    component.

    Attributes:
        tower: "vision", "projector" or "language".
        layer: Index of the block in its tower, counted from 0; None for what is outside the blocks.
        component: A block's component (one of ``BLOCK_COMPONENTS``), ``hook_embed`` of the vision tower, or
            ``hook_in`` / ``hook_out`` of the projector.

    Raises:
        ValueError: If the three do not name a place.

    Example:
        >>> site = Site("vision", 3, "hook_mlp_out")
        >>> str(site)
        'vision.blocks.3.hook_mlp_out'
        >>> Site.parse("vision.blocks.3.hook_mlp_out") == site
        True
    """

    tower: Tower
    layer: int | None
    component: str

    def __post_init__(self) -> None:
        if self.tower not in TOWERS:
            raise ValueError(f"tower must be one of {TOWERS}, got {self.tower!r}")
        allowed = _TOWER_COMPONENTS[self.tower] if self.layer is None else self._block_components()
        if self.component not in allowed:
            where = "outside the blocks" if self.layer is None else f"at layer {self.layer!r}"
            raise ValueError(
                f"component of the {self.tower} tower {where} must be one of {allowed}, got {self.component!r}"
            )
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"layer must be 0 or more, got {self.layer!r}; count from the first block")

    def _block_components(self) -> tuple[str, ...]:
        return () if self.tower == "projector" else BLOCK_COMPONENTS

    def __str__(self) -> str:
        prefix = "" if self.tower == "language" else f"{self.tower}."
        block = "" if self.layer is None else f"blocks.{self.layer}."
        return f"{prefix}{block}{self.component}"

    def _order(self) -> tuple[int, int, int]:
        if self.layer is None:
            return (TOWERS.index(self.tower), -1, _TOWER_COMPONENTS[self.tower].index(self.component))
        return (TOWERS.index(self.tower), self.layer, BLOCK_COMPONENTS.index(self.component))

    def __lt__(self, other: object) -> bool:
        if not isinstance(other, Site):
            return NotImplemented
        return self._order() < other._order()

    @classmethod
    def parse(cls, site: "SiteLike") -> "Site":
        """Turn a hook name into a site; a site is returned as it is.

        Args:
            site: A site or its string form.

        Returns:
            The site.

        Raises:
            ValueError: If the string names no site.
        """
        if isinstance(site, Site):
            return site
        match = _BLOCK_NAME.fullmatch(site)
        try:
            if match is not None:
                return cls("vision" if match["vision"] else "language", int(match["layer"]), match["component"])
            tower, _, component = site.partition(".")
            if tower in ("vision", "projector"):
                return cls(tower, None, component)
        except ValueError as error:
            raise ValueError(f"site {site!r} is not known: {error}") from None
        # A string where a list is asked for is gone through letter by letter.
        hint = "; give a list of sites, not a string" if len(site) == 1 else ""
        raise ValueError(
            "site must look like 'blocks.3.hook_mlp_out', 'vision.blocks.3.hook_mlp_out', "
            f"'vision.hook_embed' or 'projector.hook_out', got {site!r}{hint}"
        )


SiteLike: TypeAlias = Site | str
"""Wherever a site is asked for, its string form will do."""
