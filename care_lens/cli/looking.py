"""`info` and `preflight`: what a model offers, and what benchmark files lack."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from care_lens.cli import base, loading
from care_lens.cli.base import app, told
from care_lens.cli.options import Device, Dtype, Model, Quantization, Revision

if TYPE_CHECKING:
    from care_lens.data.preflight import PreflightReport

#: Columns of a terminal from which on the table of a preflight breaks few words.
_WIDE = 120


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
        width = "\u2013" if about.width is None else str(about.width)
        table.add_row(str(site), width, " ".join(about.axes), "yes" if about.editable else "no")
    base.console.print(table)
    versions = ", ".join(f"{package} {version}" for package, version in package_versions().items())
    base.console.print(versions, markup=False, highlight=False)


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
    title = f"{', '.join(report.benchmarks) or 'no benchmark'}: {report.root}"
    if base.console.is_terminal and base.console.width >= _WIDE:
        base.console.print(_table(report, title))
    else:  # a line each, in which no path or id is broken
        _line(title)
        for row in report.frame.astype(str).to_dict("records"):
            _line("{benchmark} {check}: {level}, {count}: {what}; {do}".format(**row).rstrip("; "))
    for row in report.problems.head(rows).to_dict("records"):
        _line("{file} row {row}: {kind}: {what}; {do}".format(**row))
    if (left := len(report.problems) - rows) > 0:
        base.console.print(f"and {left} rows more; --rows {len(report.problems)} lists all")


def _table(report: "PreflightReport", title: str) -> Table:
    table = Table(title=title)
    for column in ("benchmark", "check", "level", "count", "what", "do"):
        table.add_column(column, overflow="fold", justify="right" if column == "count" else "left")
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    for row in report.frame.astype(str).to_dict("records"):
        level = f"[{colours[row['level']]}]{row['level']}[/]"
        table.add_row(row["benchmark"], row["check"], level, row["count"], escape(row["what"]), escape(row["do"]))
    return table


def _line(text: str) -> None:
    base.console.print(text, markup=False, highlight=False, soft_wrap=True)
