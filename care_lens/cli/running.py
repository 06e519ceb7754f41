"""`run`, `diagnose`, `fit` and `evaluate`: the four steps on a study."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from typing import Annotated

import typer
from rich.table import Table

from care_lens.cli import base
from care_lens.cli.asked import TUNING, Asked, one_process, takes_options
from care_lens.cli.base import app, start, told

log = logging.getLogger("care_lens")


@app.command()
@told
@one_process
@takes_options()
def run(asked: Asked) -> None:
    """Diagnose, learn, choose on validation, prove on test; writes report.html."""
    start(asked.threads)
    from care_lens.core.errors import ArtifactError
    from care_lens.pipeline import run, write_report
    from care_lens.pipeline.headline import headlines, unstopped_said
    from care_lens.pipeline.report_words import part_said
    from care_lens.pipeline.stopped import STOPS, write_stopped_report

    lvlm, study = asked.load()
    settings = asked.settings(study)
    try:
        with asked.answering(lvlm):
            result = run(lvlm, study, asked.out, model=asked.title, settings=settings)
    except STOPS as error:
        if isinstance(error, ArtifactError):  # a fault of files
            raise
        page = write_stopped_report(lvlm, study, asked.out, model=asked.title, settings=settings, error=error)
        base.console.print(f"no repair was made: {error}", markup=False)
        base.console.print(f"report of what was found until then: {page}")
        raise typer.Exit(1) from None
    page = write_report(result, asked.out)
    table = Table(title=f"{study.name}: before and after (test split)")
    for column in ("", "before", "after"):
        table.add_column(column, overflow="fold")
    for name, both in headlines(result).items():
        table.add_row(name, *map(str, both))
    base.console.print(table)
    for said in (part_said(settings), unstopped_said(result)):
        if said:
            base.console.print(said, markup=False)
    base.console.print(f"report: {page}   ({sum(result.seconds.values()):.0f} s)")


@app.command()
@told
@one_process
@takes_options()
def diagnose(asked: Asked) -> None:
    """Step 1 alone: mediation effects, places ranked, ablation, patch maps; writes frames and figures."""
    start(asked.threads)
    from care_lens import plots
    from care_lens.pipeline.diagnose import diagnose as step
    from care_lens.pipeline.generating import generating
    from care_lens.pipeline.needs import require_diagnosable
    from care_lens.pipeline.run import open_stage

    lvlm, study = asked.load()
    settings = asked.settings(study)
    study = settings.asked(settings.part(study))
    require_diagnosable(study, settings)
    with (
        open_stage(lvlm, asked.out, study, settings, model=asked.title) as stage,
        generating(lvlm, settings.generation),
    ):
        found = step(lvlm, study, settings, stage)
    results = {f"effects_{k}": v for k, v in found.effects.items()} | {
        f"patches_{k}": v for k, v in found.patches.items()
    }
    results |= {f"places_{k}": v for k, v in found.places.items()}
    for name, result in {**results, "ablation": found.ablation}.items():
        plots.save_figure(result.plot(), asked.out / "figures" / f"{name}.html")
    base.console.print(f"frames and figures: {asked.out}")


@app.command()
@told
@one_process
@takes_options()
def fit(asked: Asked) -> None:
    """Rank places, learn on the fit split and choose on validation; saves the repair to OUT/repair."""
    start(asked.threads)
    from care_lens.mediation.placement import reader_layers
    from care_lens.pipeline.choose import choose
    from care_lens.pipeline.chosen import chosen
    from care_lens.pipeline.diagnose import measure_pairs, rank_pairs
    from care_lens.pipeline.generating import generating
    from care_lens.pipeline.learn import capture_fit
    from care_lens.pipeline.needs import require_feasible
    from care_lens.pipeline.prove import search_store
    from care_lens.pipeline.run import open_stage

    lvlm, study = asked.load()
    settings = asked.settings(study)
    study = settings.asked(settings.part(study))
    study.require()
    settings = require_feasible(study, settings)
    out = asked.out
    with (
        open_stage(lvlm, out, study, settings, model=asked.title) as stage,
        generating(lvlm, settings.generation),
        asked.answering(lvlm),
    ):
        effects, _ = measure_pairs(lvlm, study, settings, stage, maps=False)
        placement = reader_layers(rank_pairs(effects, settings, stage), lvlm.n_layers(), score=settings.carrier_score)
        rows, store = capture_fit(lvlm, study, settings), search_store(stage.directory, study)
        choice = chosen(stage, out, lambda: choose(lvlm, study, rows, settings, placement=placement, store=store))
    base.console.print(f"{choice.plan}; written at {choice.writer_site}: {out / 'repair'}")


@app.command()
@told
@takes_options(unused=TUNING, out="results/evaluate")
def evaluate(
    asked: Asked,
    defences: Annotated[
        list[str],
        typer.Argument(help="Folders of saved repairs or defences, as PATH or NAME=PATH.", metavar="DEFENCES..."),
    ],
) -> None:
    """Saved repairs and defences beside the undefended model on the test split; several processes share the answers."""
    start(asked.threads)
    from care_lens.core.files import in_use, swept, write_whole
    from care_lens.core.processes import Process
    from care_lens.evaluation import evaluate_sharded as step
    from care_lens.pipeline.report_words import part_said
    from care_lens.pipeline.saved import UNDEFENDED, read_defences

    read = read_defences(defences)
    process = Process.current()
    if not process.alone and asked.device is None:
        asked = replace(asked, device=process.device())
    lvlm, study = asked.load()
    settings = asked.settings(study)
    study = settings.part(study)
    asked.out.mkdir(parents=True, exist_ok=True)
    with asked.answering(lvlm) if process.alone or asked.workers else nullcontext():
        table = step(
            lvlm,
            {c: list(e) for c, e in study.suites["test"].items()},
            {UNDEFENDED: None, **read},
            judge=study.judge,
            directory=asked.out,
            settings=settings.generation,
            batch_size=settings.batch_size,
            n_boot=settings.n_boot,
            seed=asked.seed,
        )
    if table is None:
        base.console.print(f"process {process.name}: its share of the answers is in {asked.out}")
        return
    with in_use(asked.out):
        swept(asked.out, inside=False)  # what a kill has left
    table.save(asked.out, "evaluate")
    parts = [table.to_markdown(metrics=(metric,)) for metric in ("asr", "accuracy")]
    text = "\n".join([*parts, *filter(None, [part_said(settings)])])
    write_whole(asked.out / "evaluate.md", text)
    base.console.print(text, markup=False, soft_wrap=True)
