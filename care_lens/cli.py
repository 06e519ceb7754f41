"""Command line: `care-lens run`, `diagnose`, `fit`, `evaluate`, `info`, `preflight`."""

import functools
import importlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar, cast

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.table import Table

from care_lens.core.errors import CareLensError

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

#: Set it to see the traceback of an error that is otherwise told in a line.
TRACEBACK = "CARE_LENS_TRACEBACK"

Model = Annotated[str, typer.Option(help="'bundled', a hub name, or a directory.")]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Folder with examples.jsonl and study.json.", show_default="none; the bundled model brings its own"
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of the results; `run` resumes there.")]
Short = Annotated[
    bool, typer.Option("--short", help="A few examples a channel, for a quick look.", show_default="all examples")
]
Seed = Annotated[int, typer.Option(help="Seed of every draw.", min=0, max=2**32 - 1)]
Threads = Annotated[int, typer.Option(help="CPU threads.", min=1)]
Device = Annotated[
    str | None,
    typer.Option(help="As device_map of transformers: 'auto', 'cuda', 'cuda:1', 'cpu'.", show_default="cpu"),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="that of the weights")]
Batch = Annotated[int | None, typer.Option(help="Examples at a time.", min=1, show_default="128 bundled, 8 others")]
Tokens = Annotated[
    int | None, typer.Option(help="New tokens of an answer.", min=1, show_default="14 bundled, 128 others")
]
JudgeOf = Annotated[
    str | None,
    typer.Option(
        help="'module:name' of a judge object.",
        show_default="refusal substrings, which take any other answer for compliance",
    ),
]

Command = TypeVar("Command", bound=Callable[..., None])


def _told(command: Command) -> Command:
    """A command that tells errors of its user (a missing folder, a file of another kind, too small a study) in a line, not in a traceback."""

    @functools.wraps(command)
    def tidy(*args: Any, **kwargs: Any) -> None:
        try:
            with _own_logging():
                command(*args, **kwargs)
        except (CareLensError, OSError, ValueError, NotImplementedError) as error:
            if os.environ.get(TRACEBACK):
                raise
            _fail(str(error) or type(error).__name__)
        except RuntimeError as error:
            if os.environ.get(TRACEBACK) or not type(error).__module__.startswith("care_lens."):
                raise
            _fail(str(error))

    return tidy  # type: ignore[return-value]


@contextmanager
def _own_logging() -> Iterator[None]:
    """A command sets logging for itself: a process that calls it (a notebook, a test) gets its own back."""
    loggers = [logging.getLogger(name) for name in (None, "care_lens", "care_lens.subspace")]
    handlers, levels = list(loggers[0].handlers), [log.level for log in loggers]
    try:
        yield
    finally:
        loggers[0].handlers[:] = handlers
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _fail(message: str) -> NoReturn:
    """Say what was wrong on standard error and leave with status 2."""
    typer.echo(f"error: {message}\n(set {TRACEBACK}=1 to see where)", err=True)
    raise typer.Exit(2)


def _require_device(device: str | None) -> None:
    import torch

    if device is None or device in ("auto", "balanced", "balanced_low_0", "sequential"):
        return
    try:
        found = torch.device(device)
    except RuntimeError:
        raise typer.BadParameter(f"--device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}") from None
    if found.type == "cuda" and (not torch.cuda.is_available() or (found.index or 0) >= torch.cuda.device_count()):
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise typer.BadParameter(f"--device {device} needs a GPU of that number, this machine has {there}; take cpu")


def _require_out(out: Path) -> None:
    """Refuse a folder of results that cannot be written, before a model is loaded."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise typer.BadParameter(f"--out must be a folder that can be written, got {out} ({error.strerror})") from None


def _start(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)
    root = logging.getLogger()
    shown = RichHandler(console=console, show_path=False)
    shown.setFormatter(logging.Formatter("%(message)s"))
    root.handlers[:] = [shown]
    root.setLevel(logging.WARNING)
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
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise typer.BadParameter(
            f"--judge must be 'module:name' of an object that can be imported, got {name!r} ({error})"
        ) from error
    if isinstance(found, type) or not callable(found):
        what = "a class: make an instance in that module" if isinstance(found, type) else type(found).__name__
        raise typer.BadParameter(f"--judge must name a function of (examples, texts) or a judge, got {what}")
    return cast("Judge", found)


def _load(
    model: str,
    data: Path | None,
    seed: int,
    device: str | None = None,
    dtype: str | None = None,
    judge: str | None = None,
    out: Path | None = None,
) -> "tuple[HookedLVLM, Study]":
    """The model and the study, after everything that can be refused without loading the model."""
    _require_device(device)
    if out is not None:
        _require_out(out)
    if model == "bundled":
        if data is not None or judge is not None:
            raise typer.BadParameter("--data and --judge go with a model of your own; the bundled one brings both")
        from care_lens import organism

        return organism.load(device_map=device, dtype=_kind(dtype)), organism.study(seed=seed)
    if data is None:
        raise typer.BadParameter("--data must be given for a model that is not bundled; see the docs page on studies")
    if not (data / "study.json").is_file() or not (data / "examples.jsonl").is_file():
        raise typer.BadParameter(
            f"--data must be a folder with examples.jsonl and study.json, got {data}, which is not"
        )
    found = _judge(judge)
    from care_lens.data import read_study

    lvlm = _model(model, device, dtype)
    return lvlm, read_study(data, tokenizer=lvlm.tokenizer, judge=found, seed=seed)


def _kind(dtype: str | None) -> Any:
    """The dtype of a name, or None."""
    import torch

    if dtype is None:
        return None
    if dtype not in ("float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"--dtype must be float32, bfloat16 or float16, got {dtype!r}")
    return getattr(torch, dtype)


def _model(model: str, device: str | None, dtype: str | None) -> "HookedLVLM":
    from care_lens.lvlm import HookedLVLM

    return HookedLVLM.from_pretrained(model, device_map=device, dtype=_kind(dtype))


def _settings(
    study: "Study", model: str, short: bool, seed: int, batch_size: int | None, max_new_tokens: int | None
) -> "RunSettings":
    from care_lens.pipeline import RunSettings
    from care_lens.pipeline.needs import shortened

    settings = RunSettings(seed=seed)
    if model != "bundled":
        settings = replace(settings, batch_size=8, max_new_tokens=128)
    given = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
    settings = replace(settings, **{k: v for k, v in given.items() if v is not None})
    return shortened(study, settings) if short else settings


@app.command()
@_told
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

    lvlm, study = _load(model, data, seed, device, dtype, judge, out)
    settings = _settings(study, model, short, seed, batch_size, max_new_tokens)
    result = run(lvlm, study, out, model=model, settings=settings)
    page = write_report(result, out)
    table = Table(title=f"{study.name}: before and after (test split)")
    for column in ("", "before", "after"):
        table.add_column(column)
    key = report.summary(result)
    for name in ("worst seen ASR", "worst held-out ASR", "benign accuracy", "lowest benign accuracy"):
        table.add_row(name, *(report.share_text(key[f"{name} {when}"]) for when in ("before", "after")))
    console.print(table)
    console.print(f"report: {page}   ({sum(result.seconds.values()):.0f} s)")


@app.command()
@_told
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
    from care_lens.pipeline.needs import require_diagnosable
    from care_lens.pipeline.run import open_stage

    lvlm, study = _load(model, data, seed, device, dtype, judge, out)
    settings = _settings(study, model, short, seed, batch_size, max_new_tokens)
    study = study.limited(settings.limit) if settings.limit else study
    require_diagnosable(study, settings)
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
@_told
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
    from care_lens.pipeline.needs import require_feasible
    from care_lens.pipeline.place import reader_layers
    from care_lens.pipeline.prove import SEARCH
    from care_lens.pipeline.run import open_stage

    lvlm, study = _load(model, data, seed, device, dtype, judge, out)
    settings = _settings(study, model, short, seed, batch_size, max_new_tokens)
    study = study.limited(settings.limit) if settings.limit else study
    study.require()
    settings = require_feasible(study, settings)
    with open_stage(lvlm, out, study, settings, model=model) as stage:
        effects, _ = measure_pairs(lvlm, study, settings, stage, maps=False)
        placement = reader_layers(rank_pairs(effects, settings, stage), lvlm.n_layers(), score=settings.carrier_score)
        rows, store = capture_fit(lvlm, study, settings), GenerationStore(stage.directory / SEARCH)
        choice = chosen(stage, out, lambda: choose(lvlm, study, rows, settings, placement=placement, store=store))
    console.print(f"{choice.plan}; written at {choice.writer_site}: {out / 'repair'}")


@app.command()
@_told
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

    if not (repair / "repair.json").is_file():
        raise typer.BadParameter(f"REPAIR must be a folder with repair.json, as `care-lens fit` saves it, got {repair}")
    saved = replace(HybridFusion.load(repair), name="repair")
    lvlm, study = _load(model, data, seed, device, dtype, judge, out)
    settings = _settings(study, model, short, seed, batch_size, max_new_tokens)
    study = study.limited(settings.limit) if settings.limit else study
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
@_told
def info(model: Model = "bundled", device: Device = None, dtype: Dtype = None) -> None:
    """What a model offers: towers, layers, sites."""
    from care_lens.core.results import package_versions

    _require_device(device)
    if model == "bundled":
        from care_lens import organism

        lvlm = organism.load(device_map=device, dtype=_kind(dtype))
    else:
        lvlm = _model(model, device, dtype)
    table = Table(title=f"{model}: {type(lvlm.hf_model).__name__}")
    for column in ("site", "width", "axes", "editable"):
        table.add_column(column, overflow="fold")  # narrow terminals break names, and cut none off
    for site in lvlm.sites():
        about = lvlm.site_info(site)
        table.add_row(str(site), str(about.width), " ".join(about.axes), "yes" if about.editable else "no")
    console.print(table)
    console.print(package_versions())


@app.command()
@_told
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
    table = Table(title=f"{', '.join(report.benchmarks) or 'no benchmark'}: {root}")
    for column in ("benchmark", "check", "level", "count", "what", "do"):
        table.add_column(column, overflow="fold", justify="right" if column == "count" else "left")
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    for row in report.frame.astype(str).to_dict("records"):
        level = f"[{colours[row['level']]}]{row['level']}[/]"
        table.add_row(row["benchmark"], row["check"], level, row["count"], escape(row["what"]), escape(row["do"]))
    console.print(table)
    for row in report.problems.head(rows).to_dict("records"):
        console.print(escape("{file} row {row}: {kind}: {what}; {do}".format(**row)))
    if (left := len(report.problems) - rows) > 0:
        console.print(f"and {left} rows more; --rows {len(report.problems)} lists all")
    raise typer.Exit(0 if report.ok else 1)


def main() -> None:
    """Entry point of the `care-lens` command."""
    app()
