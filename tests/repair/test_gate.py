import math

import pytest
import torch

from care_lens.repair import AlwaysOpen, ConformalGate


@pytest.mark.parametrize(("n", "epsilon"), [(19, 0.05), (99, 0.01), (60, 0.1), (199, 0.02), (9, 0.1), (50, 0.37)])
def test_threshold_is_the_smallest_that_enough_scores_reach(n, epsilon):
    scores = torch.randn(n, generator=torch.Generator().manual_seed(n))
    gate = ConformalGate.calibrate(scores, epsilon=epsilon)
    needed = math.ceil(round((n + 1) * (1 - epsilon), 9))
    reached = [float(s) for s in scores if int((scores <= s).sum()) >= needed]
    assert gate.threshold == min(reached)
    assert (gate.n, gate.epsilon) == (n, epsilon)


def test_share_of_new_benign_prompts_that_open_it_is_at_most_epsilon_and_not_far_below():
    generator = torch.Generator().manual_seed(0)
    n, epsilon, opened = 39, 0.1, []
    for _ in range(4000):
        scores = torch.randn(n + 1, generator=generator).exp()
        opened.append(float(ConformalGate.calibrate(scores[:n], epsilon=epsilon)(scores[n:])))
    assert sum(opened) / len(opened) == pytest.approx(epsilon, abs=0.015)  # exactly floor(40 eps)/40 = 0.1; 3 s.e.


def test_too_few_prompts_for_epsilon():
    ConformalGate.calibrate(torch.randn(19), epsilon=0.05)
    with pytest.raises(ValueError, match="at least 19"):
        ConformalGate.calibrate(torch.randn(18), epsilon=0.05)


def test_prompts_with_nothing_to_read_count_but_cannot_set_the_threshold():
    scores = torch.cat([torch.full((5,), -torch.inf), torch.arange(14.0)])
    assert ConformalGate.calibrate(scores, epsilon=0.05).threshold == 13.0
    with pytest.raises(ValueError, match="finite"):
        ConformalGate.calibrate(torch.full((19,), -torch.inf), epsilon=0.5)
    with pytest.raises(ValueError, match="NaN"):
        ConformalGate.calibrate(torch.full((19,), torch.nan), epsilon=0.5)


def test_hard_gate_opens_above_the_threshold_only():
    gate = ConformalGate(threshold=1.0, epsilon=0.1, n=9)
    assert gate(torch.tensor([-torch.inf, 0.0, 1.0, 1.0001])).tolist() == [0, 0, 0, 1]


def test_ramp_starts_at_the_threshold_and_has_a_gradient():
    gate = ConformalGate(threshold=1.0, epsilon=0.1, n=9, width=2.0)
    score = torch.tensor([-torch.inf, 1.0, 2.0, 3.0, 9.0], requires_grad=True)
    opened = gate(score)
    assert opened.tolist() == [0, 0, 0.5, 1, 1]
    opened.sum().backward()
    assert score.grad is not None and float(score.grad[2]) == 0.5
    assert bool(score.grad.isfinite().all())


def test_always_open():
    assert AlwaysOpen()(torch.tensor([-torch.inf, 2.0])).tolist() == [1, 1]


@pytest.mark.parametrize("options", [{"epsilon": 0.0}, {"epsilon": 1.0}, {"epsilon": 0.5, "width": -1.0}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match="must be"):
        ConformalGate.calibrate(torch.randn(50), **options)
