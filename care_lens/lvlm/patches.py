"""Which entries of an activation outside the language tower are patches of the picture, and which padding or class tokens."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from care_lens.core.site import Site
from care_lens.lvlm.families import Family
from care_lens.lvlm.packing import Packing


def patches_in(
    activation: Tensor, site: Site, family: Family, config: Any, packings: Mapping[str, Packing], *, class_tokens: bool
) -> Bool[Tensor, "image patch"]:
    """The mask of patches of an activation.

    Args:
        activation: [image, patch, ...] of the forward pass that ran last.
        site: Its site, in the vision tower or at the projector.
        family: The model's family.
        config: The model's config.
        packings: How that forward pass laid the patches of its images in one row, by name.
        class_tokens: Whether class tokens count too.

    Raises:
        ValueError: If the activation is of another forward pass.
    """
    key = family.outside_packing.get(str(site)) if site.layer is None else family.vision.packing
    mask = torch.ones(activation.shape[:2], dtype=torch.bool, device=activation.device)
    if key is not None:
        packing = packings.get(key)
        if packing is None or packing.mask.shape != activation.shape[:2]:
            raise ValueError(
                f"activation must be of the forward pass under way, got {tuple(activation.shape[:2])} entries where the last "
                f"one had {None if packing is None else tuple(packing.mask.shape)}; ask inside the hook, or run that batch again first"
            )
        mask = packing.mask.to(activation.device, copy=True)
    if site.tower == "vision" and not class_tokens:
        mask[:, : family.class_tokens(config)] = False
        mask[:, mask.shape[1] - family.closing_tokens(config) :] = False
    return mask
