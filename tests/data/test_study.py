"""Studies: items in one split only; reading and writing examples."""

import functools
import json
from dataclasses import replace

import pytest
from PIL import Image

from care_lens.core import Example, UnsafeMargin
from care_lens.data import (
    DataFileError,
    Study,
    StudyError,
    StudyNotFoundError,
    read_examples,
    read_study,
    split_by_group,
    write_examples,
)
from care_lens.organism import OrganismJudge, build
from care_lens.organism import study as make_organism_study

organism_study = functools.cache(make_organism_study)


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


@functools.cache
def tokenizer():
    return build.make_processor().tokenizer


@pytest.fixture
def folder(tmp_path):
    """A study in a folder and what its study.json says."""
    write_examples([*make(20, "plain", True), *make(20, "benign")], tmp_path / "examples.jsonl")
    return tmp_path, {"name": "s", "refusal": "sorry", "comply": ["sure"], "refuse": ["sorry"], "seen": {}}


def read(directory, settings):
    text = settings if isinstance(settings, str) else json.dumps(settings)
    (directory / "study.json").write_text(text, encoding="utf-8-sig")
    return read_study(directory, tokenizer=tokenizer(), judge=OrganismJudge())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"comply": "okay"}, r'comply must be a list of texts such as .*, got "okay"'),
        ({"refuse": []}, "refuse must be a list of texts"),
        ({"comply": ["sure", 1]}, "comply must be a list"),
        ({"comply": ["sorry", "sure"]}, "must begin with different tokens of the model, got 'sorry' and 'sorry'"),
        ({"comply": ["wibble"], "refuse": ["wobble"]}, "tokenizer knows, got 'wibble' and 'wobble', which it does not"),
        ({"name": ""}, "name must be a text that is not empty"),
        ({"about": 3}, "about must be a text"),
        ({"refusal": None}, "refusal must be a text"),
        ({"plain": []}, "plain must be the name of a channel"),
        ({"seen": {"visuel": ["plain"]}}, r"seen must be .* out of \['visual', 'textual'\]"),
        ({"seen": {"visual": "plain"}}, "seen must be an object of lists"),
        ({"seen": ["plain"]}, "seen must be an object"),
        ({"seen": {"visual": ["gone"]}}, r"none for \['gone'\]"),
        ({"pairs": {"word": [["a"]]}}, "pairs must be an object of lists of"),
        ({"pairs": [["a", "b"]]}, "pairs must be an object"),
        ({"pairs": {"word": [["a", 1]]}}, "pairs must be"),
        ({"gradient": "a1"}, "gradient must be a list of ids"),
        ({"gradient": ["nobody"]}, "gradient must name examples of the test split"),
        ({"judge": "x"}, r"got \['judge'\]; take them out"),
        ({"pairs": {"x/../../../escaped": []}}, "names of pair sets must be plain"),
    ],
)
def test_a_wrong_study_json_is_named(folder, changes, message):
    directory, settings = folder
    with pytest.raises(ValueError, match=message):
        read(directory, {**settings, **changes})


@pytest.mark.parametrize(("text", "message"), [("{", "study.json must be a JSON object"), ("[]", "JSON object"), ('{"name": "a", "name": "b"}', "each key once")])  # fmt: skip
def test_a_study_json_that_is_no_object_is_named(folder, text, message):
    with pytest.raises(DataFileError, match=message):
        read(folder[0], text)


def test_a_missing_folder_or_file_is_named(tmp_path, folder):
    with pytest.raises(StudyNotFoundError, match="no such folder"):
        read_study(tmp_path / "gone", tokenizer=tokenizer(), judge=OrganismJudge())
    with pytest.raises(FileNotFoundError, match=r"got no study\.json"):
        read_study(folder[0], tokenizer=tokenizer(), judge=OrganismJudge())
    (tmp_path / "examples.jsonl").write_text("\n")
    with pytest.raises(DataFileError, match="must hold examples, got none"):
        read(tmp_path, folder[1])


@pytest.mark.parametrize(
    "name", ["x/../../../escaped", "text/visual", "a\\b", "..", ".hidden", "", " a", "a ", "a:b", "a\nb", "con?", "a.", "x" * 81, "a*"]
)  # fmt: skip
def test_names_of_pair_sets_that_are_no_file_names(name):
    study = organism_study()
    pairs = study.pairs["wrapper"][:1]
    with pytest.raises(StudyError, match="names of pair sets must be plain"):
        replace(study, pairs={name: pairs}, pair_outcomes={})


def test_names_of_pair_sets_that_are():
    study = organism_study()
    pairs = study.pairs["wrapper"][:1]
    names = {name: pairs for name in ("typographic+indirect", "text, visual (v1.2)", "Bild ä", "a", "a_b-c=d")}
    assert set(replace(study, pairs=names, pair_outcomes={}).pairs) == set(names)
    with pytest.raises(StudyError, match="more than case"):
        replace(study, pairs={"Word": pairs, "word": pairs}, pair_outcomes={})


@pytest.mark.parametrize(
    ("suites", "seen", "error", "message"),
    [
        ({"fit": {"a": make(1) * 2}}, {}, StudyError, "got 'a0' twice"),
        ({"fit": {"a": (make(1)[0], make(1, harmful=True)[0])}}, {}, StudyError, "all harmful or all benign"),
        ({"fit": {"a": make(1)}}, {"visual": ("a",)}, StudyError, r"\['a'\], which are benign"),
        ({"test": {"plain": make(1)}}, {}, StudyError, r"\['plain'\], which are benign"),
    ],
)
def test_studies_that_contradict_themselves(suites, seen, error, message):
    suites = {split: {c: tuple(rows) for c, rows in channels.items()} for split, channels in suites.items()}
    with pytest.raises(error, match=message):
        Study("s", suites, seen, OrganismJudge(), UnsafeMargin(comply=(1,), refuse=(2,)), "no")


def test_a_counterpart_must_be_a_channel():
    study = organism_study()
    with pytest.raises(StudyError, match=r"benign channel of the study, one of \['benign .*\], got 'benign plane'"):
        replace(study, counterpart="benign plane")
    with pytest.raises(StudyError, match="which is harmful"):
        replace(study, counterpart="plain")
    assert replace(study, counterpart=None).counterpart is None


def test_shares_and_limits_that_make_no_sense():
    with pytest.raises(ValueError, match="sum to 1"):
        split_by_group(make(), shares={"fit": 1.5, "test": -0.5})
    with pytest.raises(ValueError, match="neither at"):
        split_by_group([Example("a")])
    with pytest.raises(ValueError, match="1 or more, got 0"):
        organism_study().limited(0)


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
    attacked = (replace(study.gradient[0], image=None), replace(study.gradient[1], response=None))
    with pytest.raises(ValueError, match=r"gradient: example .* has no picture; gradient: example .* has no response"):
        replace(study, gradient=attacked).require()
    study.require()


def test_the_bundled_study_keeps_items_apart_and_limits():
    study = organism_study()
    assert set(study.channels("calibration", harmful=True)) == set()
    assert study.limited(3).suites["test"]["plain"] == study.suites["test"]["plain"][:3]
    assert len(study.limited(3).gradient) == 3
