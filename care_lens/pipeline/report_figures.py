"""The figures of a report, by file name."""

from typing import Any

import plotly.graph_objects as go

from care_lens import plots
from care_lens.pipeline.run import Run

#: Pictures shown with their patch effects.
PICTURES = 3
#: Places shown of each pair set.
PLACES = 10


def figures(run: Run) -> dict[str, go.Figure]:
    """Every figure of the report, by file name."""
    out = {f"effects_{name}": result.plot() for name, result in run.diagnosis.effects.items()}
    out |= {
        f"places_{name}": plots.plot_localisation(result, shown=PLACES) for name, result in run.diagnosis.places.items()
    }
    out["ablation"] = run.diagnosis.ablation.plot()
    for name, result in run.diagnosis.patches.items():
        for pair in range(PICTURES):
            rows = result.details.query("pair == @pair")
            if len(rows):
                picture = run.study.pairs[name].unsafe[pair].image
                out[f"patches_{name}_{pair}"] = plots.plot_patch_effects(rows, image=picture)
    out["asr"] = run.proof.table.plot()
    out["tradeoff"] = plots.plot_tradeoff(run.proof.table)
    own = own_subspaces(run)
    if own:
        out["subspaces"] = plots.plot_spectra(own)
    if len(own) > 1:
        out["angles"] = plots.plot_principal_angles(own)
    for subspace in run.printed_subspaces:
        if subspace.basis.shape[1] > 1 and f"published_{subspace.modality}" not in out:
            out[f"published_{subspace.modality}"] = subspace.plot()
    return out


def own_subspaces(run: Run) -> dict[str, Any]:
    """The subspaces that the repair reads, by what they are called."""

    def called(s: Any) -> str:
        rows, site = s.provenance.get("rows"), plots.short_site(str(s.site))
        # A reader of several blocks has a subspace after each, learned from the attacks of all modalities.
        return f"{s.modality}, {rows or site}" if s.modality else f"all modalities, {site}"

    return {called(s): s for s in run.choice.subspaces}
