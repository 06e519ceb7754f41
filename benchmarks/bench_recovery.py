"""How much of a known malicious subspace a fit finds, against the number of rows: contrast, shrinkage, width.

Benign rows are Gaussian with a decaying spectrum in a random orthonormal frame, ``var_i = 1 / (1 + 9 i / d)`` for the
i-th axis. Malicious rows are drawn alike, but along ``rank`` of the middle axes their standard deviation is 3 times as
large ("variance"), or their mean is 4 benign standard deviations off along one axis of the same middle part and nothing
else differs ("mean"), or both ("both"). The truth of a scenario is the span of the axes that differ, in the
directions that a generalised eigenvector has there: C_b^-1 times an axis of C_b is that axis.

A fit has the rank of the truth. Reported is the mean squared cosine of the principal angles between the fit's span and
the truth (1: found, ``rank / d``: by chance), and the largest angle in degrees; N is the number of rows a class. Each
point is repeated with other rows (seeds 0, 1, 2; the largest size is drawn once), and the interval is the smallest and
the largest of the repeats: with so few no other one is honest.

contrast "mean" has one direction by its nature, so that of a truth of several it can find one at best.

Run with ``python benchmarks/bench_recovery.py [--short] [--out results/recovery]``; writes recovery.csv and
recovery.html there. ``--widths`` and ``--counts`` take other sizes than the full run's.
"""

import argparse
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from care_lens.plots import theme
from care_lens.subspace import Moments, SubspaceError, solve_pencil
from care_lens.subspace.contrast import pencil
from care_lens.subspace.shrinkage import Shrinkage

logger = logging.getLogger("bench_recovery")

FULL = {"widths": (256, 1024, 4096), "counts": (64, 256, 1024, 6144), "repeats": 3}
SHORT = {"widths": (64, 256), "counts": (32, 96, 320), "repeats": 2}
RANK = 4
SPREAD = 3.0
SHIFT = 4.0
SCENARIOS = ("variance", "mean", "both")
CONTRASTS = ("covariance", "second_moment", "mean")
SHRINKAGES: dict[str, Shrinkage] = {"Ledoit-Wolf": "ledoit-wolf", "OAS": "oas", "0.1": 0.1, "diagonal": "diagonal"}

Scenario = Literal["variance", "mean", "both"]


def draw(scenario: str, width: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Benign and malicious rows [N, d], and the [d, k] truth."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    scale = (1 + 9 * torch.arange(width) / width) ** -0.5
    benign, malicious = (torch.randn(count, width, generator=generator) for _ in range(2))
    planted = slice(width // 2, width // 2 + RANK)
    axes = []
    if scenario in ("variance", "both"):
        malicious[:, planted] *= SPREAD
        axes += range(planted.start, planted.stop)
    if scenario in ("mean", "both"):
        malicious[:, planted.stop] += SHIFT
        axes.append(planted.stop)
    return (benign * scale) @ frame.T, (malicious * scale) @ frame.T, frame[:, axes].double()


def recovered(found: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Mean squared cosine over the truth's directions, and the largest principal angle in degrees."""
    cosines = torch.linalg.svdvals(torch.linalg.qr(found).Q.T @ truth).clamp_max(1)
    # A fit of fewer directions than the truth misses the others altogether.
    angle = 90.0 if len(cosines) < truth.shape[1] else float(torch.rad2deg(torch.arccos(cosines.min())))
    return float(cosines.square().sum()) / truth.shape[1], angle


def measure(size: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row a fit."""
    for width in size["widths"]:
        for count in size["counts"]:
            # One draw is enough where rows and width are many: the repeats of the smaller ones hardly differ there.
            repeats = size["repeats"] if width * count < 10**7 else 1
            for scenario in SCENARIOS:
                for seed in range(repeats):
                    benign, malicious, truth = draw(scenario, width, count, seed)
                    moments = Moments.from_rows(benign), Moments.from_rows(malicious)
                    for contrast in CONTRASTS:
                        for name, shrinkage in SHRINKAGES.items():
                            case = {"width": width, "n": count, "scenario": scenario, "seed": seed}
                            case |= {"contrast": contrast, "shrinkage": name}
                            yield case | fit(moments, truth, contrast, shrinkage)
            logger.info("width %d, %d rows a class: done", width, count)


def fit(moments: tuple[Moments, Moments], truth: torch.Tensor, contrast: Any, shrinkage: Shrinkage) -> dict[str, Any]:
    """What one fit found, or why it found nothing."""
    rank = 1 if contrast == "mean" else truth.shape[1]
    try:
        both = pencil(*moments, contrast=contrast, metric="benign", shrinkage=shrinkage)
        solution = solve_pencil(*both, rank=rank)
    except SubspaceError as error:
        return {"found": float("nan"), "largest_angle": float("nan"), "solver": type(error).__name__}
    found, angle = recovered(solution.vectors, truth)
    return {"found": found, "largest_angle": angle, "solver": solution.solver}


def figure(frame: pd.DataFrame) -> go.Figure:
    """Mean squared cosine against N: a row of panels a width, a column a scenario, a colour and
    symbol, a dash a shrinkage; whiskers are the smallest and the largest repeat."""
    widths, scenarios = sorted(frame.width.unique()), list(SCENARIOS)
    titles = [f"{scenario}, d = {width}" for width in widths for scenario in scenarios]
    panels = make_subplots(
        len(widths), len(scenarios), subplot_titles=titles, shared_xaxes=True, shared_yaxes=True, vertical_spacing=0.09
    )
    dashes = dict(zip(SHRINKAGES, theme.DASHES, strict=False))
    keys = ["width", "scenario", "contrast", "shrinkage", "n"]
    points = frame.groupby(keys).found.agg(["mean", "min", "max"]).reset_index()
    for (width, scenario, contrast, shrinkage), line in points.groupby(keys[:4]):
        row, column = widths.index(width) + 1, scenarios.index(scenario) + 1
        panels.add_trace(
            go.Scatter(
                x=line.n,
                y=line["mean"],
                error_y={
                    "type": "data",
                    "array": line["max"] - line["mean"],
                    "arrayminus": line["mean"] - line["min"],
                    "width": 2,
                    "thickness": 1,
                },
                mode="lines+markers",
                marker=theme.marker(CONTRASTS.index(contrast), size=7),
                line={"color": theme.COLOURS[CONTRASTS.index(contrast)], "dash": dashes[shrinkage]},
                name=f"{contrast}, {shrinkage}",
                legendgroup=f"{contrast}, {shrinkage}",
                showlegend=(row, column) == (1, 1),
            ),
            row=row,
            col=column,
        )
    panels.update_xaxes(**theme.log_axis(frame.n))
    panels.update_xaxes(title_text="rows a class", row=len(widths))
    panels.update_yaxes(range=[-0.03, 1.03], dtick=0.5)
    panels.update_layout(
        title=f"Share of a planted subspace that is found (mean squared cosine; {frame.seed.nunique()} repeats)",
        height=190 * len(widths) + 130,
        template=theme.TEMPLATE,
        legend={"orientation": "v", "x": 1.02, "y": 1, "xanchor": "left"},
    )
    return panels


def main() -> None:
    """Measure, write both files and log the table of means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--short", action="store_true", help="small sizes")
    parser.add_argument("--widths", type=int, nargs="+")
    parser.add_argument("--counts", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("results/recovery"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(options.threads)
    warnings.simplefilter("error")
    size: dict[str, Any] = dict(SHORT if options.short else FULL)
    size |= {name: tuple(given) for name in ("widths", "counts") if (given := getattr(options, name))}
    logger.info(json.dumps({**size, "rank": RANK, "spread": SPREAD, "shift": SHIFT, "threads": options.threads}))
    frame = pd.DataFrame(measure(size))
    options.out.mkdir(parents=True, exist_ok=True)
    frame.to_csv(options.out / "recovery.csv", index=False)
    figure(frame).write_html(options.out / "recovery.html", include_plotlyjs="cdn")
    table = frame.pivot_table(index=["scenario", "width", "n"], columns=["contrast", "shrinkage"], values="found")
    logger.info("%s", table.round(2).to_string())


if __name__ == "__main__":
    main()
