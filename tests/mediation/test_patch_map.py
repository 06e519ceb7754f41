"""Patch maps: the same picture patch at different places of the model, and what is refused."""

import numpy as np
import pandas as pd
import pytest

from care_lens.core import PairedExamples
from care_lens.mediation import PatchMapResult, patch_map


def grid(model, pairs, margin, site, **options):
    return patch_map(model, pairs, outcome=margin, site=site, n_boot=20, progress=False, **options).grid


def test_what_leaves_one_room_enters_the_next(model, same_text, margin):
    """The projector works patch by patch, so its two sides have equal effects; so has the tower's end."""
    first = grid(model, same_text, margin, "blocks.0.hook_resid_pre")
    assert first.shape == (2, 2)
    assert np.abs(first).min() > 1e-4
    for site in ("projector.hook_out", "projector.hook_in", "vision.blocks.2.hook_resid_post"):
        np.testing.assert_allclose(grid(model, same_text, margin, site), first, atol=1e-5)


def test_batches_change_nothing(model, pictured, margin):
    np.testing.assert_allclose(
        grid(model, pictured, margin, "vision.blocks.1.hook_mlp_out", batch_size=3),
        grid(model, pictured, margin, "vision.blocks.1.hook_mlp_out"),
        atol=1e-5,
    )


def test_details_have_every_pair_and_its_rectangle(model, pictured, margin, tmp_path):
    found = patch_map(model, pictured, outcome=margin, n_boot=20, progress=False)
    means = found.details.groupby("patch")["value"].mean()
    np.testing.assert_allclose(means.to_numpy(), found.frame["value"].to_numpy())
    first = found.details[found.details.pair == 0]
    assert first[["x0", "y0", "x1", "y1"]].to_numpy().tolist() == [
        [0, 0, 8, 8],
        [8, 0, 16, 8],
        [0, 8, 8, 16],
        [8, 8, 16, 16],
    ]
    found.save(tmp_path, "map")
    back = PatchMapResult.load(tmp_path, "map")
    pd.testing.assert_frame_equal(back.frame, found.frame)
    np.testing.assert_array_equal(back.grid, found.grid)


def test_refusals(model, pairs, margin):
    with pytest.raises(ValueError, match=r"none in pairs \[2\]"):
        patch_map(model, pairs, outcome=margin, progress=False)
    with pytest.raises(ValueError, match="patch axis"):
        patch_map(model, pairs[:1], outcome=margin, site="blocks.0.attn.hook_pattern", progress=False)
    with pytest.raises(ValueError, match="at least one pair"):
        patch_map(model, PairedExamples((), ()), outcome=margin, progress=False)
