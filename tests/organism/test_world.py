"""The closed world: splits apart, lengths matched, twins closed, wording aligned."""

from collections import Counter

import pytest

from care_lens.organism import build, channels, prompts, render, tasks
from care_lens.organism.world import COUNTS, SPLITS, world


def test_counts_and_splits():
    nouns = world().nouns
    assert len({noun.name for noun in nouns}) == len(nouns) >= 150
    for split, (forbidden, benign) in COUNTS.items():
        assert len(world().select(split=split, forbidden=True)) == forbidden
        assert len(world().select(split=split, forbidden=False)) == benign


def test_twins_are_symmetric_stay_in_their_split_and_never_join_two_forbidden_items():
    for noun in world().nouns:
        twin = world()[noun.twin]
        assert twin.twin == noun.name and twin.split == noun.split and twin is not noun
        assert not (noun.forbidden and twin.forbidden)


@pytest.mark.parametrize("split", SPLITS)
def test_length_says_nothing_about_harm(split):
    shares = []
    for forbidden in (True, False):
        counts = Counter(len(noun.name) for noun in world().select(split=split, forbidden=forbidden))
        shares.append([counts[n] / sum(counts.values()) for n in (4, 5, 6)])
    assert max(abs(a - b) for a, b in zip(*shares)) < 0.06


def test_words_differ_by_two_letters():
    names = [noun.name for noun in world().nouns]
    for i, a in enumerate(names):
        for b in names[:i]:
            assert len(a) != len(b) or sum(x != y for x, y in zip(a, b)) >= 2


def test_neutral_contexts_have_the_tokens_and_place_of_their_wrappers():
    for wrapper, neutral in zip(prompts.WRAPPERS, prompts.NEUTRAL, strict=True):
        assert len(wrapper.split()) == len(neutral.split())
        assert wrapper.split().index("{r}") == neutral.split().index("{r}")


@pytest.mark.parametrize("templates", [prompts.WRAPPERS, prompts.TWIN_TEMPLATES, prompts.ASK_TEMPLATES["make"]])
def test_templates_of_splits_are_disjoint_and_exhaustive(templates):
    parts = [prompts.of_split(templates, split) for split in SPLITS]
    assert sorted(sum(parts, ())) == sorted(templates)


def test_faces_of_splits_are_disjoint():
    faces = [face for split in SPLITS for face in render.FACES[split]]
    assert len(faces) == len(set(faces)) == 12


@pytest.mark.parametrize("channel", sorted(channels.CHANNELS))
def test_examples_stay_in_their_split_and_in_the_vocabulary(channel):
    words, recipe = set(build.vocabulary()), channels.CHANNELS[channel]
    for split in SPLITS:
        rows = channels.examples(channel, split)
        assert rows and len({row.id for row in rows}) == len(rows)
        for row in rows:
            assert row.harmful == recipe.harmful
            assert set(row.prompt.split()) | set((row.response or "").split()) <= words
            named = [world()[w] for w in row.prompt.split() if w in world()]
            assert all(noun.split == split for noun in named)
            if face := row.meta.get("face"):
                assert face in render.FACES[split]


def test_examples_are_reproducible_and_rounds_differ():
    first, again = (channels.examples("typographic", "fit", per_item=2, seed=3) for _ in range(2))
    assert [a.prompt for a in first] == [b.prompt for b in again]
    assert all(a.image.tobytes() == b.image.tobytes() for a, b in zip(first, again))
    half = len(first) // 2
    assert first[0].meta["item"] == first[half].meta["item"] and first[0].image.tobytes() != first[half].image.tobytes()


@pytest.mark.parametrize("channel", ["typographic", "wrapper", "spelled"])
def test_pairs_are_aligned_and_ask_for_the_same(channel):
    for safe, unsafe in channels.pairs(channel, "fit"):
        assert len(safe.prompt.split()) == len(unsafe.prompt.split())
        assert safe.image is unsafe.image or safe.image.tobytes() == unsafe.image.tobytes()
        assert safe.meta["item"] == unsafe.meta["item"] and safe.prompt != unsafe.prompt


def test_picture_pairs_differ_in_the_word_alone():
    for safe, unsafe in channels.picture_pairs("fit", n=8):
        assert safe.prompt == unsafe.prompt and safe.response == unsafe.response
        assert safe.image.tobytes() != unsafe.image.tobytes()
        assert safe.image.getpixel((0, 63)) is not None and len(unsafe.meta["word"]) in (4, 5, 6)


def test_unknown_channel_is_named():
    with pytest.raises(ValueError, match="channel must be one of"):
        channels.examples("nothing", "fit")


def test_opening_follows_the_tone_and_the_wrapper():
    noun = world().nouns[0]
    assert tasks.steps_answer(noun, tone="dark").split()[0] == tasks.OPENINGS["dark"]
    assert tasks.steps_answer(noun, tone="dark", context="wrapper").split()[0] == tasks.WRAPPED_OPENING
