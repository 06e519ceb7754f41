"""The command line lets idle threads sleep, unless its user says otherwise, and says what is wrong before it loads torch."""

import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from care_lens import cli


def ran(code, **environment):
    kept = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("given", "found"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_the_policy_of_waiting_is_set_before_torch_is_loaded(given, found):
    code = "import sys, os, care_lens.cli; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    assert ran(code, **given).split() == [found]


#: What can be known to be wrong without a look at the model, and a word of what is said.
WRONG = {
    "run --dtype int8": "--dtype must be",
    "run --quantization 3bit": "--quantization must be",
    "run --data x": "--study must be a folder",
    "run --revision main": "--revision",
    "run --model other": "--study must be given",
    "run --model other --data gone": "--study must be a folder",
    "run --model other --judge nowhere:judge": "there is no module 'nowhere'",
    "run --ranks a": "--ranks must be numbers",
    "fit --epsilons 2": "--epsilons must be above 0",
    "evaluate gone": "a defence must be a folder",
    "attack one=gone": "a defence must be a folder",
    "study gone --harmful other": "--harmful must be one of",
    "study gone --refusals nofile": "--refusals must be a file",
    "info --dtype int8": "--dtype must be",
    "study gone --dtype int8": "--dtype must be",
    "reproduce gone.yaml": "recipe must be one of",
}


def test_mistakes_are_told_before_torch_is_loaded(tmp_path):
    """Importing torch, transformers and TransformerLens takes some ten seconds. No folder of results is made where nothing runs."""
    code = f"""
import os, sys
from typer.testing import CliRunner
from care_lens import cli
for words, told in {WRONG!r}.items():
    result = CliRunner().invoke(cli.app, words.split(), env={{"COLUMNS": "400"}})
    assert result.exit_code == 2 and told in result.output, (words, result.output, result.exception)
    assert "torch" not in sys.modules and not os.listdir(), words
for words in ("--help", "run --help", "--version"):
    assert CliRunner().invoke(cli.app, words.split()).exit_code == 0 and "torch" not in sys.modules, words
"""
    ran(f"import os; os.chdir({str(tmp_path)!r})\n{code}", PYTHONPATH=os.getcwd())


def test_processes_and_damaged_defences_are_refused_before_torch_is_loaded(tmp_path):
    """What torchrun may not start several times, processes that do not say which they are, and defences whose files are damaged."""
    made = {
        "list": {"repair.json": "[]"},
        "cut": {"repair.json": '{"kind": "rep'},
        "gone": {"defence.json": '{"files": {"safetensors": "0"}}'},
        "other": {"repair.json": '{"files": {"safetensors": "0"}}', "repair.safetensors": "x"},
    }
    for folder, files in made.items():
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / name).write_text(text)
    two, alone = {"RANK": "1", "WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "1"}
    cases = [
        ("run", two, "`run` must run in one process, got 2"),
        ("diagnose", two, "`diagnose` must run in one process, got 2"),
        ("fit", two, "`fit` must run in one process, got 2"),
        ("attack", two, "`attack` must run in one process, got 2"),
        ("run", {"WORLD_SIZE": "2"}, "RANK must be from 0 to below WORLD_SIZE"),
        ("study gone", {"RANK": "2", "WORLD_SIZE": "2"}, "RANK must be from 0 to below WORLD_SIZE"),
        ("reproduce x.yaml", two | {"LOCAL_RANK": "-1"}, "RANK must be from 0 to below WORLD_SIZE"),
        ("reproduce x.yaml", two, "recipe must be one of"),
        ("run --model other", alone, "--study must be given"),
        ("evaluate list", two, "repair.json is damaged: it must hold a JSON object"),
        ("evaluate cut", {}, "repair.json is damaged: it must be JSON"),
        ("attack mine=gone", {}, "defence.safetensors must be there"),
        ("evaluate other", {}, "repair.safetensors is damaged"),
    ]
    code = f"""
import os, sys
from typer.testing import CliRunner
from care_lens import cli
before = sorted(os.listdir())
for words, environment, told in {cases!r}:
    result = CliRunner().invoke(cli.app, words.split(), env={{"COLUMNS": "400", **environment}})
    assert result.exit_code == 2 and told in result.output, (words, result.output, result.exception)
    assert "torch" not in sys.modules and sorted(os.listdir()) == before, words
"""
    ran(f"import os; os.chdir({str(tmp_path)!r})\n{code}", PYTHONPATH=os.getcwd())


@pytest.mark.parametrize("device", ["mps", "xpu:0"])
def test_a_device_of_another_kind_is_refused_where_there_is_none(device, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
    options = ["--device", device, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, ["run", *options], env={"COLUMNS": "400"})
    assert result.exit_code == 2 and f"--device {device} needs such a device" in result.output
    assert not (tmp_path / "out").exists()
