"""Equality, union and intersection of subspaces."""

import dataclasses

import pytest
import torch
from scipy.linalg import subspace_angles
from subspace_rows import planted, unchecked

from care_lens.subspace import RankError, SafetySubspace, SubspaceError, SubspaceMismatchError

F64 = torch.float64


def families(projection="oblique", seed=0):
    """Two attack families against one benign reference: they share direction 0 and have one each of their own."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 400, 12, generator=generator, dtype=F64)
    first, second = rows[1].clone(), rows[2].clone()
    first[:, [0, 1]] *= 9
    second[:, [0, 2]] *= 9
    options = {"rank": 2, "projection": projection, "site": "blocks.1.hook_mlp_out", "contrast": "covariance"}
    return rows[0], *(SafetySubspace.fit(rows[0], one, **options) for one in (first, second))


def rotated(subspace, seed=0):
    """The same subspace in another basis: columns of read turned, those of write and left by any matrix and its inverse."""
    generator = torch.Generator().manual_seed(seed)
    k = subspace.rank
    turn = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=F64)).Q
    mix = torch.randn(k, k, generator=generator, dtype=F64) + 3 * torch.eye(k, dtype=F64)
    wide = subspace.to(dtype=F64)
    return dataclasses.replace(
        wide,
        basis=wide.basis @ turn,
        read=wide.read @ turn.T,
        write=wide.write @ torch.linalg.inv(mix).T,
        left=wide.left @ mix,
    )


@pytest.mark.parametrize("projection", ["oblique", "orthogonal"])
def test_equality_does_not_see_the_basis_but_everything_else(projection):
    _, one, other = families(projection)
    assert one.equals(one) and one.equals(rotated(one)) and rotated(one).equals(one)
    assert one.equals(dataclasses.replace(one, diagnostics={}, provenance={"a": 1}))
    assert not one.equals(other)
    assert not one.equals(one.truncate(1))
    for change in (
        {"site": None},
        {"modality": "visual"},
        {"mean_benign": one.mean_benign + 0.1},
        {"mean_malicious": one.mean_malicious + 0.1},
        {"read": 1.1 * one.read},
        {"write": one.write.flip(0)},
    ):
        assert not one.equals(dataclasses.replace(one, **change)), change
    shaken = dataclasses.replace(one, read=one.read * (1 + 1e-3))
    assert not one.equals(shaken) and one.equals(shaken, tolerance=1e-2)


def test_a_fit_with_another_solver_is_equal():
    benign, malicious, _ = planted(50, 40, 30)
    dual, dense = (SafetySubspace.fit(benign, malicious, rank=3, solver=solver) for solver in ("dual", "dense"))
    assert dual.equals(dense)


def test_the_union_of_families_is_oblique_in_their_common_metric():
    benign, one, other = families()
    union = one.union(other)
    assert union.rank == 4  # the shared direction was fitted twice, with noise
    expected = torch.linalg.qr(torch.cat([one.basis, other.basis], dim=1).double()).Q
    assert subspace_angles(union.basis.double().numpy(), expected.numpy()).max() < 1e-5
    wide = union.to(dtype=F64)
    covariance = torch.cov(benign.T, correction=0)
    weight = one.diagnostics["shrinkage_benign"]
    metric = (1 - weight) * covariance + weight * covariance.trace() / 12 * torch.eye(12, dtype=F64)
    eye = torch.eye(4, dtype=F64)
    torch.testing.assert_close(wide.read.T @ metric @ wide.read, eye, atol=2e-3, rtol=0)
    torch.testing.assert_close(wide.write, metric @ wide.read, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(wide.left.T @ wide.write, eye, atol=1e-4, rtol=0)
    assert (union.diagnostics["operation"], union.diagnostics["metric"]) == ("union", "benign")
    # Removing the union removes both.
    cleaned = union.apply(benign * 5)
    for part in (one, other):
        assert float(part.coordinates(cleaned).abs().max()) < 1e-2 * float(part.coordinates(benign * 5).abs().max())
    assert union.eigenvalues.isnan().all()
    assert "not known" in repr(union) and "union" in union._repr_html_()
    with pytest.raises(SubspaceError, match="in no order"):
        union.truncate(2)
    with pytest.raises(SubspaceError, match="must be a fit"):
        union.uncertainty(benign, benign)


def test_a_union_with_another_reference_projects_orthogonally():
    benign, malicious, _ = planted(80, 80, 12)
    visual = SafetySubspace.fit(benign, malicious, rank=2, modality="visual")
    textual = SafetySubspace.fit(3 * malicious.flip(1), benign, rank=2, modality="textual")
    union = visual.union(textual)
    assert (union.diagnostics["metric"], union.modality, union.rank) == ("identity", None, 4)
    torch.testing.assert_close(union.projector(), union.projector().T)
    torch.testing.assert_close(union.read.T @ union.read, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(union.mean_benign, (visual.mean_benign + textual.mean_benign) / 2)
    with pytest.raises(SubspaceError, match="identity"):
        union.mahalanobis(benign)


@pytest.mark.parametrize("projection", ["oblique", "orthogonal"])
def test_union_and_intersection_obey_the_laws_of_sets(projection):
    _, one, other = families(projection)
    for operation in ("union", "intersect"):
        itself = getattr(one, operation)(one)
        assert itself.rank == one.rank
        torch.testing.assert_close(itself.projector(), one.projector(), atol=1e-4, rtol=1e-3)
        left, right = getattr(one, operation)(other), getattr(other, operation)(one)
        torch.testing.assert_close(left.projector(), right.projector(), atol=1e-3, rtol=1e-3)
    assert one.intersect(one.truncate(1)).rank == 1
    assert one.union(one.truncate(1)).rank == 2


def test_the_intersection_of_families_is_what_they_share():
    _, one, other = families()
    shared = one.intersect(other)
    assert shared.rank == 1
    truth = torch.eye(12, dtype=F64)[:, :1].numpy()
    assert subspace_angles(shared.basis.double().numpy(), truth)[0] < 0.3
    cosine = shared.diagnostics["cosines"][0]
    assert cosine == pytest.approx(float(one.compare(other).cosines[0]), abs=1e-5)
    # A midpoint is equally far from both.
    halves = [float(shared.compare(part).angles[0]) for part in (one, other)]
    assert halves[0] == pytest.approx(halves[1], abs=1e-4)
    with pytest.raises(RankError, match="lower least_cosine"):
        one.intersect(other, least_cosine=1.0)


def test_what_cannot_be_combined_is_named():
    _, one, _ = families()
    benign, malicious, _ = planted(40, 40, 6)
    with pytest.raises(SubspaceMismatchError, match="width"):
        one.union(SafetySubspace.fit(benign, malicious, rank=1))
    with pytest.raises(SubspaceMismatchError, match="one site"):
        one.intersect(dataclasses.replace(one, site=None))
    with unchecked(), pytest.raises(SubspaceError, match="least_cosine"):
        one.intersect(one, least_cosine=0.0)
