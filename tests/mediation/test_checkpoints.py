"""Every sweep goes on from whatever part of its checkpoint a kill has left, and ends in the same bytes."""

import pytest

from care_lens import organism
from care_lens.attacks import pgd
from care_lens.core import PairedExamples, UnsafeMargin, Verdict
from care_lens.core.errors import ArtifactError
from care_lens.lvlm import HookedLVLM
from care_lens.mediation import ablate, attribute, head_paths, knockout, mediate, patch_map, path_effects

BATCH = {"batch_size": 2, "progress": False}
FEW = {**BATCH, "n_boot": 20}


def judge(examples, texts):
    return [Verdict.COMPLIED if len(text) % 2 else Verdict.REFUSED for text in texts]


@pytest.fixture(scope="module")
def small():
    with HookedLVLM.from_hf(*organism.untrained(seed=0)) as lvlm:
        yield lvlm


@pytest.fixture(scope="module")
def pairs():
    return organism.pairs("typographic", "fit", n=3)


SITES = ["blocks.0.hook_mlp_out", "blocks.1.hook_attn_out", "projector.hook_out"]
SWEEPS = {
    "mediate": lambda m, p, o, c: mediate(m, p, outcome=o, sites=SITES, checkpoint=c, **FEW),
    "ablate": lambda m, p, o, c: ablate(m, p.unsafe, judge=judge, layers=[0, 1], max_new_tokens=3, checkpoint=c, **FEW),
    "patch_map": lambda m, p, o, c: patch_map(m, p, outcome=o, checkpoint=c, **FEW),
    "path_effects": lambda m, p, o, c: path_effects(
        m,
        p,
        outcome=o,
        senders=["blocks.0.hook_attn_out"],
        receivers=["blocks.0.hook_mlp_out", "end"],
        checkpoint=c,
        **FEW,
    ),
    "head_paths": lambda m, p, o, c: head_paths(m, p, outcome=o, layer=0, head=0, checkpoint=c, **FEW),
    "knockout": lambda m, p, o, c: knockout(
        m, p, source="image", target="last", outcome=o, layers=[0, (0, 1)], checkpoint=c, **FEW
    ),
    "attribute": lambda m, p, o, c: attribute(
        m, p, outcome=o, sites=["blocks.0.attn.hook_z"], method="gradient", checkpoint=c, **FEW
    ),
}


def saved(result, folder):
    result.save(folder, "found")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_killed_anywhere_ends_in_the_same_bytes(small, pairs, tmp_path, name):
    sweep, outcome = SWEEPS[name], organism.outcome()
    path = tmp_path / "whole.jsonl"
    expected = saved(sweep(small, pairs, outcome, path), tmp_path / "whole")
    assert saved(sweep(small, pairs, outcome, None), tmp_path / "without") == expected
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) > 2
    for i, kept in enumerate({1, len(lines) // 2, len(lines)}):
        path.write_bytes(b"".join(lines[:kept]) + (lines[kept][: 7 * i] if kept < len(lines) else b""))
        assert saved(sweep(small, pairs, outcome, path), tmp_path / f"again {i}") == expected
        assert path.read_bytes() == whole


@pytest.mark.parametrize("name", [name for name in SWEEPS if name != "ablate"])  # that has a judge, below
def test_a_checkpoint_of_another_outcome_is_refused_and_left(small, pairs, tmp_path, name):
    path, outcome = tmp_path / "a.jsonl", organism.outcome()
    SWEEPS[name](small, pairs, outcome, path)
    whole = path.read_bytes()
    other = UnsafeMargin(outcome.refuse, outcome.comply)
    with pytest.raises(ArtifactError, match="outcome_digest"):
        SWEEPS[name](small, pairs, other, path)
    relabelled = PairedExamples(pairs.safe, tuple(reversed(pairs.unsafe)))
    with pytest.raises(ValueError):
        SWEEPS[name](small, relabelled, outcome, path)
    assert path.read_bytes() == whole


def test_a_checkpoint_of_another_judge_with_the_same_name_is_refused(small, pairs, tmp_path):
    def made(parity):
        def judge(examples, texts):
            return [Verdict.COMPLIED if len(text) % 2 == parity else Verdict.REFUSED for text in texts]

        return judge

    options = {"layers": [0], "max_new_tokens": 2, "checkpoint": tmp_path / "a.jsonl", **FEW}
    ablate(small, pairs.unsafe, judge=made(0), **options)
    ablate(small, pairs.unsafe, judge=made(0), **options)
    with pytest.raises(ArtifactError, match="outcome_digest"):
        ablate(small, pairs.unsafe, judge=made(1), **options)


def test_pgd_killed_anywhere_finds_the_same_pictures(small, pairs, tmp_path):
    path = tmp_path / "pgd.jsonl"
    options = {"targets": ["sure"], "epsilon": 16, "steps": 2, "restarts": 2, **BATCH}
    expected = saved_attack(pgd(small, pairs.safe, **options), tmp_path / "without")
    assert saved_attack(pgd(small, pairs.safe, checkpoint=path, **options), tmp_path / "whole") == expected
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 1 + 2 * 2
    for kept in range(1, len(lines)):
        path.write_bytes(b"".join(lines[:kept]) + lines[kept][:30])
        assert saved_attack(pgd(small, pairs.safe, checkpoint=path, **options), tmp_path / f"again {kept}") == expected
        assert path.read_bytes() == whole
    with pytest.raises(ArtifactError, match="seed"):
        pgd(small, pairs.safe, checkpoint=path, seed=1, **options)


def saved_attack(result, folder):
    result.save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}
