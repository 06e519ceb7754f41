"""GLM-4V."""

from zoo.grids import GLM_POST_NORMS, MERGED_ORDERS, make_glm, specimen

_OUTSIDE = {
    "vision.hook_embed": ("model.visual.embeddings", "out"),
    "projector.hook_in": ("model.visual.merger", "in"),
    "projector.hook_out": ("model.visual.merger", "out"),
}

SPECIMENS = [
    specimen(
        "glm4v", make_glm, "mlp.down_proj", language=GLM_POST_NORMS, outside=_OUTSIDE, orders=MERGED_ORDERS,
    )
]  # fmt: skip
