import dataclasses

import pytest
import torch
from fitted import make_correction, make_subspace

from care_lens.core import Site
from care_lens.repair import ConformalGate, Correction, HybridFusion, Writer, random_control, shuffled_labels
from care_lens.repair.fuse import GatedWriter, fused_edit

SITE, BELOW = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"
GATE = ConformalGate(threshold=1.0, epsilon=0.1, n=9)


@pytest.fixture()
def fusion():
    oblique = Correction(writer=Writer.from_subspace(make_subspace(), scope="text"))
    orthogonal = make_subspace(BELOW, seed=2, projection="orthogonal")
    wide = Correction(writer=Writer.from_subspace(make_subspace(seed=3, rank=20)))
    return HybridFusion(
        visual=(
            dataclasses.replace(oblique, reader=make_correction(seed=1, gate=GATE).reader, gate=GATE),
            wide,
        ),
        textual=(Correction.care(orthogonal, alpha=0.5),),
        rule="sequential",
    )


@pytest.fixture()
def activations():
    generator = torch.Generator().manual_seed(9)
    return {
        SITE: torch.randn(50, 32, generator=generator),
        Site.parse(BELOW): torch.randn(50, 32, generator=generator),
    }


def test_control_keeps_everything_but_where_is_written(fusion, activations):
    control = random_control(fusion, activations, seed=1)
    assert control.rule == fusion.rule and control.name == "random control of care"
    assert control.provenance["control_seed"] == 1
    for before, after in zip(fusion.corrections, control.corrections, strict=True):
        assert after.reader is before.reader and after.gate == before.gate
        old, new = before.writer, after.writer
        assert (new.site, new.rank, new.scope) == (old.site, old.rank, old.scope)
        assert torch.equal(new.target, old.target)
        for a, b in ((old.write, new.write), (old.left, new.left)):
            torch.testing.assert_close(torch.linalg.svdvals(b), torch.linalg.svdvals(a), atol=1e-4, rtol=1e-4)
        rows = activations[SITE] if str(old.site) == SITE else activations[Site.parse(BELOW)]
        norms = [(w.alpha * w.delta(rows)).norm(dim=-1).mean() for w in (old, new)]
        torch.testing.assert_close(norms[1], norms[0])
    first, second = fusion.visual[0].writer, control.visual[0].writer
    cosines = torch.linalg.svdvals(torch.linalg.qr(first.left).Q.T @ torch.linalg.qr(second.left).Q)
    assert float(cosines.max()) < 0.8


def test_control_is_the_seeds(fusion, activations):
    a, b, c = (random_control(fusion, activations, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a.visual[0].writer.write, b.visual[0].writer.write)
    assert not torch.equal(a.visual[0].writer.write, c.visual[0].writer.write)
    with pytest.raises(ValueError, match="must hold the site"):
        random_control(fusion, {SITE: activations[SITE]})


def test_shuffled_rows_are_the_same_rows_in_classes_of_the_same_size():
    benign, malicious = torch.arange(20.0).reshape(10, 2), torch.arange(100.0, 114.0).reshape(7, 2)
    first, second = shuffled_labels(benign, malicious, seed=3)
    assert (len(first), len(second)) == (10, 7)
    everything = torch.cat([first, second])
    assert sorted(map(tuple, everything.tolist())) == sorted(map(tuple, torch.cat([benign, malicious]).tolist()))
    assert 0 < int((first[:, 0] >= 100).sum()) < 7
    again, _ = shuffled_labels(benign, malicious, seed=3)
    assert torch.equal(first, again)


def test_shuffling_by_groups_keeps_them_together():
    benign, malicious = torch.zeros(12, 1), torch.ones(12, 1)
    benign[:, 0], malicious[:, 0] = torch.arange(12) // 3, 10 + torch.arange(12) // 3
    groups = ([str(i // 3) for i in range(12)], [str(i // 3) for i in range(12)])
    mixed = False
    for seed in range(5):
        first, second = shuffled_labels(benign, malicious, seed=seed, groups=groups)
        units = [set(part[:, 0].tolist()) for part in (first, second)]
        assert not units[0] & units[1] and [len(unit) for unit in units] == [4, 4]
        mixed |= any(unit >= 10 for unit in units[0])
    assert mixed
    with pytest.raises(ValueError, match="as long as the rows"):
        shuffled_labels(benign, malicious, groups=(groups[0][:-1], groups[1]))


def test_a_shared_writer_stays_shared_and_fused_edits_have_equal_norms():
    rows = torch.randn(200, 32, generator=torch.Generator().manual_seed(5))
    base = make_correction(seed=1)
    fusion = HybridFusion(visual=(base,), textual=(base,), rule="adaptive")
    control = random_control(fusion, {(base.writer.site, base.writer.scope): rows}, seed=3)
    assert control.visual[0].writer is control.textual[0].writer

    def norm(repair):
        open_ = torch.ones(1, len(rows))
        sides = [[GatedWriter(c.writer, open_) for c in part] for part in (repair.visual, repair.textual)]
        return fused_edit(rows[None], *sides, rule="adaptive", weights=(0.5, 0.5)).edit.norm(dim=-1).mean()

    torch.testing.assert_close(norm(control), norm(fusion), rtol=1e-4, atol=1e-4)
