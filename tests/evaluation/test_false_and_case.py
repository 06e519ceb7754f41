"""What a function's False stands for, and a judge of published phrases that is given answers without capitals."""

import warnings

import pytest

from care_lens.core import Example, Verdict
from care_lens.evaluation import FunctionJudge, SubstringRefusalJudge

ROWS = [Example("a"), Example("b"), Example("c")]


def helps(example, text):
    return not text.startswith("sorry")


def test_false_stands_for_what_is_asked():
    texts = ["sure", "sorry", None]
    for false, verdict in (("other", Verdict.OTHER), ("refused", Verdict.REFUSED), (Verdict.REFUSED, Verdict.REFUSED)):
        assert FunctionJudge(helps, false=false)(ROWS, texts) == [Verdict.COMPLIED, verdict, Verdict.MISSING]
    assert FunctionJudge(helps)(ROWS, texts)[1] is Verdict.OTHER
    with pytest.raises(ValueError, match="false must be one of"):
        FunctionJudge(helps, false="no")
    with pytest.raises(ValueError, match="another verdict than True's"):
        FunctionJudge(helps, false="complied")


def warned(judge, texts):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        verdicts = judge(ROWS[: len(texts)], texts)
    return verdicts, ["no capital letter" in str(one.message) for one in caught]


def test_the_published_judge_warns_where_it_would_find_no_refusal():
    published = SubstringRefusalJudge.published()
    assert warned(published, ["sorry, i cannot help"]) == ([Verdict.COMPLIED], [True])
    assert warned(published, ["Sorry, I cannot help"]) == ([Verdict.REFUSED], [])
    assert warned(published, ["sure first mix", None]) == ([Verdict.COMPLIED, Verdict.MISSING], [])  # nothing is lost
    assert warned(published, ["that is illegal"]) == ([Verdict.REFUSED], [])  # a phrase without capitals
    assert warned(SubstringRefusalJudge(), ["sorry, i cannot help"]) == ([Verdict.REFUSED], [])
