"""Benchmarks joined to a study before any answer is generated: what is found, held out, and refused."""

from dataclasses import replace

import pytest
from miniatures import MAKERS
from test_benchmark_study import write_benchmarks

from care_lens.core import Example, UnsafeMargin
from care_lens.data import write_examples
from care_lens.data.benchmarks import FigStep, XSTest
from care_lens.data.preflight import benchmarks_in
from care_lens.pipeline.studying import SourceError, joined, read_source


def test_rows_left_out_are_told_once_and_in_the_words_of_the_command(tmp_path, caplog):
    (tmp_path / "xstest_prompts.csv").write_text("id,prompt,type,label\n1,fold?,a,safe\n2,crush?,a,maybe\n")
    assert benchmarks_in(tmp_path) == ["xstest"] and not caplog.records
    assert len(read_source(tmp_path)) == 1
    (told,) = caplog.messages
    assert "1 of 2 rows left out" in told and "`care-lens preflight` lists them" in told and ".problems" not in told


OUTCOME = UnsafeMargin(comply=(1,), refuse=(2,))


def rows(channel, n, harmful=True, groups=None):
    return [
        Example(f"{channel} {i}", id=f"{channel}{i}", group=f"{channel} {i % (groups or n)}", channel=channel, harmful=harmful,
                behaviour=f"do {channel} {i % (groups or n)}" if harmful else None)
        for i in range(n)
    ]  # fmt: skip


def test_which_benchmark_it_is_is_found_out_or_said(tmp_path):
    figstep, _, xstest = write_benchmarks(tmp_path)
    assert isinstance(read_source(figstep), FigStep) and len(read_source(f"xstest={xstest}")) == 36
    assert isinstance(read_source(f"xstest={xstest}/xstest_prompts.csv"), XSTest)
    with pytest.raises(SourceError, match=r"must be one of .*'xstest'.*, got 'xtest'"):
        read_source(f"xtest={xstest}")
    with pytest.raises(SourceError, match=r"must hold one benchmark, got \['figstep', 'mmsafetybench', 'xstest'\]"):
        read_source(tmp_path)
    with pytest.raises(SourceError, match="got none that is known"):
        (tmp_path / "empty").mkdir()
        read_source(tmp_path / "empty")


def test_examples_of_ones_own_are_a_source_as_they_are(tmp_path):
    own = [replace(e, system="be kind", prefill="sure") for e in rows("mine", 3)]
    write_examples(own, tmp_path / "mine.jsonl")
    write_examples(own, tmp_path / "examples.jsonl")
    assert read_source(tmp_path / "mine.jsonl") == read_source(tmp_path) == own


def test_the_smallest_family_is_held_out_and_so_are_those_too_thin():
    sources = [
        rows("a", 40),
        rows("b", 30),
        rows("c", 50),
        rows("thin", 2, groups=1),
        rows("benign", 40, harmful=False),
    ]
    study = joined(sources, name="s", outcome=OUTCOME, pairs=2)
    assert study.seen["textual"] in (("a", "b", "c"), ("a", "c"))
    assert "thin" not in study.seen["textual"]
    study = joined(sources, name="s", outcome=OUTCOME, held_out=["a"], pairs=2)
    assert study.seen["textual"] == ("b", "c") and "a" in study.held_out() and "a" in study.about.split("held out")[1]
    assert set(study.pairs) == {"b", "c"}
    assert set(study.suites["calibration"]) == {"benign"}


@pytest.mark.parametrize(
    ("sources", "lacks"),
    [
        ([rows("a", 40)], "no benign examples"),
        ([rows("benign", 40, harmful=False)], "no attack channel is seen"),
    ],
)
def test_sources_that_make_no_study_are_refused_with_what_would(sources, lacks):
    with pytest.raises(SourceError, match=f"{lacks}.*xstest.*advbench"):
        joined(sources, name="s", outcome=OUTCOME)


def test_pictures_without_a_stated_behaviour_give_no_plain_request(tmp_path):
    made = MAKERS["vlguard"]()
    vlguard = [*made.read(made.at(tmp_path))]
    with pytest.raises(SourceError, match=r"no examples of 'plain'.*advbench"):
        joined([vlguard, rows("benign", 40, harmful=False)], name="s", outcome=OUTCOME)
