"""What is known about a site of a model, such as its axes and its width; and why a site is not there."""

from dataclasses import dataclass
from typing import Any

from care_lens.core.site import BLOCK_COMPONENTS, Site
from care_lens.lvlm.families import Family, TowerMap


@dataclass(frozen=True)
class SiteInfo:
    """A site of a model.

    Attributes:
        site: The site.
        width: Size of the last axis; None for attention patterns, whose last axis is as long as the keys.
        axes: Names of the activation's axes.
        editable: Whether a returned edit acts.
        note: What else to know.
    """

    site: Site
    width: int | None
    axes: tuple[str, ...]
    editable: bool
    note: str = ""


def describe(site: Site, config: Any, family: Family, read_only: str | None) -> SiteInfo:
    """The facts about a listed site.

    Args:
        site: The site.
        config: The model's config.
        family: Its family.
        read_only: Why it cannot be edited, or None.

    Returns:
        The facts.
    """
    notes = [] if read_only is None else [f"read-only: {read_only}"]
    about = str(site) if site.layer is None else f"{site.tower}.{site.component}"
    notes += [family.notes[about]] if about in family.notes else []
    packing = family.outside_packing.get(about) if site.layer is None else _tower(site, family).packing
    if packing is not None:
        notes.append("images with fewer entries than the largest are filled up with zeros at their end")
    if site.tower == "projector":
        width = family.projector_width(config) if site.component == "hook_in" else family.language.dims(config).width
        return SiteInfo(site, width, ("image", "patch", "d_model"), read_only is None, "; ".join(notes))
    dims = _tower(site, family).dims(config)
    batch, pos = ("image", "patch") if site.tower == "vision" else ("batch", "pos")
    if site.tower == "vision" and family.class_tokens(config):
        notes.append("patch 0 is the CLS token")
    if site.tower == "vision" and family.closing_tokens(config):
        notes.append("the last patch is the CLS token")
    axes, width = (batch, pos, "d_model"), dims.width
    if site.component == "attn.hook_pattern":
        axes, width = (batch, "head", "query", "key"), None
    elif site.component == "attn.hook_z":
        axes, width = (batch, pos, "head", "d_head"), dims.d_head
    elif site.component == "mlp.hook_post":
        axes, width = (batch, pos, "d_mlp"), dims.d_mlp
    return SiteInfo(site, width, axes, read_only is None, "; ".join(notes))


def why_missing(site: Site, config: Any, family: Family) -> str:
    """Why a site is not listed on a model, and what to use instead.

    Args:
        site: A site that is not listed.
        config: The model's config.
        family: Its family.

    Returns:
        The explanation, a clause without a subject.
    """
    where = _tower(site, family)
    layers = where.dims(config).layers
    if site.layer is not None and site.layer >= layers:
        return f"the {site.tower} tower has layers 0 to {layers - 1}"
    if site.tower == "vision" and site.layer is not None and site.layer >= (depth := family.vision_depth(config)):
        return (
            f"the language model reads the vision tower at layer {depth - 1}, so nothing above it has an "
            f"effect; use a layer up to {depth - 1}, or projector.hook_in"
        )
    if site.component in where.absent:
        return where.absent[site.component]
    here = [name for name in BLOCK_COMPONENTS if name not in where.absent]
    return f"the {family.name} family has no such point; use one of {here}"


def _tower(site: Site, family: Family) -> TowerMap:
    return family.vision if site.tower == "vision" else family.language
