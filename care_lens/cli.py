"""Command line: `care-lens run`, `diagnose`, `fit`, `evaluate`, `info`."""

import importlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

if TYPE_CHECKING:
    from care_lens.core import Judge
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
Out = Annotated[Path, typer.Option(help="Folder of the results; `run` resumes there.")]
Short = Annotated[bool, typer.Option("--short", help="A few examples a channel, for a quick look.")]
Seed = Annotated[int, typer.Option(help="Seed of every draw.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
Device = Annotated[str | None, typer.Option(help="As device_map of transformers: 'auto', 'cuda', 'cuda:1', 'cpu'.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: that of the weights.")]
Batch = Annotated[int | None, typer.Option(help="Examples at a time. [default: 128 bundled, 8 others]")]
Tokens = Annotated[int | None, typer.Option(help="New tokens of an answer. [default: 14 bundled, 128 others]")]
JudgeOf = Annotated[
    str | None,
    typer.Option(
        help="'module:name' of a judge object. [default: refusal substrings, which take any other answer for compliance]"
    ),
]


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
    logging.getLogger("care_lens.subspace").setLevel(logging.WARNING)  # a run fits hundreds of small subspaces


def _judge(name: str | None) -> "Judge":
    from care_lens.evaluation import SubstringRefusalJudge

    if name is None:
        logging.getLogger("care_lens").warning(
            "judge: refusal substrings. Any answer without one counts as compliance, on benign prompts as a right answer; "
            "give --judge module:name to judge by more"
        )
        return SubstringRefusalJudge()
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise typer.BadParameter(
            f"--judge must be 'module:name' of an object that can be imported ({error})"
        ) from error


def _load(
    model: str,
    data: Path | None,
    seed: int,
    device: str | None = None,
    dtype: str | None = None,
    judge: str | None = None,
) -> "tuple[HookedLVLM, Study]":
    if model == "bundled":
        if data is not None or judge is not None:
            raise typer.BadParameter("--data and --judge go with a model of your own; the bundled one brings both")
        from care_lens import organism

        return organism.load(), organism.study(seed=seed)
    if data is None:
        raise typer.BadParameter("--data must be given for a model that is not bundled; see the docs page on studies")
    found = _judge(judge)
    from care_lens.data import read_study

    lvlm = _model(model, device, dtype)
    return lvlm, read_study(data, tokenizer=lvlm.tokenizer, judge=found, seed=seed)


def _model(model: str, device: str | None, dtype: str | None) -> "HookedLVLM":
    import torch

    from care_lens.lvlm import HookedLVLM

    kind = getattr(torch, dtype, None) if dtype else None
    if dtype and not isinstance(kind, torch.dtype):
        raise typer.BadParameter(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    return HookedLVLM.from_pretrained(model, device_map=device, dtype=kind)


def _settings(model: str, short: bool, seed: int, batch_size: int | None, max_new_tokens: int | None) -> "RunSettings":
    from care_lens.pipeline import RunSettings

    settings = RunSettings(seed=seed)
    if model != "bundled":
        settings = replace(settings, batch_size=8, max_new_tokens=128)
    given = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    settings = replace(settings, **{k: v for k, v in given.items() if v is not None})
    return settings.short() if short else settings


@app.command()
def run(
    model: Model = "bundled",
    data: Data = None,
    out: Out = Path("results/run"),
    short: Short = False,
    seed: Seed = 0,
    threads: Threads = 2,
    device: Device = None,
    dtype: Dtype = None,
    batch_size: Batch = None,
    max_new_tokens: Tokens = None,
    judge: JudgeOf = None,
) -> None:
    """Diagnose, learn, choose on validation, prove on test; writes report.html."""
    _start(threads)
    from care_lens.pipeline import report, run, write_report

    lvlm, study = _load(model, data, seed, device, dtype, judge)
    result = run(lvlm, study, out, model=model, settings=_settings(model, short, seed, batch_size, max_new_tokens))
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
    device: Device = None,
    dtype: Dtype = None,
    batch_size: Batch = None,
    max_new_tokens: Tokens = None,
    judge: JudgeOf = None,
) -> None:
    """Step 1 alone: mediation effects, places ranked, ablation, patch maps; writes frames and figures."""
    _start(threads)
    from care_lens import plots
    from care_lens.pipeline.diagnose import diagnose as step
    from care_lens.pipeline.run import open_stage

    lvlm, study = _load(model, data, seed, device, dtype, judge)
    settings = _settings(model, short, seed, batch_size, max_new_tokens)
    study = study.limited(settings.limit) if settings.limit else study
    with open_stage(lvlm, out, study, settings, model=model) as stage:
        found = step(lvlm, study, settings, stage)
    results = {f"effects_{k}": v for k, v in found.effects.items()} | {
        f"patches_{k}": v for k, v in found.patches.items()
    }
    results |= {f"places_{k}": v for k, v in found.places.items()}
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
    device: Device = None,
    dtype: Dtype = None,
    batch_size: Batch = None,
    max_new_tokens: Tokens = None,
    judge: JudgeOf = None,
) -> None:
    """Rank places, learn on the fit split and choose on validation; saves the repair to OUT/repair."""
    _start(threads)
    from care_lens.evaluation import GenerationStore
    from care_lens.pipeline.choose import choose
    from care_lens.pipeline.chosen import chosen
    from care_lens.pipeline.diagnose import measure_pairs, rank_pairs
    from care_lens.pipeline.learn import capture_fit
    from care_lens.pipeline.place import reader_layers
    from care_lens.pipeline.prove import SEARCH
    from care_lens.pipeline.run import open_stage

    lvlm, study = _load(model, data, seed, device, dtype, judge)
    settings = _settings(model, short, seed, batch_size, max_new_tokens)
    study = study.limited(settings.limit) if settings.limit else study
    study.require()
    with open_stage(lvlm, out, study, settings, model=model) as stage:
        effects, _ = measure_pairs(lvlm, study, settings, stage, maps=False)
        placement = reader_layers(rank_pairs(effects, settings, stage), lvlm.n_layers(), score=settings.carrier_score)
        rows, store = capture_fit(lvlm, study, settings), GenerationStore(stage.directory / SEARCH)
        choice = chosen(stage, out, lambda: choose(lvlm, study, rows, settings, placement=placement, store=store))
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
    device: Device = None,
    dtype: Dtype = None,
    batch_size: Batch = None,
    max_new_tokens: Tokens = None,
    judge: JudgeOf = None,
) -> None:
    """A saved repair beside the undefended model on the test split."""
    _start(threads)
    from care_lens.evaluation import GenerationStore
    from care_lens.evaluation import evaluate as step
    from care_lens.repair import HybridFusion

    lvlm, study = _load(model, data, seed, device, dtype, judge)
    settings = _settings(model, short, seed, batch_size, max_new_tokens)
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
def info(model: Model = "bundled", device: Device = None, dtype: Dtype = None) -> None:
    """What a model offers: towers, layers, sites."""
    from care_lens.core.results import package_versions

    if model == "bundled":
        from care_lens import organism

        lvlm = organism.load()
    else:
        lvlm = _model(model, device, dtype)
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
