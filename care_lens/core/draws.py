"""Random draws that belong to an example: the same whatever it is run together with, and in whatever order."""

import torch

from care_lens.core.examples import Example, examples_digest


def example_generator(seed: int, example: Example, *labels: object) -> torch.Generator:
    """A generator on the CPU for the draws of one example.

    Args:
        seed: The run's seed.
        example: Its id, prompt, response and pictures make the generator; batch, order and other examples do not.
        labels: What is drawn for, where an example has several draws: a site, a restart.

    Example:
        >>> one = Example("a", id="x")
        >>> draws = [torch.rand(1, generator=example_generator(0, one)) for _ in range(2)]
        >>> bool(draws[0] == draws[1])
        True
    """
    from transformer_lens.utilities.statistics import derive_generator

    return derive_generator(seed, example.id, examples_digest([example]), *labels)
