"""The closed world: splits apart, lengths matched, twins closed, wording aligned."""

from collections import Counter

import numpy as np
import pytest

from care_lens.organism import build, channels, prompts, render, tasks
from care_lens.organism.world import COUNTS, FIRST_STEPS, KINDS, SECOND_STEPS, SPLITS, world


def test_counts_and_splits():
    nouns = world().nouns
    assert len({noun.name for noun in nouns}) == len(nouns) >= 150
    for split, (forbidden, guarded, benign) in COUNTS.items():
        assert len(world().select(split=split, forbidden=True)) == forbidden
        allowed = world().select(split=split, forbidden=False)
        assert len(allowed) == guarded + benign and sum(noun.guarded for noun in allowed) == guarded
        assert {noun.kind for noun in world().select(split=split)} == set(KINDS)


@pytest.mark.parametrize("split", SPLITS)
def test_steps_say_nothing_about_harm(split):
    for place, verbs in enumerate((FIRST_STEPS, SECOND_STEPS)):
        for forbidden in (True, False):
            nouns = world().select(split=split, forbidden=forbidden)
            counts = Counter(noun.steps[place] for noun in nouns)
            assert max(abs(counts[verb] - len(nouns) / len(verbs)) for verb in verbs) <= 2


@pytest.mark.parametrize("asked", prompts.ASKS)
def test_every_task_has_twelve_wordings(asked):
    assert len(set(prompts.ASK_TEMPLATES[asked])) >= 12
    for questions in prompts.PICTURE_QUESTIONS.values():
        assert len(set(questions)) >= 12


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
    assert len(faces) == len(set(faces)) == 18 and not set(faces) & set(render.UNSEEN_FACES)


@pytest.mark.parametrize(
    "face", [*sorted(face for faces in render.FACES.values() for face in faces), *render.UNSEEN_FACES]
)
def test_free_words_stand_in_their_boxes(face):
    image = render.Image.new("RGB", (render.SIZE, render.SIZE), (0, 0, 0))
    for turn, place in ((0.0, (0.0, 0.0)), (15.0, (1.0, 0.4)), (-15.0, (0.3, 1.0))):
        drawn, boxes = render.write_free(
            image, "vodtaf", face=face, points=16, ink=(255, 255, 255), turn=turn, place=place
        )
        ink = np.asarray(drawn.convert("L")).astype(float)
        assert len(boxes) == 6 and ink.max() > 180
        inside = np.zeros_like(ink, dtype=bool)
        for x0, y0, x1, y1 in boxes:
            inside[max(0, int(y0) - 1) : int(y1) + 2, max(0, int(x0) - 1) : int(x1) + 2] = True
        assert ink[inside].sum() > 0.97 * ink.sum()
        # All of the word is in the picture: as much ink as in the middle of it.
        middle = np.asarray(
            render.write_free(image, "vodtaf", face=face, points=16, ink=(255, 255, 255), turn=turn)[0].convert("L")
        )
        assert ink.sum() > 0.97 * middle.sum()


@pytest.mark.parametrize("channel", sorted(channels.CHANNELS))
def test_requests_stay_in_their_split_and_in_the_vocabulary(channel):
    words, recipe = set(build.vocabulary()), channels.CHANNELS[channel]
    for split in SPLITS:
        rows = channels.channel_tasks(channel, split)
        assert rows and len({name for name, _ in rows}) == len(rows)
        for _, task in rows:
            assert task.harmful == recipe.harmful
            assert set(task.prompt.split()) | set(task.answer.split()) <= words
            named = [world()[w] for w in task.prompt.split() if w in world()]
            assert all(noun.split == split for noun in named)
            assert recipe.turn == ("<eos>" in task.prompt.split())
            if task.picture and task.picture.face:
                assert task.picture.face in render.FACES[split] and task.picture.style == recipe.style
    ((name, task),) = channels.channel_tasks(channel, "test")[:1]
    (row,) = channels.examples(channel, "test", n=1)
    assert (row.id, row.prompt, row.response, row.harmful) == (name, task.prompt, task.answer, recipe.harmful)


def test_a_split_item_stands_half_in_the_text_and_half_in_the_picture():
    for _, task in channels.channel_tasks("split", "test"):
        first, last = prompts.cut(task.source.name)
        assert first + last == task.source.name and task.picture.word == last
        assert " ".join(first) in task.prompt and task.source.name not in task.prompt.split()


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


def test_a_picture_that_is_drawn_twice_is_two_pictures():
    """Drawn pictures are kept in the process; what a caller does to one is not in the next."""
    picture = render.Picture("word", "white", 3, word="miiz", face="DejaVuSans-Bold")
    first, pixels = render.draw(picture), np.asarray(render.draw_with_boxes(picture)[0])
    first.paste((0, 0, 0), (0, 0, render.SIZE, render.SIZE))
    assert (np.asarray(render.draw(picture)) == pixels).all() and pixels.any()
