"""What differences of an outcome can be told from rounding, and which intervals effects have.

Two outcomes of forward passes differ by rounding alone where passes are run in batches of other sizes, replayed from the middle,
or with hooks that put back what was there. The resolution of a difference is taken as

    16 eps max(1, |Y|)    in float32 and float64,    eps max(1, |Y|)    in float16 and bfloat16,

with eps the spacing of the model's numbers at 1 and |Y| the larger of the two outcomes. A difference of no more is reported
as 0: for an outcome of 5 nats that is 1e-5 in float32 and .04 in bfloat16. The raw outcomes stay in ``details``.

That factor is stated, not derived: rounding grows with the width and depth of a model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from care_lens.core import Interval, cluster_bootstrap
from care_lens.core.stats import are_binary
from care_lens.lvlm import HookedLVLM


def spacing(lvlm: HookedLVLM) -> float:
    """The resolution of a difference of outcomes of size 1 or below, of a model of this dtype."""
    dtype = next(lvlm.hf_model.parameters()).dtype
    eps = torch.finfo(dtype).eps
    return eps if dtype in (torch.float16, torch.bfloat16) else 16 * eps


def resolved(
    effects: Float[ndarray, "*cells"], *outcomes: Float[ndarray, "..."], spacing: float
) -> Float[ndarray, "*cells"]:
    """Effects with 0 in place of what cannot be told from rounding.

    Args:
        effects: Differences of outcomes.
        outcomes: The outcomes that they are differences of; broadcast against them.
        spacing: What :func:`spacing` gives.

    Returns:
        A new array; missing values stay missing.
    """
    size = np.ones_like(effects)
    for outcome in outcomes:
        size = np.fmax(size, np.abs(np.broadcast_to(outcome, effects.shape)))
    return np.where(np.abs(effects) <= spacing * size, 0.0, effects)


def mean_effect(
    effects: Float[ndarray, "n *cells"],
    groups: Sequence[Any],
    *outcomes: Float[ndarray, "..."],
    n_boot: int,
    seed: int,
    confidence: float = 0.95,
) -> Interval:
    """Mean effects with intervals; missing where there is nothing to average.

    Args:
        effects: [n, ...] differences of outcomes.
        groups: n labels.
        outcomes: What they are differences of: where all of these are 0 or 1 (judged answers), the effects are differences of
            rates, of which none is a point; of others an effect that is 0 in every pair is.
        n_boot: Resamples.
        seed: Their seed.
        confidence: Coverage aimed at.
    """
    if not len(effects):
        empty = np.full(effects.shape[1:], np.nan)
        return Interval(*(3 * [float("nan")] if effects.ndim == 1 else [empty, empty, empty]))
    kind = "differences" if outcomes and are_binary(*outcomes) else "numbers"
    return cluster_bootstrap(effects, groups, kind=kind, n_boot=n_boot, seed=seed, confidence=confidence)
