"""Which added vectors are a bias of a linear map, so that :func:`care_lens.repair.bake` can fold them.

The residual stream is a sum, ``resid_post = resid_mid + mlp_out``. A vector that is added to it at every token after a block is therefore added
as well by that block's MLP, and one after attention by that block's attention; no map makes all of the stream, so only vectors that are the
same for every activation can be moved so.
"""

from jaxtyping import Float
from torch import Tensor

from care_lens.core.site import Site
from care_lens.repair.linear import LinearPart, linear_part
from care_lens.repair.positions import Positions


def added_vector_part(name: str, site: Site, vector: Float[Tensor, "d"], *, scope: Positions = "all") -> LinearPart:
    """A vector that is added at a site, as a part that can be baked where some linear map adds it too.

    Args:
        name: What it is called in messages.
        site: Where it is added. A residual site stands for what was added to the stream last: the MLP's output for ``hook_resid_post``,
            attention's for ``hook_resid_mid``, the MLP's output of the block before for ``hook_resid_pre``.
        vector: [d] what is added, times its strength.
        scope: At which positions.

    Returns:
        The part; one with a reason where the scope is not everything, there is no block before, or the site is not of the language tower.
    """
    if site.tower != "language":
        reason = (
            f"it is added at {site}, and only linear maps of the language tower are folded; take a site of that tower"
        )
        return LinearPart(name=name, site=site, reason=reason)

    def edit(rows: Tensor) -> Tensor:
        return vector.to(rows).expand_as(rows)

    layer, component = site.layer, site.component
    if layer is None or not component.startswith("hook_resid"):
        return linear_part(name, site, edit, scope=scope)
    if component == "hook_resid_pre" and layer == 0:
        reason = "it is added before the first block, to what embedding and projector make; no one linear map makes all of that"
        return LinearPart(name=name, site=site, reason=reason)
    writer = {
        "hook_resid_pre": Site("language", layer - 1, "hook_mlp_out"),
        "hook_resid_mid": Site("language", layer, "hook_attn_out"),
        "hook_resid_post": Site("language", layer, "hook_mlp_out"),
    }[component]
    return linear_part(name, writer, edit, scope=scope)
