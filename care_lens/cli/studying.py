"""`study`: benchmark files to a folder that `run --study` takes."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from care_lens.cli import base, loading
from care_lens.cli.base import app, require_out, start, told
from care_lens.cli.early import require_processes
from care_lens.cli.options import (
    Batch,
    Config,
    Device,
    Dtype,
    Least,
    Model,
    Quantization,
    Revision,
    Sample,
    Seed,
    System,
    Temperature,
    Threads,
    Tokens,
    TopK,
    TopP,
    texts,
)

if TYPE_CHECKING:
    from care_lens.data import Study

log = logging.getLogger("care_lens")


@app.command()
@told
def study(
    sources: Annotated[
        list[str],
        typer.Argument(help="Folders, zips or tables of benchmarks, as PATH or NAME=PATH.", show_default=False),
    ],
    model: Model = "bundled",
    out: Annotated[Path, typer.Option(help="Folder of the study; a stopped call goes on there.")] = Path(
        "results/study"
    ),
    name: Annotated[str, typer.Option(help="Of the study, for the report.", show_default="that of the folder")] = "",
    limit: Annotated[int | None, typer.Option(help="Examples a channel at most.", min=1, show_default="all")] = None,
    harmful: Annotated[
        str, typer.Option(help="Answers of attacks: 'cycled' compliances, 'target' openings, or the 'model''s own.")
    ] = "cycled",
    benign: Annotated[
        str,
        typer.Option(
            help="Answers of harmless requests: the 'model''s own, or the file's 'reference' where there is one."
        ),
    ] = "model",
    refusals: Annotated[
        Path | None, typer.Option(help="File of refusals to cycle, one a line.", show_default="a hundred of our own")
    ] = None,
    compliances: Annotated[
        Path | None, typer.Option(help="File of compliances to cycle, one a line.", show_default="a hundred of our own")
    ] = None,
    comply: Annotated[
        str | None,
        typer.Option(
            help="First words of compliant answers: 'Sure,Here'.",
            show_default="Sure, Here, Yes, ...; those of the bundled model's world",
        ),
    ] = None,
    refuse: Annotated[
        str | None,
        typer.Option(
            help="First words of refusals: 'I,Sorry'.",
            show_default="I, Sorry, Unfortunately, ...; that of the bundled model's world",
        ),
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Attack channels or benchmarks that the fit may not use.", show_default="the smallest of three or more"
        ),
    ] = None,
    held_templates: Annotated[
        float, typer.Option(help="Share of jailbreak templates that the test split alone has.", min=0, max=0.9)
    ] = 0.3,
    pairs: Annotated[int, typer.Option(help="Pairs a channel for mediation.", min=0)] = 32,
    seed: Seed = 0,
    threads: Threads = 2,
    device: Device = None,
    dtype: Dtype = None,
    revision: Revision = None,
    quantization: Quantization = None,
    batch_size: Batch = None,
    max_new_tokens: Tokens = None,
    min_new_tokens: Least = None,
    do_sample: Sample = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    system: System = None,
    config: Config = None,
) -> None:
    """Join benchmarks to a study: splits, plain twins, pairs, answers; several processes share the answers."""
    del config
    require_processes()
    for option, value, known in (
        ("--harmful", harmful, ("cycled", "target", "model")),
        ("--benign", benign, ("model", "reference")),
    ):
        if value not in known:
            raise typer.BadParameter(f"{option} must be one of {known}, got {value!r}")
    lists: dict[str, Any] = {
        what: lines(path, f"--{what}") for what, path in (("refusals", refusals), ("compliances", compliances)) if path
    }
    loading.refuse_model(model, device=device, dtype=dtype, revision=revision, quantization=quantization)
    require_out(out)
    start(threads)
    from care_lens.core.processes import Process
    from care_lens.evaluation import GenerationSettings
    from care_lens.pipeline.studying import COMPLY, REFUSE, make_study, read_source

    bundled = model == "bundled"
    openings = (COMPLY, REFUSE)
    if bundled:  # it knows the words of its world alone
        from care_lens.organism import tasks

        openings = (tuple(sorted({*tasks.OPENINGS.values()})), (tasks.REFUSAL.split()[0],))
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens or (14 if bundled else 128),
        min_new_tokens=min_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        system=system,
    )
    read = {source: read_source(source) for source in sources}  # before the model is loaded
    for source, rows in read.items():
        if not len(rows):
            raise typer.BadParameter(f"{source} must give an example or more, got none; see `care-lens preflight`")
        log.info("%s: %d examples", source, len(rows))
    process = Process.current()
    lvlm = loading.load_model(
        model, process.device() if device is None and not process.alone else device, dtype, revision, quantization
    )
    made = make_study(
        lvlm,
        read,
        out,
        name=name or out.name,
        comply=texts(comply, "--comply") or openings[0],
        refuse=texts(refuse, "--refuse") or openings[1],
        limit=limit,
        held_out=texts(held_out, "--held-out"),
        held_templates=held_templates,
        pairs=pairs,
        settings=settings,
        batch_size=batch_size or (128 if bundled else 8),
        seed=seed,
        process=process,
        harmful=harmful,
        benign=benign,
        **lists,
    )
    if made is None:
        base.console.print(f"process {process.name}: its share of the answers is in {out / 'answers'}")
        return
    table = Table(title=f"{made.study.name}: {out}")
    splits = list(made.study.suites)
    for column in ("channel", *splits, "role"):
        table.add_column(column, overflow="fold")
    roles = {c: f"seen, {m}" for m, channels in made.study.seen.items() for c in channels}
    roles |= {made.study.plain: "plain"} | dict.fromkeys(made.study.held_out(), "held out")
    for channel in dict.fromkeys(c for s in splits for c in made.study.suites[s]):
        counts = [str(len(made.study.suites[s].get(channel, ()))) for s in splits]
        table.add_row(channel, *counts, roles.get(channel, "benign"))
    base.console.print(table)
    base.console.print(str(made.notes))
    base.console.print(_next(made.study, f"care-lens run --model {model} --study {out}"), markup=False, soft_wrap=True)


def _next(study: "Study", command: str) -> str:
    """What can be done with a study: a whole run, a quick look, or what it lacks for either."""
    from care_lens.data.study import StudyError
    from care_lens.pipeline import RunSettings
    from care_lens.pipeline.needs import NeedsError, require_ready, shortened

    needs = logging.getLogger("care_lens.pipeline.needs")
    needs.disabled = True  # what a look leaves out is said when it is taken
    try:
        require_ready(study, RunSettings())
    except (StudyError, NeedsError) as lacking:
        try:
            short = shortened(study, RunSettings())
            require_ready(short.part(study), short)
        except (StudyError, NeedsError):
            return f"next: nothing yet that `care-lens run` could do: {lacking}"
        return f"next: {command} --short, a quick look; not without --short: {lacking}"
    finally:
        needs.disabled = False
    return f"next: {command}"


def lines(path: Path, option: str) -> list[str]:
    """The lines of a file, without empty ones.

    Raises:
        typer.BadParameter: If there is none.
    """
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{option} must be a file of lines in UTF-8, got {path} ({error})") from None
    if not found:
        raise typer.BadParameter(f"{option} must hold a line or more, got none in {path}")
    return found
