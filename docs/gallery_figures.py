"""Every figure of care_lens.plots, made of the small results in docs/gallery; the gallery page and the tests draw them."""

from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from PIL import Image

from care_lens import plots
from care_lens.core.spans import PatchGrid
from care_lens.evaluation import DefenceTable
from care_lens.mediation import Region
from care_lens.planted.scorecard import Scorecard
from care_lens.plots.attribution import plot_attribution
from care_lens.subspace import SafetySubspace
from care_lens.subspace.uncertainty import SubspaceUncertainty

HERE = Path(__file__).parent / "gallery"
#: Where the word is in picture.png, in pixels.
WORD = Region.box(14, 46, 52, 60, name="word")
WHOLE = {"layer": "Int64", "head": "Int64", "neuron": "Int64"}


def frame(name: str) -> pd.DataFrame:
    """One of the kept frames."""
    read = pd.read_csv(HERE / f"{name}.csv", dtype={"position": str, "layers": str} if name != "recording" else None)
    if name in ("recording", "trace"):
        read["position"] = read["position"].astype(int)
    return read.astype({column: kind for column, kind in WHOLE.items() if column in read.columns})


def trials() -> pd.DataFrame:
    """The trials of the table of defences, one row an item."""
    held = np.load(HERE / "trials.npz")
    columns = {name: held[f"{name}_names"][held[name]] for name in ("defence", "channel", "metric", "group")}
    return pd.DataFrame({**columns, "value": held["value"].astype(float)})


def defences() -> DefenceTable:
    """The table of defences with its trials."""
    return DefenceTable(frame("defences"), {}, trials())


def subspace(name: str) -> SafetySubspace:
    """One of the kept subspaces."""
    return SafetySubspace.load(HERE / name)


def tokens(name: str) -> list[str]:
    """The text of the tokens of a row."""
    return [str(token) for token in pd.read_csv(HERE / f"{name}.csv", keep_default_na=False)["token"]]


def picture(name: str) -> Image.Image:
    """One of the kept pictures."""
    with Image.open(HERE / f"{name}.png") as image:
        return image.copy()


def _few(table: pd.DataFrame) -> pd.DataFrame:
    channels = ["typographic", "wrapper", "spelled", "typographic+indirect", "benign plain", "hard read"]
    return table[table["channel"].isin(channels)]


def _rows() -> dict[str, torch.Tensor]:
    held = np.load(HERE / "rows.npz")
    return {name: torch.from_numpy(held[name].astype(np.float32)) for name in held.files}


def _angles() -> dict[str, SafetySubspace]:
    sites = [("1", "visual"), ("1", "textual"), ("6", "visual"), ("6", "textual")]
    return {f"layer {k}, {modality}": subspace(f"angles/{k}.{modality}") for k, modality in sites}


def _pairs_by_layer() -> dict:
    at = {k: (subspace(f"angles/{k}.visual"), subspace(f"angles/{k}.textual")) for k in range(8)}
    return {"bundled model": at}


def _positions() -> go.Figure:
    """One pair: the words of its prompt, and the tokens of its answer."""
    names, each = tokens("tokens"), frame("each")
    answer = int(each["position"].astype(int).max()) + 1 - len(names)
    return plots.plot_positions(each, tokens=[*names, *(f"answer {k}" for k in range(1, answer + 1))])


def _recording() -> go.Figure:
    image = picture("recording")
    grid = PatchGrid(start=0, rows=8, cols=8, width=image.width, height=image.height)
    row = frame("recording")
    first = int(row.loc[row["span"] == "image", "position"].min())
    return plots.plot_recording(row, grids=[(grid, first)], tokens=tokens("recording.tokens"), image=image)


def _before_after() -> go.Figure:
    rows = _rows()
    before = {name.removesuffix(", before"): value for name, value in rows.items() if name.endswith("before")}
    after = {name.removesuffix(", after"): value for name, value in rows.items() if name.endswith("after")}
    return plots.plot_before_after(subspace("subspace.pair"), before, after)


def _grid() -> PatchGrid:
    image = picture("picture")
    return PatchGrid(start=0, rows=8, cols=8, width=image.width, height=image.height)


def _reading() -> go.Figure:
    return plots.plot_picture_reading(frame("reading"), image=picture("reading"), stacked=True)


def _scorecard() -> go.Figure:
    return plots.plot_scorecard(Scorecard(frame("scorecard"), {}, frame("scorecard.details")))


def _uncertainty() -> SubspaceUncertainty:
    return SubspaceUncertainty(frame("uncertainty"), {})


#: By name: what the figure shows, what makes it, and the figure.
ENTRIES = {
    "effects": (
        "Effects by layer, component and tokens",
        "mediate(...).plot()",
        lambda: plots.plot_effects(frame("effects.wrapper")),
    ),
    "positions": (
        "Effects of single tokens, the picture folded",
        'plot_positions(mediate(..., positions=("each",)), tokens=[...])',
        _positions,
    ),
    "heads": (
        "Effects of heads",
        "mediate(..., sites=heads(lvlm)).plot()",
        lambda: plots.plot_mediation(frame("heads")),
    ),
    "mediators": (
        "Effects of neurons and groups",
        "mediate(..., sites=neurons(...)).plot()",
        lambda: plots.plot_mediators(frame("neurons")),
    ),
    "places": (
        "Places ranked by what they carry",
        "localise(...).plot()",
        lambda: plots.plot_localisation(frame("places.wrapper"), shown=10),
    ),
    "patches": (
        "Effects of patches over the picture",
        "plot_patch_effects(patch_map(...), image=picture)",
        lambda: plots.plot_patch_effects(frame("patches.0"), image=picture("picture")),
    ),
    "patch_layers": (
        "Effects of patches by layer, in one colour scale",
        'plot_patch_layers({"layer 0": patch_map(...), ...}, image=picture)',
        lambda: plots.plot_patch_layers(
            {f"layer {k}": frame(f"patches.{k}") for k in (0, 1, 2, 4, 6, 7)}, image=picture("picture")
        ),
    ),
    "attribution": (
        "Largest attributions",
        "attribute(...).plot()",
        lambda: plot_attribution(frame("attribution"), top=6),
    ),
    "verified": (
        "Attributions against exact patching",
        "verify(...).plot()",
        lambda: plots.plot_verified(frame("verified")),
    ),
    "knockout": (
        "Attention knocked out, by layers",
        "knockout(...).plot()",
        lambda: plots.plot_knockout(frame("knockout")),
    ),
    "paths": ("Effects of direct paths", "path_effects(...).plot()", lambda: plots.plot_paths(frame("paths"))),
    "ablation": ("Answers under ablation", "ablate(...).plot()", lambda: plots.plot_ablation(frame("ablation"))),
    "separability": (
        "How well classes come apart",
        "separability(...).plot()",
        lambda: plots.plot_separability(frame("separability")),
    ),
    "spectrum_heldout": (
        'Spectrum and null, rank="auto"',
        "subspace.plot()",
        lambda: plots.plot_spectrum(subspace("subspace.auto")),
    ),
    "spectrum_energy": (
        'Spectrum and null, rank="energy"',
        "subspace.plot()",
        lambda: plots.plot_spectrum(subspace("subspace.energy")),
    ),
    "spectrum_permutation": (
        'Spectrum and null, rank="permutation"',
        "subspace.plot()",
        lambda: plots.plot_spectrum(subspace("subspace.permutation")),
    ),
    "spectra": ("Spectra of several subspaces", "plot_spectra({...})", lambda: plots.plot_spectra(_angles())),
    "uncertainty": (
        "How sure a subspace is",
        "measure_uncertainty(...).plot()",
        lambda: plots.plot_uncertainty(_uncertainty()),
    ),
    "angles": (
        "Principal angles between subspaces",
        "plot_principal_angles({...})",
        lambda: plots.plot_principal_angles(_angles()),
    ),
    "angles_by_layer": (
        "Angle between the modalities, by layer",
        "plot_angles_by_layer({model: {layer: (visual, textual)}})",
        lambda: plots.plot_angles_by_layer(_pairs_by_layer()),
    ),
    "before_after": (
        "Rows in a subspace, before and after the repair",
        "plot_before_after(subspace, before, after)",
        _before_after,
    ),
    "writing": (
        "Tokens a subspace writes towards",
        "writes_towards(...).plot()",
        lambda: plots.plot_writing(frame("writing"), top=3),
    ),
    "recording": (
        "What a repair does, token by token and over the picture",
        "plot_recording(recording.to_dataframe(), grids=..., tokens=..., image=...)",
        _recording,
    ),
    "trace": (
        "Scores of readers, token by token",
        "read_scores(..., trace=True).plot()",
        lambda: plots.plot_trace(frame("trace")),
    ),
    "asr": ("Defences by channel", "evaluate(...).plot()", lambda: plots.plot_asr(_few(defences().frame))),
    "asr_column": (
        "Defences by channel, for one column",
        "plot_asr_column(evaluate(...))",
        lambda: plots.plot_asr_column(_few(defences().frame)),
    ),
    "tradeoff": ("Safety against utility", "plot_tradeoff(evaluate(...))", lambda: plots.plot_tradeoff(defences())),
    "frontier": (
        "Settings of a defence by what they cost",
        "search(...).frontier.plot()",
        lambda: plots.plot_frontier(frame("frontier")),
    ),
    "lens": (
        "What is legible at image tokens, by layer",
        "logit_lens(...).plot()",
        lambda: plots.plot_lens(frame("lens")),
    ),
    "reading": (
        "What is legible at the patches of a picture, and what they do",
        "plot_picture_reading(picture_reading(..., neighbours=nearest_text(...)), image=picture, stacked=True)",
        _reading,
    ),
    "tiles": (
        "Effects of patches of several grids: tiles, or here two pictures",
        "plot_tiles(patch_map(...), image=[first, second])",
        lambda: plots.plot_tiles(frame("tiles"), image=[picture("tiles.0"), picture("tiles.1")]),
    ),
    "region": (
        "A region and its tokens",
        "region.plot(picture, grids=...)",
        lambda: plots.plot_region(WORD, picture("picture"), grids=[_grid()]),
    ),
    "regions": (
        "Effects of regions over the picture",
        "plot_regions(mediate(..., positions=(region,)), [region], picture, site=...)",
        lambda: plots.plot_regions(
            frame("regions"), [WORD], picture("picture"), site="blocks.0.hook_resid_pre", grids=[_grid()]
        ),
    ),
    "edges": ("Leading edges", "edge_attribution(...).plot()", lambda: plots.plot_edges(frame("edges"), top=12)),
    "edges_verified": (
        "Edge estimates against exact patching",
        "verify_edges(...).plot()",
        lambda: plots.plot_edge_verification(frame("edges.verified")),
    ),
    "faithfulness": (
        "Faithfulness of circuits against random ones",
        "circuit_faithfulness(...).plot()",
        lambda: plots.plot_faithfulness(frame("faithfulness")),
    ),
    "scorecard": ("Methods on planted channels", "planted.scorecard(...).plot()", _scorecard),
    "training": (
        "Training of the bundled world",
        "plot_training(training_frame(log))",
        lambda: plots.plot_training(frame("training")),
    ),
}


def figures() -> dict[str, go.Figure]:
    """Every figure, by name."""
    return {name: make() for name, (_, _, make) in ENTRIES.items()}
