"""Training curves of the bundled world, from the log that training writes."""

import ast
import re
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from care_lens.plots import theme
from care_lens.plots.frames import frame_of, where

_STEP = re.compile(r"\b(?P<stage>tower|language) (?P<step>\d+)/(?P<steps>\d+) \d+s (?P<rest>loss .*)")
_MATCH = re.compile(r"\bexact(?: match)? (?P<rates>\{.*\})")
_PAIR = re.compile(r"(\w+) (-?\d+(?:\.\d+)?)")
_NAMES = {"letters": "letters read", "progress": "size of the letters", "exact": "exact answers"}


def training_frame(log: str | Path) -> pd.DataFrame:
    """The figures in the log of ``python -m care_lens.organism.train``.

    Args:
        log: The file, or its text.

    Returns:
        One row a figure: stage ("tower 1", "language 1", ... in the order in which they began), step, metric ("loss", "letters",
        "progress", "exact"), value.

    Raises:
        ValueError: If it holds no line of training.
    """
    text = log.read_text(encoding="utf-8") if isinstance(log, Path) else log
    rows: list[tuple[str, int, str, float]] = []
    counts: dict[str, int] = {}
    stage, step, steps_of = "", 0, {}
    for line in text.splitlines():
        if found := _STEP.search(line):
            kind, step, steps = found["stage"], int(found["step"]), int(found["steps"])
            last = steps_of.get(kind)
            if last is None or last[1] != steps or last[0] > step:
                counts[kind] = counts.get(kind, 0) + 1
            steps_of[kind] = (step, steps)
            stage = f"{kind} {counts[kind]}"
            rows += [(stage, step, name, float(value)) for name, value in _PAIR.findall(found["rest"])]
        elif (found := _MATCH.search(line)) and stage.startswith("language"):
            rate = ast.literal_eval(found["rates"]).get("all")
            if rate is not None:
                rows.append((stage, step, "exact", float(rate)))
    if not rows:
        raise ValueError("log must hold lines of python -m care_lens.organism.train, got none; give its standard error")
    return pd.DataFrame(rows, columns=["stage", "step", "metric", "value"]).drop_duplicates()


def plot_training(frame: pd.DataFrame) -> go.Figure:
    """The loss of each stage of training, and the shares that were measured on the way.

    Args:
        frame: As :func:`training_frame` gives it.

    Returns:
        The figure: losses on a logarithmic scale above, shares below where there are any; one curve a stage (and share).

    Raises:
        ValueError: If the frame is not such.
    """
    frame = frame_of(frame, ("stage", "step", "metric", "value"))
    shares = pd.DataFrame(frame[frame["metric"] != "loss"])
    panels = 1 + bool(len(shares))
    figure = make_subplots(rows=panels, cols=1, vertical_spacing=0.2)
    stages = list(dict.fromkeys(frame["stage"]))
    for index, stage in enumerate(stages):
        part = where(frame, stage=stage, metric="loss")
        figure.add_trace(_curve(part, f"loss, {stage}", index), row=1, col=1)
    curves = list(dict.fromkeys(zip(shares["stage"], shares["metric"], strict=True)))
    for index, (stage, metric) in enumerate(curves, start=len(stages)):
        part = where(shares, stage=stage, metric=metric)
        figure.add_trace(_curve(part, f"{_NAMES.get(metric, metric)}, {stage}", index), row=2, col=1)
    losses = where(frame, metric="loss")["value"].astype(float).tolist()
    figure.update_yaxes(**theme.log_axis(losses), title_text="loss", row=1, col=1)
    if panels == 2:
        figure.update_yaxes(range=[-0.03, 1.03], tickformat=".0%", title_text="share", row=2, col=1)
    figure.update_xaxes(title_text="step", row=panels, col=1)
    figure.update_layout(template=theme.TEMPLATE, height=320 + 260 * (panels - 1), showlegend=True)
    return figure


def _curve(part: pd.DataFrame, name: str, index: int) -> go.Scatter:
    return go.Scatter(
        x=part["step"].tolist(),
        y=part["value"].astype(float).tolist(),
        mode="lines+markers" if len(part) < 20 else "lines",
        **theme.series(index, size=6),
        hovertemplate="step %{x}: %{y:.3g}",
        name=name,
    )
