"""Rules for the rank of one's own: what they are given, what they may return, and that the package's own rules are such rules."""

import dataclasses
import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from subspace_rows import planted

from care_lens.subspace import (
    EnergyRank,
    HeldOutRank,
    Moments,
    PermutationRank,
    RankRule,
    SafetySubspace,
    SubspaceError,
)


def eigenvalues_by_scipy(benign, malicious):
    both = (torch.cov(rows.T, correction=0).numpy() for rows in (malicious, benign))
    return eigh(*both, eigvals_only=True)[::-1]


@dataclasses.dataclass(frozen=True)
class BrokenStick:
    """Keeps directions while their share of the excess is above what a stick broken at random gives (Frontier 1976)."""

    name: ClassVar[str] = "broken stick"
    most: int = 5

    def __call__(self, eigenvalues, null):
        excess = (eigenvalues - null[0]).clamp(min=0)
        k = len(excess)
        stick = torch.tensor([sum(1 / j for j in range(i, k + 1)) / k for i in range(1, k + 1)], dtype=torch.float64)
        passed = (excess / excess.sum() > stick).long().cumprod(0)
        return min(int(passed.sum()), self.most)


def test_a_rule_of_ones_own_is_given_the_eigenvalues_and_their_floor():
    benign, malicious, _ = planted(300, 300, 10, planted=4)
    seen = []

    def two(eigenvalues, null):
        seen.append((eigenvalues, null))
        return 2

    fitted = SafetySubspace.fit(benign, malicious, rank=two, contrast="covariance", shrinkage=None)
    ((values, null),) = seen
    np.testing.assert_allclose(values, eigenvalues_by_scipy(benign, malicious), rtol=1e-6)
    assert values.dtype == torch.float64 and null.shape == (1, 10) and bool((null == 1).all())
    assert fitted.rank == 2 and fitted.equals(
        SafetySubspace.fit(benign, malicious, rank=2, contrast="covariance", shrinkage=None)
    )
    told = fitted.diagnostics["rank_rule"]
    assert (told["rule"], told["passed"], told["thresholds"], told["p_first"]) == ("two", 2, [], None)
    assert "2 directions by two" in fitted.summary()["rank chosen"]
    json.dumps(fitted.diagnostics)
    moments = [Moments.from_rows(rows).without_rows() for rows in (benign, malicious)]
    assert SafetySubspace.from_moments(*moments, rank=two, contrast="covariance", shrinkage=None).rank == 2


def test_a_published_rule_finds_the_planted_rank_and_keeps_its_settings(tmp_path):
    benign, malicious, _ = planted(400, 400, 20, planted=3, spread=10.0)
    rule = BrokenStick(most=7)
    assert isinstance(rule, RankRule)
    fitted = SafetySubspace.fit(benign, malicious, rank=rule, contrast="covariance")
    assert fitted.rank == 3
    assert fitted.diagnostics["rank_rule"]["rule"] == "broken stick" and fitted.diagnostics["rank_rule"]["most"] == 7
    fitted.save(tmp_path)
    assert SafetySubspace.load(tmp_path).diagnostics["rank_rule"]["rule"] == "broken stick"


def test_a_rule_may_ask_for_permutations_or_held_out_ratios():
    """With the package's own decision each gives the package's own rank."""
    benign, malicious, _ = planted(60, 60, 12, planted=2, spread=10.0)

    class Parallel:
        evidence = "permutation"
        draws = 39

        def __call__(self, eigenvalues, null):
            assert null.shape == (39, len(eigenvalues))
            return PermutationRank(39, 0.05)(eigenvalues, null)

    class HeldOut:
        evidence = "heldout"

        def __call__(self, eigenvalues, null):
            passed = (eigenvalues > null.max()).long().cumprod(0)
            return int(passed.sum())

    permuted = SafetySubspace.fit(benign, malicious, rank=Parallel(), seed=3)
    own = SafetySubspace.fit(benign, malicious, rank=PermutationRank(39, 0.05), seed=3)
    assert permuted.equals(own) and permuted.rank == 2
    for name in ("passed", "eigenvalues", "p_first"):
        assert permuted.diagnostics["rank_rule"][name] == own.diagnostics["rank_rule"][name]
    held = SafetySubspace.fit(benign, malicious, rank=HeldOut(), seed=3)
    auto = SafetySubspace.fit(benign, malicious, rank="auto", seed=3)
    assert held.equals(auto) and auto.equals(SafetySubspace.fit(benign, malicious, rank=HeldOutRank(), seed=3))
    assert held.diagnostics["auto_rank"] == {**auto.diagnostics["auto_rank"], "rule": "HeldOut"}
    with pytest.raises(SubspaceError, match=r"use SafetySubspace\.fit"):
        SafetySubspace.from_moments(*map(Moments.from_rows, (benign, malicious)), rank=HeldOut())


def test_the_packages_rules_are_functions_of_eigenvalues_and_null():
    values = torch.tensor([5.0, 3.0, 2.0, 0.5], dtype=torch.float64)
    ones = torch.ones(1, 4, dtype=torch.float64)
    # Excess over 1: 4, 2, 1, 0 of 7.
    assert [EnergyRank(share)(values, ones) for share in (4 / 7, 0.6, 6 / 7, 1.0)] == [1, 2, 2, 3]
    assert EnergyRank()(values, 9 * ones) == 0
    null = torch.arange(1.0, 20.0, dtype=torch.float64)[:, None] / 5  # the 19th smallest of 19 is 3.8
    assert PermutationRank()(values, null.expand(19, 4)) == 1
    assert HeldOutRank()(values, torch.tensor([[0.4], [2.5]]).double().expand(2, 4)) == 2
    assert all(isinstance(rule, RankRule) for rule in (EnergyRank(), PermutationRank(), HeldOutRank()))


@pytest.mark.parametrize("found", [-1, 9, 1.0, None, True, "2"])
def test_what_is_no_rank_is_refused(found):
    benign, malicious, _ = planted(40, 40, 6)
    with pytest.raises(SubspaceError, match="the rank rule odd must return a whole number from 0 to 6"):
        SafetySubspace.fit(benign, malicious, rank=type("Odd", (), {"name": "odd", "__call__": lambda *a: found})())


def test_what_is_no_rule_is_refused():
    benign, malicious, _ = planted(40, 40, 6)

    def strange(eigenvalues, null):
        return 1

    strange.evidence = "stars"
    with pytest.raises(SubspaceError, match="evidence of a rank rule must be one of"):
        SafetySubspace.fit(benign, malicious, rank=strange)
    with pytest.raises(SubspaceError, match=r"make one: EnergyRank\(\)"):
        SafetySubspace.fit(benign, malicious, rank=EnergyRank)
    with pytest.warns(UserWarning, match="the <lambda> rule found no direction"):
        assert SafetySubspace.fit(benign, malicious, rank=lambda eigenvalues, null: 0).rank == 1
