"""Studies: items in one split only; reading and writing examples."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from care_lens.core import Example, UnsafeMargin
from care_lens.data import Study, read_examples, read_study, split_by_group, write_examples
from care_lens.organism import OrganismJudge, build
from care_lens.organism import study as organism_study


def make(n=40, channel="a", harmful=False):
    return [
        Example(f"p{i}", harmful=harmful, channel=channel, id=f"{channel}{i}", group=f"g{i % 10}") for i in range(n)
    ]


def test_groups_are_dealt_whole():
    suites = split_by_group([*make(), *make(channel="b", harmful=True)], seed=1)
    home = {}
    for split, channels in suites.items():
        for rows in channels.values():
            for row in rows:
                assert home.setdefault(row.group, split) == split
    assert sum(len(rows) for channels in suites.values() for rows in channels.values()) == 80


def test_a_group_in_two_splits_is_refused():
    margin = UnsafeMargin(comply=(1,), refuse=(2,))
    suites = {"fit": {"a": tuple(make(1))}, "test": {"a": tuple(make(1))}}
    with pytest.raises(ValueError, match="must stand in one split"):
        Study("s", suites, {}, OrganismJudge(), margin, "no")
    with pytest.raises(ValueError, match="seen channels"):
        Study("s", {"fit": {}}, {"visual": ("a",)}, OrganismJudge(), margin, "no")


def test_examples_survive_the_disk(tmp_path):
    rows = [
        Example(
            "a",
            image=Image.new("RGB", (4, 4), (1, 2, 3)),
            response="r",
            harmful=True,
            channel="c",
            id="1",
            group="g",
        ),
        Example("b", id="2", group="h", meta={"k": "v"}),
    ]
    back = read_examples(write_examples(rows, tmp_path / "e.jsonl"))
    assert [(e.prompt, e.response, e.harmful, e.channel, e.id, e.group) for e in back] == [
        (e.prompt, e.response, e.harmful, e.channel, e.id, e.group) for e in rows
    ]
    assert back[0].image.tobytes() == rows[0].image.tobytes() and back[1].meta == {"k": "v"}


@pytest.mark.parametrize("line", ["{", '{"image": "x.png"}', '{"prompt": "p", "answer": 1}'])
def test_bad_lines_are_named(tmp_path, line):
    path = tmp_path / "e.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"e\.jsonl:2"):
        read_examples(path)


def test_a_study_in_a_folder(tmp_path):
    rows = [*make(20, "plain", True), *make(20, "typographic", True), *make(20, "benign")]
    write_examples(rows, tmp_path / "examples.jsonl")
    settings = {
        "name": "s",
        "refusal": "sorry",
        "comply": ["sure"],
        "refuse": ["sorry"],
        "seen": {"visual": ["typographic"]},
    }
    (tmp_path / "study.json").write_text(json.dumps(settings))
    tokenizer = build.make_processor().tokenizer
    study = read_study(tmp_path, tokenizer=tokenizer, judge=OrganismJudge())
    assert study.outcome.comply == (tokenizer.convert_tokens_to_ids("sure"),)
    assert study.malicious("fit", "visual") and study.refused("fit") and study.benign("test")
    del settings["refuse"]
    (tmp_path / "study.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="refuse"):
        read_study(tmp_path, tokenizer=tokenizer, judge=OrganismJudge())


def test_pairs_and_gradient_requests_are_named_by_id(tmp_path):
    rows = [
        replace(e, meta={"split": s}, id=f"{s}/{e.id}", group=f"{s}{e.group}") for s in ("fit", "test") for e in make(6)
    ]
    write_examples(rows, tmp_path / "examples.jsonl")
    settings = {"name": "s", "refusal": "sorry", "comply": ["sure"], "refuse": ["sorry"], "seen": {}}
    settings |= {"pairs": {"word": [["fit/a0", "fit/a1"], ["fit/a2", "fit/a3"]]}, "gradient": ["test/a5"]}
    (tmp_path / "study.json").write_text(json.dumps(settings))
    tokenizer = build.make_processor().tokenizer
    study = read_study(tmp_path, tokenizer=tokenizer, judge=OrganismJudge())
    assert [(a.id, b.id) for a, b in study.pairs["word"]] == [("fit/a0", "fit/a1"), ("fit/a2", "fit/a3")]
    assert [e.id for e in study.gradient] == ["test/a5"]
    settings["pairs"]["word"][0][1] = "test/a1"
    (tmp_path / "study.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"fit split.*test/a1"):
        read_study(tmp_path, tokenizer=tokenizer, judge=OrganismJudge())


def test_a_study_with_gaps_names_them_all():
    study = organism_study()
    suites = {**study.suites, "calibration": {}, "fit": {**study.suites["fit"]}}
    channel = study.seen["visual"][0]
    suites["fit"][channel] = tuple(replace(e, response=None) for e in suites["fit"][channel][:1])
    with pytest.raises(ValueError, match=r"calibration: no benign.*has no response"):
        replace(study, suites=suites).require()
    study.require()


def test_the_bundled_study_keeps_items_apart_and_limits():
    study = organism_study()
    assert set(study.channels("calibration", harmful=True)) == set()
    assert study.limited(3).suites["test"]["plain"] == study.suites["test"]["plain"][:3]
    assert len(study.limited(3).gradient) == 3
