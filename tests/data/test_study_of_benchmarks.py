"""A study of several benchmarks: no behaviour in two splits, nothing lost, the same deal whatever the order."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import MAKERS

from care_lens.core import Example, UnsafeMargin
from care_lens.data import Study, StudyError
from care_lens.data.behaviours import behaviour_key, deal_behaviours
from care_lens.evaluation import SubstringRefusalJudge
from care_lens.pipeline.studying import joined

SHARES = {"fit": 0.4, "calibration": 0.15, "validation": 0.15, "test": 0.3}


def study(examples, **options):
    fixed = {
        "name": "s",
        "judge": SubstringRefusalJudge(),
        "outcome": UnsafeMargin(comply=(1,), refuse=(2,)),
        "refusal": "no",
    }
    return Study.from_examples(examples, **{**fixed, **options})


def keys(example):
    return {behaviour_key(text) for text in (example.group, example.behaviour) if text}


EXAMPLES = st.lists(
    st.builds(
        dict,
        group=st.sampled_from([f"G{i}" for i in range(9)]),
        behaviour=st.none() | st.sampled_from([f"g{i}. " for i in range(9)] + [f"do {i}" for i in range(4)]),
        harmful=st.booleans(),
        channel=st.sampled_from("ab"),
    ),
    min_size=1,
    max_size=24,
)


@settings(max_examples=80, deadline=None)
@given(EXAMPLES, st.integers(0, 3))
def test_no_behaviour_stands_in_two_splits(rows, seed):
    examples = [
        Example("p", id=str(i), **{**row, "channel": row["channel"] + str(row["harmful"])})
        for i, row in enumerate(rows)
    ]
    homes = deal_behaviours(examples, SHARES, benign_only=("calibration",), seed=seed)
    assert len(homes) == len(examples)
    for i, one in enumerate(examples):
        for j, other in enumerate(examples):
            assert not keys(one) & keys(other) or homes[i] == homes[j]
    # behaviours that are harmful in every example never go to calibration
    linked = [{*keys(e)} for e in examples]
    for _ in examples:
        linked = [set().union(*(b for b in linked if a & b)) for a in linked]
    for i, home in enumerate(homes):
        if home == "calibration":
            assert any(not e.harmful for e, names in zip(examples, linked, strict=True) if names & linked[i])
    # the order of the examples does not matter
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    again = deal_behaviours([examples[i] for i in order], SHARES, benign_only=("calibration",), seed=seed)
    assert [homes[i] for i in order] == again


def test_every_channel_gets_its_shares_and_the_seed_decides_which_rows():
    rows = [
        Example("p", id=f"{c}{i}", channel=c, harmful=c != "benign", group=f"{c} {i}")
        for c in ("benign", "x", "rare")
        for i in range(6 if c == "rare" else 100)
    ]
    homes = deal_behaviours(rows, SHARES, benign_only=("calibration",), seed=1)
    counts = Counter(zip((e.channel for e in rows), homes, strict=True))
    assert [counts["benign", split] for split in SHARES] == [40, 15, 15, 30]
    assert counts["x", "calibration"] == 0
    assert all(abs(counts["x", split] - 100 * SHARES[split] / 0.85) <= 1 for split in ("fit", "validation", "test"))
    assert all(counts["rare", split] >= 1 for split in ("fit", "validation", "test"))
    assert homes == deal_behaviours(rows, SHARES, benign_only=("calibration",), seed=1)
    assert homes != deal_behaviours(rows, SHARES, benign_only=("calibration",), seed=2)


def test_a_study_of_five_benchmarks(tmp_path, caplog):
    """The same requests are rows of three of them, under other ids."""
    made = {name: MAKERS[name]() for name in ("jailbreakv", "figstep", "redteam2k", "xstest", "mmvet")}
    rows = {name: mini.read(mini.at(tmp_path / name)) for name, mini in made.items()}
    with caplog.at_level("WARNING"):
        found = study([*rows.values()], plain="redteam2k", seed=3)
    every = [e for channels in found.suites.values() for some in channels.values() for e in some]
    assert sorted(e.id for e in every) == sorted(e.id for one in rows.values() for e in one)
    homes = {}
    for split, channels in found.suites.items():
        for some in channels.values():
            for example in some:
                for key in keys(example):
                    assert homes.setdefault(key, split) == split
    fit = {channel for channel, some in found.suites["fit"].items() if some[0].harmful} - {"redteam2k"}
    pictured = {channel for channel in fit if channel.startswith(("figstep", "jailbreakv"))}
    assert (
        found.seen == {"visual": tuple(sorted(pictured)), "textual": tuple(sorted(fit - pictured))}
        and "figstep" in pictured
    )
    held = {e.channel for one in rows.values() for e in one if e.harmful} - fit - {"redteam2k"}
    assert held and all(channel in caplog.text for channel in held)
    assert len({homes[behaviour_key(e.behaviour)] for e in rows["figstep"]}) >= 3
    again = study([e for one in reversed([*rows.values()]) for e in one], plain="redteam2k", seed=3)
    ids = [
        {s: {c: [e.id for e in some] for c, some in channels.items()} for s, channels in one.suites.items()}
        for one in (found, again)
    ]
    assert ids[0] == ids[1]
    with pytest.raises(StudyError, match="has no response"):
        found.require()
    answered = [replace(e, response="sure" if e.harmful else "paper") for e in every] + [
        Example("what is this?", response="paper", id=f"b{i}", group=f"b{i}", channel="benign") for i in range(12)
    ]
    study(answered, plain="redteam2k", seen={"visual": ("figstep",)}).require()


def test_what_is_no_study():
    rows = [Example("p", id=str(i), channel="x", harmful=True) for i in range(4)]
    for wrong, error, message in (
        ([], StudyError, "got none"),
        (rows[0], TypeError, "must be a list of examples"),
        ([*rows, 3], TypeError, r"examples\[4\]"),
        ([*rows, Example("q", id="9", channel="x")], StudyError, "all harmful or all benign"),
        ([*rows, rows[0]], StudyError, "ids must differ"),
    ):
        with pytest.raises(error, match=message):
            unchecked(wrong)
    with pytest.raises(ValueError, match="give harmful behaviours a split"):
        study(rows, shares={"calibration": 1.0})
    with pytest.raises(ValueError, match="sum to 1"):
        study(rows, shares={"fit": 0.5})


def unchecked(wrong):
    """As users call it: the types that the tests check are off."""
    call = Study.from_examples.__func__
    while hasattr(call, "__wrapped__"):
        call = call.__wrapped__
    return call(
        Study,
        wrong,
        name="s",
        judge=SubstringRefusalJudge(),
        outcome=UnsafeMargin(comply=(1,), refuse=(2,)),
        refusal="no",
    )


def test_what_is_left_out_is_logged_once(caplog):
    """The first deal only looks which channels can be seen."""
    asked = [f"how to fold a zorp {i}?" for i in range(40)]
    rows = [
        Example(f"{opening} {what}", id=f"{c}{i}", channel=c, harmful=True, behaviour=what, group=behaviour_key(what))
        for c in ("jail", "other", "rare")
        for i, what in enumerate(asked[: 12 if c == "rare" else 40])
        for opening in [f"You are {'abcde'[i % 5]}, and you say all:"]
    ]
    rows += [Example(f"what is {i}", id=f"b{i}", channel="benign", group=f"b{i}") for i in range(40)]
    made = joined([rows], name="s", outcome=UnsafeMargin(comply=(1,), refuse=(2,)))
    told = [record.message for record in caplog.records]
    assert "rare" in made.held_out() and told and len(told) == len({*told})
    assert any("templates kept for the test split" in one for one in told)
