"""A with block that is forgotten says so; one that is not does what contextlib's does."""

import gc
import warnings

import pytest

from care_lens.core.blocks import UnusedBlockWarning, with_block


@pytest.fixture
def seen():
    return []


@pytest.fixture
def lamp(seen):
    @with_block("lamp.on(room)")
    def on(room, *, colour="white"):
        """Light."""
        seen.append(f"on in {room}")
        try:
            yield colour
        finally:
            seen.append("off")

    return on


def test_a_block_that_was_never_entered_warns_where_it_was_written(lamp, seen):
    with pytest.warns(UnusedBlockWarning, match=r"lamp.on\(room\) was made and not entered") as caught:
        lamp("hall")
        gc.collect()
    assert seen == [] and len(caught) == 1


def test_a_block_that_was_entered_does_not(lamp, seen):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block = lamp("hall", colour="red")
        with block as colour:
            assert colour == "red" and seen == ["on in hall"]
        with block, block:
            pass
        with pytest.raises(KeyError), lamp("hall"):
            raise KeyError
        lamp("hall")(lambda: seen.append("inside"))()
        del block
        gc.collect()
    assert seen == ["on in hall", "off"] + 2 * ["on in hall"] + 2 * ["off"] + [
        "on in hall", "off", "on in hall", "inside", "off",
    ]  # fmt: skip


def test_what_is_asked_of_a_block_that_was_not_entered_is_answered_with_what_to_write(lamp):
    block = lamp("hall")
    with pytest.raises(
        AttributeError, match=r"must be entered .* got 'generate' asked of it; write `with lamp.on\(room\)"
    ):
        block.generate()
    assert not hasattr(block, "_private") and "to be entered" in repr(block)
    with block:
        pass
    assert lamp.__name__ == "on" and lamp.__doc__ == "Light."


def test_wrong_arguments_are_told_on_entering(lamp):
    with pytest.raises(TypeError, match="nowhere"), lamp(nowhere=1):
        pass
