"""Which paths there are: from a sender to a later component of its tower, or to its end."""

from collections.abc import Sequence
from dataclasses import dataclass

from care_lens.core import Site, SiteLike
from care_lens.core.site import Tower
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.mediators import HEADS, Mediator

END = "end"
"""The tower's final residual stream, as a receiver."""

ATTN, MLP = "hook_attn_out", "hook_mlp_out"
WRITERS = (ATTN, MLP)


@dataclass(frozen=True)
class Path:
    """The way from a sender, patched at a position, to a receiver, named by the site of its output, "end", or its head."""

    sender: Mediator
    receiver: str
    position: str

    @property
    def name(self) -> str:
        """As results write it."""
        return f"{self.sender.name} -> {self.receiver}"

    @property
    def needs_image(self) -> bool:
        """Whether it says nothing of pairs without pictures."""
        return not self.sender.in_language or self.position == "image"


def paths_between(
    lvlm: HookedLVLM,
    senders: Sequence[SiteLike | Mediator],
    receivers: Sequence[SiteLike] | None,
    positions: Sequence[str],
) -> list[Path]:
    """The paths from senders to receivers that come after them.

    Args:
        lvlm: The model.
        senders: As :func:`~care_lens.mediation.path_effects` takes them, likewise receivers and positions.
        receivers: Of any tower, and "end"; None: all of each sender's tower.
        positions: Where senders of the language tower are patched.

    Raises:
        ValueError: If a sender or receiver is of another kind or cannot be edited, or there is no path.
    """
    sources = list(dict.fromkeys(Mediator.of(sender) for sender in senders))
    for sender in sources:
        if len(sender.sites) != 1 or sender.sites[0].component not in (*WRITERS, HEADS):
            raise ValueError(
                f"senders must be one site of {(*WRITERS, HEADS)} each, or heads of one, got {sender.name}; take one layer "
                "at a time"
            )
        _require_editable(lvlm, sender.sites[0])
    if receivers is None:
        able = [site for site in lvlm.sites() if site.component in WRITERS and lvlm.site_info(site).editable]
        ends: list[Site | str] = [*able, END]
    else:
        ends = [END if name == END else Site.parse(name) for name in receivers]
    for end in ends:
        if isinstance(end, Site):
            if end.component not in WRITERS:
                raise ValueError(f"receivers must be named by their output, one of {WRITERS}, or {END!r}, got {end}")
            _require_editable(lvlm, end)
    found = [
        Path(sender, str(end), position)
        for sender in sources
        for position in (positions if sender.in_language else ("all",))
        for end in ends
        if end == END
        or (isinstance(end, Site) and end.tower == sender.sites[0].tower and end in writers_after(lvlm, sender))
    ]
    if not found:
        raise ValueError("receivers must come after a sender, in its tower, got none that does")
    return found


def _require_editable(lvlm: HookedLVLM, site: Site) -> None:
    info = lvlm.site_info(site)
    if not info.editable:
        raise ValueError(f"senders and receivers must be editable, got {site}: {info.note}")


def writers_after(lvlm: HookedLVLM, sender: Mediator) -> list[Site]:
    """Attention and MLP outputs that come after what the sender writes; a head writes by its own layer's attention."""
    place = sender.sites[0]
    tower: Tower = place.tower
    own = Site(tower, place.layer, ATTN) if place.component == HEADS else place
    return [site for site in lvlm.sites(tower=tower) if site.component in WRITERS and site > own]
