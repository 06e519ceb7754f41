"""What ``generate`` computes when it is made to give a certain answer."""

import torch
from torch import Tensor


@torch.no_grad()
def forced_logits(model, inputs, answers: list[list[int]]) -> Tensor:
    """Logits of each step of ``generate``, [batch, step, vocab], where each row must answer as given.

    Args:
        model: A plain Hugging Face model.
        inputs: A prepared batch, padded on the left, without responses.
        answers: For each row its token ids, as many in each.
    """
    start = inputs.input_ids.shape[1]
    out = model.generate(
        **inputs.generate_kwargs(),
        max_new_tokens=len(answers[0]),
        do_sample=False,
        prefix_allowed_tokens_fn=lambda row, ids: [answers[row][len(ids) - start]],
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert out.sequences[:, start:].tolist() == answers
    return torch.stack(out.logits, dim=1)
