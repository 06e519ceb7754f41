"""One set of generation settings for every step of a run: put on the model's own generation configuration while the run works.

with generating(lvlm, settings.generation):
    ...  # whatever generates from the model goes by them, and stored answers say so
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

from care_lens.evaluation.settings import GenerationSettings
from care_lens.lvlm import HookedLVLM


@contextmanager
def generating(lvlm: HookedLVLM, settings: GenerationSettings) -> Iterator[None]:
    """Let a model generate by some settings for a ``with`` block.

    The length of answers is not among them, since each step says its own.

    Args:
        lvlm: The model; its ``generation_config`` is put back afterwards.
        settings: Those that are None are as the model's own configuration says.
    """
    model = lvlm.hf_model
    before = model.generation_config
    ours = deepcopy(before)
    for name, value in settings.options().items():
        if name != "max_new_tokens":
            setattr(ours, name, value)
    model.generation_config = ours
    try:
        yield
    finally:
        model.generation_config = before
