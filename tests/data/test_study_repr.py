"""A study says what it holds in a few lines."""

import pytest

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
        ({"split": "tset"}, "split"),
        ({"split": "test", "n": -1}, "n must be a whole number of 0 or more"),
        ({"split": "test", "per_item": 0}, "per_item must be a whole number of 1 or more"),
    ],
)
def test_examples_that_cannot_be_had_are_refused(options, message):
    with pytest.raises(Exception, match=message):  # the tests' own check of types speaks first where a type is wrong
        organism.examples("typographic", **options)
