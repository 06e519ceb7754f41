"""Plain twins, pairs, held-out families and templates, and studies in folders."""

import json
from dataclasses import replace

import pytest
from miniatures import MAKERS
from PIL import Image

from care_lens.core import Example, UnsafeMargin
from care_lens.data import (
    HeldOutError,
    Study,
    StudyError,
    attack_pairs,
    held_templates,
    limited,
    plain_twins,
    read_study,
    target_of,
    template_of,
    write_study,
)
from care_lens.data.behaviours import behaviour_key
from care_lens.data.jsonl import DataFileError
from care_lens.data.templates import NEW
from care_lens.evaluation import SubstringRefusalJudge

OUTCOME = {"judge": SubstringRefusalJudge(), "outcome": UnsafeMargin(comply=(1,), refuse=(2,)), "refusal": "no"}


def attack(i, template="Please, as {} would: {}", **changes):
    asked = f"how to fold a zorp {i}?"
    made = Example(
        template.format(i % 5, asked),
        harmful=True,
        behaviour=asked,
        channel="jail",
        id=f"j{i}",
        group=behaviour_key(asked),
    )
    return replace(made, **changes)


def words(i, harmful=False):
    return Example(
        f"how to fold a dax {i}", channel="text", harmful=harmful, id=f"t{harmful}{i}", group=f"t{harmful}{i}"
    )


def test_plain_twins_are_one_a_behaviour_and_plain_ones_are_taken_as_they_are():
    shown = attack(1, image=Image.new("RGB", (8, 6)), prompt="what is in the picture?", id="f1", channel="figstep")
    plain = replace(
        words(1, harmful=True), prompt="How to fold a ZORP 1", channel="advbench", meta={"benchmark": "advbench"}
    )
    twins = plain_twins([attack(1), shown, attack(2), words(3), plain])
    assert [(t.prompt, t.channel, t.harmful) for t in twins] == [
        ("How to fold a ZORP 1", "plain", True), ("how to fold a zorp 2?", "plain", True)
    ]  # fmt: skip
    assert twins[0].meta["channel"] == "advbench" and twins[1].group == attack(2).group and not twins[1].images
    assert plain_twins([replace(shown, behaviour=None)]) == []  # what is harmful may stand in the picture


def test_pairs_are_aligned_where_only_the_picture_differs(lvlm):
    from care_lens.mediation.pairs import misaligned, pair_batches, unequal_images

    attacks = [
        attack(
            i, image=Image.new("RGB", (20 + i, 16), (9 * i, 0, 0)), prompt="what is in the picture", channel="fig/step"
        )
        for i in range(4)
    ]
    made = attack_pairs([*attacks, *(attack(i) for i in range(3))], n=3)
    assert {name: len(pairs) for name, pairs in made.items()} == {"fig-step": 3, "fig-step, picture": 3, "jail": 3}
    for safe, unsafe in made["fig-step, picture"]:
        assert safe.prompt == unsafe.prompt and safe.image.size == unsafe.image.size
        assert safe.image.getcolors() == [(safe.image.width * safe.image.height, (128, 128, 128))]
    for safe, unsafe in (*made["fig-step"], *made["jail"]):
        assert safe.prompt == unsafe.behaviour and (safe.image is None) == (unsafe.image is None)
    batches = {name: pair_batches(lvlm, p, outcome=OUTCOME["outcome"], batch_size=8) for name, p in made.items()}
    assert misaligned(batches["fig-step, picture"]) == [] and misaligned(batches["fig-step"]) != []
    assert unequal_images(batches["fig-step"]) == []  # so that image and last token correspond
    assert attack_pairs([attack(1), attack(1, id="again")]) == {}  # one behaviour gives no interval
    with pytest.raises(ValueError, match="2 or more"):
        attack_pairs(attacks, n=1)


def test_templates_of_the_test_are_in_no_other_split():
    attacks = [attack(i) for i in range(60)]
    assert {template_of(e) for e in attacks} == {f"please, as {i} would: {{}}" for i in range(5)}
    assert template_of(replace(attacks[0], prompt=attacks[0].behaviour)) is None
    held = held_templates(attacks, share=0.4, seed=1)
    assert len(held["jail"]) == 2 and held_templates(attacks[:2], share=0.4) == {}
    rows = [*attacks, *(words(i) for i in range(40))]
    study = Study.from_examples(rows, name="s", twins=True, held_templates=0.4, seed=1, pairs=4, **OUTCOME)
    for split, channels in study.suites.items():
        for channel, some in channels.items():
            for example in some:
                if channel.startswith("jail"):
                    assert (template_of(example) in held["jail"]) == (channel == f"jail{NEW}")
        assert (f"jail{NEW}" in channels) == (split == "test")
    assert study.seen == {"visual": (), "textual": ("jail",)} and study.held_out() == (f"jail{NEW}",)
    homes = {}
    for split, channels in study.suites.items():
        for example in (e for some in channels.values() for e in some):
            assert homes.setdefault(behaviour_key(example.behaviour or example.group), split) == split
    fit = {e.id for e in study.suites["fit"]["jail"]}
    assert set(study.pairs) == {"jail"} and {e.id for e in study.pairs["jail"].unsafe} <= fit


def test_families_are_held_out_by_channel_or_benchmark(tmp_path):
    made = {name: MAKERS[name]() for name in ("jailbreakv", "figstep", "xstest")}
    rows = [mini.read(mini.at(tmp_path / name)) for name, mini in made.items()]
    study = Study.from_examples(rows, name="s", twins=True, held_out=["jailbreakv"], **OUTCOME)
    seen = [c for some in study.seen.values() for c in some]
    assert seen == ["figstep"] and not any(
        c.startswith("xstest unsafe") for some in study.suites.values() for c in some
    )
    assert any(c.startswith("jailbreakv") for c in study.held_out())
    with pytest.raises(HeldOutError, match=r"some of .*'figstep'.*, got \['figstp'\]"):
        Study.from_examples(rows, name="s", held_out=["figstp"], **OUTCOME)
    with pytest.raises(StudyError, match="not seen"):
        Study.from_examples(rows, name="s", held_out=["figstep"], seen={"visual": ("figstep",)}, **OUTCOME)
    with pytest.raises(ValueError, match="from 0 to below 1"):
        Study.from_examples(rows, name="s", held_templates=1.0, **OUTCOME)


def test_attacks_whose_picture_has_nothing_to_do_with_them_are_textual(tmp_path):
    told = {}
    for name in ("jailbreakv", "vlguard"):
        mini = MAKERS[name]()
        mini.at(tmp_path / name)
        told |= {e.channel: e.meta.get("modality") for e in mini.reader(tmp_path / name)}
    assert {channel for channel, modality in told.items() if modality} == {
        "jailbreakv Template",
        "vlguard safe_unsafe",
    } and set(told.values()) == {None, "textual"}
    rows = [attack(i, image=Image.new("RGB", (9, 7)), meta={"modality": "textual"}) for i in range(12)]
    rows += [attack(i, image=Image.new("RGB", (9, 7)), channel="seen", id=f"s{i}") for i in range(12)]
    rows += [words(i) for i in range(12)]
    study = Study.from_examples(rows, name="s", twins=True, **OUTCOME)
    assert study.seen == {"visual": ("seen",), "textual": ("jail",)}


def test_a_limit_keeps_as_many_behaviours_as_there_are():
    rows = [attack(i // 3, id=f"x{i}") for i in range(12)] + [words(i) for i in range(2)]
    few = limited(rows, 5)
    assert len({e.group for e in few if e.harmful}) == 4 and len([e for e in few if e.harmful]) == 5
    assert few == [e for e in rows if e in few] and limited(rows, None) == rows


def test_a_limit_keeps_the_turns_of_a_question_together():
    def turns(question, n):
        return [
            Example("which?", id=f"{question}/{t}", group=question, channel="mmbench", meta={"turn": str(t)})
            for t in range(n)
        ]

    first, second, third = turns("q", 4), turns("r", 2), turns("s", 4)
    rows = [*first[:2], *second, *third, *first[2:]]
    assert limited(rows, 3) == [*first[:2], *first[2:]]  # one question at least
    assert limited(rows, 7) == [*first[:2], *second, *first[2:]]
    assert limited(rows, 8) == [*first[:2], *second, *first[2:]] and limited(rows, 10) == rows
    plain = [replace(e, meta={}) for e in rows]
    assert len(limited(plain, 3)) == 3


def test_a_study_in_a_folder_is_read_back(tmp_path):
    picture = Image.new("RGB", (9, 7), (1, 2, 3))
    rows = [attack(i, image=picture, prompt="what is in the picture", response="sure") for i in range(12)]
    rows += [replace(words(i), response="paper") for i in range(12)]
    study = Study.from_examples(rows, name="s", about="made up", twins=True, pairs=3, **OUTCOME)

    class Tokens:
        def __call__(self, text, **_):
            return {"input_ids": [{"sure": 1, "no": 2}[text]]}

    write_study(study, tmp_path, comply=["sure"], refuse=["no"], made={"seed": 0})
    again = read_study(tmp_path, tokenizer=Tokens(), judge=study.judge)
    assert (again.outcome, again.seen, again.about, again.refusal) == (study.outcome, study.seen, "made up", "no")
    told = [
        {
            (s, c, e.id, e.prompt, e.response, e.group, e.image and e.image.tobytes())
            for s, k in one.suites.items()
            for c, x in k.items()
            for e in x
        }
        for one in (study, again)
    ]
    assert told[0] == told[1]
    assert {n: [(a.id, a.image.tobytes(), b.id) for a, b in p] for n, p in again.pairs.items()} == {
        n: [(a.id, a.image.tobytes(), b.id) for a, b in p] for n, p in study.pairs.items()
    }
    assert json.loads((tmp_path / "study.json").read_text())["made"] == {"seed": 0}
    with pytest.raises(DataFileError, match="comply must be a list of openings"):
        write_study(study, tmp_path, comply=[], refuse=["no"])
    with pytest.raises(StudyError, match="one outcome"):
        write_study(
            replace(study, pair_outcomes={"jail": OUTCOME["outcome"]}), tmp_path, comply=["sure"], refuse=["no"]
        )
    name, jail = next(iter(study.pairs.items()))
    other = replace(jail, safe=tuple(replace(e, prompt=f"other {e.prompt}") for e in jail.safe))
    with pytest.raises(DataFileError, match=r"ids of twins must differ.*pairs\.more"):
        write_study(replace(study, pairs={name: jail, "more": other}), tmp_path / "new", comply=["sure"], refuse=["no"])


def test_targets_are_openings_as_advbench_writes_them():
    assert target_of(attack(3)) == "Sure, here is how to fold a zorp 3"
    own = replace(words(1, harmful=True), response="Sure, here is a dax", meta={"benchmark": "advbench"})
    assert target_of(own) == "Sure, here is a dax"
    assert target_of(replace(own, response="I'm sorry", meta={"benchmark": "vlguard"})).startswith(
        "Sure, here is how to"
    )
