"""What activations of a batch take in memory, reckoned from shapes before anything runs."""

from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING

from care_lens.core.display import memory
from care_lens.core.site import Site

if TYPE_CHECKING:
    from care_lens.lvlm.inputs import LVLMInputs
    from care_lens.lvlm.wrapped import WrappedBridge

LARGE = 2**30
"""Bytes from which on a cache of all sites is announced."""


def language_bytes(lvlm: "WrappedBridge", inputs: "LVLMInputs", sites: Iterable[Site]) -> int:
    """Bytes that copies of the language tower's activations at these sites take; others are left out.

    Args:
        lvlm: The model.
        inputs: The batch.
        sites: The sites.
    """
    dims = lvlm.family.language.dims(lvlm.hf_model.config)
    rows, positions = inputs.input_ids.shape
    sizes = {"batch": rows, "pos": positions, "query": positions, "key": positions, "head": dims.heads}
    total = 0
    for site in (site for site in sites if site.tower == "language"):
        info = lvlm.site_info(site)
        axes = [sizes.get(axis, info.width or 0) for axis in info.axes]
        total += prod(axes) * lvlm.dtype.itemsize
    return total


def told(lvlm: "WrappedBridge", inputs: "LVLMInputs", sites: Iterable[Site]) -> str:
    """The memory in words: exact for the language tower; what pictures add depends on the tower and is not reckoned."""
    rows, positions = inputs.input_ids.shape
    size = memory(language_bytes(lvlm, inputs, sites))
    besides = "" if inputs.pixel_values is None else ", besides those of the vision tower and the projector"
    return f"{size} in the language tower for this batch of {rows} by {positions} tokens{besides}"
