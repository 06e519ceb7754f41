"""`info` and `preflight`: what a model offers, and what benchmark files lack."""

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from care_lens.cli import base, loading
from care_lens.cli.base import app, told
from care_lens.cli.options import Device, Dtype, Model, Quantization, Revision


@app.command()
@told
def info(
    model: Model = "bundled",
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    quantization: Quantization = None,
) -> None:
    """What a model offers: towers, layers, sites."""
    loading.refuse_model(model, device=device, dtype=dtype, revision=revision, quantization=quantization)
    from care_lens.core.results import package_versions

    lvlm = loading.load_model(model, device, dtype, revision, quantization)
    table = Table(title=f"{model}: {type(lvlm.hf_model).__name__}")
    for column in ("site", "width", "axes", "editable"):
        table.add_column(column, overflow="fold")  # narrow terminals break names, and cut none off
    for site in lvlm.sites():
        about = lvlm.site_info(site)
        table.add_row(str(site), str(about.width), " ".join(about.axes), "yes" if about.editable else "no")
    base.console.print(table)
    base.console.print(package_versions())


@app.command()
@told
def preflight(
    root: Annotated[Path, typer.Argument(help="Folder, zip or table of a benchmark, or folder of a study.")],
    format: Annotated[
        str | None, typer.Option(help="Name of the benchmark, such as figstep.", show_default="found out")
    ] = None,
    pixels: Annotated[bool, typer.Option("--pixels", help="Decode every picture to its end.")] = False,
    rows: Annotated[int, typer.Option(help="Rows with problems to list.", min=0)] = 10,
) -> None:
    """What benchmark files lack, before any GPU time; status 1 if something is wrong."""
    from care_lens.data.preflight import preflight as look

    report = look(root, format=format, pixels=pixels)
    show_preflight(report, rows=rows)
    raise typer.Exit(0 if report.ok else 1)


def show_preflight(report: object, *, rows: int = 10) -> None:
    """Print what was found.

    Args:
        report: A :class:`~care_lens.data.PreflightReport`.
        rows: Rows with problems to list.
    """
    from care_lens.data.preflight import PreflightReport

    assert isinstance(report, PreflightReport)
    table = Table(title=f"{', '.join(report.benchmarks) or 'no benchmark'}: {report.root}")
    for column in ("benchmark", "check", "level", "count", "what", "do"):
        table.add_column(column, overflow="fold", justify="right" if column == "count" else "left")
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    for row in report.frame.astype(str).to_dict("records"):
        level = f"[{colours[row['level']]}]{row['level']}[/]"
        table.add_row(row["benchmark"], row["check"], level, row["count"], escape(row["what"]), escape(row["do"]))
    base.console.print(table)
    for row in report.problems.head(rows).to_dict("records"):
        base.console.print(escape("{file} row {row}: {kind}: {what}; {do}".format(**row)))
    if (left := len(report.problems) - rows) > 0:
        base.console.print(f"and {left} rows more; --rows {len(report.problems)} lists all")
