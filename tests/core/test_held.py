"""Names that are not there are answered with those that are."""

import copy
import pickle

import pytest

from care_lens.core.errors import CareLensError
from care_lens.core.held import Named, NotHeldError, not_held


def test_the_error_lists_what_is_there_the_nearest_first():
    held = Named({"typographic": 1, "wrapper": 2, "cover": 3}, what="pair set")
    assert held["cover"] == 3 and held.get("gone") is None and "gone" not in held
    with pytest.raises(NotHeldError) as raised:
        held["wraper"]
    assert str(raised.value) == (
        "pair set must be one of 'wrapper', 'typographic', 'cover', got 'wraper'; did you mean 'wrapper'?"
    )
    assert isinstance(raised.value, KeyError) and isinstance(raised.value, CareLensError)
    assert list(held) == ["typographic", "wrapper", "cover"], "asking for a name adds none"


def test_many_names_are_counted_and_none_is_said():
    assert str(not_held("site", "x", map(str, range(40)))).count("'") == 2 * (12 + 1)
    assert "and 28 more" in str(not_held("site", "x", map(str, range(40))))
    assert "there is none" in str(not_held("site", "x", []))
    assert "; run it again" in str(not_held("site", "x", ["y"], advice="run it again"))


def test_another_layer_is_not_meant():
    held = ["blocks.2.hook_mlp_out", "blocks.2.hook_attn_out"]
    told = str(not_held("site", "blocks.3.hook_mlp_out", held))
    assert "'blocks.2.hook_mlp_out'" in told and "did you mean" not in told
    assert "did you mean 'blocks.2.hook_mlp_out'" in str(not_held("site", "blocks.2.hook_mpl_out", held))


def test_it_is_a_dictionary_in_all_else():
    held = Named({"a": 1}, what="channel")
    assert held == {"a": 1} and {**held} == {"a": 1} and held | {"b": 2} == {"a": 1, "b": 2}
    for same in (copy.copy(held), copy.deepcopy(held), held.copy(), pickle.loads(pickle.dumps(held))):
        assert same == held
        with pytest.raises(NotHeldError, match="channel must be one of 'a'"):
            same["b"]
