"""Examples and their pairs."""

import pytest

from care_lens.core import Example, PairedExamples


def test_pairs_hold_together(picture):
    safe = [Example("a", group="one"), Example("b", image=picture(0)), Example("c")]
    unsafe = [Example("a*", harmful=True), Example("b*", group="two"), Example("c*")]
    pairs = PairedExamples(tuple(safe), tuple(unsafe))
    assert len(pairs) == 3 and pairs.groups == ("one", "two", "2")
    assert pairs[1] == (safe[1], unsafe[1]) and list(pairs) == list(zip(safe, unsafe, strict=True))
    assert pairs[1:] == PairedExamples(tuple(safe[1:]), tuple(unsafe[1:]))
    assert PairedExamples.from_pairs(list(pairs)) == pairs


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="got 1 and 0"):
        PairedExamples((Example("a"),), ())


def test_examples_can_be_told_apart_and_put_in_sets(picture):
    a, b = Example("a", image=picture(0), meta={"k": "v"}), Example("a", image=picture(1), meta={"k": "v"})
    assert a != b and a == Example("a", image=picture(0), meta={"k": "v"}) and len({a, b}) == 2
