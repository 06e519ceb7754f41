"""Words that the tokenizer does not have are named, each once; nothing is said where all are known."""

import warnings

import pytest

from care_lens import organism
from care_lens.core import Example
from care_lens.core.conversation import PICTURE
from care_lens.lvlm.unknown import UnknownWordsWarning, warn_of_unknown


def told(lvlm, *examples, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lvlm.prepare(list(examples), **options)
    return [str(one.message) for one in caught if issubclass(one.category, UnknownWordsWarning)]


@pytest.fixture
def world():
    with organism.load() as lvlm:
        yield lvlm


def test_each_word_once_wherever_it_stands(world):
    known = organism.examples("typographic", "test", n=1)[0]
    assert told(world, known) == [] == told(world, known, responses=True)
    (said,) = told(world, known, Example("how to make a wibble"), Example("wibble and wobble", response="sure wubble"))
    assert "does not know 'wibble', 'wobble': the model reads '<unk>'" in said  # the answer is not part of this batch
    assert "wubble" not in said
    (said,) = told(world, Example("wobble", response="sure wubble"), responses=True)
    assert "does not know 'wubble': " in said
    assert told(world, Example("how to make a wibble")) == []
    (said,) = told(world, Example("how to make", prefill="sure wabble"), Example("to", system="be webble"))[:1]
    assert "'wabble'" in said and "'webble'" in said
    placed = Example(f"{PICTURE}tell me how to make {PICTURE}wobbly", image=known.image, more_images=(known.image,))
    assert "does not know 'wobbly': " in told(world, placed)[0]  # the mark of a picture's place is no part of a word
    many = Example(" ".join(f"word{i}" for i in range(12)))
    assert "and 4 more" in told(world, many)[0]
    with pytest.warns(UnknownWordsWarning, match="wibble"), organism.load() as other:  # another tokenizer
        other.prepare(Example("wibble"))


def test_a_tokenizer_that_cannot_be_remembered_is_no_obstacle():
    class Odd:
        unk_token_id, unk_token = 0, "<?>"
        __hash__ = None

        def __call__(self, text, **options):
            return {"input_ids": [int(word == "known") for word in text.split()]}

    for _ in range(2):  # told each time, since nothing is kept
        with pytest.warns(UnknownWordsWarning, match="does not know 'strange': the model reads '<\\?>'"):
            warn_of_unknown(Odd(), [[1, 0]], [Example("known strange")], responses=False)
