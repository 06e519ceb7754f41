"""The command line tells its user's errors in a line, shows its defaults, and checks what a run needs before it starts."""

import io
import json
import logging
import os
import sys
from dataclasses import replace

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from care_lens import cli, organism
from care_lens.cli.asked import Asked
from care_lens.core import CareLensError, Example
from care_lens.data import write_examples
from care_lens.data.study import StudyError
from care_lens.pipeline import RunSettings
from care_lens.pipeline.needs import (
    NeedsError,
    needed_for,
    require_diagnosable,
    require_feasible,
    require_ready,
    shortened,
)
from care_lens.pipeline.report import share_text


def invoke(*words, **options):
    return CliRunner().invoke(cli.app, list(words), **options)


@pytest.fixture(scope="module")
def study():
    return organism.study()


@pytest.fixture
def folder(tmp_path):
    write_examples([Example("p", id=str(i), channel="benign") for i in range(9)], tmp_path / "examples.jsonl")
    settings = {"name": "s", "refusal": "sorry", "comply": ["sure"], "refuse": ["sorry"], "seen": {}}
    (tmp_path / "study.json").write_text(json.dumps(settings))
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--threads", "0"], "threads"),
        (["--seed", "-1"], "seed"),
        (["--batch-size", "0"], "batch-size"),
        (["--max-new-tokens", "-3"], "max-new-tokens"),
        (["--seed", "x"], "seed"),
        (["--device", "gpu"], "--device must be"),
        (["--device", "cuda:99"], "needs a GPU"),
        (["--dtype", "int8"], "--dtype must be"),
        (["--judge", "care_lens.organism:OrganismJudge"], "--judge goes with a --study of your own"),
        (["--data", "x"], "--study must be a folder with examples.jsonl and study.json"),
        (["--model", "gone"], "--study must be given"),
        (["--model", "gone", "--data", "nowhere"], "--study must be a folder with examples.jsonl and study.json"),
        (["--model", "gone", "--data", "FOLDER", "--judge", "nomodule:x"], "--judge must be"),
        (["--model", "gone", "--data", "FOLDER", "--judge", "os"], "--judge must be"),
        (["--model", "gone", "--data", "FOLDER", "--judge", "os:sep"], "got str"),
        (["--model", "gone", "--data", "FOLDER", "--judge", "care_lens.organism:OrganismJudge"], "make an instance"),
        (["--model", "gone", "--data", "FOLDER", "--dtype", "int8"], "--dtype must be"),
        (["--model", "FOLDER", "--data", "FOLDER"], "error: "),
        (["--out", "FOLDER/study.json"], "--out must be a folder that can be written"),
        (["--out", "FOLDER/study.json/deeper"], "--out must be a folder that can be written"),
    ],
)
def test_errors_of_the_user_are_told_in_a_line(folder, tmp_path, words, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = invoke("run", *(word.replace("FOLDER", str(folder)) for word in words), env={"COLUMNS": "400"})
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert message in result.output and "Traceback" not in result.output


def test_no_gpu_is_said_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(organism, "load", lambda **_: pytest.fail("loaded"))
    for verb in ("run", "diagnose", "fit", "info"):
        result = invoke(verb, "--device", "cuda", env={"COLUMNS": "400"})
        assert result.exit_code == 2 and "this machine has 0" in result.output


def test_device_and_dtype_are_those_of_the_bundled_model_too(monkeypatch):
    asked, load = {}, organism.load
    monkeypatch.setattr(organism, "load", lambda **options: asked.update(options) or load(**options))
    lvlm, _ = cli.loading.load("bundled", None, 0, "cpu", "bfloat16")
    assert lvlm.dtype == torch.bfloat16 and asked["device_map"] == "cpu"
    asked.clear()
    assert invoke("info", "--device", "cpu", "--dtype", "float16").exit_code == 0
    assert asked == {"device_map": "cpu", "dtype": torch.float16}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    result = invoke("run", "--out", str(tmp_path / "new"), env={"COLUMNS": "400"})
    assert result.exit_code == 2 and "--out must be a folder that can be written" in result.output


def test_a_saved_repair_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(organism, "load", lambda **_: None)
    monkeypatch.setattr(organism, "study", lambda seed: None)
    result = invoke("evaluate", str(tmp_path / "gone"), "--out", str(tmp_path), env={"COLUMNS": "400"})
    assert result.exit_code == 2 and "--" not in result.output[:2] and "Traceback" not in result.output


def test_tracebacks_are_there_for_those_who_ask(folder, monkeypatch):
    monkeypatch.setenv(cli.TRACEBACK, "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = invoke("run", "--model", str(folder), "--data", str(folder), "--out", str(folder / "out"))
    assert isinstance(result.exception, (OSError, ValueError))


@pytest.mark.parametrize("verb", ["run", "diagnose", "fit", "evaluate"])
def test_help_shows_every_default(verb):
    text = " ".join(invoke(verb, "--help", env={"COLUMNS": "300"}).output.split())
    for default in (
        "[default: bundled]", "128 bundled, 8 others", "14 bundled, 128 others", "refusal substrings, which take any",
        "that of the weights", "[default: 2]", "[default: 0]", "(full)", "(cpu)",
        f"[default: results/{'evaluate' if verb == 'evaluate' else 'run'}]",
    ):  # fmt: skip
        assert default in text, default
    assert ("--epsilons" in text) == (
        verb != "evaluate"
    )  # it is taken there too, from a file of options that commands share


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_info_cuts_nothing_off(width, monkeypatch):
    monkeypatch.setattr(cli.base, "console", Console(width=width))
    result = invoke("info")
    assert result.exit_code == 0 and "\u2026" not in result.output
    rows = [line for line in result.output.splitlines() if line.startswith("\u2502")]
    names = "".join(row.split("\u2502")[1].strip() for row in rows)
    with organism.load() as lvlm:
        assert names == "".join(str(site) for site in lvlm.sites())


def test_a_bundled_study_needs_nothing_more(study):
    settings = RunSettings()
    assert require_feasible(study, settings) == settings
    short = shortened(study, settings)
    assert short == settings.short() and require_feasible(short.part(study), short) == short


def test_a_size_draws_what_it_uses_and_short_is_one(monkeypatch):
    drawn = []
    monkeypatch.setattr(cli.loading, "load_model", lambda *_: None)
    monkeypatch.setattr(organism, "study", lambda **given: drawn.append(given.get("only")))
    for asked in (
        Asked(size="compact"),
        Asked(short=True),
        Asked(size="short", short=True),
        Asked(),
        Asked(size="full"),
    ):
        asked.load()
    assert drawn == [organism.DEMONSTRATED] * 3 + [None] * 2
    assert Asked(short=True, size="compact").asked_size == "short"


def test_what_is_asked_for_by_name_stands_in_a_smaller_run(study):
    settings = Asked(size="compact", epsilons="0.03", batch_size=7).settings(study)
    assert settings == replace(RunSettings().compact(), epsilons=(0.03,), batch_size=7)


def test_an_epsilon_that_is_given_is_not_said_to_be_another(study, caplog):
    little = smaller(study, 20, 9)
    assert Asked(size="short", epsilons="0.2").settings(little).epsilons == (0.2,) and "epsilon" not in caplog.text
    assert Asked(size="short").settings(little).epsilons != (0.02,) and "epsilon" in caplog.text


def smaller(study, calibration, fit):
    """The study with so many benign calibration prompts, and so many examples in each seen channel of the fit."""
    benign = study.benign("calibration")[:calibration]
    benign = [replace(e, channel="benign", group=e.id) for e in benign]
    seen = [c for channels in study.seen.values() for c in channels]
    kept = {c: e[:fit] if c in seen else e for c, e in study.suites["fit"].items()}
    return replace(study, suites={**study.suites, "calibration": {"benign": tuple(benign)}, "fit": kept})


@pytest.mark.parametrize("epsilon", [0.01, 0.02, 0.05, 0.1, 0.3])
def test_calibration_needs_are_the_conformal_bound(study, epsilon):
    from care_lens.repair import ConformalGate, TooFewCalibration

    n = needed_for(epsilon)
    assert n >= 1 / epsilon - 1 - 1e-9 > n - 1
    ConformalGate.calibrate(torch.arange(float(n)), epsilon=epsilon)
    with pytest.raises(TooFewCalibration):
        ConformalGate.calibrate(torch.arange(float(n - 1)), epsilon=epsilon)


def test_what_a_study_lacks_and_what_it_is_too_small_for_come_together(study):
    settings = RunSettings()
    assert require_ready(study, settings) == require_feasible(study, settings)
    little = smaller(study, 40, 12)
    validation = {c: e for c, e in study.suites["validation"].items() if c != "plain"}
    with pytest.raises(StudyError, match=r"no examples of 'plain'.*; and .* needs 49 benign prompts"):
        require_ready(replace(little, suites={**little.suites, "validation": validation}), settings)
    with pytest.raises(StudyError, match="no examples of 'plain'") as alone:
        require_ready(replace(study, suites={**study.suites, "validation": validation}), settings)
    assert "benign prompts in each half" not in str(alone.value)
    with pytest.raises(NeedsError, match="needs 49 benign prompts"):
        require_ready(little, settings)


def test_needs_are_told_in_numbers_all_at_once(study):
    little = smaller(study, 40, 4)
    with pytest.raises(NeedsError) as raised:
        require_feasible(little, RunSettings())
    text = str(raised.value)
    assert "epsilon 0.02 needs 49 benign prompts in each half of the split, cut by item, got 20" in text
    assert "at least 98" in text and "epsilon of 0.05 or more" in text
    assert (
        "of rank 8, those of published CARE, need 9 examples in each seen modality, got {'visual': 4, 'textual': 8}"
        in text
    )
    one = replace(study, pairs={"word": study.pairs["wrapper"][:1]}, pair_outcomes={})
    with pytest.raises(NeedsError, match=r"'word' needs pairs of 2 items or more for intervals, got 1"):
        require_feasible(one, RunSettings())


def test_a_diagnosis_needs_pairs_and_attacks_and_nothing_of_the_gates(study):
    require_diagnosable(smaller(study, 1, 1), RunSettings())
    one = replace(study, pairs={"word": study.pairs["wrapper"][:1]}, pair_outcomes={})
    with pytest.raises(NeedsError, match=r"'word' needs pairs of 2 items or more for intervals, got 1"):
        require_diagnosable(one, RunSettings())
    bare = {c: e for c, e in study.suites["fit"].items() if e[0].harmful}
    with pytest.raises(NeedsError, match="a benign example to take the mean over, got none"):
        require_diagnosable(replace(study, suites={**study.suites, "fit": bare}), RunSettings())
    with pytest.raises(NeedsError, match="a seen attack channel, got none"):
        require_diagnosable(replace(study, seen={}), RunSettings())


def test_diagnose_tells_what_a_study_lacks_before_it_runs(study, tmp_path, monkeypatch):
    one = replace(study, pairs={"word": study.pairs["wrapper"][:1]}, pair_outcomes={})
    monkeypatch.setattr(cli.loading, "load", lambda *given: (None, one))
    result = invoke("diagnose", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and "'word' needs pairs of 2 items or more" in " ".join(result.output.split())
    assert not (tmp_path / "out" / "frames").exists()


def test_what_cannot_be_done_is_left_out_with_a_warning(study, caplog):
    kept = require_feasible(smaller(study, 150, 12), RunSettings(reader_ranks=(0, 20)))
    assert (kept.epsilons, kept.reader_ranks) == ((0.015, 0.02), (0,))
    assert "epsilons [0.01] are left out" in caplog.text and "reader ranks [20] are left out" in caplog.text


@pytest.mark.parametrize(("calibration", "fit"), [(6, 2), (20, 5), (4, 12), (150, 3)])
def test_a_quick_look_fits_any_study_and_says_how(study, calibration, fit, caplog):
    little = smaller(study, calibration, fit)
    short = shortened(little, RunSettings())
    assert require_feasible(short.part(little), short) == short
    assert "not to be quoted" in caplog.text
    assert (f"published CARE of rank {short.printed_rank}" in caplog.text) == (short.printed_rank < 8)
    assert (f"epsilon {short.epsilons[0]:g}" in caplog.text) == (short.epsilons != (0.02,))
    half = min(calibration, short.learn_limit) // 2
    assert short.epsilons[0] <= 1 / (half + 1) + 0.01


def test_a_study_without_held_out_channels_has_a_dash():
    assert share_text(float("nan")) == "- (none in the study)" and share_text(0.25) == "25.0 %"


def test_the_entry_point_is_there():
    assert callable(cli.main) and "care_lens.cli" in sys.modules


def test_a_command_gives_back_the_logging_of_its_process(monkeypatch, tmp_path):
    """Called from a notebook or a test, a command must not leave its handler or its levels behind, nor close anybody's."""
    root, ours = logging.getLogger(), logging.getLogger("care_lens")
    mine = logging.StreamHandler(io.StringIO())
    monkeypatch.setattr(root, "handlers", [mine])
    levels = root.level, ours.level
    during = []

    def run(*_args, **_options):
        during.append((list(root.handlers), ours.level))
        raise NeedsError("stop here")

    monkeypatch.setattr("care_lens.pipeline.run", run)
    result = invoke("run", "--out", str(tmp_path / "out"), "--threads", str(torch.get_num_threads()))
    assert result.exit_code != 0 and during, result.output
    (handlers, level) = during[0]
    assert mine not in handlers and len(handlers) == 1 and level == logging.INFO
    assert root.handlers == [mine] and (root.level, ours.level) == levels
    mine.handle(logging.makeLogRecord({"msg": "still open"}))
    assert mine.stream.getvalue() == "still open\n"


def test_a_repair_that_is_not_there_is_told_before_a_model_is_loaded(monkeypatch, tmp_path):
    monkeypatch.setattr(cli.loading, "load", lambda *_: pytest.fail("the model was loaded"))
    result = invoke("evaluate", str(tmp_path))
    assert result.exit_code == 2 and "defence must be a folder with repair.json or defence.json" in " ".join(
        result.output.split()
    )


def test_named_errors_are_told_in_a_line_and_faults_of_the_code_are_not(capsys, monkeypatch):
    monkeypatch.delenv(cli.TRACEBACK, raising=False)

    class Own(CareLensError):
        """Neither a ValueError nor of this package."""

    def raising(error):
        @cli.base.told
        def command():
            raise error

        return command

    with pytest.raises(typer.Exit):
        raising(Own("why it was refused"))()
    assert capsys.readouterr().err.startswith("error: why it was refused\n")
    for fault in (KeyError("x"), RuntimeError("of torch"), typer.BadParameter("told by typer")):
        with pytest.raises(type(fault)):
            raising(fault)()
