"""Subspaces and corrections of the tiny LLaVA, fitted on random rows."""

import dataclasses

import torch

from care_lens.core import Site
from care_lens.repair import Correction, EnergyReader, Writer
from care_lens.subspace import SafetySubspace

WIDTH = 32


def make_subspace(site="blocks.1.hook_resid_post", *, modality=None, seed=0, rank=3, projection="oblique"):
    """A subspace of random rows whose malicious class has other means and other variances."""
    generator = torch.Generator().manual_seed(seed)
    benign = torch.randn(60, WIDTH, generator=generator)
    stretch = 1 + 2 * torch.rand(WIDTH, generator=generator)
    malicious = torch.randn(60, WIDTH, generator=generator) * stretch + torch.randn(WIDTH, generator=generator)
    return SafetySubspace.fit(
        benign, malicious, rank=rank, site=Site.parse(site), modality=modality, projection=projection
    )


def make_correction(
    site="blocks.1.hook_resid_post", *, seed=0, gate=None, positions="last", reader_site=None, **options
):
    """A correction of a random subspace; gated if a gate is given."""
    subspace = make_subspace(site, seed=seed)
    correction = Correction(writer=Writer.from_subspace(subspace, **options))
    if gate is None:
        return correction
    reader = EnergyReader.from_subspace(make_subspace(reader_site or site, seed=seed + 100), positions=positions)
    return dataclasses.replace(correction, reader=reader, gate=gate)
