"""The rank by a share of the energy, and by permuted labels."""

import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import eigh
from scipy.stats import binomtest
from subspace_rows import planted

from care_lens.subspace import EnergyRank, PermutationRank, SafetySubspace, SubspaceError, TooFewRowsError
from care_lens.subspace.items import Items


def chosen(subspace):
    return subspace.diagnostics["rank_rule"]


def test_the_energy_rank_is_a_cumulative_share_of_the_excess():
    benign, malicious, _ = planted(300, 300, 10, planted=4)
    values = eigh(*(torch.cov(rows.T, correction=0).numpy() for rows in (malicious, benign)), eigvals_only=True)[::-1]
    excess = (values - 1).clip(min=0)
    for share in (0.3, 0.6, 0.9, 1.0):
        fitted = SafetySubspace.fit(benign, malicious, rank=EnergyRank(share), contrast="covariance", shrinkage=None)
        expected = int(np.argmax(np.cumsum(excess) >= share * excess.sum() * (1 - 1e-9))) + 1
        assert fitted.rank == expected == chosen(fitted)["passed"]
        np.testing.assert_allclose(chosen(fitted)["eigenvalues"], values, rtol=1e-6)
    assert chosen(SafetySubspace.fit(benign, malicious, rank="energy"))["share"] == 0.9


def test_with_few_rows_the_floor_is_that_of_the_directions_no_row_speaks_of():
    benign, malicious, _ = planted(20, 20, 60, spread=8.0)
    fitted = SafetySubspace.fit(benign, 3 * malicious, rank="energy", shrinkage=0.2)
    assert chosen(fitted)["thresholds"][0] == pytest.approx(fitted.diagnostics["noise_eigenvalue"])


@pytest.mark.parametrize("planted_rank", [1, 3])
@pytest.mark.parametrize("contrast", ["covariance", "second_moment"])
@pytest.mark.parametrize("width", [24, 120])
def test_permutation_finds_the_planted_rank(planted_rank, contrast, width):
    benign, malicious, _ = planted(100, 100, width, planted=planted_rank, spread=10.0)
    fitted = SafetySubspace.fit(benign, malicious, rank="permutation", contrast=contrast)
    assert fitted.rank == planted_rank
    choice = chosen(fitted)
    assert choice["p_first"] == 1 / 20
    assert choice["eigenvalues"][planted_rank] <= choice["thresholds"][planted_rank]


def test_permutation_sees_a_shift_only_where_the_contrast_does():
    benign, malicious, _ = planted(150, 150, 12, planted=1, spread=1.0, shift=4.0)
    assert chosen(SafetySubspace.fit(benign, malicious, rank="permutation"))["passed"] == 1
    with pytest.warns(UserWarning, match="permutation rule found no direction"):
        blind = SafetySubspace.fit(benign, malicious, rank="permutation", contrast="covariance")
    assert (blind.rank, chosen(blind)["passed"]) == (1, 0)


def test_permutation_keeps_its_level_where_there_is_nothing():
    """level = 0.2, 60 fits without a difference: as many pass as a binomial of 0.2 gives, two-sided."""
    passed = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for seed in range(60):
            benign, malicious, _ = planted(20, 20, 8, spread=1.0, seed=seed)
            fitted = SafetySubspace.fit(benign, malicious, rank=PermutationRank(9, 0.2), shrinkage=0.1, seed=seed)
            passed += chosen(fitted)["passed"] > 0
    assert binomtest(passed, 60, 0.2).pvalue > 0.01


def test_paraphrases_of_one_item_are_relabelled_together():
    """Copies make a handful of items look like many rows: without groups noise passes, with them it does not."""
    benign = planted(60, 5, 40, spread=1.0)[0]
    few = planted(60, 6, 40, spread=1.0, seed=1)[1]
    copies = few.repeat_interleave(10, 0)
    options = {"contrast": "covariance", "rank": "permutation", "shrinkage": 0.1}
    fooled = SafetySubspace.fit(benign, copies, **options)
    assert chosen(fooled)["passed"] > 0
    pairs = planted(6, 5, 40, spread=1.0, seed=2)[0].repeat_interleave(10, 0)
    items = [str(i // 10) for i in range(60)]
    with pytest.warns(UserWarning, match="no direction"):
        SafetySubspace.fit(pairs, copies, groups=(items, items), **options)


def test_the_mean_contrast_has_rank_one_whatever_the_rule():
    benign, malicious, _ = planted(40, 40, 6, shift=3.0)
    for rule in ("energy", "permutation"):
        assert SafetySubspace.fit(benign, malicious, rank=rule, contrast="mean").rank == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EnergyRank(0.0), "share must be"),
        (lambda: EnergyRank(1.1), "share must be"),
        (lambda: PermutationRank(significance=1.0), "significance must be"),
        (lambda: PermutationRank(draws=18), "draws must be 19 or more for significance 0.05, got 18"),
    ],
)
def test_rules_that_cannot_be(make, message):
    with pytest.raises(SubspaceError, match=message):
        make()


def test_too_few_items_to_permute_are_named():
    benign, malicious, _ = planted(20, 20, 6)
    groups = (["a"] * 20, [str(i) for i in range(20)])
    with pytest.raises(TooFewRowsError, match="4 items or more in each class, got 1 benign and 20"):
        SafetySubspace.fit(benign, malicious, rank="permutation", groups=groups)


class TestItems:
    groups = (["a", "a", "b", "c", "d", "e"], ["b", "c", "c", "x", "y"])

    def test_draws_keep_items_whole_and_classes_their_numbers_of_items(self):
        items = Items(self.groups, (6, 5))
        assert (items.both, items.benign_only, items.malicious_only) == (["b", "c"], ["a", "d", "e"], ["x", "y"])
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            benign, malicious = items.bootstrap(generator)
            assert benign.count(0) == benign.count(1)
            # An item of both classes is drawn for both, as often.
            assert benign.count(2) == malicious.count(0)
            assert benign.count(3) == malicious.count(1) == malicious.count(2)
            assert malicious.count(3) + malicious.count(4) == 2

    def test_halves_share_no_item(self):
        items = Items(self.groups, (6, 5))
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            names = []
            for benign, malicious in items.halves(generator):
                names.append({self.groups[0][i] for i in benign} | {self.groups[1][i] for i in malicious})
            assert not names[0] & names[1]
            assert names[0] | names[1] == set("abcdexy")

    def test_relabelling_swaps_items_of_both_and_deals_the_others(self):
        items = Items(self.groups, (6, 5))
        generator = torch.Generator().manual_seed(0)
        swapped = 0
        for _ in range(200):
            first, second = items.relabelled(generator)
            assert sorted(first + second) == [(0, i) for i in range(6)] + [(1, i) for i in range(5)]
            assert ((0, 2) in first) != ((1, 0) in first)
            assert ((0, 0) in first) == ((0, 1) in first)
            dealt = {name for kind, i in first if (name := self.groups[kind][i]) in "adexy"}
            assert len(dealt) == 3
            swapped += (1, 0) in first
        assert 70 < swapped < 130
