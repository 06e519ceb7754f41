"""A small random model with large weights, so that every edit shows."""

import torch

from care_lens import organism
from care_lens.lvlm import HookedLVLM


def make_world_model(*, seed=0, dtype=torch.float32, std=0.15, **sizes):
    """The bundled architecture with random weights: 64 image tokens, the vocabulary of the closed world."""
    model, processor = organism.untrained(seed=seed, **sizes)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return HookedLVLM.from_hf(model.to(dtype), processor)
