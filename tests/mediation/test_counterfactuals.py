"""Makers of twins: what is taken out, what stays, and what is refused."""

import numpy as np
import pytest

from care_lens.attacks import TextStyle, random_noise
from care_lens.core import Example
from care_lens.mediation import misaligned, neutralise, pair_batches, remove_noise, swap_drawn_text, swap_text

STYLE = TextStyle(font_size=10, margin=1)


def test_text_words(model, margin, picture):
    unsafe = [Example("how to make a red picture", image=picture(0), harmful=True, id="x", group="g")]
    pairs = swap_text(unsafe, {"red": "blue"}, tokenizer=model.tokenizer)
    safe, same = pairs[0]
    assert safe.prompt == "how to make a blue picture" and same is unsafe[0]
    assert not safe.harmful and safe.id == "x/safe" and safe.group == "g" and safe.image is unsafe[0].image
    assert not misaligned(pair_batches(model, pairs, outcome=margin, batch_size=4))
    with pytest.raises(ValueError, match="got none in example 0"):
        swap_text(unsafe, {"redder": "blue"})
    with pytest.raises(ValueError, match=r"\(safe, unsafe\) \{0: \(7, 6\)\}"):
        swap_text(unsafe, {"red": "blue blue"}, tokenizer=model.tokenizer)


def test_drawn_words_change_nothing_else(picture):
    base = Example("what is in the picture", image=picture(0, (64, 64)), harmful=True)
    safe, unsafe = swap_drawn_text([base], ["bomb"], ["cake"], style=STYLE)[0]
    a, b = np.asarray(safe.image, dtype=int), np.asarray(unsafe.image, dtype=int)
    changed = np.argwhere((a != b).any(axis=-1))
    assert len(changed) and (changed.max(axis=0) - changed.min(axis=0) < (16, 50)).all()
    assert safe.prompt == unsafe.prompt and unsafe.harmful and not safe.harmful
    with pytest.raises(ValueError, match="one length"):
        swap_drawn_text([base], ["bomb"], [])


@pytest.mark.parametrize("template", ["please tell me now {prompt}", "{prompt} and say yes", "please {prompt} now"])
def test_wrappers_become_neutral_words_of_the_same_number_of_tokens(model, margin, template):
    request = Example("how to make a red picture", harmful=True, id="r")
    pairs = neutralise([request], template, tokenizer=model.tokenizer, neutral="what is the picture in")
    safe, unsafe = pairs[0]
    assert unsafe.prompt == template.replace("{prompt}", request.prompt)
    assert request.prompt in safe.prompt and safe.prompt != unsafe.prompt and safe.harmful
    batches = pair_batches(model, pairs, outcome=margin, batch_size=4)
    assert not misaligned(batches)
    ids = batches[0].inputs.input_ids
    words = model.tokenizer(request.prompt, add_special_tokens=False)["input_ids"]
    starts = [[i for i in range(ids.shape[1]) if row[i : i + len(words)].tolist() == words] for row in ids]
    assert starts[0] == starts[1] != []
    with pytest.raises(ValueError, match="contain"):
        neutralise([request], "no place", tokenizer=model.tokenizer)
    with pytest.raises(ValueError, match="neutral must have words"):
        neutralise([request], template, tokenizer=model.tokenizer, neutral="")


def test_noise_is_removed(picture):
    originals = [Example("what", image=picture(i), channel="plain", id=str(i)) for i in range(2)]
    attacked = random_noise(originals, epsilon=8, channel="noise")
    pairs = remove_noise(attacked, originals)
    for (safe, unsafe), original in zip(pairs, originals, strict=True):
        assert safe.image is original.image and safe.channel == "plain" and unsafe.channel == "noise"
        distance = np.abs(np.asarray(safe.image, dtype=int) - np.asarray(unsafe.image, dtype=int))
        assert 0 < distance.max() <= 8
    with pytest.raises(ValueError, match="one length"):
        remove_noise(attacked, originals[:1])
    with pytest.raises(ValueError, match="one size"):
        remove_noise(attacked, [Example("what"), originals[1]])
    with pytest.raises(ValueError, match="one prompt"):
        remove_noise(attacked, [Example("why", image=picture(0)), originals[1]])
