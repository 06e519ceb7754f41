"""The spectrum of a safety subspace."""

import plotly.graph_objects as go

from care_lens.plots import theme
from care_lens.subspace import SafetySubspace


def plot_spectrum(subspace: SafetySubspace) -> go.Figure:
    """Malicious over benign energy along each direction, on a logarithmic scale.

    Where the rank was chosen from held-out rows, their ratios stand beside it, with the threshold that benign
    rows against benign rows reached: a large eigenvalue whose held-out ratio is small was fitted to noise.

    Args:
        subspace: The subspace.

    Returns:
        The figure: the eigenvalues of the fit, and what held-out rows give if the diagnostics have it.
        Directions count from 1.
    """
    values = subspace.eigenvalues.double().cpu().tolist()
    figure = go.Figure()
    _add(figure, values, "fit", 0)
    choice = subspace.diagnostics.get("auto_rank")
    if choice:
        _add(figure, list(choice["heldout_ratios"]), "held out", 1)
        figure.add_trace(
            go.Scatter(
                x=[1, max(len(values), len(choice["heldout_ratios"]))],
                y=[float(choice["threshold"])] * 2,
                mode="lines",
                line={"dash": "dash", "color": theme.INK, "width": 2},
                name="benign against benign",
            )
        )
    where = ", ".join(str(part) for part in (subspace.modality, subspace.site) if part is not None)
    figure.update_layout(
        template=theme.TEMPLATE,
        height=400,
        title=where or None,
        xaxis={"title": {"text": "direction"}},
        yaxis={
            "title": {"text": "malicious / benign energy"},
            "type": "log",
            "exponentformat": "power",
        },
        showlegend=True,
        legend={"orientation": "v", "x": 1, "xanchor": "right", "y": 1, "yanchor": "top"},
    )
    return figure


def _add(figure: go.Figure, values: list[float], name: str, index: int) -> None:
    figure.add_trace(
        go.Scatter(
            x=list(range(1, len(values) + 1)),
            y=values,
            mode="lines+markers",
            marker={"symbol": theme.SYMBOLS[index], "size": 8},
            line={"color": theme.COLOURS[index], "width": 2},
            hovertemplate="direction %{x}: %{y:.3g}",
            name=name,
        )
    )
