"""Command line: `care-lens run`, `diagnose`, `fit`, `evaluate`, `info`."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

if TYPE_CHECKING:
    from care_lens.data import Study
    from care_lens.lvlm import HookedLVLM
    from care_lens.pipeline import RunSettings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Diagnose and repair unsafe channels of vision-language models.",
)
console = Console()

Model = Annotated[str, typer.Option(help="'bundled', a hub name, or a directory.")]
Data = Annotated[
    Path | None, typer.Option(help="Folder with examples.jsonl and study.json; not for the bundled model.")
]
Out = Annotated[Path, typer.Option(help="Folder of the run; the same command resumes there.")]
Short = Annotated[bool, typer.Option("--short", help="A few examples a channel, for a quick look.")]
Seed = Annotated[int, typer.Option(help="Seed of every draw.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]


def _start(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=console, show_path=False)],
        force=True,
    )
    logging.getLogger("care_lens").setLevel(logging.INFO)


def _load(model: str, data: Path | None, seed: int) -> "tuple[HookedLVLM, Study]":
    if model == "bundled":
        from care_lens import organism

        return organism.load(), organism.study(seed=seed)
    if data is None:
        raise typer.BadParameter("--data must be given for a model that is not bundled; see the docs page on studies")
    from care_lens.data import read_study
    from care_lens.evaluation import SubstringRefusalJudge
    from care_lens.lvlm import HookedLVLM

    lvlm = HookedLVLM.from_pretrained(model)
    return lvlm, read_study(data, tokenizer=lvlm.tokenizer, judge=SubstringRefusalJudge(), seed=seed)


def _settings(short: bool, seed: int) -> "RunSettings":
    from care_lens.pipeline import RunSettings

    settings = RunSettings(seed=seed)
    return settings.short() if short else settings


@app.command()
def run(
    model: Model = "bundled",
    data: Data = None,
    out: Out = Path("results/run"),
    short: Short = False,
    seed: Seed = 0,
    threads: Threads = 2,
) -> None:
    """Diagnose, learn, choose on validation, prove on test; writes report.html."""
    _start(threads)
    from care_lens.pipeline import report, run, write_report

    lvlm, study = _load(model, data, seed)
    result = run(lvlm, study, out, model=model, settings=_settings(short, seed))
    page = write_report(result, out)
    table = Table(title=f"{study.name}: before and after (test split)")
    for column in ("", "before", "after"):
        table.add_column(column)
    key = report.summary(result)
    for name in ("worst seen ASR", "worst held-out ASR", "benign accuracy", "lowest benign accuracy"):
        table.add_row(name, *(f"{100 * key[f'{name} {when}']:.1f} %" for when in ("before", "after")))
    console.print(table)
    console.print(f"report: {page}   ({sum(result.seconds.values()):.0f} s)")


@app.command()
def diagnose(
    model: Model = "bundled",
    data: Data = None,
    out: Out = Path("results/run"),
    short: Short = False,
    seed: Seed = 0,
    threads: Threads = 2,
) -> None:
    """Step 1 alone: mediation effects, ablation, patch maps; writes frames and figures."""
    _start(threads)
    from care_lens import plots
    from care_lens.pipeline.diagnose import diagnose as step
    from care_lens.pipeline.run import open_stage

    lvlm, study = _load(model, data, seed)
    settings = _settings(short, seed)
    study = study.limited(settings.limit) if settings.limit else study
    found = step(lvlm, study, settings, open_stage(out, study, settings, model=model))
    results = {f"effects_{k}": v for k, v in found.effects.items()} | {
        f"patches_{k}": v for k, v in found.patches.items()
    }
    for name, result in {**results, "ablation": found.ablation}.items():
        plots.save_figure(result.plot(), out / "figures" / f"{name}.html")
    console.print(f"frames and figures: {out}")


@app.command()
def fit(
    model: Model = "bundled",
    data: Data = None,
    out: Out = Path("results/run"),
    short: Short = False,
    seed: Seed = 0,
    threads: Threads = 2,
) -> None:
    """Learn on the fit split and choose on validation; saves the repair to OUT/repair."""
    _start(threads)
    from care_lens.pipeline.choose import choose
    from care_lens.pipeline.learn import capture_fit

    lvlm, study = _load(model, data, seed)
    settings = _settings(short, seed)
    study = study.limited(settings.limit) if settings.limit else study
    choice = choose(lvlm, study, capture_fit(lvlm, study, settings), settings)
    choice.repair.save(out / "repair")
    console.print(f"{choice.plan}; written at {choice.writer_site}: {out / 'repair'}")


@app.command()
def evaluate(
    repair: Annotated[Path, typer.Argument(help="Folder of a saved repair.")],
    model: Model = "bundled",
    data: Data = None,
    out: Out = Path("results/run"),
    short: Short = False,
    seed: Seed = 0,
    threads: Threads = 2,
) -> None:
    """A saved repair beside the undefended model on the test split."""
    _start(threads)
    from care_lens.evaluation import GenerationStore
    from care_lens.evaluation import evaluate as step
    from care_lens.repair import HybridFusion

    lvlm, study = _load(model, data, seed)
    settings = _settings(short, seed)
    study = study.limited(settings.limit) if settings.limit else study
    saved = replace(HybridFusion.load(repair), name="repair")
    out.mkdir(parents=True, exist_ok=True)
    table = step(
        lvlm,
        {c: list(e) for c, e in study.suites["test"].items()},
        {"none": None, "repair": saved},
        judge=study.judge,
        store=GenerationStore(out / "answers.jsonl"),
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        n_boot=settings.n_boot,
        seed=seed,
    )
    table.save(out, "evaluate")
    console.print(table.to_markdown(metrics=("asr",)))
    console.print(table.to_markdown(metrics=("accuracy",)))


@app.command()
def info(model: Model = "bundled") -> None:
    """What a model offers: towers, layers, sites."""
    from care_lens.core.results import package_versions

    if model == "bundled":
        from care_lens import organism

        lvlm = organism.load()
    else:
        from care_lens.lvlm import HookedLVLM

        lvlm = HookedLVLM.from_pretrained(model)
    table = Table(title=f"{model}: {type(lvlm.hf_model).__name__}")
    for column in ("site", "width", "axes", "editable"):
        table.add_column(column)
    for site in lvlm.sites():
        about = lvlm.site_info(site)
        table.add_row(str(site), str(about.width), " ".join(about.axes), "yes" if about.editable else "no")
    console.print(table)
    console.print(package_versions())


def main() -> None:
    """Entry point of the `care-lens` command."""
    app()
