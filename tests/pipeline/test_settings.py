"""Sizes of a run: which part of a study it works on, and what is written down of it."""

from dataclasses import replace

import pytest
from few_channels import few_channels
from subspace_rows import unchecked

from care_lens import organism
from care_lens.data.study import SPLITS, StudyError
from care_lens.pipeline import RunSettings
from care_lens.pipeline.needs import require_feasible, shortened
from care_lens.pipeline.report_words import part_text
from care_lens.pipeline.settings import SIZES


@pytest.fixture(scope="module")
def study():
    return few_channels(pairs=("wrapper", "picture"))


def longest(study, split):
    return max(map(len, study.suites[split].values()))


def test_a_run_of_all_works_on_the_whole_study(study):
    assert RunSettings().part(study) == study and RunSettings().sized("full") == RunSettings()


@pytest.mark.parametrize(("limit", "learn", "expected"), [(3, None, (3, 3)), (3, 5, (5, 3)), (None, 4, (4, None))])
def test_what_is_learned_from_has_a_limit_of_its_own(study, limit, learn, expected):
    part = replace(RunSettings(), limit=limit, learn_limit=learn).part(study)
    for splits, most in ((("fit", "calibration"), expected[0]), (("validation", "test"), expected[1])):
        for split in splits:
            assert longest(part, split) == (longest(study, split) if most is None else most)
    assert max(map(len, part.pairs.values())) == expected[0]
    assert part.gradient == (study.gradient if limit is None else study.gradient[:limit])


def test_the_limit_of_what_is_learned_from_is_written_down_where_it_is_given():
    assert "learn_limit" not in RunSettings().to_dict()
    assert RunSettings().compact().to_dict()["learn_limit"] == 36


def test_what_a_run_reads_at_once_is_written_down_but_where_it_is_as_it_was():
    """A run of an earlier version read after one block; the default of today is another run."""
    assert RunSettings().to_dict()["reader_depths"] == [1, 5]
    assert "reader_depths" not in RunSettings(reader_depths=(1,)).to_dict()
    for depths in ((0,), (2.5,), (True,), (1, "5")):
        with unchecked(), pytest.raises(ValueError, match="depths must be whole numbers of 1 or more, got "):
            RunSettings(reader_depths=depths)


def test_a_size_that_there_is_not_is_refused():
    with unchecked(), pytest.raises(ValueError, match=r"size must be one of .*'compact'.*, got 'tiny'"):
        RunSettings().sized("tiny")
    with unchecked(), pytest.raises(ValueError, match=r"rivals must be out of .*, got \['ASTRA'\]"):
        RunSettings(rivals=("ASTRA",))


def test_each_size_does_less_than_the_next():
    short, compact, full = (RunSettings().sized(size) for size in SIZES)
    assert short.limit < compact.limit and short.learn_limit < compact.learn_limit and full.limit is None
    for name in ("n_boot", "pgd_steps", "pgd_examples", "fidelity"):
        assert getattr(short, name) < getattr(compact, name) < getattr(full, name), name


@pytest.mark.parametrize("size", ["short", "compact"])
def test_what_is_less_already_stays(size):
    few = RunSettings(limit=3, pgd_examples=0, rivals=("published CARE",), steering=(0.4,), epsilons=(0.1,), n_boot=10)
    got = few.sized(size)
    assert (got.limit, got.learn_limit, got.pgd_examples, got.n_boot) == (3, 3, 0, 10)
    assert set(got.rivals) <= {"published CARE"} and got.steering == (0.4,) and got.epsilons == (0.1,)


def test_the_report_of_a_part_says_so():
    assert part_text(RunSettings()) == ""
    assert "at most 12 examples per channel in validation and test and at most 36" in part_text(RunSettings().compact())
    assert "at most 5 examples per channel to learn" in part_text(replace(RunSettings(), learn_limit=5))


def test_a_part_of_the_bundled_study_has_the_same_examples():
    whole = organism.study()
    part = organism.study(only=organism.DEMONSTRATED)
    for split in SPLITS:
        assert part.suites[split] == {c: e for c, e in whole.suites[split].items() if c in organism.DEMONSTRATED}
    assert part.held_out() and set(part.benign("test")) < set(whole.benign("test"))
    for size in ("short", "compact"):
        settings = shortened(part, RunSettings(), size)
        assert require_feasible(settings.part(part), settings) == settings == RunSettings().sized(size)


def test_channels_that_there_are_not_and_that_a_study_needs():
    with pytest.raises(ValueError, match=r"only must name channels out of .*, got \['typographical'\]"):
        organism.study(only=["plain", "typographical"])
    with pytest.raises(StudyError, match=r"only must hold .*, got none of \['typographic', 'wrapper', 'spelled'\]"):
        organism.study(only=["plain", "benign plain"])
    with unchecked(), pytest.raises(TypeError, match="only must be a collection of channels, got the text 'plain'"):
        organism.study(only="plain")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"limit": 0}, "limit must be a whole number of 1 or more, or None for all, got 0"),
        ({"learn_limit": "3"}, "learn_limit must be a whole number of 1 or more"),
        ({"epsilons": 0.05}, r"epsilons must be a tuple, got 0.05; give \(0.05,\)"),
        ({"rivals": "published CARE"}, "rivals must be a tuple, got 'published CARE'"),
    ],
)
def test_a_wrong_setting_is_told_by_its_name(wrong, said):
    with unchecked(), pytest.raises((TypeError, ValueError), match=said):
        RunSettings(**wrong)
