"""Every sweep goes on from whatever part of its checkpoint a kill has left, and ends in the same bytes."""

import functools
from contextlib import contextmanager

import pytest
import torch
from unchecking import unchecked

from care_lens import organism
from care_lens.attacks import pgd
from care_lens.core import PairedExamples, UnsafeMargin, Verdict
from care_lens.core.errors import ArtifactError
from care_lens.lvlm import HookedLVLM
from care_lens.mediation import (
    ablate,
    attribute,
    head_paths,
    knockout,
    localise,
    mediate,
    patch_map,
    path_effects,
    separability,
    verify,
)
from care_lens.mediation.checkpoint import CellLog
from care_lens.mediation.errors import MediationError

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
    "verify": lambda m, p, o, c: verify(m, p, guessed(m, p, o), outcome=o, top=2, random=1, checkpoint=c, **FEW),
}


@functools.cache
def guessed(m, p, o):
    return attribute(m, p, outcome=o, sites=["blocks.0.attn.hook_z"], patches=(), method="gradient", **FEW)


@contextmanager
def modules_called():
    """How many modules are called meanwhile: none where no pass is made."""
    calls = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(lambda module, args: calls.append(module) or None)
    try:
        yield calls
    finally:
        handle.remove()


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


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_interrupted_after_any_cell_goes_on_without_running_it_again(small, pairs, tmp_path, monkeypatch, name):
    sweep, outcome, path = SWEEPS[name], organism.outcome(), tmp_path / "a.jsonl"
    with modules_called() as whole:
        expected = saved(sweep(small, pairs, outcome, tmp_path / "whole.jsonl"), tmp_path / "whole")
    add_all, kept = CellLog.add_all, []

    def interrupted(self, cells):
        add_all(self, cells)
        kept.append(cells)
        if len(kept) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(CellLog, "add_all", interrupted)
    with modules_called() as before, pytest.raises(KeyboardInterrupt):
        sweep(small, pairs, outcome, path)
    monkeypatch.undo()
    with modules_called() as after:
        assert saved(sweep(small, pairs, outcome, path), tmp_path / "again") == expected
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(before) < len(whole) and len(after) < len(whole)
    with modules_called() as nothing:
        assert saved(sweep(small, pairs, outcome, path), tmp_path / "held") == expected
    # Untouched outcomes tell models apart, where they are the log's probe; nothing else is run.
    assert len(nothing) < len(after) if name in ("mediate", "ablate") else not nothing


NUMBERS = (0, -1, 2.5, True, None, "3")
POSITIONS = ("last", ["nowhere"], [3], ["-1"])
WRONG = {
    "mediate": {
        "n_boot": NUMBERS,
        "n_permutations": NUMBERS,
        "batch_size": (*NUMBERS, 1),
        "positions": (*POSITIONS, []),
    },
    "ablate": {"n_boot": NUMBERS, "batch_size": NUMBERS, "max_new_tokens": NUMBERS},
    "patch_map": {"n_boot": NUMBERS, "batch_size": (*NUMBERS, 1)},
    "path_effects": {"n_boot": NUMBERS, "batch_size": (*NUMBERS, 1), "positions": (*POSITIONS, ["each"])},
    "head_paths": {"n_boot": NUMBERS, "batch_size": (*NUMBERS, 1)},
    "knockout": {"n_boot": NUMBERS, "batch_size": NUMBERS},
    "attribute": {"n_boot": NUMBERS, "neurons_by_pair": NUMBERS[1:], "positions": (*POSITIONS, ["each"])},
    "localise": {"n_boot": NUMBERS, "batch_size": (*NUMBERS, 1), "n_spans": NUMBERS[1:]},
    "verify": {"n_boot": NUMBERS, "top": NUMBERS, "random": NUMBERS},
}


def called(name, m, p, **options):
    """A sweep called with right arguments but those given."""
    outcome = organism.outcome()
    right = {
        "mediate": (mediate, (m, p), {"sites": SITES, "outcome": outcome}),
        "ablate": (ablate, (m, p.unsafe), {"judge": judge}),
        "patch_map": (patch_map, (m, p), {"outcome": outcome}),
        "path_effects": (path_effects, (m, p), {"senders": SITES[:1], "outcome": outcome}),
        "head_paths": (head_paths, (m, p), {"layer": 0, "head": 0, "outcome": outcome}),
        "knockout": (knockout, (m, p), {"source": "image", "target": "last", "outcome": outcome}),
        "attribute": (attribute, (m, p), {"outcome": outcome}),
        "localise": (localise, (m, p), {"outcome": outcome}),
        "verify": (verify, (m, p, guessed(m, p, outcome)), {"outcome": outcome}),
    }
    sweep, given, named = right[name]
    return sweep(*given, **{**named, **options})


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_before_anything_runs(small, pairs, name):
    guessed(small, pairs, organism.outcome())
    wrong = {**WRONG[name], "seed": (-1, 0.5, None)}
    with unchecked(), modules_called() as calls:
        for argument, values in wrong.items():
            for value in values:
                with pytest.raises(MediationError, match=f"{argument} must "):
                    called(name, small, pairs, **{argument: value})
    assert not calls


@pytest.mark.parametrize("name", WRONG)
def test_a_checkpoint_that_cannot_be_one_is_refused_before_anything_runs(small, pairs, tmp_path, name):
    guessed(small, pairs, organism.outcome())
    other = tmp_path / "other.jsonl"
    CellLog(other, settings={"other": "sweep"}, probe=[1.0])
    before = other.read_bytes()
    with modules_called() as calls:
        with pytest.raises(MediationError, match="checkpoint must be a file, got the folder"):
            called(name, small, pairs, checkpoint=tmp_path)
        with pytest.raises(ArtifactError, match="same settings"):
            called(name, small, pairs, checkpoint=other)
    assert not calls and other.read_bytes() == before


def test_separability_refuses_its_options_first():
    with unchecked():
        for options in ({"n_boot": 0}, {"n_folds": 1}, {"seed": -1}):
            with pytest.raises(MediationError, match=f"{next(iter(options))} must be"):
                separability(None, None, **options)


@pytest.mark.parametrize("name", [name for name in SWEEPS if name != "ablate"])  # that has a judge, below
def test_a_checkpoint_of_another_outcome_is_refused_and_left(small, pairs, tmp_path, name):
    path, outcome = tmp_path / "a.jsonl", organism.outcome()
    SWEEPS[name](small, pairs, outcome, path)
    whole = path.read_bytes()
    other = UnsafeMargin(outcome.refuse, outcome.comply)
    with pytest.raises((ArtifactError, ValueError), match=r"outcome_digest|outcome must be the attribution's"):
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
    assert len(lines) > 2  # its head, and a batch of pictures and restarts a line
    for kept in range(1, len(lines)):
        path.write_bytes(b"".join(lines[:kept]) + lines[kept][:30])
        assert saved_attack(pgd(small, pairs.safe, checkpoint=path, **options), tmp_path / f"again {kept}") == expected
        assert path.read_bytes() == whole
    with pytest.raises(ArtifactError, match="seed"):
        pgd(small, pairs.safe, checkpoint=path, seed=1, **options)


def saved_attack(result, folder):
    result.save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}
