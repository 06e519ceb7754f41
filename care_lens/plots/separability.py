"""How well benign and malicious activations come apart, by layer."""

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from care_lens.core.results import FrameResult
from care_lens.plots import theme
from care_lens.plots.frames import component_label, frame_of, half_widths, in_order, towers_in_order, where, with_n

TITLES = {
    "probe_auc": "probe AUC",
    "silhouette": "silhouette",
    "fisher": "between / within scatter",
    "mahalanobis": "Mahalanobis distance",
}
_COLUMNS = ("tower", "layer", "component", "position", "metric", "value", "ci_low", "ci_high", "n")


def plot_separability(result: FrameResult | pd.DataFrame) -> go.Figure:
    """Each measure of separability by layer: one panel a measure, one curve a tower, component and selection.

    Args:
        result: A ``SeparabilityResult`` or its frame. Sites outside the blocks are drawn at layer -1.

    Returns:
        The figure; intervals are bars where there are any.

    Raises:
        ValueError: If the frame is not such.
    """
    frame = frame_of(result, _COLUMNS)
    metrics = list(dict.fromkeys(frame["metric"]))
    figure = make_subplots(
        rows=len(metrics),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.16 / len(metrics) if len(metrics) > 1 else 0,
    )
    curves = [
        (tower, component, position)
        for tower in towers_in_order(frame["tower"])
        for component in in_order(where(frame, tower=tower)["component"])
        for position in dict.fromkeys(where(frame, tower=tower, component=component)["position"])
    ]
    for row, metric in enumerate(metrics, start=1):
        for index, curve in enumerate(curves):
            tower, component, position = curve
            part = where(frame, metric=metric, tower=tower, component=component, position=position)
            part = part.sort_values(by="layer")
            figure.add_trace(_curve(part, curve, index, legend=row == 1), row=row, col=1)
        figure.update_yaxes(title_text=TITLES.get(metric, metric), row=row, col=1)
    figure.update_xaxes(title_text=with_n("layer", frame), row=len(metrics), col=1)
    figure.update_layout(template=theme.TEMPLATE, height=120 + 240 * len(metrics))
    return figure


def _curve(part: pd.DataFrame, curve: tuple[str, str, str], index: int, *, legend: bool) -> go.Scatter:
    tower, component, position = curve
    bars = None if part["ci_low"].isna().all() else {**half_widths(part), "thickness": 1.5, "width": 3}
    name = f"{tower} {component_label(component)}, {position}"
    return go.Scatter(
        x=part["layer"].fillna(-1).astype(int).tolist(),
        y=part["value"].astype(float).tolist(),
        error_y=bars,
        mode="lines+markers",
        **theme.series(index),
        hovertemplate="layer %{x}: %{y:.3g}",
        legendgroup=name,
        showlegend=legend,
        name=name,
    )
