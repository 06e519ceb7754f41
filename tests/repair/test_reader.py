import dataclasses

import pytest
import torch
from fitted import make_subspace

from care_lens.core import Site
from care_lens.repair import EnergyReader, LinearReader, MaxReader

SITE = Site.parse("blocks.1.hook_resid_post")


def activations(seed=0):
    return torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(seed))


def test_energy_is_the_subspaces_own():
    subspace = make_subspace()
    reader = EnergyReader.from_subspace(subspace)
    assert reader.site == SITE
    torch.testing.assert_close(reader.tokens(activations()), subspace.energy(activations()))


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_pooling_by_loops(pooling):
    reader = EnergyReader.from_subspace(make_subspace(), pooling=pooling)
    mask = torch.tensor([[True, False, True, True, False], [False] * 5])
    score = reader.score(activations(), mask)
    tokens = reader.tokens(activations())[0]
    expected = {"max": max, "mean": lambda values: sum(values) / len(values)}[pooling](
        [float(tokens[i]) for i in (0, 2, 3)]
    )
    assert float(score[0]) == pytest.approx(expected, rel=1e-5)
    assert float(score[1]) == -torch.inf


def test_linear_reader_points_to_the_malicious_mean():
    for seed in range(5):
        fitted = make_subspace(seed=seed)
        reader = LinearReader.from_subspace(fitted)
        means = torch.stack([fitted.mean_benign, fitted.mean_malicious])[None]
        benign, malicious = reader.tokens(means)[0].tolist()
        assert benign == pytest.approx(0, abs=1e-5)
        assert malicious > 0


def test_standardised_scores_have_mean_0_and_deviation_1_also_twice():
    reader = EnergyReader.from_subspace(make_subspace())
    mask = torch.ones(40, 1, dtype=torch.bool)
    for _ in range(2):
        rows = torch.randn(40, 1, 32, generator=torch.Generator().manual_seed(3))
        reader = reader.standardised(reader.score(rows, mask))
        scores = reader.score(rows, mask)
        assert float(scores.mean()) == pytest.approx(0, abs=1e-5)
        assert float(scores.std()) == pytest.approx(1, abs=1e-5)


def test_max_reader_takes_the_largest_standardised_score_and_can_be_nested():
    a = EnergyReader.from_subspace(make_subspace(seed=1))
    b = dataclasses.replace(EnergyReader.from_subspace(make_subspace(seed=2)), location=1.0, scale=0.5)
    inner = MaxReader(readers=(a, b), location=2.0)
    outer = MaxReader(readers=(inner, a), scale=4.0)
    assert outer.leaves == (a, b)
    scores = {a: torch.tensor([1.0, 9.0]), b: torch.tensor([8.0, 0.0])}
    assert outer.combine(scores).tolist() == [6 / 4, 9 / 4]


def test_refused():
    with pytest.raises(ValueError, match="scale must be above 0"):
        dataclasses.replace(EnergyReader.from_subspace(make_subspace()), scale=0.0)
    with pytest.raises(ValueError, match="finite and vary"):
        EnergyReader.from_subspace(make_subspace()).standardised(torch.ones(5))
    with pytest.raises(ValueError, match="positions must be one of"):
        EnergyReader.from_subspace(make_subspace(), positions="first")
    with pytest.raises(ValueError, match="32 wide"):
        EnergyReader.from_subspace(make_subspace()).tokens(torch.zeros(1, 1, 31))
    with pytest.raises(ValueError, match="language tower"):
        EnergyReader.from_subspace(make_subspace("vision.blocks.1.hook_resid_post"))
    with pytest.raises(ValueError, match="which site"):
        EnergyReader.from_subspace(dataclasses.replace(make_subspace(), site=None))
    with pytest.raises(ValueError, match="at least one"):
        MaxReader(readers=())
