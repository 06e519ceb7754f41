"""A study says what it holds in a few lines."""

import pytest
from unchecking import unchecked

from care_lens import organism


def test_a_study_prints_counts_not_examples():
    study = organism.study()
    told = repr(study)
    assert len(told) < 1500 and told.splitlines()[0] == "Study"
    fit = sum(map(len, study.suites["fit"].values()))
    assert f"{fit} examples of {len(study.suites['fit'])} channels" in told
    assert study.suites["fit"]["typographic"][0].prompt not in told
    assert "typographic (" in told and "<script" not in study._repr_html_()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": -1}, "n must be a whole number of 0 or more"),
        ({"per_item": 0}, "per_item must be a whole number of 1 or more"),
    ],
)
def test_examples_that_cannot_be_had_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        organism.examples("typographic", "test", **options)


def test_a_split_that_is_none_is_refused_where_types_are_not_checked():
    words = r"split must be one of \['fit', 'calibration', 'validation', 'test'\], got 'tset'"
    with unchecked(), pytest.raises(ValueError, match=words):
        organism.examples("typographic", "tset")
