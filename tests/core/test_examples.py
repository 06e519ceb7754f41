"""Examples and their pairs."""

import pytest

from care_lens.core import Example, PairedExamples, Turn
from care_lens.core.conversation import ExampleError


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


def test_an_example_is_not_its_own_twin(picture):
    image = picture(0)
    one = Example("a", image=image, id="one")
    for other in (one, Example("a", image=image, id="another", group="x", harmful=True)):
        with pytest.raises(ExampleError, match=r"twins must differ .* in pairs \[1\]; give the unsafe one"):
            PairedExamples((Example("b"), one), (Example("c"), other))
    turn = Turn("user", "before")
    for other in (
        Example("b", image=image),
        Example("a", image=picture(1)),
        Example("a"),
        Example("a", image=image, response="yes"),
        Example("a", image=image, system="be brief"),
        Example("a", image=image, prefill="Sure"),
        Example("a", image=image, more_images=(image,)),
        Example("a", image=image, turns=(turn, Turn("assistant", "yes"))),
    ):
        assert len(PairedExamples((one,), (other,))) == 1


def test_examples_can_be_told_apart_and_put_in_sets(picture):
    a, b = Example("a", image=picture(0), meta={"k": "v"}), Example("a", image=picture(1), meta={"k": "v"})
    assert a != b and a == Example("a", image=picture(0), meta={"k": "v"}) and len({a, b}) == 2
