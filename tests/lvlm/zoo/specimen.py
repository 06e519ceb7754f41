"""A tiny random model of a family, and where plain torch hooks find in it what each site names.

Nothing here knows care_lens's own maps: locations and patch orders are written down a second time, by hand.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Specimen:
    """One family under test.

    Attributes:
        name: Of the family.
        make: () -> (model, processor): plain Hugging Face, eager attention, eval mode, the same weights at every call, about
            3 language and 3 vision layers, weights of std 0.1 to 0.25 so that edits show in the logits.
        language_layers: Path of the module list of the language tower on the Hugging Face model.
        vision_layers: The same of the vision tower.
        language: Component to (path inside a layer, "in" or "out"): "out" is the module's output (its first entry if it is a
            tuple), "in" its first argument (positional, or keyword "hidden_states"). "" is the layer itself. All but
            hook_resid_mid and attn.hook_pattern, which the test works out from hook_attn_out, `mid` and the eager function.
        vision: The same of the vision tower; only the components that exist.
        outside: Site to (module path, "in" or "out").
        mid: Path in a language layer of the norm whose input is the stream between attention and MLP; vision_mid: in a vision one.
        language_eager, vision_eager: (module of the model's file, name of its eager attention function); None: no pattern site.
        orders: "vision", "projector.hook_in", "projector.hook_out" to a function from the prepared batch to a list: for each image the
            rows (in the tower's own flat order) of its patches in raster order. Missing: the native tensor is [image or tile, patch, d] already.
        vision_scales: Parameters of a vision layer that multiply attention's and the MLP's output; None: none.
        language_scales: The same of a language layer.
        heads: of the vision tower, to flatten a uniform [..., head, d_head] where the native tensor has them in one piece.
        depth: How many vision layers are sites.
    """

    name: str
    make: Callable[[], tuple[Any, Any]]
    language_layers: str
    vision_layers: str
    language: Mapping[str, tuple[str, str]]
    vision: Mapping[str, tuple[str, str]]
    outside: Mapping[str, tuple[str, str]]
    mid: str
    vision_mid: str
    language_eager: tuple[str, str] | None = None
    vision_eager: tuple[str, str] | None = None
    orders: Mapping[str, Callable[[Any], list[Tensor]]] = field(default_factory=dict)
    vision_scales: tuple[str, str] | None = None
    language_scales: tuple[str, str] | None = None
    depth: int = 3
