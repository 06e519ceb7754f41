"""Calls of the public API with wrong arguments, and what becomes of each: run as a program it writes one JSON line a call.

A right call of every function stands here once, and beside it what each argument must not be. Each wrong value is put in alone. A call is
"clear" if it ends in an error that the package raises itself, with a message; "obscure" if the error comes from elsewhere (an AttributeError, a
KeyError, an error from inside of torch or pandas); "silent" if there is none. It is run in an interpreter of its own: the tests'
type checks are off there, as they are for users.
"""

import ast
import contextlib
import functools
import io
import json
import linecache
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image

from care_lens import attacks, capture, core, data, evaluation, mediation, organism, plots, repair, subspace

NAN = float("nan")
FOLDER = Path(tempfile.mkdtemp())
FOREIGN = FOLDER / "foreign.json"
FOREIGN.write_text('{"notes": "somebody\'s"}')
TEXT = FOLDER / "text.jsonl"
TEXT.write_text("dear diary\n")
MISSING = FOLDER / "missing"

# What an argument of a kind must not be.
COUNT = (0, -1, 2.5, "3", NAN, None)
WHOLE = (-1, 2.5, "3", NAN)
SHARE = (-0.1, 1.5, NAN, "half", None)
NUMBER = (NAN, "1", None)
LISTED = (None, 3, "text", [], ["text"], [None])
TEXTS = (None, 3, "text", [3], [None])
SITES = (3, [], ["nowhere"], ["blocks.99.hook_mlp_out"], [None])
SITE = (3, None, "nowhere", "blocks.x.hook_mlp_out", "")
PATHS = (3, None, MISSING, FOREIGN)
NAME = ("x", 3, None, "")
ROWS = (
    None,
    "rows",
    [1.0],
    torch.zeros(3),
    torch.full((9, 6), NAN),
    torch.zeros(0, 6),
    torch.zeros(9, 5, dtype=torch.long),
)
MODEL = (None, "model", 3)
FRAME = (None, "frame", 3, pd.DataFrame(), pd.DataFrame({"a": [1]}))
FUNCTION = (None, "function", 3)


@functools.cache
def lvlm() -> Any:
    return organism.load()


@functools.cache
def examples() -> list[Any]:
    return organism.examples("typographic", "fit", n=2)


@functools.cache
def pairs() -> Any:
    return organism.pairs("wrapper", "fit", n=2)


@functools.cache
def inputs() -> Any:
    return lvlm().prepare(examples())


@functools.cache
def study() -> Any:
    seen = ("plain", "typographic", "wrapper", "spelled", "benign plain")  # as few as it can be of
    return organism.study(only=seen).limited(2)


@functools.cache
def rows(seed: int, n: int = 9) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


@functools.cache
def fitted() -> Any:
    return subspace.SafetySubspace.fit(
        rows(0, 40), rows(1, 40) + 1, rank=2, site="blocks.0.hook_mlp_out", modality="visual"
    )


@functools.cache
def activations() -> Any:
    return capture.capture(lvlm(), examples(), ["blocks.0.hook_mlp_out"], positions=("last",), progress=False)


def answer() -> Any:
    return evaluation.StoredAnswer("none", "c", "1", "g", 0, "p", "sorry", "", 1, "s", "e")


def trials() -> pd.DataFrame:
    rows = [("none", "a", str(i), str(i), 0, "j", "asr", float(i % 2)) for i in range(6)]
    return pd.DataFrame(rows, columns=["defence", "channel", "id", "group", "seed", "judge", "metric", "value"])


# Each: the name, the function, its right arguments, and the wrong values by argument.
Call = tuple[str, Callable[..., Any], dict[str, Any], dict[str, tuple[Any, ...]]]


def table() -> Iterator[Call]:
    yield from core_calls()
    yield from data_calls()
    yield from evaluation_calls()
    yield from subspace_calls()
    yield from repair_calls()
    yield from attack_calls()
    yield from lvlm_calls()
    yield from capture_calls()
    yield from mediation_calls()
    yield from plot_calls()


def core_calls() -> Iterator[Call]:
    wrong = {
        "prompt": (None, 3, b"x", ["x"]),
        "image": ("a.png", 3, np.zeros((2, 2))),
        "response": (3, ["x"]),
        "harmful": ("false", 1, None),
    }
    wrong |= {"channel": (None, 3), "id": (None, 3), "group": (3,), "meta": (None, "x", [1])}
    wrong |= {"more_images": (3, "x", [None]), "behaviour": (3, ["x"])}
    yield "core.Example", core.Example, {"prompt": "p"}, wrong
    one = core.Example("p")
    yield (
        "core.PairedExamples",
        core.PairedExamples,
        {"safe": (one,), "unsafe": (one,)},
        {"safe": (None, 3, (), ("x",)), "unsafe": (None, (), (one, one))},
    )
    yield "core.Site.parse", core.Site.parse, {"site": "blocks.0.hook_mlp_out"}, {"site": SITE}
    yield (
        "core.Site",
        core.Site,
        {"tower": "language", "layer": 0, "component": "hook_mlp_out"},
        {"tower": NAME, "layer": (-1, "0", 1.5), "component": (None, 3, "")},
    )
    for kind in (core.UnsafeMargin, core.PrefixMargin):
        right = (1,) if kind is core.UnsafeMargin else ("a",)
        other = (2,) if kind is core.UnsafeMargin else ("b",)
        yield (
            f"core.{kind.__name__}",
            kind,
            {"comply": right, "refuse": other},
            {"comply": (None, 3, (), other, (None,), (1.5,)), "refuse": (None, (), right)},
        )
    yield (
        "core.LogitDifference",
        core.LogitDifference,
        {"toward": (1,), "away": (2,)},
        {"toward": (None, 3, ("x",), (-1,)), "away": (None, ("x",))},
    )
    yield "core.cluster_bootstrap", core.cluster_bootstrap, {"values": np.arange(4.0), "groups": list("abcd"), "n_boot": 20}, {
        "values": (None, "x", [], ["a"], [NAN] * 4), "groups": (["a"], 3), "n_boot": COUNT, "confidence": (0, 1, 1.5, NAN, "x")}  # fmt: skip
    yield (
        "core.rate_ci",
        core.rate_ci,
        {"successes": 1, "trials": 4},
        {"successes": (-1, 5, NAN, "1", None), "trials": (0, -1, "4", None), "confidence": (0, 1, 95, NAN, "x")},
    )
    yield (
        "core.paired_difference",
        core.paired_difference,
        {"first": np.arange(4.0), "second": np.ones(4), "n_boot": 20},
        {"first": (None, "x", [], [NAN] * 4), "second": ([1.0], None)},
    )
    yield "core.examples_digest", core.examples_digest, {"examples": [one]}, {"examples": (None, 3, ["x"], [None])}
    yield (
        "core.open_picture",
        core.open_picture,
        {"path": ""},
        {"path": (3, None, b"x", MISSING, FOREIGN, FOLDER, "a\x00b")},
    )
    yield (
        "core.shown_picture",
        core.shown_picture,
        {"image": None},
        {
            "image": (
                None,
                3,
                "x",
                np.zeros((2, 2)),
                Image.fromarray(np.full((2, 2), NAN, np.float32)),
                Image.fromarray(np.full((2, 2), -1.0, np.float32)),
            )
        },
    )
    yield (
        "core.require_verdicts",
        core.require_verdicts,
        {"made": ["other"], "n": 1},
        {"made": (None, True, "other", 3, [], [True], ["yes"], [None], {})},
    )
    yield (
        "core.require_outcome",
        core.require_outcome,
        {"values": torch.zeros(1), "rows": 1},
        {
            "values": (
                None,
                1.0,
                [0.0],
                torch.zeros(2),
                torch.zeros(1, 1),
                torch.tensor([NAN]),
                torch.zeros(1, dtype=torch.cfloat),
            )
        },
    )


def data_calls() -> Iterator[Call]:
    yield "data.read_examples", data.read_examples, {"path": ""}, {"path": (3, None, MISSING, TEXT, FOREIGN, FOLDER)}
    yield (
        "data.write_examples",
        data.write_examples,
        {"examples": [], "path": FOLDER / "w.jsonl"},
        {"examples": (None, 3, "text", ["text"], [None]), "path": (None, 3)},
    )
    yield (
        "data.read_study",
        data.read_study,
        {"directory": "", "tokenizer": lambda *_, **__: {"input_ids": [1]}, "judge": organism.OrganismJudge()},
        {"directory": (3, None, MISSING, TEXT, FOLDER)},
    )
    attacks = [
        core.Example(f"p {i}", id=f"{i}", group=f"{i}", behaviour=f"b {i}", harmful=True, channel="a") for i in range(6)
    ]
    some: dict[str, Any] = {"examples": (None, 3, "text", ["text"], [None])}
    yield "data.plain_twins", data.plain_twins, {"examples": attacks}, {**some, "channel": (None, 3)}
    yield "data.attack_pairs", data.attack_pairs, {"examples": attacks}, {**some, "n": COUNT}
    yield "data.held_templates", data.held_templates, {"examples": attacks, "share": 0.5}, {**some, "share": SHARE}
    yield "data.limited", data.limited, {"examples": attacks, "n": 2}, {**some, "n": (0, -1, 2.5, "3", NAN)}
    made = {"name": "s", "judge": organism.OrganismJudge(), "outcome": core.UnsafeMargin((1,), (2,)), "refusal": "no"}
    yield (
        "data.Study.from_examples",
        data.Study.from_examples,
        {"examples": attacks, "twins": True, **made},
        {
            "examples": LISTED,
            "held_out": (None, 3, "a", ["nowhere"], [3]),
            "held_templates": SHARE,
            "pairs": (-1, 1, 2.5, "3", NAN, None),
            "shares": ({"fit": 2.0}, {"train": 1.0}),
        },
    )
    yield (
        "data.write_study",
        data.write_study,
        {
            "study": data.Study.from_examples(attacks, **made),
            "directory": FOLDER / "study",
            "comply": ["sure"],
            "refuse": ["no"],
        },
        {
            "study": (None, 3, "s"),
            "directory": (3, None),
            "comply": (None, 3, [], "sure", [3], [""]),
            "refuse": (None, 3, [], "no", [3], [""]),
        },
    )
    one = core.Example("p", id="a")
    yield (
        "data.split_by_group",
        data.split_by_group,
        {"examples": [one]},
        {
            "examples": (None, 3, "text", ["x"], [core.Example("p")]),
            "shares": ({"fit": 2.0}, {"train": 1.0}, {"fit": NAN}, "half", {"fit": "x"}),
            "seed": ("x" * 0 or [1],),
        },
    )
    right = {
        "name": "s",
        "suites": {"fit": {"a": (one,)}},
        "seen": {},
        "judge": organism.OrganismJudge(),
        "outcome": core.UnsafeMargin((1,), (2,)),
        "refusal": "no",
    }
    yield "data.Study", data.Study, right, {
        "suites": (None, 3, [], {"train": {}}, {"fit": [one]}, {"fit": {"a": ("x",)}}, {"fit": {"a": one}}, {"fit": {"a": (one, one)}}),
        "seen": (None, 3, {"visual": "a"}, {"audio": ("a",)}, {"visual": ("gone",)}),
        "pairs": (None, {"a/b": pairs()}, {"..": pairs()}, {3: pairs()}, {"a": 3}), "pair_outcomes": ({"gone": print}, None)}  # fmt: skip
    yield "data.Study.limited", study().limited, {"n": 1}, {"n": COUNT}
    yield (
        "data.Study.malicious",
        study().malicious,
        {"split": "fit", "modality": "visual"},
        {"split": NAME, "modality": NAME},
    )
    yield "data.Study.benign", study().benign, {"split": "fit"}, {"split": NAME}


def evaluation_calls() -> Iterator[Call]:
    judge = evaluation.SubstringRefusalJudge
    yield (
        "evaluation.SubstringRefusalJudge",
        judge,
        {},
        {"phrases": (None, 3, "sorry", [], [""], ["\u200b"], [3]), "position": NAME, "exceptions": (3, "x", [3])},
    )
    yield (
        "evaluation.SubstringRefusalJudge.from_file",
        judge.from_file,
        {"path": ""},
        {"path": (3, None, MISSING, FOLDER)},
    )
    for name, made in (("SubstringRefusalJudge()", judge()), ("OrganismJudge()", organism.OrganismJudge())):
        yield (
            f"evaluation.{name}",
            made,
            {"examples": examples(), "texts": ["a", "b"]},
            {"examples": (None, 3, [examples()[0]]), "texts": (None, 3, "ab", ["a"], [1, 2], [b"a", b"b"])},
        )
    yield (
        "organism.OrganismJudge()",
        organism.OrganismJudge(),
        {"examples": [core.Example("p")], "texts": ["a"]},
        {"texts": (["b"],)},
    )
    tokenizer = lvlm().tokenizer
    right = {
        "model": lvlm().hf_model,
        "tokenizer": tokenizer,
        "template": "{behavior} {generation}",
        "yes": "sure",
        "no": "sorry",
    }
    yield (
        "evaluation.ClassifierJudge",
        evaluation.ClassifierJudge,
        right,
        {
            "template": (None, 3, "", "{behavior}"),
            "yes": ("", "sorry"),
            "no": ("",),
            "max_answer_tokens": COUNT,
            "batch_size": COUNT,
            "refusals": (3,),
        },
    )
    yield (
        "evaluation.ClassifierJudge.from_pretrained",
        evaluation.ClassifierJudge.from_pretrained,
        {"name_or_dir": "", "template": "{behavior} {generation}"},
        {"name_or_dir": (MISSING, FOLDER)},
    )
    yield "evaluation.GenerationStore", evaluation.GenerationStore, {}, {"path": (3, TEXT, FOREIGN, FOLDER)}
    store = evaluation.GenerationStore()
    yield "evaluation.GenerationStore.add", store.add, {"answers": []}, {"answers": (None, 3, "text", ["text"], [None])}
    yield "evaluation.judge_answers", evaluation.judge_answers, {"answers": [answer()], "judge": judge()}, {
        "answers": (None, 3, "x", ["x"]), "judge": (*FUNCTION, lambda e, t: True, lambda e, t: [], lambda e, t: [True], lambda e, t: "other"), "examples": ([1, 2],)}  # fmt: skip
    yield (
        "evaluation.judge_store",
        evaluation.judge_store,
        {"store": store, "judge": judge()},
        {"store": (None, 3, "x", [])},
    )
    options = {"lvlm": lvlm(), "examples": examples(), "store": store, "max_new_tokens": 2, "progress": False}
    yield "evaluation.generate_all", evaluation.generate_all, options, {
        "lvlm": MODEL, "examples": (None, 3, "text", ["text"], [core.Example("p")], [examples()[0]] * 2), "store": (None, "x", 3), "max_new_tokens": COUNT,
        "batch_size": COUNT, "generation": (3, "x", {"temperature": print}), "repair": (3, "x")}  # fmt: skip
    yield (
        "evaluation.with_answers",
        evaluation.with_answers,
        {"lvlm": lvlm(), "examples": examples(), "progress": False},
        {
            "lvlm": MODEL,
            "examples": (None, 3, "text", ["text"], [core.Example("p")]),
            "harmful": ("cycle", None, 3),
            "benign": ("own", None, 3),
            "refusals": (None, 3, [], "no", [3]),
            "compliances": (None, 3, [], "sure", [3]),
            "settings": ("x", 3),
            "batch_size": COUNT,
            "max_missing": SHARE,
            "directory": (3, TEXT),
        },
    )
    options = {
        "lvlm": lvlm(),
        "suites": {"a": examples()},
        "defences": {"none": None},
        "judge": organism.OrganismJudge(),
        "max_new_tokens": 2,
        "n_boot": 20,
        "progress": False,
    }
    yield "evaluation.evaluate", evaluation.evaluate, options, {
        "lvlm": MODEL, "suites": (None, 3, [], {}, {"a": []}, {"a": ["x"]}, {"a": "x"}), "defences": (None, 3, {}, {"a": 3}, ["none"]), "judge": (*FUNCTION, lambda e, t: True, lambda e, t: []),
        "max_new_tokens": COUNT, "batch_size": COUNT, "n_boot": COUNT, "max_missing": (-1, 2, NAN, "x"), "fidelity": (-1, "x")}  # fmt: skip
    for name, function in (
        ("summarise", evaluation.summarise),
        ("DefenceTable.from_trials", functools.partial(evaluation.DefenceTable.from_trials, settings={})),
    ):
        yield (
            f"evaluation.{name}",
            function,
            {"trials": trials(), "n_boot": 20},
            {"trials": FRAME, "n_boot": COUNT, "confidence": (0, 1.5, NAN, "x"), "max_missing": (-1, 2, NAN, "x")},
        )
    yield (
        "evaluation.paired_difference",
        evaluation.paired_difference,
        {"trials": trials(), "first": "none", "second": "none", "metric": "asr", "n_boot": 20},
        {"trials": FRAME, "first": NAME, "second": NAME, "metric": NAME},
    )
    yield "evaluation.verdict_trials", evaluation.verdict_trials, {"verdicts": pd.DataFrame()}, {"verdicts": FRAME[:3]}
    yield (
        "evaluation.verdict_frame",
        evaluation.verdict_frame,
        {"answers": [answer()], "verdicts": [core.Verdict.OTHER], "judge": "j"},
        {"answers": (None, 3, ["x"]), "verdicts": (None, [], ["x"])},
    )
    made = evaluation.DefenceTable.from_trials(trials(), settings={}, n_boot=20)
    yield (
        "evaluation.DefenceTable.load",
        evaluation.DefenceTable.load,
        {"directory": FOLDER, "name": "foreign"},
        {"directory": (3, None, MISSING, FOLDER), "name": (3, None, "gone", "foreign")},
    )
    yield "evaluation.DefenceTable.to_markdown", made.to_markdown, {}, {"metrics": (["gone"], [], None, 3, "asr")}


def subspace_calls() -> Iterator[Call]:
    kind = subspace.SafetySubspace
    right = {
        "benign": rows(0, 40),
        "malicious": rows(1, 40),
        "rank": 2,
        "site": "blocks.0.hook_mlp_out",
        "modality": "visual",
    }
    yield "subspace.SafetySubspace.fit", kind.fit, right, {
        "benign": ROWS, "malicious": ROWS, "rank": (0, -1, 99, 2.5, "most", None, NAN), "contrast": NAME, "shrinkage": ("x", -1, 2, NAN), "projection": NAME,
        "site": SITE[:1] + SITE[2:], "modality": ("x", 3, "audio"), "solver": NAME, "groups": (3, ["a"], ("a", "b")), "seed": ("x",)}  # fmt: skip
    yield (
        "subspace.SafetySubspace.load",
        kind.load,
        {"directory": ""},
        {"directory": (3, None, MISSING, FOREIGN, FOLDER)},
    )
    for method in ("project", "coordinates", "energy", "mahalanobis", "apply"):
        yield (
            f"subspace.SafetySubspace.{method}",
            getattr(fitted(), method),
            {"h": rows(2)},
            {"h": (None, "x", [1.0], 3, torch.zeros(5), torch.zeros(2, 5))},
        )
    yield (
        "subspace.SafetySubspace.apply alpha",
        functools.partial(fitted().apply, rows(2)),
        {},
        {"alpha": NUMBER, "beta": NUMBER, "target": (3, "x", torch.zeros(5), torch.full((6,), NAN))},
    )
    yield "subspace.SafetySubspace.truncate", fitted().truncate, {"rank": 1}, {"rank": (0, -1, 9, 1.5, "1", None)}
    yield "subspace.SafetySubspace.score", functools.partial(fitted().score, rows(2)), {}, {"kind": NAME}
    yield (
        "subspace.SafetySubspace.calibrate",
        fitted().calibrate,
        {"benign": rows(2)},
        {"benign": ROWS, "groups": (3, ["a"]), "score": NAME},
    )
    for method in ("compare", "union", "intersect", "equals"):
        yield (
            f"subspace.SafetySubspace.{method}",
            getattr(fitted(), method),
            {"other": fitted()},
            {"other": (None, 3, "x", rows(0))},
        )
    yield (
        "subspace.SafetySubspace.check",
        fitted().check,
        {},
        {"site": ("blocks.1.hook_mlp_out", 3), "modality": ("textual", "x"), "width": (7, "6")},
    )
    yield "subspace.SafetySubspace.save", fitted().save, {"directory": FOLDER / "s"}, {"directory": (None, 3, FOREIGN)}
    yield "subspace.Moments.from_rows", subspace.Moments.from_rows, {"rows": rows(0)}, {"rows": ROWS}
    yield (
        "subspace.ConformalScores.from_scores",
        subspace.ConformalScores.from_scores,
        {"scores": rows(0)[:, 0]},
        {"scores": (None, [1.0], "x", torch.zeros(0), torch.full((3,), NAN), torch.zeros(2, 2)), "groups": (["a"], 3)},
    )
    yield (
        "subspace.ConformalScores.threshold",
        subspace.ConformalScores.from_scores(rows(0)[:, 0]).threshold,
        {"epsilon": 0.2},
        {"epsilon": (0, 1, -1, NAN, "x", None, 0.001)},
    )
    yield (
        "subspace.compare_bases",
        subspace.compare_bases,
        {"first": rows(0).T[:, :2], "second": rows(1).T[:, :2]},
        {
            "first": (None, "x", torch.zeros(6), torch.full((6, 2), NAN), torch.zeros(6, 2)),
            "second": (None, torch.zeros(5, 2)),
        },
    )
    yield (
        "subspace.random_like",
        subspace.random_like,
        {"subspace": fitted()},
        {"subspace": (None, 3, "x"), "seed": ("x", 1.5)},
    )
    yield (
        "subspace.shrink",
        subspace.shrink,
        {"moments": subspace.Moments.from_rows(rows(0)), "shrinkage": 0.1},
        {"moments": (None, 3, rows(0)), "shrinkage": (-1, 2, NAN, "x", [1]), "target": NAME},
    )
    yield (
        "subspace.fit_families",
        subspace.fit_families,
        {"benign": rows(0, 40), "malicious": {"a": rows(1, 40), "b": rows(2, 40)}, "rank": 1},
        {"benign": ROWS[:4], "malicious": (None, 3, {}, [rows(1)], {"a": 3}), "threshold": (NAN, "x", -1)},
    )
    yield (
        "subspace.pool",
        subspace.pool,
        {"parts": {"a": subspace.Moments.from_rows(rows(0))}},
        {"parts": (None, 3, {}, {"a": 3}, [1])},
    )
    yield "subspace.MomentsTable", subspace.MomentsTable, {"width": 6}, {"width": COUNT, "folds": COUNT, "keep": NAME}
    yield (
        "subspace.MomentsTable.update",
        subspace.MomentsTable(6).update,
        {"rows": rows(0), "label": "a", "modality": "visual", "groups": list("abcdefghi")},
        {"rows": (None, "x", torch.zeros(3), torch.full((9, 6), NAN), torch.zeros(9, 5)), "groups": (None, ["a"], 3)},
    )
    yield (
        "subspace.MomentsTable.load",
        subspace.MomentsTable.load,
        {"directory": ""},
        {"directory": (3, None, MISSING, FOREIGN, FOLDER)},
    )
    yield "subspace.EnergyRank", subspace.EnergyRank, {}, {"share": (0, 1.5, -1, NAN, "x", None)}
    yield "subspace.PermutationRank", subspace.PermutationRank, {}, {"draws": COUNT, "significance": (0, 1.5, NAN, "x")}
    yield (
        "subspace.overlaps",
        subspace.overlaps,
        {"subspaces": {"a": fitted()}},
        {"subspaces": (None, 3, {}, {"a": 3}, [fitted()])},
    )


def repair_calls() -> Iterator[Call]:
    gate, site = repair.ConformalGate, core.Site.parse("blocks.0.hook_mlp_out")
    yield (
        "repair.ConformalGate",
        gate,
        {"threshold": 1.0, "epsilon": 0.1, "n": 9},
        {
            "threshold": (NAN, "1", None, float("inf")),
            "epsilon": (0, 1, -1, NAN, "x", None),
            "n": COUNT,
            "width": (-1, NAN, "x", None),
        },
    )
    yield (
        "repair.ConformalGate.calibrate",
        gate.calibrate,
        {"scores": rows(0)[:, 0], "epsilon": 0.2},
        {
            "scores": (None, "x", [1.0], torch.full((9,), NAN), torch.zeros(0), torch.zeros(3, 3)),
            "epsilon": (0, 1, NAN, "x", None, 0.001),
        },
    )
    yield from combined_calls()
    right = {"site": site, "target": torch.ones(6), "source": torch.zeros(6)}
    yield (
        "repair.Writer.towards",
        repair.Writer.towards,
        right,
        {
            "site": SITE,
            "target": (None, 3, "x", torch.ones(5), torch.full((6,), NAN), torch.zeros(6)),
            "source": (None, torch.zeros(5)),
            "alpha": NUMBER,
            "scope": (3, None, "somewhere", ()),
        },
    )
    yield (
        "repair.Writer.from_subspace",
        repair.Writer.from_subspace,
        {"subspace": fitted()},
        {
            "subspace": (None, 3, "x"),
            "target": (3, torch.zeros(5), torch.full((6,), NAN)),
            "alpha": NUMBER,
            "beta": NUMBER,
            "scope": (3, "somewhere"),
        },
    )
    for reader in (repair.EnergyReader, repair.LinearReader):
        yield (
            f"repair.{reader.__name__}.from_subspace",
            reader.from_subspace,
            {"subspace": fitted()},
            {"subspace": (None, 3, "x"), "positions": (3, None, "somewhere", ()), "pooling": NAME},
        )
    writer = repair.Writer.towards(**right)
    yield (
        "repair.Correction",
        repair.Correction,
        {"writer": writer},
        {"writer": (None, 3, "x"), "reader": (3, "x"), "gate": (None, 3, "x"), "modality": ("audio", 3)},
    )
    yield (
        "repair.Correction.care",
        repair.Correction.care,
        {"subspace": fitted()},
        {"subspace": (None, 3), "alpha": NUMBER},
    )
    fusion = {"visual": (repair.Correction.care(fitted()),)}
    yield (
        "repair.HybridFusion",
        repair.HybridFusion,
        fusion,
        {
            "visual": (None, 3, "x", (3,), ("x",)),
            "rule": NAME,
            "weights": (3, (1,), (NAN, 1), ("a", "b"), (-1, 2)),
            "scope": (3, "somewhere"),
        },
    )
    yield (
        "repair.HybridFusion.load",
        repair.HybridFusion.load,
        {"directory": ""},
        {"directory": (3, None, MISSING, FOREIGN, FOLDER)},
    )
    yield (
        "repair.HybridFusion.on",
        lambda lvlm: repair.HybridFusion(**fusion).on(lvlm).__enter__(),
        {"lvlm": None},
        {"lvlm": (*MODEL, lvlm())},
    )
    yield (
        "repair.read_scores",
        repair.read_scores,
        {"lvlm": lvlm(), "examples": examples(), "readers": [], "progress": False},
        {"readers": (None, 3, [], ["x"]), "trace": (3, "x", None)},
    )
    yield (
        "repair.shuffled_labels",
        repair.shuffled_labels,
        {"benign": rows(0), "malicious": rows(1)},
        {"benign": (None, "x", torch.zeros(3), torch.zeros(9, 5)), "seed": ("x",)},
    )


def combined_calls() -> Iterator[Call]:
    """Readers made of several, gates that open gradually, and schedules."""
    yield (
        "repair.SoftGate",
        repair.SoftGate,
        {"threshold": 1.0, "temperature": 0.5, "closed_to": 0.0, "epsilon": 0.1, "n": 9},
        {
            "threshold": (*NUMBER, float("inf")),
            "temperature": (0, -1, *NUMBER),
            "closed_to": (NAN, "x"),
            "epsilon": (0, 1, NAN, "x", None),
            "n": (0, 2.5, "3"),
        },
    )
    scores = rows(0)[:, 0]
    yield (
        "repair.SoftGate.calibrate",
        repair.SoftGate.calibrate,
        {"scores": scores, "epsilon": 0.2, "temperature": 1.0},
        {"scores": (None, "x", torch.zeros(3, 3)), "epsilon": (0, NAN, None, 0.001), "temperature": (0, *NUMBER)},
    )
    for name, right, wrong in (
        ("ConstantSchedule", {"strength": 0.5}, {"strength": (2.0, -0.1, *NUMBER)}),
        ("LinearDecay", {"tokens": 3}, {"tokens": COUNT, "end": (2.0, *NUMBER)}),
        ("FirstTokens", {"tokens": 3}, {"tokens": (*WHOLE, None)}),
        ("ExponentialDecay", {"half_life": 2.0}, {"half_life": (0, -1, *NUMBER)}),
    ):
        yield f"repair.{name}", getattr(repair, name), right, wrong
    image = repair.LinearReader.from_subspace(fitted(), positions="image")
    text = repair.LinearReader.from_subspace(fitted(), positions="text")
    yield (
        "repair.Reader.with_threshold",
        image.with_threshold,
        {"threshold": 2.0},
        {"threshold": (0.0, -1, *NUMBER), "zero": (3.0, *NUMBER)},
    )
    for combined in (repair.AllOf, repair.SumReader):
        yield (
            f"repair.{combined.__name__}",
            combined,
            {"readers": (image, text)},
            {"readers": (None, 3, (), "x", (3,)), "scale": (0, NAN)},
        )
    yield (
        "repair.WeightedReader",
        repair.WeightedReader,
        {"readers": (image, text), "weights": (1.0, 2.0)},
        {"weights": (None, 3, (), (1.0,), (0, 0), (NAN, 1), (-1, 2), ("a", "b")), "floor": NUMBER},
    )
    yield (
        "repair.in_threshold_units",
        repair.in_threshold_units,
        {"readers": (image, text), "benign": rows(0)[:, :2], "epsilon": 0.2},
        {
            "readers": (None, 3, "x", (3, 4)),
            "benign": (None, "x", scores, rows(0)),
            "epsilon": (0, 1, NAN, None, 0.001),
        },
    )
    yield (
        "repair.modality_detector",
        repair.modality_detector,
        {"image": image, "text": text, "combine": "both", "thresholds": (1.0, 2.0)},
        {
            "image": (None, 3, "x", text),
            "text": (None, 3, image),
            "combine": NAME,
            "thresholds": (None, 3, (1.0,), (0, 1), (NAN, 1)),
        },
    )


def attack_calls() -> Iterator[Call]:
    style = attacks.TextStyle
    yield (
        "attacks.TextStyle",
        lambda **o: attacks.draw_text("a", style=style(**o)),
        {},
        {
            "font": (3, MISSING, FOREIGN),
            "font_size": COUNT,
            "position": ("nowhere", 3, (1,)),
            "colour": ("nocolour", 3.5, None),
            "margin": (-1, "x", None),
        },
    )
    yield (
        "attacks.draw_text",
        attacks.draw_text,
        {"text": "a"},
        {
            "text": (None, 3, "", " ", "word " * 9999),
            "image": ("x", 3),
            "style": (None, 3, "x"),
            "size": (3, (0, 0), (1,), ("a", "b"), (-5, 5)),
            "background": ("nocolour", 3.5),
        },
    )
    yield (
        "attacks.typographic",
        attacks.typographic,
        {"examples": examples(), "prompt": "read"},
        {"examples": (None, 3, "text", ["text"], [None]), "prompt": (None, 3), "style": (None, 3)},
    )
    yield (
        "attacks.wrap",
        attacks.wrap,
        {"examples": examples(), "template": "{request}"},
        {"examples": (None, 3, ["x"]), "template": (None, 3, "", "no field", "{other}", "{")},
    )
    yield (
        "attacks.random_noise",
        attacks.random_noise,
        {"examples": examples(), "epsilon": 8},
        {
            "examples": (None, 3, ["x"], [core.Example("p")]),
            "epsilon": (0, -1, NAN, "8", None, 300),
            "kind": NAME,
            "seed": ("x",),
        },
    )
    right = {"lvlm": lvlm(), "examples": examples(), "epsilon": 8, "steps": 1, "progress": False}
    yield "attacks.pgd", attacks.pgd, right, {
        "lvlm": MODEL, "examples": (None, 3, [], ["x"], [core.Example("p")]), "epsilon": (0, -1, NAN, "8", None), "steps": (-1, 1.5, "1", None), "step_size": (0, -1, NAN, "x"),
        "restarts": COUNT, "targets": (3, ["a"], [[], []], [3, 3]), "batch_size": COUNT, "target_tokens": (0, -1, "x"), "repair": (3, "x")}  # fmt: skip
    yield (
        "attacks.PGDResult.load",
        attacks.PGDResult.load,
        {"directory": ""},
        {"directory": (3, None, MISSING, FOREIGN, FOLDER)},
    )
    yield (
        "attacks.as_seen",
        attacks.as_seen,
        {"lvlm": lvlm(), "examples": examples()},
        {"lvlm": MODEL, "examples": (None, 3, ["x"], [core.Example("p")])},
    )


def lvlm_calls() -> Iterator[Call]:
    from care_lens import HookedLVLM

    model = lvlm()
    hooks = [("blocks.0.hook_mlp_out", lambda a, hook: a)]
    bad_hooks = (
        None,
        3,
        "x",
        [3],
        [("nowhere", print)],
        [("blocks.0.hook_mlp_out", 3)],
        [("blocks.0.hook_mlp_out",)],
        [("blocks.0.hook_mlp_out", lambda a, hook: "x")],
        [("blocks.0.hook_mlp_out", lambda a, hook: a[:, :1])],
        [("blocks.0.hook_mlp_out", lambda a, hook: a > 0)],
    )
    yield (
        "lvlm.HookedLVLM.from_pretrained",
        HookedLVLM.from_pretrained,
        {"name_or_dir": organism.path()},
        {"name_or_dir": (3, None, MISSING, FOLDER), "dtype": ("nofloat", 3)},
    )
    yield (
        "lvlm.HookedLVLM.from_hf",
        HookedLVLM.from_hf,
        {"model": model.hf_model, "processor": model.processor},
        {"model": (None, 3, torch.nn.Linear(2, 2)), "processor": (None, 3)},
    )
    yield (
        "lvlm.prepare",
        model.prepare,
        {"examples": examples()},
        {"examples": (None, 3, "text", [], ["text"], [None]), "padding_side": NAME},
    )
    yield (
        "lvlm.run_with_hooks",
        model.run_with_hooks,
        {"inputs": inputs(), "fwd_hooks": hooks},
        {"inputs": (None, 3, "x", examples()), "fwd_hooks": bad_hooks, "logits_to_keep": (-1, "x", 1.5)},
    )
    yield (
        "lvlm.run_with_cache",
        model.run_with_cache,
        {"inputs": inputs(), "sites": ["blocks.0.hook_mlp_out"]},
        {"inputs": (None, 3), "sites": (3, ["nowhere"], [3], "nowhere"), "logits_to_keep": (-1, "x")},
    )
    yield (
        "lvlm.generate",
        model.generate,
        {"inputs": inputs(), "max_new_tokens": 1},
        {"inputs": (None, 3, "x"), "max_new_tokens": COUNT[:5], "fwd_hooks": bad_hooks[1:], "sites": (3, ["nowhere"])},
    )
    yield "lvlm.site_info", model.site_info, {"site": "blocks.0.hook_mlp_out"}, {"site": SITE}
    yield "lvlm.bind", model.bind, {"inputs": inputs()}, {"inputs": (None, 3)}
    yield "lvlm.LVLMInputs.rows", inputs().rows, {"index": [0]}, {"index": (None, [], [9], ["x"], 3, [-9])}
    yield "core.TokenSpans.mask", inputs().spans.mask, {"name": "image"}, {"name": NAME}


def capture_calls() -> Iterator[Call]:
    right = {
        "lvlm": lvlm(),
        "examples": examples(),
        "sites": ["blocks.0.hook_mlp_out"],
        "positions": ("last",),
        "progress": False,
    }
    yield (
        "capture.capture",
        capture.capture,
        right,
        {
            "lvlm": MODEL,
            "examples": LISTED,
            "sites": (*SITES, "blocks.0.hook_mlp_out", None),
            "positions": (3, [], ["nowhere"], None, [3]),
            "batch_size": COUNT,
            "attribution": (3, "x"),
            "outcome": (3, "x"),
        },
    )
    yield (
        "capture.capture_moments",
        capture.capture_moments,
        {**right, "label": "benign"},
        {
            "examples": LISTED,
            "sites": SITES,
            "label": (3, None, ["a"]),
            "positions": ([], ["nowhere"]),
            "folds": COUNT,
            "keep": NAME,
            "batch_size": COUNT,
        },
    )
    held = activations()
    yield (
        "capture.Activations.rows",
        held.rows,
        {"site": "blocks.0.hook_mlp_out", "positions": "last"},
        {"site": (*SITE, "blocks.1.hook_mlp_out"), "positions": NAME},
    )
    yield (
        "capture.Activations.subset",
        held.subset,
        {"which": [0]},
        {"which": (None, 3, [9], ["x"], torch.zeros(5, dtype=torch.bool))},
    )
    yield (
        "capture.Activations.concatenate",
        held.concatenate,
        {"parts": [held]},
        {"parts": (None, 3, [], [3], [held, 3])},
    )
    yield (
        "capture.Activations.load",
        held.load,
        {"directory": FOLDER, "name": "foreign"},
        {"directory": (3, None, MISSING), "name": (3, None, "gone", "foreign")},
    )
    yield (
        "capture.TokenAttribution",
        capture.TokenAttribution,
        {},
        {
            "visual": (-1, 2, NAN, "x", None),
            "text": (-1, 2, NAN, "x"),
            "method": NAME,
            "kernel": NAME,
            "distance_weight": (-1, 2, NAN, "x"),
        },
    )
    yield (
        "capture.select_tokens",
        capture.select_tokens,
        {"scores": torch.arange(4.0), "k": 2},
        {"scores": (None, "x", [1.0], torch.full((4,), NAN), torch.zeros(2, 2)), "k": (0, -1, "2", 1.5, None)},
    )
    yield (
        "capture.visual_scores",
        capture.visual_scores,
        {"visual": rows(0), "text": rows(1)},
        {
            "visual": (None, "x", torch.zeros(3), torch.full((9, 6), NAN)),
            "text": (None, torch.zeros(9, 5), torch.zeros(0, 6)),
            "kernel": NAME,
        },
    )
    yield (
        "capture.token_gradients",
        capture.token_gradients,
        {"lvlm": lvlm(), "inputs": inputs(), "sites": ["blocks.0.hook_mlp_out"], "outcome": organism.outcome()},
        {
            "lvlm": MODEL,
            "inputs": (None, 3),
            "sites": SITES,
            "outcome": (*FUNCTION, lambda logits, inputs: 1.0, lambda logits, inputs: logits),
        },
    )


def mediation_calls() -> Iterator[Call]:
    outcomes = (
        *FUNCTION,
        lambda logits, inputs: 1.0,
        lambda logits, inputs: logits[:, -1],
        lambda logits, inputs: logits[:, -1, 0] * NAN,
    )
    bad_pairs = (None, 3, "x", [], pairs()[:0], [1, 2])
    shared = {"lvlm": lvlm(), "pairs": pairs(), "outcome": organism.outcome(), "progress": False, "n_boot": 20}
    wrong = {"lvlm": MODEL, "pairs": bad_pairs, "outcome": outcomes, "batch_size": COUNT, "n_boot": COUNT}
    sites = ["blocks.0.hook_mlp_out"]
    yield (
        "mediation.mediate",
        mediation.mediate,
        {**shared, "sites": sites, "positions": ("last",), "n_permutations": 10},
        {**wrong, "sites": SITES, "positions": (3, [], ["nowhere"], "last", [3])},
    )
    yield (
        "mediation.attribute",
        mediation.attribute,
        {**shared, "sites": sites, "points": 2},
        {**wrong, "sites": SITES, "positions": ([], ["nowhere"]), "method": NAME, "points": COUNT, "path": NAME},
    )
    yield (
        "mediation.patch_map",
        mediation.patch_map,
        {**shared, "pairs": organism.picture_pairs("fit", n=2)},
        {"pairs": bad_pairs, "site": SITE, "batch_size": COUNT},
    )
    yield (
        "mediation.path_effects",
        mediation.path_effects,
        {**shared, "senders": sites},
        {"pairs": bad_pairs, "senders": SITES, "receivers": (["nowhere"], []), "positions": ([], ["nowhere"])},
    )
    yield (
        "mediation.localise",
        mediation.localise,
        {**shared, "sites": sites},
        {"pairs": bad_pairs, "sites": SITES, "n_spans": (-1, "x")},
    )
    right = {
        "lvlm": lvlm(),
        "examples": examples(),
        "judge": organism.OrganismJudge(),
        "layers": [0],
        "components": ("hook_mlp_out",),
        "mode": "zero",
        "max_new_tokens": 1,
        "n_boot": 20,
        "progress": False,
    }
    yield "mediation.ablate", mediation.ablate, right, {
        "lvlm": MODEL, "examples": LISTED, "judge": (*FUNCTION, lambda e, t: True, lambda e, t: [], lambda e, t: [True] * len(t), lambda e, t: ["yes"] * len(t)),
        "components": ([], ["nowhere"], 3, "hook_mlp_out"), "layers": ([], [99], ["0"], 3), "mode": NAME, "max_new_tokens": COUNT, "batch_size": COUNT}  # fmt: skip
    yield (
        "mediation.knockout",
        mediation.knockout,
        {
            "lvlm": lvlm(),
            "examples": examples(),
            "source": "image",
            "target": "last",
            "outcome": organism.outcome(),
            "n_boot": 20,
            "layers": [0],
            "progress": False,
        },
        {
            "examples": LISTED,
            "source": NAME,
            "target": NAME,
            "outcome": outcomes,
            "layers": ([], [99], ["x"]),
            "window": COUNT,
            "modes": ([], ["x"]),
        },
    )
    yield (
        "mediation.windows",
        mediation.windows,
        {"sites": sites, "size": 1},
        {"sites": (3, [], ["nowhere"], None), "size": COUNT, "step": COUNT},
    )
    yield (
        "mediation.heads",
        mediation.heads,
        {"lvlm": lvlm()},
        {"lvlm": MODEL, "tower": NAME, "layers": ([99], ["x"], 3)},
    )
    yield (
        "mediation.neurons",
        mediation.neurons,
        {"site": "blocks.0.mlp.hook_post", "sets": [0]},
        {"site": SITE, "sets": (None, 3, [], ["x"], [-1])},
    )
    yield (
        "mediation.probe_auc",
        mediation.probe_auc,
        {
            "features": rows(0, 20),
            "labels": torch.arange(20) % 2 == 0,
            "groups": [str(i) for i in range(20)],
            "n_boot": 10,
        },
        {
            "features": ROWS,
            "labels": (None, torch.ones(20, dtype=torch.bool), torch.ones(3, dtype=torch.bool)),
            "groups": (None, ["a"], 3),
            "n_folds": (0, 1, 99, "x"),
            "strength": (0, -1, NAN, "x"),
        },
    )
    yield (
        "mediation.swap_text",
        mediation.swap_text,
        {"unsafe": examples(), "words": {"a": "b"}},
        {"unsafe": (None, 3, ["x"]), "words": (None, 3, {}, {"": "b"}, {"a": 3})},
    )


def plot_calls() -> Iterator[Call]:
    for name in (
        "ablation",
        "asr",
        "attribution",
        "effects",
        "knockout",
        "localisation",
        "patch_effects",
        "paths",
        "separability",
        "tradeoff",
        "verified",
        "writing",
    ):
        yield f"plots.plot_{name}", getattr(plots, f"plot_{name}"), {"result": None}, {"result": FRAME}
    yield "plots.plot_spectrum", plots.plot_spectrum, {"subspace": fitted()}, {"subspace": (None, 3, "x", rows(0))}
    yield "plots.plot_uncertainty", plots.plot_uncertainty, {"result": None}, {"result": (None, 3, "x", pd.DataFrame())}
    yield (
        "plots.save_figure",
        plots.save_figure,
        {"figure": fitted().plot(), "path": FOLDER / "a.html"},
        {"figure": (None, 3, "x"), "path": (None, 3, FOLDER, FOLDER / "a.unknown", FOREIGN / "a.html")},
    )


PLAIN = (
    AttributeError,
    KeyError,
    IndexError,
    AssertionError,
    RecursionError,
    StopIteration,
    NameError,
    ZeroDivisionError,
    UnicodeError,
)


@functools.cache
def raise_lines(path: str) -> frozenset[int]:
    """Lines of a file that belong to a raise statement."""
    tree = ast.parse("".join(linecache.getlines(path)))
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            found |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return frozenset(found)


def fate(function: Callable[..., Any], arguments: dict[str, Any]) -> tuple[str, str]:
    """What becomes of a call: clear, obscure or silent, and the error."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            function(**arguments)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        ours = "care_lens/" in frame.filename.replace("\\", "/") and (frame.lineno or 0) in raise_lines(frame.filename)
        described = f"{type(error).__name__}: {error!s:.160} ({Path(frame.filename).name}:{frame.lineno})"
        missing = isinstance(error, OSError) and str(FOLDER) in str(
            error
        )  # Python's own words about a file, with its name
        plain = isinstance(error, PLAIN) and not isinstance(error, core_error())
        ours = ours or isinstance(error, core_error())  # a wrong type is told by beartype, in the package's own error
        return ("clear" if (ours or missing) and not plain and len(str(error)) > 15 else "obscure"), described
    return "silent", ""


def core_error() -> type[Exception]:
    from care_lens.core.errors import CareLensError

    return CareLensError


def shown(value: Any) -> str:
    """A value in the name of a call; the same in every run."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {list(value.shape)}" + (
            " nan" if value.is_floating_point() and bool(value.isnan().any()) else ""
        )
    if isinstance(value, Path):
        return value.name if value != FOLDER else "a folder"
    text = (
        f"{type(value).__name__}"
        if callable(value) or not isinstance(value, (int, float, str, bytes, list, tuple, dict, type(None)))
        else repr(value)
    )
    return (
        text
        if " at 0x" not in text and len(text) < 50
        else f"{type(value).__name__} of {len(value)}"
        if hasattr(value, "__len__")
        else type(value).__name__
    )


def main() -> None:
    """Write the fate of every call."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    parts = {name: globals()[f"{name}_calls"] for name in sys.argv[1:]}
    for name, function, right, wrong in (call for part in parts.values() for call in part()) if parts else table():
        for argument, values in wrong.items():
            for index, value in enumerate(values):
                what, error = fate(function, {**right, argument: value})
                line = {"call": f"{name}({argument}={shown(value)}) #{index}", "fate": what, "error": error}
                sys.stdout.write(json.dumps(line) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
