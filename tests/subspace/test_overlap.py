"""Overlap with directions, and of subspaces with each other: TransformerLens's kernel, scipy's angles."""

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from scipy.stats import kstest
from subspace_rows import planted, unchecked
from transformer_lens.tools.analysis.projection_kernel import orthonormal_subspace, projection_kernel

from care_lens.subspace import (
    NonFiniteError,
    SafetySubspace,
    SubspaceError,
    SubspaceMismatchError,
    overlap_with_directions,
)

F64 = torch.float64


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_a_visual_and_a_textual_subspace_overlap_by_transformer_lenss_kernel():
    benign, malicious, _ = planted(80, 80, 20)
    visual = SafetySubspace.fit(benign, malicious, rank=3, modality="visual")
    textual = SafetySubspace.fit(malicious, benign + normal(80, 20), rank=2, modality="textual")
    found = visual.compare(textual)
    bases = [orthonormal_subspace(one.basis.double()) for one in (visual, textual)]
    assert found.kernel == pytest.approx(float(projection_kernel(*bases).score))
    angles = np.sort(subspace_angles(visual.basis.double().numpy(), textual.basis.double().numpy()))
    np.testing.assert_allclose(np.sort(found.angles.numpy()), angles, atol=1e-6)


def test_shares_are_squared_cosines_of_scipys_angles():
    benign, malicious, _ = planted(60, 60, 12)
    subspace = SafetySubspace.fit(benign, malicious, rank=3)
    directions = normal(5, 12, seed=1)
    found = subspace.overlap(directions, names=list("abcde"))
    for row, share in zip(directions.numpy(), found.shares.numpy(), strict=True):
        angle = subspace_angles(subspace.basis.double().numpy(), row[:, None])[0]
        assert share == pytest.approx(np.cos(angle) ** 2, abs=1e-9)
    torch.testing.assert_close(found.coordinates.square().sum(1), found.shares)
    assert found.chance == 0.25
    frame = found.to_dataframe()
    assert frame["share"].is_monotonic_decreasing
    assert set(frame["direction"]) == set("abcde")


def test_directions_in_and_out_of_the_span():
    basis = torch.eye(6, dtype=F64)[:, :2]
    directions = torch.stack(
        [3 * basis[:, 0] - basis[:, 1], torch.eye(6, dtype=F64)[5], basis[:, 0] + torch.eye(6, dtype=F64)[5]]
    )
    found = overlap_with_directions(basis, directions)
    torch.testing.assert_close(found.shares, torch.tensor([1.0, 0.0, 0.5], dtype=F64))
    torch.testing.assert_close(found.coordinates[0], torch.tensor([3.0, -1.0], dtype=F64) / 10**0.5)
    assert found.p_values[0] < 1e-12 and found.p_values[1] == 1
    assert overlap_with_directions(torch.eye(6, dtype=F64), directions).p_values.tolist() == [1, 1, 1]


def test_p_values_of_random_directions_are_uniform():
    basis = torch.linalg.qr(normal(30, 4)).Q
    found = overlap_with_directions(basis, normal(2000, 30, seed=2))
    assert kstest(found.p_values.numpy(), "uniform").pvalue > 0.01
    assert float(found.shares.mean()) == pytest.approx(found.chance, rel=0.05)


def test_directions_that_cannot_be_compared_are_named():
    basis = torch.eye(6, dtype=F64)[:, :2]
    with unchecked(), pytest.raises(SubspaceMismatchError, match="width 6"):
        overlap_with_directions(basis, normal(2, 5))
    for bad in (torch.zeros(1, 6), torch.full((1, 6), torch.nan)):
        with pytest.raises(NonFiniteError, match="row 0"):
            overlap_with_directions(basis, bad)
    with pytest.raises(SubspaceError, match="names must be as many"):
        overlap_with_directions(basis, normal(2, 6), names=["a"])
