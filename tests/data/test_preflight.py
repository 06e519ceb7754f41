"""Before a run: what is wrong with the files is found, named and counted, and nothing is said of files that are right."""

import json
from collections import Counter

import pandas as pd
import pytest
from miniatures import MAKERS, Mini, figstep, jailbreakv, mmsafetybench, picture, text, vlguard
from PIL import Image
from typer.testing import CliRunner

from care_lens.cli import app
from care_lens.core import Example
from care_lens.data import benchmarks, preflight, write_examples

#: Checks that say that a miniature is small, or that a table of the published set repeats itself.
SMALL = {"fewer rows", "picture size"}


def found(report, level=None):
    frame = report.frame if level is None else report.frame[report.frame["level"] == level]
    return dict(zip(frame["check"], frame["count"], strict=True))


@pytest.mark.parametrize("name", sorted({*MAKERS} - {"jailbreakv_mini", "scienceqa"}))
def test_files_that_are_right_have_no_errors_and_are_recognised(name, tmp_path):
    mini = MAKERS[name]()
    for root in (mini.at(tmp_path / "a"), mini.zipped(tmp_path / "a.zip", "main/")):
        report = preflight(root, pixels=True)
        assert report.ok and report.benchmarks == (mini.reader.name,) and report.problems.empty
        assert {*found(report, "warning")} <= SMALL
        assert found(report)["examples"] == len(mini.expected)


def test_several_tables_and_several_benchmarks_in_one_folder(tmp_path):
    MAKERS["jailbreakv_mini"]().at(tmp_path)
    MAKERS["xstest"]().at(tmp_path / "more")
    MAKERS["advbench"]().at(tmp_path)
    assert {*preflight(tmp_path).benchmarks} == {"jailbreakv full", "jailbreakv mini", "advbench", "xstest"}
    assert preflight(tmp_path, format="xstest").benchmarks == ("xstest",)
    assert preflight(tmp_path / "mini_JailBreakV_28K.csv").benchmarks == ("jailbreakv",)


def test_tables_of_other_names_are_told_by_their_columns(tmp_path):
    made = MAKERS["jailbreakbench"]()
    content = made.files["data/harmful-behaviors.csv"]
    (tmp_path / "mine.csv").write_bytes(content)
    assert preflight(tmp_path).benchmarks == ("jailbreakbench",)
    assert len(benchmarks.JailbreakBench(tmp_path)) == 5


def test_missing_misnamed_empty_and_damaged_pictures(tmp_path):
    made = jailbreakv()
    names = [n for n in made.files if n.endswith(".png")]
    del made.files[names[0]]
    made.files[names[0].replace(".png", "_copy.png")] = picture(10)
    made.files[names[1].upper()] = made.files.pop(names[1])
    made.files[names[2]] = b""
    made.files[names[3]] = b"no picture" * 50
    cut = Image.effect_noise((64, 64), 90)
    cut.save(tmp_path / "cut.png")
    made.files[names[4]] = (tmp_path / "cut.png").read_bytes()[:2000]
    report = preflight(made.at(tmp_path / "a"))
    assert found(report, "error") == {"missing picture": 1, "empty picture": 1, "damaged picture": 1}
    assert found(report, "warning") == {"misnamed picture": 1, "unused picture": 1, "fewer rows": 27_995}
    assert not report.ok and Counter(report.problems["kind"]) == {
        "missing picture": 1,
        "empty picture": 1,
        "damaged picture": 1,
    }
    assert found(preflight(tmp_path / "a", pixels=True), "error")["damaged picture"] == 2
    missing = report.problems[report.problems["kind"] == "missing picture"].iloc[0]
    assert missing["row"] == "1" and names[0] in missing["what"] and missing["do"]


def test_a_zip_that_was_cut_off(tmp_path):
    made = jailbreakv()
    pictures = Mini(made.reader, {n: c for n, c in made.files.items() if n.endswith(".png")}, [])
    made.files = {n: c for n, c in made.files.items() if n not in pictures.files}
    whole = pictures.zipped(made.at(tmp_path) / "images.zip")
    assert preflight(tmp_path).ok
    whole.write_bytes(whole.read_bytes()[:-40])
    assert found(preflight(tmp_path), "error") == {"examples": 0, "missing picture": 5, "damaged zip": 1}


def test_windows_paths_are_found_and_told(tmp_path):
    made = jailbreakv()
    made.files["JailBreakV_28K.csv"] = made.files["JailBreakV_28K.csv"].replace(b"figstep/", b"figstep\\")
    report = preflight(made.at(tmp_path))
    assert report.ok and found(report, "warning")["misnamed picture"] == 2
    assert "separators" in report.frame.set_index("check")["what"]["misnamed picture"]


def test_pictures_of_other_questions(tmp_path):
    made = figstep()
    one, other = (f"data/images/SafeBench/query_ForbidQI_1_{i}_6.png" for i in (1, 2))
    made.files[other] = made.files[one]
    report = preflight(made.at(tmp_path / "a"))
    assert found(report, "error") == {"wrong pairing": 1}
    assert (
        "figstep/ForbidQI_1_2 has the picture of figstep/ForbidQI_1_1"
        in report.frame.set_index("check")["what"]["wrong pairing"]
    )
    kinds = mmsafetybench()
    kinds.files["data/imgs/02-HateSpeech/TYPO/1.jpg"] = kinds.files["data/imgs/02-HateSpeech/SD_TYPO/1.jpg"]
    assert found(preflight(kinds.at(tmp_path / "b")), "error") == {"wrong pairing": 1}
    rows = jailbreakv()
    table = rows.files["JailBreakV_28K.csv"]
    lines = [f"{i},p {i},fold {i},figstep,x,figstep/{i}.png,x,False,False".encode() for i in range(20)]
    lines[7] = lines[7].replace(b"figstep/7.png", b"llm_transfer_attack/7.png")
    files = {f"figstep/{i}.png": picture(10 + i) for i in range(20)} | {"llm_transfer_attack/7.png": picture(50)}
    shuffled = Mini(rows.reader, {"JailBreakV_28K.csv": b"\n".join([table.split(b"\n")[0], *lines]), **files}, [])
    report = preflight(shuffled.at(tmp_path / "c"))
    assert (
        found(report, "error") == {"wrong pairing": 1}
        and "jailbreakv/7" in report.frame.set_index("check")["what"]["wrong pairing"]
    )


def test_examples_that_stand_twice_and_rows_that_lack_an_answer(tmp_path):
    made = vlguard()
    rows = json.loads(made.files["test.json"])
    rows[1]["id"], again = "v1", {**rows[1], "id": "again"}
    del rows[3]["instr-resp"][0]["response"]
    made.files["test.json"] = text([*rows, again])
    report = preflight(made.at(tmp_path))
    assert report.ok and found(report, "warning") == {"duplicate": 1, "no answer": 1, "fewer rows": 1558 - 9}


def test_answers_that_are_all_missing(tmp_path):
    made = MAKERS["vqa"]()
    del made.files["v2_mscoco_val2014_annotations.json"]
    assert found(preflight(made.at(tmp_path)), "warning") == {"no answer": 5}


def test_behaviours_in_two_splits(tmp_path):
    made = MAKERS["scienceqa"]()
    report = preflight(made.at(tmp_path))
    assert found(report, "warning")["leak over splits"] == 5 and report.ok


def test_behaviours_in_two_benchmarks(tmp_path):
    for name in ("figstep", "redteam2k", "xstest"):
        MAKERS[name]().at(tmp_path / name)
    report = preflight(tmp_path)
    assert report.ok and found(report, "warning")["shared behaviour"] == 5
    assert "figstep, redteam2k" in [*report.frame["benchmark"]]


def test_a_study_of_ones_own(tmp_path):
    shown = [Image.new("RGB", (8 + i, 8)) for i in range(4)]
    rows = [Example(f"fold {i}", image=shown[i], response="sure", id=str(i), group=f"g{i % 3}", channel="x", meta={"split": "fit" if i < 3 else "test"})
            for i in range(4)]  # fmt: skip
    path = write_examples(rows, tmp_path / "examples.jsonl")
    report = preflight(tmp_path)
    assert report.benchmarks == ("examples",) and found(report, "error") == {"leak over splits": 1}
    assert "'g0' in fit and test" in report.frame.set_index("check")["what"]["leak over splits"]
    lines = path.read_text().splitlines()
    names = [json.loads(line)["image"] for line in lines]
    (tmp_path / names[0]).rename((tmp_path / names[0]).with_suffix(".PNG"))
    lines[1] = lines[1].replace('"harmful": false', '"harmful": "no"')
    path.write_text("\n".join([*lines, "{no json"]) + "\n")
    report = preflight(tmp_path)
    assert found(report, "error") == {"missing picture": 1, "bad field": 1, "bad row": 1}
    do = dict(zip(report.problems["kind"], report.problems["do"], strict=True))
    assert ".PNG" in do["missing picture"] and found(report)["rows"] == 5 and found(report)["examples"] == 2


@pytest.mark.parametrize("beside", [False, True])
def test_a_table_that_cannot_be_read_is_told(beside, tmp_path):
    """It is called as a benchmark's table is, in an encoding that is not read: alone, and beside another benchmark."""
    if beside:
        MAKERS["advbench"]().at(tmp_path)
    made = MAKERS["xstest"]()
    (name,) = made.files
    (tmp_path / name).write_bytes(made.files[name].decode().encode("utf-16"))
    report = preflight(tmp_path)
    assert not report.ok and f"{name} must be UTF-8, got UTF-16" in " ".join(report.frame["what"])
    assert [*report.frame[report.frame["what"].str.contains("UTF-16")]["benchmark"]] == ["xstest"]


def test_what_is_no_benchmark(tmp_path):
    (tmp_path / "notes.txt").write_text("dear diary")
    report = preflight(tmp_path)
    assert not report.ok and repr(report) == "PreflightReport(no benchmark: 1 errors, 0 warnings)"
    assert "--format" in report.frame["do"][0] and "'.txt'" in report.frame["what"][0]
    report = preflight(tmp_path, format="figstep")
    assert not report.ok and "must hold SafeBench.csv" in report.frame["what"][0]
    with pytest.raises(benchmarks.BenchmarkError, match="format must be one of"):
        preflight(tmp_path, format="figstp")
    with pytest.raises(FileNotFoundError):
        preflight(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        preflight(tmp_path / "gone.csv")


def test_the_command(tmp_path):
    made = figstep()
    runner = CliRunner(env={"COLUMNS": "200"})
    done = runner.invoke(app, ["preflight", str(made.at(tmp_path / "a"))])
    assert done.exit_code == 0 and "figstep" in done.output
    made.files.pop("data/images/SafeBench/query_ForbidQI_1_1_6.png")
    done = runner.invoke(app, ["preflight", str(made.at(tmp_path / "b")), "--format", "figstep", "--pixels"])
    assert done.exit_code == 1 and "missing picture" in done.output and "query_ForbidQI_1_1_6.png" in done.output
    done = runner.invoke(app, ["preflight", str(tmp_path / "b"), "--rows", "0"])
    assert done.exit_code == 1 and "and 1 rows more" in done.output
    assert runner.invoke(app, ["preflight", str(tmp_path / "gone")]).exit_code == 2
    assert runner.invoke(app, ["preflight", str(tmp_path / "a"), "--format", "x"]).exit_code == 2


def test_the_frame_is_tidy(tmp_path):
    report = preflight(figstep().at(tmp_path))
    assert [*report.frame] == ["benchmark", "check", "level", "count", "what", "do"] and isinstance(
        report.frame, pd.DataFrame
    )
    assert {*report.frame["level"]} <= {"ok", "warning", "error"}
