"""Rows with unequal variances, tables of their moments, and what it means that two moments are the same."""

import pytest
import torch

from care_lens.subspace import MomentsTable

F64 = torch.float64


def rows_of(n, d, seed=0, *, shift=0.0):
    drawn = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return drawn * torch.linspace(0.3, 3.0, d, dtype=F64) + shift


def assert_same(found, expected):
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.covariance(), expected.covariance(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.variances, expected.variances, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.quartics, expected.quartics, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found.sums.third, expected.sums.third, rtol=1e-8, atol=1e-7)
    torch.testing.assert_close(found.sums.cubes, expected.sums.cubes, rtol=1e-8, atol=1e-7)
    for name in ("count", "width", "trace", "squared_norm", "fourth"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-9, abs=1e-12)


def filled(width=5, **options):
    table = MomentsTable(width, **options)
    for label, n in (("benign", 40), ("malicious", 30)):
        rows, groups = rows_of(n, width, n), [f"item {i // 2}" for i in range(n)]
        for start in range(0, n, 7):
            table.update(rows[start : start + 7], label=label, modality="visual", groups=groups[start : start + 7])
    return table
