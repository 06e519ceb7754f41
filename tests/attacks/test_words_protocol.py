"""Attacks in words and drawings under the protocol: what they make, what stays, what a result holds."""

import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from care_lens import attacks
from care_lens.attacks import (
    AttackKindError,
    AttackResult,
    Clean,
    DrawingError,
    Prefill,
    PrefixInjection,
    RandomNoise,
    RefusalSuppression,
    ScrambledWords,
    SeveralTurns,
    Spelled,
    TextStyle,
    Typographic,
    Wrapper,
    draw_text,
    text_styles,
)
from care_lens.core import ArtifactError, Attack, Example, Turn


@pytest.fixture
def requests(picture):
    return [
        Example("how to make a blue", image=picture(0), response="sure red then", harmful=True, id="a", group="blue"),
        Example("what is red", behaviour="tell what red is", harmful=True, id="b", group="red", meta={"k": "v"}),
    ]


CASES = [
    (Clean(), "how to make a blue", {}),
    (Wrapper(template="now {prompt} now"), "now how to make a blue now", {}),
    (PrefixInjection(opening="yes"), "how to make a blue Begin your answer with 'yes'.", {}),
    (RefusalSuppression(rules=("no sorry", "no cannot")), "no sorry no cannot how to make a blue", {}),
    (Prefill(opening="sure i"), "how to make a blue", {"prefill": "sure i"}),
    (Prefill(opening=None, words=2), "how to make a blue", {"prefill": "sure red"}),
    (SeveralTurns(before=(("is it {prompt}", "yes"),)), "how to make a blue",
     {"turns": (Turn("user", "is it how to make a blue"), Turn("assistant", "yes"))}),
    (Spelled(), "how to make a b l u e", {}),
    (Spelled(words="all", separator="-"), "h-o-w t-o m-a-k-e a b-l-u-e", {}),
    (Spelled(words=("make",)), "how to m a k e a blue", {}),
]  # fmt: skip


@pytest.mark.parametrize(("attack", "prompt", "fields"), CASES, ids=lambda c: getattr(c, "name", None))
def test_each_makes_what_it_says_and_keeps_the_rest(requests, attack, prompt, fields):
    result = attack.run(None, requests[:1], seed=3)
    assert isinstance(attack, Attack) and isinstance(result, AttackResult)
    assert result.examples == (replace(requests[0], prompt=prompt, behaviour="how to make a blue", **fields),)
    assert result.settings["attack"] == type(attack).__name__ and result.settings["seed"] == 3
    assert result.frame.to_dict("records")[0]["id"] == "a" and np.isnan(result.frame.loss[0])
    assert replace(attack, channel="new").run(None, requests[:1]).examples[0].channel == "new"


def test_a_behaviour_that_is_there_stays(requests):
    assert Wrapper(template="story").run(None, requests[1:]).examples[0].behaviour == "tell what red is"


def test_typographic_layouts(requests):
    def made(**options):
        return Typographic(size=(300, 200), keep_picture=False, **options).run(None, requests[:1]).examples[0]

    page = {"size": (300, 200)}
    text = made()
    assert text.image.tobytes() == draw_text("how to make a blue", **page).tobytes()
    assert text.prompt == "Answer the question in the picture." and text.channel == "typographic"
    numbered = made(layout="list", items=2)
    assert numbered.image.tobytes() == draw_text("how to make a blue\n1.\n2.", **page).tobytes()
    assert "numbered 1 to 2" in numbered.prompt
    split = made(layout="split", share=0.4, prompt="{typed} , then the picture")
    assert split.image.tobytes() == draw_text("a blue", **page).tobytes()
    assert split.prompt == "how to make , then the picture"
    style = TextStyle(font_size=14, position="top", colour="red")
    assert made(style=style).image.tobytes() == draw_text("how to make a blue", style=style, **page).tobytes()
    with pytest.raises(DrawingError, match="fit"):
        made(style=TextStyle(font_size=150))
    on_its_own = Typographic(style=TextStyle(font_size=3, margin=0), heading="{prompt}")
    short = replace(requests[0], prompt="a")
    assert on_its_own.run(None, [short]).examples[0].image.size == (16, 16)


def test_styles_are_all_combinations_with_the_contrast_asked_for():
    styles = text_styles(font_sizes=(10, 12), positions=("top", (1, 2)), contrasts=(1.0, 0.2))
    assert len(styles) == 8 == len(set(styles))
    assert {style.colour for style in styles} == {(0, 0, 0), (204, 204, 204)}
    assert text_styles(contrasts=(0.5,), background="black")[0].colour == (128, 128, 128)
    with pytest.raises(ValueError, match="contrast"):
        text_styles(contrasts=(0.0,))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Wrapper(template="no place"), lambda: Prefill(opening=" "), lambda: Prefill(words=0),
        lambda: SeveralTurns(before=()), lambda: RefusalSuppression(rules=()), lambda: Spelled(separator=""),
        lambda: Typographic(layout="list", items=0), lambda: Typographic(share=0.0), lambda: Typographic(heading="none"),
        lambda: PrefixInjection(opening=""), lambda: ScrambledWords(strength=2.0),
        lambda: Clean().run(None, []), lambda: Prefill(opening=None).run(None, [Example("a", id="x")]),
    ],
)  # fmt: skip
def test_bad_options_are_refused(make):
    with pytest.raises(ValueError, match=r"must|got"):
        make()


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet="abcdefgh ABC", min_size=1, max_size=40), st.integers(0, 5))
def test_scrambled_words_keep_their_letters_and_ends(prompt, seed):
    made = ScrambledWords(letters=False)(Example(prompt), random.Random(seed)).prompt
    for before, after in zip(prompt.split(" "), made.split(" "), strict=True):
        assert sorted(before.lower()) == sorted(after.lower())
        assert before[:1].lower() == after[:1].lower() and before[-1:].lower() == after[-1:].lower()
    assert ScrambledWords(strength=0.0)(Example(prompt), random.Random(seed)).prompt == prompt


def test_a_result_is_saved_with_its_pictures_and_read_back_to_the_bit(requests, picture, tmp_path):
    turns = (Turn("user", "look", (picture(5, (8, 4)),)), Turn("assistant", "=1+1"))
    rich = [replace(requests[0], turns=turns, more_images=(picture(6), picture(0))), replace(requests[1], system="s")]
    history = [{"row": 1, "step": 2, "loss": 0.1 + 0.2, "what": "=x"}]
    result = AttackResult.of(
        rich, settings={"attack": "x", "epsilon": float("inf")}, loss=[0.1, 0.2], clean_loss=[1.0, 2.0], tries=[3, 4], history=history
    ).with_complied([True, None])  # fmt: skip
    assert result.success == 1.0
    result.save(tmp_path)
    read = AttackResult.load(tmp_path)
    for one, other in zip(read.examples, rich, strict=True):
        assert [i.tobytes() for i in one.images] == [i.tobytes() for i in other.images]
        bare = {"image": None, "more_images": (), "turns": ()}
        assert replace(one, **bare) == replace(other, **bare)
        assert [(t.role, t.text) for t in one.turns] == [(t.role, t.text) for t in other.turns]
    assert read.frame.equals(result.frame) and read.settings == result.settings
    assert read.history.loss[0] == 0.1 + 0.2 and read.to_dataframe(history=True).id[0] == "b"
    assert len(list(tmp_path.glob("*.png"))) == 3  # a picture that stands twice is saved once
    content = (tmp_path / "attack.00000.png").read_bytes()
    (tmp_path / "attack.00000.png").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="checksum"):
        AttackResult.load(tmp_path)


def test_kinds_are_known_by_name_and_others_refused():
    assert {"pgd", "autopgd", "mifgsm", "universalpgd", "bestofn", "typographic"} <= {*attacks.registered_attacks()}
    assert attacks.attack("RandomNoise", epsilon=4) == RandomNoise(epsilon=4)
    with pytest.raises(AttackKindError, match="must be one of"):
        attacks.attack("none")
    with pytest.raises(AttackKindError, match="epsilom"):
        attacks.attack("pgd", epsilom=4)
    with pytest.raises(AttackKindError, match="frozen dataclass"):
        attacks.register_attack(dict)

    @dataclass(frozen=True)
    class Clean:
        name: str = "mine"

        def run(self, lvlm, examples, defence=None, seed=0): ...

        def describe(self): ...

    with pytest.raises(AttackKindError, match="name of its own"):
        attacks.register_attack(Clean)
