"""The nodes between which edges run: heads and MLPs of both towers, the projector, the end of the language tower."""

from dataclasses import dataclass
from typing import Any

from care_lens.core import Site
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.errors import MediationError
from care_lens.mediation.mediators import HEADS

ATTN, MLP, MID, PRE, POST = "hook_attn_out", "hook_mlp_out", "hook_resid_mid", "hook_resid_pre", "hook_resid_post"
END = "end"
PROJECTOR = Site("projector", None, "hook_out")


@dataclass(frozen=True, order=True)
class Node:
    """A head, an MLP, the projector or the end of the language tower.

    Attributes:
        site: ``attn.hook_z``, ``hook_mlp_out``, the projector's output; of the end the last ``hook_resid_post``.
        head: The head; -1 where it is none.
    """

    site: Site
    head: int = -1

    @property
    def name(self) -> str:
        """As results write it."""
        if self.site.component == POST:
            return END
        return f"{self.site}[{self.head}]" if self.head >= 0 else str(self.site)


def nodes(lvlm: HookedLVLM) -> tuple[list[Node], list[Node]]:
    """Senders and receivers of a model, in the order of the forward pass.

    Raises:
        MediationError: If attention heads cannot be told apart in a tower, or its residual stream between attention and MLP not be read.
    """
    listed = set(lvlm.sites())
    found: list[Node] = []
    for tower in ("vision", "language"):
        dims = (lvlm.family.vision if tower == "vision" else lvlm.family.language).dims(lvlm.hf_model.config)
        for layer in range(lvlm.n_layers(tower)):
            needed = [Site(tower, layer, name) for name in (PRE, HEADS, ATTN, MID, MLP)]
            if lacking := [str(site) for site in needed if site not in listed]:
                raise MediationError(
                    f"edges must have {lacking[0]} in every layer, which this model has not; use path_effects"
                )
            found += [Node(Site(tower, layer, HEADS), head) for head in range(dims.heads)]
            found.append(Node(Site(tower, layer, MLP)))
        if tower == "vision":
            found.append(Node(PROJECTOR))
    end = Node(Site("language", lvlm.n_layers() - 1, POST))
    receivers = [node for node in found if node.site.tower != "projector"]
    return found, [*receivers, end]


def position_of(node: Node) -> tuple[int, int, int]:
    """Where a node stands in the forward pass: heads of a layer together, its MLP after them."""
    tower = {"vision": 0, "projector": 1, "language": 2}[node.site.tower]
    layer = -1 if node.site.layer is None else node.site.layer
    return tower, layer, {HEADS: 0, MLP: 1, POST: 2}.get(node.site.component, 0)


def edge_columns(sender: Node, receiver: Node) -> dict[str, Any]:
    """The place of an edge, for a frame."""
    return {
        "tower": sender.site.tower,
        "layer": sender.site.layer,
        "component": sender.site.component,
        "head": sender.head if sender.head >= 0 else None,
        "sender": sender.name,
        "receiver_tower": receiver.site.tower,
        "receiver_layer": receiver.site.layer,
        "receiver_component": receiver.site.component,
        "receiver_head": receiver.head if receiver.head >= 0 else None,
        "receiver": receiver.name,
    }
