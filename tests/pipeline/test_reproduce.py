"""`care-lens reproduce` on files in the published formats and a tiny model: nothing leaks, the rows are what they are called, the quoted stand apart."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from miniatures import MAKERS
from test_benchmark_study import invoke, write_benchmarks
from zoo.tiny import make_llava

from care_lens.data.behaviours import behaviour_key
from care_lens.defences import CAREFaults, PublishedCARE, load_defence
from care_lens.pipeline.recipe import Recipe, RecipeDefence, RecipeError, RecipeModel, Source, read_recipe, recipes
from care_lens.pipeline.recipe_look import NotReadyError, look
from care_lens.pipeline.reproduce import read_parts

RECIPE = {
    "name": "a table",
    "model": {"name": "MODEL"},
    "columns": {
        "FigStep": {"benchmark": "figstep", "root": "figstep", "fit": True},
        "MM-SafetyBench": {"benchmark": "mmsafetybench", "root": "mmsafety", "fit": True},
        "PGD": {
            "benchmark": "astra",
            "root": "astra",
            "prompts": {"benchmark": "advbench", "root": "advbench"},
        },
    },
    "utility": {
        "MMBench": {"benchmark": "mmbench", "root": "mmbench", "grader": "choice"},
        "MOSSBench": {"benchmark": "mossbench", "root": "mossbench"},
    },
    "benign": {"VQA": {"benchmark": "vqav2", "root": "vqa"}},
    "defences": {
        "CARE, published": {"layers": [1], "rank": 2, "alpha": 4.5},
        "CARE, visual alone": {"layers": [1], "rank": 2, "alpha": 4.5, "alpha_textual": 0.0},
        "CARE, sound": {"faults": "none", "layers": [1], "rank": 2, "alpha": 1.0},
    },
    "generation": {"max_new_tokens": 3},
    "n_boot": 50,
    "quoted_from": "a paper",
    "quoted": {"CARE": {"FigStep": 6.55}},
    "notes": ["made-up files"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    write_benchmarks(root)
    for name in ("astra", "advbench", "mmbench", "mossbench", "vqa"):
        MAKERS[name]().at(root / name)
    return root


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("model")
    model, processor = make_llava()
    model.save_pretrained(home)
    processor.save_pretrained(home)
    return home


@pytest.fixture
def recipe(tmp_path, home):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "model": {"name": str(home)}}, sort_keys=False))
    return path


def test_a_table_from_files_by_one_command(recipe, files, tmp_path):
    out = tmp_path / "out"
    words = (
        "reproduce",
        recipe,
        "--files",
        files,
        "--out",
        out,
        "--batch-size",
        16,
        "--threads",
        1,
        "--allow-problems",
    )
    made = invoke(*words)
    assert made.exit_code == 0, made.output
    page = (out / "table.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in page.split("\n\n")[1].splitlines() if line.startswith("|")}
    assert [*rows] == ["Method", "---", "none", "CARE, published", "CARE, visual alone", "CARE, sound", "CARE (quoted)"]
    cells = [cell.strip() for cell in rows["CARE (quoted)"].split("|")[2:-1]]
    assert cells == ["6.55", "\u2013", "\u2013"]  # no interval, and nothing where nothing is published
    assert (
        re.search(r"\[\d", rows["none"]) and "Quoted figures are those of a paper" in page and "- made-up files" in page
    )
    assert "MMBench" in page and "MOSSBench" in page and "(quoted)" in (out / "table.tex").read_text()
    saved = [load_defence(out / "defences" / f"{i:02d}") for i in range(3)]
    assert all(isinstance(one, PublishedCARE) for one in saved)
    assert [one.faults for one in saved] == [CAREFaults(), CAREFaults(), CAREFaults.none()]
    assert [(one.alpha_visual, one.alpha_textual) for one in saved] == [(4.5, 4.5), (4.5, 0.0), (1.0, 1.0)]
    assert torch.equal(saved[0].visual[1].columns, saved[1].visual[1].columns)
    # a second call makes nothing anew, another recipe is refused
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and "defences" in str(path)}
    assert invoke(*words).exit_code == 0 and (out / "table.md").read_text() == page
    assert before == {path: path.stat().st_mtime_ns for path in before}
    refused = invoke(*words, "--limit", 3)
    assert refused.exit_code == 2 and "must be empty or of the same recipe" in " ".join(refused.output.split())


def test_what_is_learned_from_is_not_tested(recipe, files):
    parts = read_parts(read_recipe(recipe), files)
    keys = [
        {behaviour_key(t) for e in some for t in (e.group, e.behaviour) if t}
        for some in (parts.malicious, [e for rows in parts.tested.values() for e in rows])
    ]
    assert parts.malicious and parts.benign and not keys[0] & keys[1]
    assert not {e.group for e in parts.benign} & {e.group for rows in parts.tested.values() for e in rows}
    pgd = parts.tested["PGD"]
    assert pgd and all(e.prompt and e.meta["source_split"] == "test" for e in pgd)


def test_what_a_column_without_fit_asks_is_not_learned_from_elsewhere(tmp_path):
    goals = [f"fold the paper zorp {i}" for i in range(20)]
    for name, path, header, rows in (
        ("adv", "advbench.csv", "goal,target", [f"{g},Sure" for g in goals]),
        (
            "red",
            "RedTeam_2K.csv",
            "id,question,policy,from",
            [f"{i},{g.title()}?,p,f" for i, g in enumerate(goals[:15])],
        ),
        (
            "xs",
            "xstest_prompts.csv",
            "id,prompt,type,label,focus,note",
            [f"{i},what is {i},t,safe,," for i in range(9)],
        ),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / path).write_text("\n".join([header, *rows]) + "\n")
    recipe = Recipe(
        name="r",
        model=RecipeModel("m"),
        columns={"A": Source("advbench", "adv", fit=True), "B": Source("redteam2k", "red")},
        defences={"c": RecipeDefence(layers=(1,))},
        benign={"X": Source("xstest", "xs")},
    )
    parts = read_parts(recipe, tmp_path)
    learned = {behaviour_key(e.prompt) for e in parts.malicious}
    tested = {behaviour_key(e.prompt) for rows in parts.tested.values() for e in rows}
    assert len(parts.tested["B"]) == 15 and learned and not learned & tested
    (tmp_path / "red" / "RedTeam_2K.csv").write_text(
        "\n".join(["id,question,policy,from", *(f"{i},{g},p,f" for i, g in enumerate(goals))]) + "\n"
    )
    with pytest.raises(RecipeError, match="got 0 and 9 whose behaviours are not tested, of 8 and 9"):
        read_parts(recipe, tmp_path)


def test_gaps_are_told_before_a_model_is_loaded(recipe, files, tmp_path):
    asked = read_recipe(recipe)
    found = look(
        replace(asked, columns={**asked.columns, "Gone": replace(asked.columns["PGD"], root="nowhere")}), files
    )
    assert not found.ok and "Gone" in set(found.frame[found.frame["level"] == "error"]["source"])
    with pytest.raises(NotReadyError, match="Gone: files"):
        found.require()
    deep = replace(asked, defences={"x": replace(asked.defences["CARE, sound"], layers=(9,))})
    assert "blocks [9]" in " ".join(look(deep, files).frame["what"])
    checked = invoke(
        "reproduce", recipe, "--files", tmp_path / "empty", "--check", "--threads", 1, "--device", "cuda:99"
    )
    assert checked.exit_code == 1 and not Path("results/table").exists()  # the check needs no GPU


@pytest.mark.parametrize("name", list(recipes()))
def test_recipes_of_the_package_are_whole_and_quote_what_is_published(name):
    found = read_recipe(name)
    published = {
        "qwen2.5-vl-7b": {"CARE": (6.55, 8.72, 4.60, None)},
        "llava-onevision": {
            "CARE": (7.03, 9.13, 12.78, 8.46),
            "ASTRA": (11.98, 15.37, 16.37, 14.85),
            "SPO-VLM": (10.37, 16.26, 17.90, 17.38),
        },
        "llava-1.5-7b": {},
    }[name]
    for method, figures in published.items():
        assert tuple(found.quoted[method].get(column) for column in found.columns) == figures
    assert bool(found.quoted) == bool(published)
    kinds = {defence.kept == CAREFaults() for defence in found.defences.values()}
    assert kinds == {True, False} and any(d.kept == CAREFaults.none() for d in found.defences.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colums": {}}, "must have keys out of"),
        ({"columns": {"x": {"benchmark": "figstp", "root": "."}}}, "columns.x: benchmark must be one of"),
        (
            {"columns": {"x": {"benchmark": "figstep", "root": ".", "fit": True, "shade": 1}}},
            "columns.x must have keys",
        ),
        ({"defences": {"none": {"layers": [1]}}}, "title 'none'"),
        ({"defences": {"x": {"layers": []}}}, "defences.x: layers must name"),
        ({"defences": {"x": {"layers": [1], "faults": ["ridge"]}}}, "faults must be"),
        ({"generation": {"temperature": 0}}, "generation: temperature must be above 0"),
        ({"judge": {"kind": "classifier"}}, "judge: model must be given"),
        ({"quoted": {"CARE": {"Nothing": 1.0}}}, "quoted must be of columns"),
        ({"quoted_from": ""}, "quoted_from must say"),
        ({"benign": {}}, "benign source must be there"),
    ],
)
def test_recipes_that_are_none(tmp_path, change, message):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **change}))
    with pytest.raises(RecipeError, match=message):
        read_recipe(path)
