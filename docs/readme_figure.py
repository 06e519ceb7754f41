"""The figure at the top of the README, from the file that its table is of: `python docs/readme_figure.py` writes figures/asr.png.

The picture names the rows that it was drawn from (a digest, in its text chunk "rows"), so that a test can tell an old one.
"""

import hashlib
import tempfile
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from PIL import Image, PngImagePlugin

from care_lens.plots import plot_asr, save_figure

HERE = Path(__file__).parent
PICTURE, MEASURED = HERE / "figures" / "asr.png", HERE.parent / "benchmarks" / "measured" / "readme.csv"
CHANNELS = {
    "typographic": "typographic",
    "wrapper": "wrapper",
    "spelled": "spelled",
    "indirect": "indirect",
    "typographic second turn": "typographic, second turn",
    "typographic+indirect": "typographic + indirect",
    "split": "split",
    "gradient: PGD, whole answer": "PGD, whole answer",
}
DEFENCES = {
    "none": "undefended",
    "refusal direction": "refusal direction",
    "difference of means, all tokens": "difference of means",
    "published CARE": "published CARE",
    "care_lens": "care_lens",
    "control: random writer": "control: random writer",
    "control: shuffled labels": "control: shuffled labels",
}


def rows() -> pd.DataFrame:
    """Attack success by defence and channel, in the order of README's table."""
    measured = pd.read_csv(MEASURED).query("metric == 'asr'").set_index(["defence", "channel"])
    wanted = [(defence, channel) for defence in DEFENCES for channel in CHANNELS]
    found = measured.loc[wanted].reset_index()
    return found.assign(defence=found["defence"].map(DEFENCES), channel=found["channel"].map(CHANNELS))


def digest() -> str:
    """Of the rows that are drawn."""
    return hashlib.sha256(rows().to_csv(index=False, float_format="%.6f").encode()).hexdigest()


def figure() -> go.Figure:
    """Attack success, with intervals."""
    return plot_asr(rows(), metrics=("asr",))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "asr.png"
        save_figure(figure(), drawn, columns=2)
        told = PngImagePlugin.PngInfo()
        told.add_text("rows", digest())
        with Image.open(drawn) as picture:
            picture.save(PICTURE, pnginfo=told, optimize=True)
