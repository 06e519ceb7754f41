"""The spectrum of a safety subspace, and the spectra of several."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from care_lens.plots import theme
from care_lens.subspace import SafetySubspace


def plot_spectrum(subspace: SafetySubspace) -> go.Figure:
    """Malicious over benign energy along each direction, on a logarithmic scale, with the null of the rule that chose the rank.

    Where the rank was chosen from held-out rows, their ratios stand beside it, with the threshold that benign
    rows against benign rows reached: a large eigenvalue whose held-out ratio is small was fitted to noise. A rule that looks at the
    spectrum itself (the energy floor, permuted labels, a rule of one's own) has the eigenvalues it looked at and what each had to exceed.

    Args:
        subspace: The subspace.

    Returns:
        The figure: the eigenvalues of the fit, and the evidence of the rank rule if the diagnostics have it: what was held out, and the
        null as a dashed line. Directions count from 1.
    """
    values = subspace.eigenvalues.double().cpu().tolist()
    figure = go.Figure()
    choice: dict[str, Any] = subspace.diagnostics.get("auto_rank") or {}
    rule: dict[str, Any] = subspace.diagnostics.get("rank_rule") or {}
    seen = [float(value) for value in rule.get("eigenvalues", ())]
    if len(seen) > len(values):
        _add(figure, seen, "looked at", 3)
    _add(figure, values, "fit", 0)
    held: list[float] = []
    if choice:
        held = [float(value) for value in choice["heldout_ratios"]]
        _add(figure, held, "held out", 1)
        _null(figure, [float(choice["threshold"])] * 2, "null: benign against benign", last=max(len(values), len(held)))
    elif thresholds := [float(value) for value in rule.get("thresholds", ())]:
        _null(
            figure,
            thresholds * (2 if len(thresholds) == 1 else 1),
            f"null: {_NULLS.get(str(rule.get('rule')), 'rule ' + str(rule.get('rule')))}",
        )
    where = ", ".join(str(part) for part in (subspace.modality, subspace.site) if part is not None)
    figure.update_layout(
        template=theme.TEMPLATE,
        height=400,
        title=where or None,
        xaxis={"title": {"text": f"direction{_rows(subspace)}"}, **theme.whole(max(len(values), len(seen), len(held)))},
        yaxis={"title": {"text": "malicious / benign energy"}, **theme.log_axis([*values, *seen, *held])},
        showlegend=len(tuple(figure.data)) > 1,
    )
    return figure


def plot_spectra(subspaces: Mapping[str, SafetySubspace]) -> go.Figure:
    """The eigenvalues of several subspaces, on one logarithmic scale; at 1 malicious rows have no more energy than benign ones.

    Args:
        subspaces: By what they are called.

    Returns:
        The figure: a curve for each; where all are of rank 1, a point for each, under one another.

    Raises:
        ValueError: If there are none.
    """
    if not subspaces:
        raise ValueError("subspaces must hold at least one, got none")
    spectra = {name: one.eigenvalues.double().cpu().tolist() for name, one in subspaces.items()}
    figure = go.Figure()
    energy: dict[str, Any] = {
        "title": {"text": "malicious / benign energy"},
        **theme.log_axis([1.0, *(value for values in spectra.values() for value in values)]),
    }
    rule: Any = {"line": {"dash": "dash", "color": theme.INK, "width": 1}}
    if max(map(len, spectra.values())) == 1:
        points = {"x": [values[0] for values in spectra.values()], "y": list(spectra), "mode": "markers"}
        figure.add_trace(
            go.Scatter(**points, marker=theme.marker(0, size=10), hovertemplate="%{y}: %{x:.3g}<extra></extra>")
        )
        figure.add_vline(x=1, **rule)
        figure.update_layout(template=theme.TEMPLATE, height=130 + 34 * len(spectra), xaxis=energy, margin={"t": 30})
        figure.update_yaxes(type="category", autorange="reversed")
        return figure
    for index, (name, values) in enumerate(spectra.items()):
        _add(figure, values, name, index)
    longest = max(map(len, spectra.values()))
    _null(figure, [1.0, 1.0], "1: as much as benign rows", last=longest)
    direction: dict[str, Any] = {"title": {"text": "direction"}, **theme.whole(longest)}
    figure.update_layout(template=theme.TEMPLATE, height=400, xaxis=direction, yaxis=energy, showlegend=True)
    return figure


def _rows(subspace: SafetySubspace) -> str:
    """How many rows it was fitted to, where it says so."""
    notes = subspace.diagnostics
    if "n_benign" not in notes or "n_malicious" not in notes:
        return ""
    return f" (n: benign {notes['n_benign']}, malicious {notes['n_malicious']})"


_NULLS = {"energy": "noise floor", "permutation": "permuted labels"}


def _null(figure: go.Figure, values: list[float], name: str, *, last: int | None = None) -> None:
    figure.add_trace(
        go.Scatter(
            x=list(range(1, len(values) + 1)) if last is None else [1, last],
            y=values,
            mode="lines",
            line={"dash": "dash", "color": theme.INK, "width": 2},
            hovertemplate="direction %{x}: %{y:.3g} needed",
            name=name,
        )
    )


def _add(figure: go.Figure, values: list[float], name: str, index: int) -> None:
    figure.add_trace(
        go.Scatter(
            x=list(range(1, len(values) + 1)),
            y=values,
            mode="lines+markers",
            **theme.series(index),
            hovertemplate="direction %{x}: %{y:.3g}",
            name=name,
        )
    )
