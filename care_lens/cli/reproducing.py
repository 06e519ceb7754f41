"""`reproduce`: a published table out of a recipe and public files."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from care_lens.cli import base, loading
from care_lens.cli.base import app, require_out, start, told
from care_lens.cli.early import require_device, require_dtype, require_processes, require_recipe
from care_lens.cli.options import Config, Quantization, Threads

log = logging.getLogger("care_lens")


@app.command()
@told
def reproduce(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe of the package, or a yaml file.", show_default=False)],
    files: Annotated[Path, typer.Option(help="Folder with the benchmarks that the recipe names.")] = Path("files"),
    out: Annotated[Path, typer.Option(help="Folder of the table; a stopped job goes on there.")] = Path(
        "results/table"
    ),
    check: Annotated[bool, typer.Option("--check", help="Look through files and model, and stop.")] = False,
    allow_problems: Annotated[
        bool, typer.Option("--allow-problems", help="Go on without the rows that give no example.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Examples a column at most.", min=1, show_default="all")] = None,
    model: Annotated[
        str | None, typer.Option(help="Another model, hub name or directory.", show_default="the recipe's")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of the model.", show_default="the recipe's")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="the recipe's")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="As device_map of transformers.", show_default="the recipe's; of several processes each has a GPU"
        ),
    ] = None,
    quantization: Quantization = None,
    batch_size: Annotated[int, typer.Option(help="Examples at a time.", min=1)] = 8,
    judge: Annotated[str | None, typer.Option(help="'module:name' of a judge.", show_default="the recipe's")] = None,
    threads: Threads = 2,
    config: Config = None,
) -> None:
    """A published table from public files, the published figures beside it; several processes share the answers."""
    del config
    require_processes()
    require_recipe(recipe)
    require_dtype(dtype)
    if not check:  # files are looked through on machines without the GPU too
        loading.refuse_model(model or "", device=device, dtype=dtype, quantization=quantization)
    start(threads)
    from care_lens.core.processes import Process
    from care_lens.pipeline.recipe import read_recipe
    from care_lens.pipeline.recipe_look import look
    from care_lens.pipeline.reproduce import reproduce as make

    asked = read_recipe(recipe)
    given = {"name": model, "revision": revision, "dtype": dtype, "device": device}
    if model is not None:
        given["revision"] = revision or ""  # the recipe's is of its own model
    changed = {key: value or None for key, value in given.items() if value is not None}
    asked = replace(asked, model=replace(asked.model, **changed))
    process = Process.current()
    found = look(asked, files)
    if process.first:
        _show(asked.name, found)
    if check:
        raise typer.Exit(0 if found.ok else 1)
    if (
        not allow_problems
        or (
            found.frame["check"].isin(("files", "model", "settings", "examples")) & (found.frame["level"] == "error")
        ).any()
    ):
        found.require()
    where = asked.model.device if process.alone or device is not None else process.device()
    require_device(None if where is None or where == "auto" else where)
    require_out(out)
    ours = loading.load_judge(judge) if judge is not None else None
    lvlm = loading.load_model(asked.model.name, where, asked.model.dtype, asked.model.revision, quantization)
    made = make(asked, files, out, lvlm=lvlm, judge=ours, limit=limit, batch_size=batch_size, process=process)
    if made is None:
        base.console.print(f"process {process.name}: its share of the answers is in {out / 'answers'}")
        return
    base.console.print(made.markdown, markup=False)
    base.console.print(f"table: {out / 'table.md'}, {out / 'table.tex'}")


def _show(title: str, found: object) -> None:
    """Print what was looked at: all errors and warnings, and how many examples there are."""
    from care_lens.pipeline.recipe_look import Looked

    assert isinstance(found, Looked)
    table = Table(title=f"files of {title}")
    for column in ("source", "check", "level", "count", "what", "do"):
        table.add_column(column, overflow="fold")
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    for row in found.frame.astype(str).to_dict("records"):
        if row["level"] == "ok" and row["check"] not in ("examples", "model"):
            continue
        level = f"[{colours[row['level']]}]{row['level']}[/]"
        table.add_row(row["source"], row["check"], level, row["count"], escape(row["what"]), escape(row["do"]))
    base.console.print(table)
