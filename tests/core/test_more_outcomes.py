"""Logit difference, KL divergence, whole responses and sets of prefixes, against scipy and by hand."""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import entropy

from care_lens.core import (
    BaseOutcome,
    Example,
    KLDivergence,
    LogitDifference,
    Outcome,
    OutcomeError,
    PrefixMargin,
    ResponseLogProb,
    TokenSpans,
    UnsafeMargin,
    as_outcome,
)
from care_lens.core.details import describe_outcome, metric_name
from care_lens.core.outcome import given_outcome
from care_lens.core.verdicts import named, read_out


@pytest.fixture
def batch():
    padding = torch.tensor([[True, False, False, False, False], [False] * 5])
    response = torch.tensor([[False, False, False, True, True], [False, False, True, True, True]])
    spans = TokenSpans.from_masks(image=torch.zeros_like(padding), padding=padding, response=response, grids=[(), ()])
    ids = torch.tensor([[0, 3, 4, 5, 1], [3, 4, 2, 6, 1]])
    logits = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    return SimpleNamespace(spans=spans, input_ids=ids), logits


LAST = (2, 1)


def test_logit_difference(batch):
    inputs, logits = batch
    outcome = LogitDifference(toward=(1, 2), away=(4,))
    assert isinstance(outcome, Outcome)
    expected = [float(logits[i, p, 1] + logits[i, p, 2]) / 2 - float(logits[i, p, 4]) for i, p in enumerate(LAST)]
    assert outcome(logits, inputs).tolist() == pytest.approx(expected)
    assert outcome(logits[:, -4:], inputs).tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="must cover the last prompt position"):
        outcome(logits[:, -3:], inputs)
    for toward, away in (((), (1,)), ((1,), (1, 2))):
        with pytest.raises(ValueError, match="toward and away"):
            LogitDifference(toward, away)


@pytest.mark.parametrize("reverse", [False, True])
def test_kl_is_scipys(batch, reverse):
    inputs, logits = batch
    reference = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1))
    bare = KLDivergence(reverse=reverse)
    assert repr(bare) == f"KLDivergence(reverse={reverse})"
    outcome = bare.with_reference(reference, inputs, [1, 0])
    p, q = (
        [part[i, place].double().softmax(-1).numpy() for i, place in enumerate(LAST)] for part in (reference, logits)
    )
    order = [(p[1], q[0]), (p[0], q[1])]
    expected = [entropy(*(pair[::-1] if reverse else pair)) for pair in order]
    assert outcome(logits, inputs).tolist() == pytest.approx(expected, abs=1e-6)
    second = outcome.for_rows([1])
    one = SimpleNamespace(spans=inputs.spans.rows([1]))
    assert second(logits[1:], one).tolist() == pytest.approx(expected[1:], abs=1e-6)
    same = bare.with_reference(logits, inputs, [0, 1])
    assert same(logits, inputs).tolist() == pytest.approx([0, 0], abs=1e-6)
    with pytest.raises(ValueError, match="reference must be of shape"):
        bare(logits, inputs)


def test_responses_with_and_without_their_end(batch):
    inputs, logits = batch
    log_probs = logits.double().log_softmax(-1)
    rows = [[(2, 5), (3, 1)], [(1, 2), (2, 6), (3, 1)]]  # position whose logits predict it, token
    each = [[float(log_probs[i, p, token]) for p, token in row] for i, row in enumerate(rows)]
    assert ResponseLogProb()(logits, inputs).tolist() == pytest.approx([np.mean(row) for row in each])
    assert ResponseLogProb(total=True)(logits, inputs).tolist() == pytest.approx([sum(row) for row in each])
    without = ResponseLogProb(end=False)(logits, inputs).tolist()
    assert without == pytest.approx([np.mean(row[:-1]) for row in each])
    prefix = PrefixMargin(("a",), ("b",)).single
    assert prefix(logits, inputs).tolist() == pytest.approx([sum(row[:-1]) for row in each])


def test_prefixes_are_put_together():
    outcome = PrefixMargin(comply=("yes", "sure"), refuse=("sorry",))
    assert [one.response for one in outcome.responses_for(Example("x"))] == ["yes", "sure", "sorry"]
    values = np.random.default_rng(0).normal(size=(2, 4, 3))
    expected = logsumexp(values[..., :2], axis=-1) - values[..., 2]
    np.testing.assert_allclose(outcome.combine(values), expected)
    assert np.isnan(outcome.combine(np.array([[0.0, np.nan, 1.0]]))).all()
    with pytest.raises(ValueError, match="beginning of another"):
        PrefixMargin(("yes", "yes sir"), ("no",))
    with pytest.raises(ValueError, match="beginning of another"):
        PrefixMargin(("yes",), ("yes",))
    with pytest.raises(ValueError, match="must each have a prefix"):
        PrefixMargin((), ("no",))
    assert not callable(outcome)
    with pytest.raises(OutcomeError, match=r"got PrefixMargin; use UnsafeMargin.*mediate, which takes it"):
        read_out(outcome, torch.zeros(1, 1, 2), None)


def double(logits, inputs):
    return 2 * logits[:, -1, 3]


class Duck:
    """Everything that can be asked of an outcome, without its base class."""

    from_last = True
    responses = True

    def __init__(self, told=()):
        self.told = told

    def with_examples(self, examples):
        return Duck((*self.told, len(examples)))

    def with_reference(self, logits, inputs, rows):
        return Duck((*self.told, len(rows)))

    def for_rows(self, rows):
        return Duck((*self.told, *rows))

    def __call__(self, logits, inputs):
        return logits[:, -1, 3]


def test_whatever_can_be_an_outcome_answers_the_same_questions(batch):
    inputs, logits = batch
    plain, duck, margin = as_outcome(double), as_outcome(Duck()), KLDivergence()
    assert as_outcome(margin) is margin and as_outcome(plain) is plain and given_outcome(plain) is double
    assert [(one.from_last, one.responses, one.compares) for one in (plain, duck, margin)] == [
        (False, False, False), (True, True, True), (True, False, True)]  # fmt: skip
    assert plain.with_examples([]) is plain.with_reference(logits, inputs, [0]) is plain.for_rows([0]) is plain
    bound = duck.with_examples([Example("a"), Example("b")]).with_reference(logits, inputs, [0]).for_rows([1, 0])
    assert isinstance(bound, BaseOutcome) and given_outcome(bound).told == (2, 1, 1, 0)
    torch.testing.assert_close(read_out(plain, logits, inputs), 2 * logits[:, -1, 3])
    assert (metric_name(plain), describe_outcome(plain), named(plain)) == ("double",) * 3
    assert all(isinstance(one, Outcome) for one in (double, Duck(), margin)) and not isinstance(double, BaseOutcome)
    with pytest.raises(OutcomeError, match="must be a function of logits and inputs, got int"):
        as_outcome(3)


def test_the_outcomes_of_the_house_are_of_the_base_and_say_what_they_need():
    needs = {
        UnsafeMargin((1,), (2,)): (True, False, False),
        LogitDifference((1,), (2,)): (True, False, False),
        KLDivergence(): (True, False, True),
        ResponseLogProb(): (True, True, False),
    }
    for outcome, expected in needs.items():
        assert isinstance(outcome, BaseOutcome) and isinstance(outcome, Outcome)
        assert (outcome.from_last, outcome.responses, outcome.compares) == expected
    assert repr(ResponseLogProb()) == "ResponseLogProb(responses=True, total=False, end=True)"
    assert [field.name for field in fields(KLDivergence)] == ["reverse", "reference"]
