"""Vectors of the residual stream read through the model's own final norm, unembedding and soft cap.

TransformerLens's ``logit_readout`` does it; what stands here is how a HookedLVLM calls it.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.lvlm import HookedLVLM

CHUNK = 64
"""Vectors whose logits over the whole vocabulary are held at once."""


def full_log_probs(
    lvlm: HookedLVLM, vectors: Float[Tensor, "n d_model"], *, enable_grad: bool = False
) -> Float[Tensor, "n vocab"]:
    """Log probabilities of the whole vocabulary.

    Args:
        lvlm: The model.
        vectors: [n, d_model] states, taken as the last residual stream.
        enable_grad: Whether gradients go through.

    Returns:
        [n, vocab] float32.
    """
    from transformer_lens.tools.analysis import logit_readout

    given = vectors.to(lvlm.device)
    found = logit_readout(
        lvlm.bridge, given, return_type="logits", chunk_size=max(1, len(vectors)), enable_grad=enable_grad
    )
    return torch.log_softmax(found.values.float(), dim=-1)
