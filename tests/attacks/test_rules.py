"""Step rules against plain loops written from the papers, on functions whose gradient is known."""

import math

import numpy as np
import pytest
import torch

from care_lens.attacks.rules import AutoRule, MomentumRule, SignRule, checkpoints

STEPS, RADIUS = 50, 8.0


def bumpy(x):
    """[n] a function with many valleys, and its gradient; both by hand."""
    flat = x.flatten(1)
    weight = torch.linspace(0.5, 2, flat.shape[1])
    value = (weight * (flat / 7).sin() + 0.002 * (flat - 130) ** 2).sum(dim=1)
    slope = weight * (flat / 7).cos() / 7 + 0.004 * (flat - 130)
    return value, slope.view_as(x)


@pytest.fixture
def box():
    original = torch.randint(0, 256, (3, 3, 4, 5), generator=torch.Generator().manual_seed(0)).float()
    return original, (original - RADIUS).clamp(min=0), (original + RADIUS).clamp(max=255)


def run(rule):
    """All pictures that a rule visits, and the losses there."""
    seen, everyone = [], torch.arange(len(rule.pixels))
    for _ in range(STEPS):
        seen.append(rule.pixels.clone())
        rule.step(everyone, *bumpy(rule.pixels))
    return torch.stack(seen)


def auto_pgd_by_hand(start, low, high):
    """Algorithm 1 of Croce and Hein (2020), line by line, for one picture; f is what is maximised."""

    def f(x):
        value, slope = bumpy(torch.tensor(x)[None])
        return -float(value), -slope[0].numpy()

    def project(x):
        return np.clip(x, low, high)

    w, p = [0, math.ceil(0.22 * STEPS)], [0.0, 0.22]
    while p[-1] + max(p[-1] - p[-2] - 0.03, 0.06) <= 1:
        p.append(p[-1] + max(p[-1] - p[-2] - 0.03, 0.06))
        w.append(math.ceil(round(p[-1] * STEPS, 9)))
    eta, etas, tops = 2 * RADIUS, {}, {}
    x = [start, project(start + eta * np.sign(f(start)[1]))]
    values = [f(x[0])[0], f(x[1])[0]]
    visited = [x[0], x[1]]
    f_max, x_max = max(values), x[int(np.argmax(values))]
    etas[0], tops[0] = eta, f_max
    for k in range(1, STEPS - 1):
        z = project(x[k] + eta * np.sign(f(x[k])[1]))
        new = project(x[k] + 0.75 * (z - x[k]) + 0.25 * (x[k] - x[k - 1]))
        visited.append(new)
        value = f(new)[0]
        if value > f_max:
            x_max, f_max = new, value
        if k in w[1:]:
            j = w.index(k)
            rises = sum(values[i + 1] > values[i] for i in range(w[j - 1], w[j]))
            first = rises < 0.75 * (w[j] - w[j - 1])
            second = etas[w[j - 1]] == eta and tops[w[j - 1]] == f_max
            etas[k], tops[k] = eta, f_max
            if first or second:
                eta, new = eta / 2, x_max
                value = f(new)[0]
        x.append(new)
        values.append(value)
    return np.stack(visited), eta


def test_auto_pgd_is_the_published_algorithm(box):
    original, low, high = box
    rule = AutoRule(original, low, high, steps=STEPS, radius=RADIUS, momentum=0.75, rho=0.75)
    seen = run(rule)
    for i in range(len(original)):
        by_hand, eta = auto_pgd_by_hand(*(part[i].numpy() for part in (original, low, high)))
        np.testing.assert_allclose(seen[:, i].numpy(), by_hand, atol=1e-4)
        assert (
            rule.eta[i] <= eta < 2 * RADIUS
        )  # it was halved on the way; the last look back comes after the last picture


def test_checkpoints_are_those_of_the_paper():
    assert checkpoints(100) == [0, 22, 41, 57, 70, 80, 87, 93, 99]
    for steps in (1, 2, 5, 10, 1000):
        marks = checkpoints(steps)
        assert marks[0] == 0 and marks == sorted(set(marks)) and marks[-1] <= steps


def test_momentum_accumulates_gradients_of_norm_one(box):
    original, low, high = box
    seen = run(MomentumRule(original, low, high, size=0.5, decay=0.9))
    x, g = original.clone(), torch.zeros_like(original)
    for k in range(STEPS):
        torch.testing.assert_close(seen[k], x)
        slope = bumpy(x)[1]
        g = 0.9 * g + slope / slope.abs().sum(dim=(1, 2, 3), keepdim=True)
        x = torch.minimum(torch.maximum(x - 0.5 * g.sign(), low), high)


def test_sign_steps_and_rows_that_are_left_alone(box):
    original, low, high = box
    rule = SignRule(original, low, high, size=2.0)
    value, slope = bumpy(original)
    rule.step(torch.tensor([0, 2]), value[[0, 2]], slope[[0, 2]])
    torch.testing.assert_close(rule.pixels[1], original[1])
    expected = torch.minimum(torch.maximum(original - 2 * slope.sign(), low), high)
    torch.testing.assert_close(rule.pixels[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("kind", ["sign", "momentum", "auto"])
def test_no_rule_leaves_the_box(box, kind):
    original, low, high = box
    rules = {
        "sign": lambda: SignRule(original, low, high, size=5.0),
        "momentum": lambda: MomentumRule(original, low, high, size=5.0, decay=1.0),
        "auto": lambda: AutoRule(original, low, high, steps=STEPS, radius=RADIUS, momentum=0.75, rho=0.75),
    }
    seen = run(rules[kind]())
    assert bool((seen >= low).all()) and bool((seen <= high).all())
    assert float(bumpy(seen[-1])[0].sum()) < float(bumpy(original)[0].sum())
