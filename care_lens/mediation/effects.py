"""Causal mediation effects: from four outcomes of a pair to effects, and from pairs to means with intervals.

Let x be the safe input, x* its unsafe twin, M a mediator and Y an outcome in which larger is less safe.

- TE  = Y(x*) - Y(x), the total effect.
- NIE = Y(x with M := M(x*)) - Y(x), the natural indirect effect: is M alone sufficient to carry the unsafe
  behaviour into the safe run?
- NDE = Y(x* with M := M(x)) - Y(x), the natural direct effect: what is left of the unsafe behaviour without
  M.
- TIE = TE - NDE = Y(x*) - Y(x* with M := M(x)), the total indirect effect: is M necessary?
- interaction = TE - NDE - NIE = TIE - NIE, zero in a linear model.
- p-values are of a sign-flip permutation test: were an effect symmetric about 0, every group's effects could as well
  have the other sign.
- proportion = mean NIE / mean TE, a ratio of means with Fieller's interval; missing where TE's interval contains 0,
  its ends also where TE is not clear enough of 0 for a bounded interval.

Source: Pearl 2001; Vig et al. 2020, "Investigating gender bias in language models using causal mediation
analysis".
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from care_lens.core import Interval, cluster_bootstrap, ratio_of_means

EFFECTS: tuple[str, ...] = ("TE", "NIE", "NDE", "TIE", "interaction", "proportion")
"""The effects that :func:`summarise` gives, in its order."""


def effects_of(
    safe: Float[ndarray, "n cells"],
    unsafe: Float[ndarray, "n cells"],
    safe_patched: Float[ndarray, "n cells"],
    unsafe_patched: Float[ndarray, "n cells"],
) -> dict[str, Float[ndarray, "n cells"]]:
    """The effects of each pair and cell.

    Args:
        safe: [n, cells] Y(x), in the outcome's unit.
        unsafe: [n, cells] Y(x*).
        safe_patched: [n, cells] Y(x with M := M(x*)).
        unsafe_patched: [n, cells] Y(x* with M := M(x)).

    Returns:
        TE, NIE, NDE, TIE and interaction, each [n, cells], in the outcome's unit.
    """
    te, nie, nde = unsafe - safe, safe_patched - safe, unsafe_patched - safe
    return {"TE": te, "NIE": nie, "NDE": nde, "TIE": te - nde, "interaction": te - nde - nie}


def summarise(
    effects: Mapping[str, Float[ndarray, "n cells"]],
    groups: Sequence[str],
    *,
    n_boot: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
    binary: bool = False,
) -> dict[str, Interval]:
    """Means over pairs with intervals by group, the same resamples for all effects and cells.

    Args:
        effects: What :func:`effects_of` gives; [n, cells] each.
        groups: n labels; pairs of one label are drawn together.
        n_boot: Number of resamples.
        seed: Seed of the resamples.
        confidence: Coverage aimed at.
        binary: Whether outcomes are 0 or 1 (judged answers), so that effects are differences of rates: no point where
            nothing changed. Of other outcomes an effect that is 0 in every pair is [0, 0]: the patch changes nothing.

    Returns:
        For each of ``EFFECTS``, the estimate and its interval as [cells] arrays; the ends are missing with one group. The proportion is NaN in the
        cells where TE's interval contains 0.
    """
    names = list(effects)
    stacked = np.stack([effects[name] for name in names], axis=1)
    options = {"n_boot": n_boot, "seed": seed, "confidence": confidence}
    # Of outcomes of 0 or 1 an interaction, the difference of two differences, is between -2 and 2.
    span = np.array([[2.0 if binary and name == "interaction" else 1.0] for name in names])
    found = cluster_bootstrap(stacked / span, groups, kind="differences" if binary else "numbers", **options)
    means = Interval(*(part * span for part in found))
    out = {name: Interval(means.estimate[i], means.low[i], means.high[i]) for i, name in enumerate(names)}
    clear = (out["TE"].low > 0) | (out["TE"].high < 0)
    proportion = np.full((3, len(clear)), np.nan)
    if clear.any():
        proportion[:, clear] = ratio_of_means(effects["NIE"][:, clear], effects["TE"][:, clear], groups, **options)
    out["proportion"] = Interval(*proportion)
    return {name: out[name] for name in EFFECTS}


def p_values(
    effects: Mapping[str, Float[ndarray, "n cells"]],
    groups: Sequence[str],
    *,
    n_permutations: int = 1000,
    seed: int = 0,
) -> dict[str, Float[ndarray, " cells"]]:
    """Two-sided p-values of a mean effect of 0, from flips of the groups' signs, the same flips for all cells.

    With at most 12 groups all flips are enumerated and the smallest possible value is 2 / 2^groups.

    Args:
        effects: What :func:`effects_of` gives; [n, cells] each.
        groups: n labels; the effects of one label change sign together.
        n_permutations: Random flips where there are more than 12 groups.
        seed: Seed of the flips.

    Returns:
        For each effect [cells] p-values, not corrected for the number of cells; 1 where an effect is 0 in every pair.
    """
    from transformer_lens.utilities.statistics import derive_generator, sign_flip_permutation_pvalue

    _, members = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    # Sums by group, scaled so that their mean is the mean over pairs whatever the groups' sizes.
    sums = np.zeros((int(members.max()) + 1, len(members)))
    sums[members, np.arange(len(members))] = len(sums) / len(members)
    out: dict[str, ndarray] = {}
    for name, values in effects.items():
        cells = torch.from_numpy((sums @ values).T.copy())
        parts = [
            sign_flip_permutation_pvalue(
                part, n_permutations=n_permutations, generator=derive_generator(seed, "mediation", name)
            )
            for part in cells.split(_CELLS)
        ]
        out[name] = torch.cat(parts).double().numpy()
    return out


_CELLS = 64
"""Cells whose flips are held at once."""
