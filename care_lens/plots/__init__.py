"""Figures: one function a result, from its tidy frame to a ``plotly.graph_objects.Figure``.

Figures are returned, never shown. Blue is less safe, in every figure: signed effects are drawn in RdBu with white at 0, blue for positive
(less safe) and red for negative; attacks and malicious rows are blue, benign ones orange. What has no such sign is drawn in Viridis. Curves
differ in symbol and dash, too. What an interval says stands in the figure: as a bar, as a band, or as a dot in the cells whose interval excludes
0 (cell by cell, without a correction for their number) and that are at least 5 % of the largest; axes say of how many.

    figure = result.plot()                                   # interactive; a go.Figure of plotly
    save_figure(figure, "effects.pdf", columns=1)            # 3.3 inches wide, 7.5 point text, and .html and .json beside it
    paper(figure, columns=2, dark=True, names={"L6 MLP": "MLP 6"})  # the same as a figure, to go on with
"""

from care_lens.core.arguments import checked
from care_lens.plots.ablation import plot_ablation
from care_lens.plots.angles import plot_angles_by_layer, plot_principal_angles
from care_lens.plots.attribution import plot_attribution, plot_knockout, plot_paths, plot_verified
from care_lens.plots.compact import plot_asr_column
from care_lens.plots.defence import plot_asr
from care_lens.plots.edges import plot_edge_verification, plot_edges, plot_faithfulness
from care_lens.plots.effects import plot_effects
from care_lens.plots.frontier import plot_frontier
from care_lens.plots.heads import plot_heads, plot_mediation, plot_mediators
from care_lens.plots.lens import plot_lens, plot_picture_reading
from care_lens.plots.localisation import plot_localisation
from care_lens.plots.paper import paper, short_site
from care_lens.plots.patch_layers import plot_patch_layers
from care_lens.plots.patches import plot_patch_effects
from care_lens.plots.planted import plot_scorecard
from care_lens.plots.positions import plot_positions
from care_lens.plots.recording import plot_recording, plot_trace
from care_lens.plots.regions import plot_region, plot_regions, plot_tiles
from care_lens.plots.saving import ExportError, save_figure
from care_lens.plots.scatter import plot_before_after
from care_lens.plots.separability import plot_separability
from care_lens.plots.spectrum import plot_spectra, plot_spectrum
from care_lens.plots.tradeoff import plot_tradeoff
from care_lens.plots.training import plot_training, training_frame
from care_lens.plots.uncertainty import plot_uncertainty
from care_lens.plots.writing import plot_writing

__all__ = [
    "ExportError",
    "paper",
    "plot_ablation",
    "plot_angles_by_layer",
    "plot_asr",
    "plot_asr_column",
    "plot_attribution",
    "plot_before_after",
    "plot_edge_verification",
    "plot_edges",
    "plot_effects",
    "plot_faithfulness",
    "plot_frontier",
    "plot_heads",
    "plot_knockout",
    "plot_lens",
    "plot_localisation",
    "plot_mediation",
    "plot_mediators",
    "plot_patch_effects",
    "plot_patch_layers",
    "plot_paths",
    "plot_picture_reading",
    "plot_positions",
    "plot_principal_angles",
    "plot_recording",
    "plot_region",
    "plot_regions",
    "plot_scorecard",
    "plot_separability",
    "plot_spectra",
    "plot_spectrum",
    "plot_tiles",
    "plot_trace",
    "plot_tradeoff",
    "plot_training",
    "plot_uncertainty",
    "plot_verified",
    "plot_writing",
    "save_figure",
    "short_site",
    "training_frame",
]

checked(globals(), __all__)
