"""Ways to rank places: care_lens's own figures, TransformerLens's attribution patching, and a linear probe.

A localiser is any function ``(lvlm, pairs) -> ranking``: the candidates (:func:`candidates`), as sites or their names, the most likely first.
It need not name all of them.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch

from care_lens import organism
from care_lens.capture import capture
from care_lens.core import PairedExamples, SiteLike
from care_lens.lens import separability
from care_lens.lvlm import HookedLVLM
from care_lens.mediation import Localisation, attribute, localise
from care_lens.mediation.localise import WRITERS, candidates

Localiser: TypeAlias = Callable[[HookedLVLM, PairedExamples], Sequence[SiteLike]]
"""From a model and pairs to a ranking of its candidates, the most likely first."""

_localised: "WeakKeyDictionary[HookedLVLM, tuple[PairedExamples, Localisation]]" = WeakKeyDictionary()


def by_localise(lvlm: HookedLVLM, pairs: PairedExamples) -> list[str]:
    """``care_lens.mediation.localise``: the mean of sufficiency and necessity."""
    return _ranking(lvlm, pairs).frame["mediator"].tolist()


def by_nie(lvlm: HookedLVLM, pairs: PairedExamples) -> list[str]:
    """NIE / TE alone: what is sufficient."""
    return _ranking(lvlm, pairs).frame.sort_values("sufficient", ascending=False)["mediator"].tolist()


def by_tie(lvlm: HookedLVLM, pairs: PairedExamples) -> list[str]:
    """TIE / TE alone: what is necessary."""
    return _ranking(lvlm, pairs).frame.sort_values("necessary", ascending=False)["mediator"].tolist()


def by_gradient(lvlm: HookedLVLM, pairs: PairedExamples) -> list[str]:
    """``attribute`` with the gradient at the safe twin."""
    return _attributed(lvlm, pairs, "gradient")


def by_integrated_gradients(lvlm: HookedLVLM, pairs: PairedExamples) -> list[str]:
    """``attribute`` with integrated gradients over both towers."""
    return _attributed(lvlm, pairs, "integrated")


def by_transformer_lens(lvlm: HookedLVLM, pairs: PairedExamples, *, batch_size: int = 16) -> list[str]:
    """TransformerLens's attribution patching, run through ``lvlm.bind``: the language tower alone, which is all it reaches.

    Args:
        lvlm: The model.
        pairs: The pairs.
        batch_size: Pairs of a forward and backward pass.
    """
    from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient

    outcome = organism.outcome()
    names = [str(site) for site in lvlm.sites(tower="language") if site.component in WRITERS]
    totals = dict.fromkeys(names, 0.0)
    for start in range(0, len(pairs), batch_size):
        some = slice(start, start + batch_size)
        safe, unsafe = lvlm.prepare(pairs.safe[some]), lvlm.prepare(pairs.unsafe[some])
        with torch.enable_grad():
            own = cache_activation_and_gradient(
                lvlm.bind(safe),
                safe.input_ids,
                lambda logits, safe=safe: outcome(logits, safe).sum(),
                names_filter=names,
            )
            other = cache_activation_and_gradient(
                lvlm.bind(unsafe), unsafe.input_ids, lambda logits, unsafe=unsafe: outcome(logits, unsafe).sum(), names_filter=names,
                compute_gradient=False,
            )  # fmt: skip
        for name in names:
            gradient = own.gradients[name]
            if gradient is not None:
                totals[name] += float(((other.activations[name] - own.activations[name]) * gradient).sum())
    return sorted(names, key=lambda name: -totals[name])


def by_probe(lvlm: HookedLVLM, pairs: PairedExamples) -> list[str]:
    """A linear probe's AUC, then the silhouette: what separability alone says."""
    sites = candidates(lvlm)
    held = [capture(lvlm, rows, sites, positions=("all",), progress=False) for rows in (pairs.safe, pairs.unsafe)]
    frame = separability(*held, n_boot=10, n_permutations=20).to_dataframe()
    wide = frame.pivot_table(index=["tower", "layer", "component"], columns="metric", values="value", sort=False)
    wide = wide.sort_values([c for c in wide.columns if c in ("probe_auc", "silhouette")][::-1], ascending=False)
    return [("vision." if t == "vision" else "") + f"blocks.{layer}.{c}" for t, layer, c in wide.index]


METHODS: dict[str, Localiser] = {
    "localise": by_localise,
    "NIE alone": by_nie,
    "TIE alone": by_tie,
    "gradient alone": by_gradient,
    "integrated alone": by_integrated_gradients,
    "TransformerLens attribution patching": by_transformer_lens,
    "probe alone": by_probe,
}
"""What every scorecard has beside the methods that are entered."""


def ranking(lvlm: HookedLVLM, pairs: PairedExamples) -> Localisation:
    """What :func:`care_lens.mediation.localise` says, in full; kept for the model, so that several figures of it cost one run.

    Args:
        lvlm: The model.
        pairs: The pairs.

    Raises:
        NothingToLocaliseError: If the pairs' total effect is not above 0.
    """
    return _ranking(lvlm, pairs)


def _ranking(lvlm: HookedLVLM, pairs: PairedExamples) -> Localisation:
    held = _localised.get(lvlm)
    if held is None or held[0] is not pairs:
        held = pairs, localise(lvlm, pairs, outcome=organism.outcome(), progress=False)
        _localised[lvlm] = held
    return held[1]


def _attributed(lvlm: HookedLVLM, pairs: PairedExamples, method: Any) -> list[str]:
    frame = attribute(
        lvlm,
        pairs,
        outcome=organism.outcome(),
        sites=candidates(lvlm),
        patches=(),
        method=method,
        n_boot=2,
        progress=False,
    ).frame.sort_values("value", ascending=False)
    return frame["mediator"].tolist()
