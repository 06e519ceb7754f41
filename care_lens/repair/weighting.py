"""One weight for each row of a batch and site: the modalities' shares of the edits of its prompt."""

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.repair.fuse import adaptive_share
from care_lens.repair.positions import BatchView


class SampleShare:
    """The visual share of a row, ``||D_v||_F / (||D_v||_F + ||D_t||_F)`` over its prompt, which then holds for its answer.

    The prompt alone decides, so that a teacher-forced answer and a generated one have the same weight. A row whose prompt is not edited (its gate opens
    while it answers) has the weights of its tokens.

    Args:
        view: The batch.
    """

    def __init__(self, view: BatchView) -> None:
        self._view = view
        self._held: Tensor | None = None

    def __call__(
        self, visual: Float[Tensor, "batch pos 1"], textual: Float[Tensor, "batch pos 1"]
    ) -> Float[Tensor, "batch pos 1"]:
        """The share of each token.

        Args:
            visual: Norms of the visual edit at alpha = 1.
            textual: Norms of the textual edit.

        Returns:
            [batch, pos, 1] shares, the same along pos.
        """
        each = adaptive_share(visual, textual)
        if self._view.is_prefill(visual.shape):
            answer = self._view.mask("response", prefill=True).to(visual.device)[..., None]
            v, t = (side.masked_fill(answer, 0.0).norm(dim=1, keepdim=True) for side in (visual, textual))
            self._held = torch.where(v + t > 0, adaptive_share(v, t), torch.nan)
        assert self._held is not None  # a generated token comes after its prompt
        return torch.where(self._held.isnan(), each, self._held.expand_as(each))
