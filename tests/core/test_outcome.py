"""Outcomes read off logits."""

from types import SimpleNamespace

import pytest
import torch

from care_lens.core import Outcome, TokenSpans, UnsafeMargin, Verdict


@pytest.fixture
def batch():
    padding = torch.tensor([[True, False, False, False], [False, False, False, False]])
    response = torch.tensor([[False, False, False, True], [False, False, False, False]])
    nothing = torch.zeros_like(padding)
    spans = TokenSpans.from_masks(image=nothing, padding=padding, response=response, grids=[(), ()])
    return SimpleNamespace(spans=spans), torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0))


def test_the_margin_is_the_log_odds_of_two_sets_at_the_last_prompt_position(batch):
    inputs, logits = batch
    margin = UnsafeMargin(comply=(1, 2), refuse=(4,))
    probabilities = torch.stack([logits[0, 2], logits[1, 3]]).double().softmax(-1)
    expected = (probabilities[:, [1, 2]].sum(-1) / probabilities[:, 4]).log()
    assert isinstance(margin, Outcome)
    torch.testing.assert_close(margin(logits, inputs), expected.float())
    torch.testing.assert_close(margin(logits[:, -2:], inputs), expected.float())
    assert margin(logits.bfloat16(), inputs).dtype == torch.float32
    swapped = UnsafeMargin(comply=(4,), refuse=(1, 2))
    torch.testing.assert_close(swapped(logits, inputs), -expected.float())


def test_the_margin_is_differentiable(batch):
    inputs, logits = batch
    logits.requires_grad_()
    UnsafeMargin(comply=(1,), refuse=(4,))(logits, inputs).sum().backward()
    assert logits.grad is not None
    assert {tuple(i) for i in logits.grad.nonzero().tolist()} <= {(0, 2, k) for k in range(7)} | {
        (1, 3, k) for k in range(7)
    }
    assert logits.grad[0, 2, 1] == pytest.approx(1) and logits.grad[0, 2, 4] == pytest.approx(-1)


def test_what_cannot_be_measured_is_refused(batch):
    inputs, logits = batch
    with pytest.raises(ValueError, match="must cover the last prompt position"):
        UnsafeMargin((1,), (2,))(logits[:, -1:], inputs)
    with pytest.raises(ValueError, match="must each have a token id"):
        UnsafeMargin((), (2,))
    with pytest.raises(ValueError, match=r"must not share token ids, got \[2\]"):
        UnsafeMargin((1, 2), (2, 3))


def test_verdicts_are_strings():
    assert Verdict("refused") is Verdict.REFUSED and Verdict.MISSING == "missing"
