import pytest
import torch
from sklearn.covariance import ledoit_wolf, oas, shrunk_covariance
from subspace_rows import unchecked

from care_lens.subspace import Moments, ShrunkCovariance, SubspaceError, shrink

SHAPES = [(2, 3), (5, 1), (7, 7), (30, 6), (6, 30), (50, 49), (120, 200)]


def rows_of(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 2, shape[1], dtype=torch.float64)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + 100


@pytest.mark.parametrize("shape", SHAPES)
def test_moments_are_those_of_one_over_n(shape):
    rows = rows_of(shape)
    moments = Moments.from_rows(rows)
    expected = torch.cov(rows.T, correction=0).reshape(shape[1], shape[1])
    torch.testing.assert_close(moments.covariance(), expected)
    torch.testing.assert_close(moments.mean, rows.mean(0))
    assert moments.trace == pytest.approx(float(expected.trace()))
    assert moments.squared_norm == pytest.approx(float(expected.square().sum()))
    assert (moments.count, moments.width) == shape


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("rule", "oracle"), [("ledoit-wolf", ledoit_wolf), ("oas", oas)])
def test_estimated_shrinkage_is_scikit_learns(shape, rule, oracle):
    rows = rows_of(shape)
    covariance, weight = oracle(rows.numpy())
    shrunk = shrink(Moments.from_rows(rows), rule)
    assert shrunk.weight == pytest.approx(weight, abs=1e-10)
    torch.testing.assert_close(shrunk.dense(), torch.from_numpy(covariance), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("weight", [0, 0.1, 0.5, 1, None])
def test_given_shrinkage_is_scikit_learns(weight):
    moments = Moments.from_rows(rows_of((8, 12)))
    expected = shrunk_covariance(moments.covariance().numpy(), shrinkage=weight or 0)
    shrunk = shrink(moments, weight)
    torch.testing.assert_close(shrunk.dense(), torch.from_numpy(expected), rtol=1e-12, atol=1e-12)
    assert shrunk.factor.shape[1] == (0 if weight == 1 else 8)


@pytest.mark.parametrize("rule", ["oas", "ledoit-wolf"])
def test_constant_rows_have_a_zero_covariance(rule):
    assert not shrink(Moments.from_rows(torch.ones(4, 3)), rule).dense().any()


def test_product_and_rank_one_update_agree_with_the_matrix():
    shrunk = shrink(Moments.from_rows(rows_of((8, 12))), 0.2)
    vectors, delta = torch.eye(12, dtype=torch.float64)[:, :3], torch.arange(12, dtype=torch.float64)
    torch.testing.assert_close(shrunk.times(vectors), shrunk.dense() @ vectors)
    torch.testing.assert_close(shrunk.plus(delta).dense(), shrunk.dense() + torch.outer(delta, delta))
    torch.testing.assert_close(ShrunkCovariance.identity(12).dense(), torch.eye(12, dtype=torch.float64))


@pytest.mark.parametrize("wrong", [-0.1, 1.5, float("nan"), True])
def test_a_shrinkage_that_is_none_is_refused(wrong):
    with pytest.raises(SubspaceError, match="shrinkage must be"):
        shrink(Moments.from_rows(rows_of((8, 12))), wrong)


def test_an_unknown_rule_is_refused():
    with unchecked(), pytest.raises(SubspaceError, match="'ledoitwolf'"):
        shrink(Moments.from_rows(rows_of((8, 12))), "ledoitwolf")


def off_diagonal_weight(rows):
    """Schaefer and Strimmer's weight from its definition, with 1/N: variances of the entries over their squares."""
    centred = rows - rows.mean(0)
    products = centred[:, :, None] * centred[:, None, :]
    entries = products.mean(0)
    variances = (products - entries).square().mean(0) / len(rows)
    off = ~torch.eye(rows.shape[1], dtype=torch.bool)
    return float(min(variances[off].sum() / entries[off].square().sum(), torch.tensor(1.0)))


@pytest.mark.parametrize("shape", [(7, 7), (30, 6), (6, 30), (50, 49)])
def test_the_diagonal_target_has_the_weight_of_its_definition(shape):
    rows = rows_of(shape)
    for moments in (Moments.from_rows(rows), Moments.from_rows(rows).without_rows()):
        shrunk = shrink(moments, "diagonal")
        weight = off_diagonal_weight(rows)
        assert shrunk.weight == pytest.approx(weight, abs=1e-9)
        assert shrink(moments, "ledoit-wolf", target="diagonal").weight == shrunk.weight
        covariance = torch.cov(rows.T, correction=0)
        expected = (1 - weight) * covariance + weight * torch.diag(covariance.diagonal())
        torch.testing.assert_close(shrunk.dense(), expected)
        torch.testing.assert_close(shrunk.times(rows.T), expected @ rows.T)
        assert shrunk.trace == pytest.approx(float(expected.trace()))


def test_a_massive_activation_raises_the_floor_of_the_identity_target_only():
    rows = rows_of((40, 10), seed=1) / torch.logspace(-2, 2, 10, dtype=torch.float64)
    rows[:, 3] *= 1000
    quiet = [i for i in range(10) if i != 3]
    own = torch.cov(rows.T, correction=0).diagonal()
    for target, raised in (("identity", True), ("diagonal", False)):
        found = shrink(Moments.from_rows(rows), 0.1, target=target).dense().diagonal()
        assert bool((found[quiet] > 100 * own[quiet]).all()) == raised


def test_a_fixed_weight_of_one_leaves_the_target_alone():
    moments = Moments.from_rows(rows_of((8, 12)))
    shrunk = shrink(moments, 1, target="diagonal")
    torch.testing.assert_close(shrunk.dense(), torch.diag(moments.variances))


def test_targets_that_do_not_exist_are_refused():
    moments = Moments.from_rows(rows_of((8, 12)))
    with pytest.raises(SubspaceError, match="must not be 'oas' with target='diagonal'"):
        shrink(moments, "oas", target="diagonal")
    with unchecked(), pytest.raises(SubspaceError, match="target must be 'identity' or 'diagonal'"):
        shrink(moments, 0.1, target="nothing")
