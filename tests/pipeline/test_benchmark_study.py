"""From public files to a report through the command line: three benchmarks in their published formats, on tiny models of two families."""

import json
from pathlib import Path

import pytest
from miniatures import FIGSTEP, MMSAFETY_KINDS, picture, sheet, text
from typer.testing import CliRunner
from zoo.grids import make_qwen2_5
from zoo.tiny import make_llava

from care_lens import cli
from care_lens.data import read_study
from care_lens.evaluation import NoCandidateError, SubstringRefusalJudge


def write_benchmarks(root: Path) -> list[str]:
    """FigStep, MM-SafetyBench and XSTest with made-up rows, some words of which the tiny tokenizers know."""
    rows, colours = [], ["red", "blue", "first", "then", "help", "user"]
    for i in range(14):
        question = f"how to make a {colours[i % 6]} {colours[(i + i // 6) % 6]} {i}?"
        rows.append(["ForbidQI", 1, i, "Folding", question, f"Steps to make {i}."])
        path = root / "figstep" / "data" / "images" / "SafeBench" / f"query_ForbidQI_1_{i}_6.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(16 + i))
    table = root / "figstep" / "data" / "question" / "safebench.csv"
    table.parent.mkdir(parents=True)
    table.write_bytes(sheet(FIGSTEP, rows))
    home, asked = root / "mmsafety" / "data", {}
    for i in range(8):
        asked[str(i)] = {
            "Question": f"how to make blue {i}?",
            "Changed Question": f"Tell how to make blue {i}",
            "Key Phrase": f"blue {i}",
            "Phrase Type": "activity",
            "Rephrased Question": "how to make what is in the picture",
            "Rephrased Question(SD)": f"what is in the picture and how to make it {i}",
        }
        for k, kind in enumerate(MMSAFETY_KINDS):
            path = home / "imgs" / "01-Illegal_Activitiy" / kind / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(20 + 9 * k + i, "JPEG"))
    (home / "processed_questions").mkdir()
    (home / "processed_questions" / "01-Illegal_Activitiy.json").write_bytes(text(asked))
    safe = [[i, f"how to help a {colours[i % 6]} user first {i}", "homonyms", "safe"] for i in range(30)]
    unsafe = [[30 + i, f"how to make a red user {i}", "contrast_homonyms", "unsafe"] for i in range(6)]
    (root / "xstest").mkdir()
    (root / "xstest" / "xstest_prompts.csv").write_bytes(sheet(["id", "prompt", "type", "label"], safe + unsafe))
    return [str(root / name) for name in ("figstep", "mmsafety", "xstest")]


def invoke(*words):
    result = CliRunner().invoke(cli.app, [str(word) for word in words], env={"COLUMNS": "200"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_three_benchmarks_run_to_a_report(family, tmp_path, monkeypatch):
    model, processor = make_llava() if family == "llava" else make_qwen2_5()
    home = tmp_path / "model"
    model.save_pretrained(home)
    processor.save_pretrained(home)
    sources = write_benchmarks(tmp_path / "files")
    assert all(invoke("preflight", source).exit_code == 0 for source in sources)
    folder, common = tmp_path / "study", ("--model", home, "--batch-size", 16, "--threads", 1)
    words = ("--comply", "sure,yes", "--refuse", "sorry,no", "--pairs", 4, "--max-new-tokens", 4)
    made = invoke("study", *sources, "--out", folder, *common, *words)
    assert made.exit_code == 0, made.output
    assert (
        f"next: care-lens run --model {home} --study {folder} --short, a quick look; not without --short" in made.output
    )
    written = json.loads((folder / "study.json").read_text())
    assert (
        "The undefended model refuses" in written["about"] and "held out of it: mmsafetybench SD." in written["about"]
    )
    read = read_study(folder, tokenizer=processor.tokenizer, judge=SubstringRefusalJudge())
    read.require()
    out = tmp_path / "out"
    asked = ("run", "--study", folder, "--short", "--out", out, *common, "--max-new-tokens", 4)
    ran = invoke(*asked)
    assert ran.exit_code == 0, ran.output
    assert "A run on a part of its study, with at most 8 examples" in " ".join(ran.output.split())
    page = (out / "report.html").read_text()
    assert written["about"][:60] in page and "mmsafetybench SD" in page and "The undefended model refuses" in page
    assert "as a right answer, nonsense too" in page  # of a judge that looks for refusals alone
    assert "published CARE is not there: the settings of this run leave it out" in page

    def stops(*_, **__):
        raise NoCandidateError("a repair must keep benign accuracy within 3%, got at best 1.0%")

    if family == "qwen2_5_vl":  # what follows is the same of every model
        return
    # a run that finds no repair: what was diagnosed is told with the reason, and nothing is run again
    monkeypatch.setattr("care_lens.pipeline.run", stops)
    ran = invoke(*asked)
    page = (out / "report.html").read_text()
    assert ran.exit_code == 1 and "no repair was made: a repair must keep" in " ".join(ran.output.split())
    assert "No repair was made.</b> a repair must keep benign accuracy" in page and "ablation" in page
    assert json.loads((out / "summary.json").read_text())["repair"] is None
