"""What a user of TransformerLens types on a HookedLVLM is answered with what to write; a cache of everything with what it takes."""

import logging

import pytest

from care_lens.core.display import memory
from care_lens.core.errors import CareLensError
from care_lens.lvlm import footprint
from care_lens.lvlm.errors import HookError
from care_lens.lvlm.missing import _INSTEAD, MissingNameError


@pytest.mark.parametrize(
    "name, told",
    [
        ("to_tokens", "lvlm.prepare(Example("),
        ("cfg", "lvlm.n_layers("),
        ("add_hook", "with lvlm.hooks("),
        ("reset_hooks", "lvlm.acting()"),
        ("blocks", "lvlm.bridge.blocks"),
        ("run_with_caches", "did you mean run_with_cache?"),
        ("W_U", "lvlm.bridge.W_U"),
        ("no_such_thing_at_all", "dir(lvlm)"),
    ],
)
def test_a_missing_name_says_what_to_write(lvlm, name, told):
    with pytest.raises(MissingNameError) as caught:
        getattr(lvlm, name)
    error = caught.value
    assert isinstance(error, AttributeError) and isinstance(error, CareLensError) and error.name == name
    assert f"has no attribute {name!r}" in str(error) and told in str(error)


def test_what_is_told_for_other_names_exists(lvlm, examples):
    inputs = lvlm.prepare(examples[:1])
    for name, told in _INSTEAD.items():
        assert not hasattr(lvlm, name), name
        for word in told.replace("(", " ").replace("`", " ").replace("[", " ").split():
            if word.startswith("lvlm."):
                held = lvlm
                for part in word.rstrip(".,;)").split(".")[1:]:
                    held = getattr(held, part)
            if word.startswith("inputs."):
                assert hasattr(inputs, word.split(".")[1].rstrip(".,;)]"))
    assert getattr(lvlm, "cfg", None) is None  # as before for those who ask with a default


def test_a_call_without_sites_says_what_all_would_take(lvlm, examples):
    inputs = lvlm.prepare(examples)
    with pytest.raises(HookError) as caught:
        lvlm.run_with_cache(inputs)
    # By what is really kept, not by the same reckoning.
    _, cache = lvlm.run_with_cache(inputs, sites=None)
    kept = {name: value for name, value in cache.cache_dict.items() if not name.startswith(("vision", "projector"))}
    took = sum(value.numel() * value.element_size() for value in kept.values())
    assert footprint.language_bytes(lvlm, inputs, lvlm.sites()) == took > 0
    rows, positions = inputs.input_ids.shape
    assert f"{memory(took)} in the language tower for this batch of {rows} by {positions} tokens" in str(caught.value)
    assert "besides those of the vision tower" in str(caught.value)


def test_a_large_cache_is_announced(lvlm, examples, monkeypatch, caplog):
    inputs = lvlm.prepare(examples[1:2])
    with caplog.at_level(logging.WARNING, logger="care_lens.lvlm.hooked"):
        lvlm.run_with_cache(inputs, sites=None)
        assert not caplog.records
        monkeypatch.setattr("care_lens.lvlm.hooked.LARGE", 1)
        lvlm.run_with_cache(inputs, sites=["blocks.0.hook_mlp_out"])
        assert not caplog.records
        lvlm.run_with_cache(inputs, sites=None)
    (record,) = caplog.records
    assert "name those that you need" in record.getMessage() and "vision" not in record.getMessage()
