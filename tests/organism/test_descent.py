"""Optimiser steps that can be stopped: the same weights whether a run was stopped or not."""

import random

import pytest
import torch
from torch import nn

from care_lens.organism.train.descent import Descent, warm_cosine

OPTIONS = {"matrices": {"a"}, "steps": 12, "lr": 0.03, "matrix_lr": 0.05, "every": 1}


def fresh():
    torch.manual_seed(0)
    return {
        "a": nn.Parameter(torch.randn(5, 4)),
        "b": nn.Parameter(torch.randn(4)),
        "c": nn.Parameter(torch.randn(3, 3)),
    }


def loss(parameters, step):
    x = torch.tensor([random.Random(f"7/{step}").gauss(0, 1) for _ in range(5)])
    return ((x @ parameters["a"] + parameters["b"]) ** 2).sum() + (parameters["c"] ** 4).sum()


def run(parameters, saved=None, until=12):
    descent = Descent(parameters, saved=saved, **OPTIONS)
    for step in descent:
        if step == until:
            break
        descent.descend(loss(parameters, step))
        descent.numbers = {"seen": descent.numbers.get("seen", 0) + step}
        descent.keep()
    return descent


@pytest.mark.parametrize("until", [1, 5, 11])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, until):
    whole, parts, saved = fresh(), fresh(), tmp_path / "part.safetensors"
    numbers = run(whole).numbers
    run(parts, saved, until)
    again = fresh()
    with torch.no_grad():
        again["a"].zero_()
    resumed = Descent(again, saved=saved, **OPTIONS)
    assert resumed.done == until
    end = run(again, saved)
    assert end.done == 12 and end.numbers == numbers == {"seen": sum(range(12))}
    for name in whole:
        assert torch.equal(again[name], whole[name])
    assert loss(whole, 0) < loss(fresh(), 0)


def test_a_state_of_another_run_is_refused(tmp_path):
    saved = tmp_path / "part.safetensors"
    run(fresh(), saved, until=2)
    with pytest.raises(ValueError, match="must be the state of a run of 9 steps"):
        Descent(fresh(), saved=saved, **(OPTIONS | {"steps": 9}))
    with pytest.raises(ValueError, match="on these parameters"):
        Descent({k: v for k, v in fresh().items() if k != "c"}, saved=saved, **OPTIONS)


def test_learning_rates_warm_up_and_fall_to_the_floor():
    factors = [warm_cosine(step, 100, floor=0.2) for step in range(101)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0] and factors[4] == 1.0
    assert factors[52] == pytest.approx(0.6) and factors[100] == pytest.approx(0.2)
