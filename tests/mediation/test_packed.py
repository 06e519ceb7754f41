"""Towers that lay the patches of all pictures in one row, and pictures that are cut in tiles."""

import pytest
import torch
from zoo import idefics3, qwen_vl

from care_lens.attacks import as_seen
from care_lens.core import Example, PairedExamples, UnsafeMargin
from care_lens.lvlm import HookedLVLM
from care_lens.mediation import mediate, path_effects

OUTCOME, SITE = UnsafeMargin(comply=(10,), refuse=(11,)), "vision.blocks.0.hook_resid_pre"


@pytest.fixture(scope="module")
def packed():
    with HookedLVLM.from_hf(*qwen_vl.SPECIMENS[0].make()) as lvlm:
        yield lvlm


def effects(lvlm, pairs, batch_size):
    found = mediate(
        lvlm, pairs, outcome=OUTCOME, sites=[SITE], positions=("last",), batch_size=batch_size, n_boot=5, progress=False
    )
    return torch.tensor(found.details[["safe_patched", "unsafe_patched"]].to_numpy())


def test_pairs_with_smaller_pictures_are_patched_in_a_batch_with_larger_ones(packed, picture):
    small = [Example("what is red", image=picture(i, (32, 32))) for i in range(2)]
    large = [Example(text, image=picture(9, (64, 64))) for text in ("what is red", "what is blue")]
    pairs = PairedExamples.from_pairs([tuple(small), tuple(large)])
    together, alone = effects(packed, pairs, 4), effects(packed, pairs, 2)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert (together[0, 0] - together[0, 1]).abs() > 1e-4, "exchanging the picture does something"


def test_twins_with_pictures_of_two_sizes_are_refused_in_the_vision_tower(packed, picture):
    pairs = PairedExamples.from_pairs(
        [(Example("what is red", image=picture(0, (32, 32))), Example("what is red", image=picture(1, (56, 28))))]
    )
    with pytest.raises(ValueError, match=r"pictures of one size.*in pairs \[0\]"):
        effects(packed, pairs, 4)
    with pytest.raises(ValueError, match=r"pictures of one size.*in pairs \[0\]"):
        path_effects(
            packed,
            pairs,
            outcome=OUTCOME,
            senders=["vision.blocks.0.hook_attn_out"],
            positions=("last",),
            n_boot=5,
            progress=False,
        )


def test_tiles_are_refused_by_name(picture):
    with HookedLVLM.from_hf(*idefics3.SPECIMENS[0].make()) as lvlm:
        rows = [Example("what is red", image=picture(i, (32, 32)), id=str(i)) for i in range(2)]
        with pytest.raises(ValueError, match="cut in tiles for vision"):
            effects(lvlm, PairedExamples.from_pairs([tuple(rows)]), 4)
        with pytest.raises(ValueError, match="in tiles or rows of patches"):
            as_seen(lvlm, rows)


def test_rows_of_patches_are_refused_by_attacks(packed, picture):
    with pytest.raises(ValueError, match="in tiles or rows of patches"):
        as_seen(packed, [Example("what", image=picture(0, (32, 32)), id="a")])
