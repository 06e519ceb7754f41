"""Figures: one function a result, from its tidy frame to a ``plotly.graph_objects.Figure``.

Figures are returned, never shown. Signed effects are drawn in RdBu with white at 0: blue is positive (less
safe), red is negative. What an interval says stands in the figure: as a bar, as a band, or as a dot in the
cells whose interval excludes 0 (cell by cell, without a correction for their number).
"""

from care_lens.core.arguments import checked
from care_lens.plots.ablation import plot_ablation
from care_lens.plots.attribution import plot_attribution, plot_knockout, plot_paths, plot_verified
from care_lens.plots.compact import plot_asr_column
from care_lens.plots.defence import plot_asr
from care_lens.plots.edges import plot_edge_verification, plot_edges, plot_faithfulness
from care_lens.plots.effects import plot_effects
from care_lens.plots.frontier import plot_frontier
from care_lens.plots.lens import plot_lens, plot_picture_reading
from care_lens.plots.localisation import plot_localisation
from care_lens.plots.patches import plot_patch_effects
from care_lens.plots.planted import plot_scorecard
from care_lens.plots.recording import plot_recording, plot_trace
from care_lens.plots.regions import plot_region, plot_regions, plot_tiles
from care_lens.plots.separability import plot_separability
from care_lens.plots.spectrum import plot_spectrum
from care_lens.plots.theme import ExportError, save_figure
from care_lens.plots.tradeoff import plot_tradeoff
from care_lens.plots.uncertainty import plot_uncertainty
from care_lens.plots.writing import plot_writing

__all__ = [
    "ExportError",
    "plot_ablation",
    "plot_asr",
    "plot_asr_column",
    "plot_attribution",
    "plot_edge_verification",
    "plot_edges",
    "plot_effects",
    "plot_faithfulness",
    "plot_frontier",
    "plot_knockout",
    "plot_lens",
    "plot_localisation",
    "plot_patch_effects",
    "plot_paths",
    "plot_picture_reading",
    "plot_recording",
    "plot_region",
    "plot_regions",
    "plot_scorecard",
    "plot_separability",
    "plot_spectrum",
    "plot_tiles",
    "plot_trace",
    "plot_tradeoff",
    "plot_uncertainty",
    "plot_verified",
    "plot_writing",
    "save_figure",
]

checked(globals(), __all__)
