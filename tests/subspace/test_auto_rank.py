import pytest
import torch
from subspace_rows import planted

from care_lens.subspace import SafetySubspace, TooFewRowsError
from care_lens.subspace.auto_rank import _assign


@pytest.mark.parametrize("planted_rank", [1, 3])
@pytest.mark.parametrize("contrast", ["covariance", "second_moment"])
def test_the_planted_rank_is_found(planted_rank, contrast):
    benign, malicious, _ = planted(160, 160, 24, planted=planted_rank, spread=5.0)
    fitted = SafetySubspace.fit(benign, malicious, contrast=contrast)
    assert fitted.rank == planted_rank
    choice = fitted.diagnostics["auto_rank"]
    assert choice["passed"] == planted_rank
    assert min(choice["heldout_ratios"][:planted_rank]) > choice["threshold"]
    assert choice["heldout_ratios"][planted_rank] <= choice["threshold"]


def test_it_is_found_with_fewer_rows_than_dimensions():
    benign, malicious, _ = planted(60, 60, 100, planted=2, spread=10.0)
    assert SafetySubspace.fit(benign, malicious).rank == 2


def test_nothing_to_find_warns_and_keeps_one():
    ranks = []
    for seed in range(4):
        benign, malicious, _ = planted(80, 80, 16, spread=1.0, seed=seed)
        with pytest.warns(UserWarning, match="found no direction"):
            fitted = SafetySubspace.fit(benign, malicious)
        ranks.append((fitted.rank, fitted.diagnostics["auto_rank"]["passed"]))
    assert ranks == [(1, 0)] * 4


def test_groups_keep_copies_of_one_item_on_one_side():
    """Copies of a row in training and held out make noise look real, unless they are one group."""
    benign, _, _ = planted(40, 40, 60, spread=1.0)
    malicious = planted(40, 8, 60, spread=1.0, seed=1)[1]
    noise = torch.Generator().manual_seed(0)
    copies = malicious.repeat_interleave(6, 0)
    copies = copies + 0.01 * torch.randn(copies.shape, generator=noise, dtype=torch.float64)
    items = [str(i // 6) for i in range(48)]
    fooled = SafetySubspace.fit(benign, copies, contrast="covariance")
    assert fooled.diagnostics["auto_rank"]["passed"] > 0
    with pytest.warns(UserWarning, match="found no direction"):
        SafetySubspace.fit(benign, copies, contrast="covariance", groups=([f"b{i}" for i in range(40)], items))


def test_folds_hold_whole_items_of_both_classes_evenly():
    benign = [f"item {i}" for i in range(12)] * 2
    malicious = [f"item {i}" for i in range(6, 18)]
    folds = _assign((benign, malicious), torch.Generator().manual_seed(0))
    assert set(folds) == set(benign) | set(malicious)
    for names in (set(benign), set(malicious)):
        sizes = [sum(folds[name] == fold for name in names) for fold in range(4)]
        assert sizes == [3, 3, 3, 3]


def test_it_is_reproducible_and_depends_on_the_seed():
    benign, malicious, _ = planted(40, 40, 12)
    ratios = [
        SafetySubspace.fit(benign, malicious, seed=seed).diagnostics["auto_rank"]["heldout_ratios"]
        for seed in (0, 0, 1)
    ]
    assert ratios[0] == ratios[1] != ratios[2]


def test_the_mean_contrast_has_one_direction():
    benign, malicious, _ = planted(40, 40, 12, shift=4.0)
    assert SafetySubspace.fit(benign, malicious, contrast="mean").rank == 1


def test_too_few_items_are_named():
    benign, malicious, _ = planted(40, 3, 12)
    with pytest.raises(TooFewRowsError, match="8 groups of benign and 4 of malicious rows or more, got 40 and 3"):
        SafetySubspace.fit(benign, malicious)
