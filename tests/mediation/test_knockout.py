"""Attention knockout: hand-written masks, identities, refusals."""

import json

import pandas as pd
import pytest
import torch
from transformers.models.llama import modeling_llama

from care_lens.core import Example
from care_lens.mediation.knockout import KnockoutResult, cut_attention, knockout

QUICK = {"n_boot": 20, "progress": False}


def rows(result, **values):
    frame = result.frame
    for column, value in values.items():
        frame = frame[frame[column] == value]
    return frame["value"].tolist()


@pytest.fixture(scope="module")
def found(model, pairs, margin):
    return knockout(model, pairs, source="image", target="last", outcome=margin, layers=[0, 2, (0, 1, 2)], **QUICK)


def plain_outcome(llava_maker, inputs, margin, edit, layers, monkeypatch):
    """The outcome of the plain model, whose eager function is written out here with an edit of scores or weights."""
    plain, _ = llava_maker("clip")

    def eager(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        key, value = (part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (key, value))
        scores = query @ key.transpose(2, 3) * scaling + attention_mask[..., : key.shape[-2]]
        weights = edit(scores) if module.layer_idx in layers else scores.softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", eager)
    with torch.no_grad():
        return margin(plain(**inputs.model_kwargs()).logits, inputs).double().numpy()


@pytest.mark.parametrize("mode", ["zero", "renormalised"])
@pytest.mark.parametrize(("source", "target"), [("image", "last"), ("image", "text"), ("text", "last")])
def test_against_the_eager_function_edited_by_hand(
    model, llava_maker, pictured, margin, mode, source, target, monkeypatch
):
    examples = list(pictured.safe)
    result = knockout(
        model, examples, source=source, target=target, outcome=margin, layers=[(1, 2)], modes=(mode,), **QUICK
    )
    inputs = model.prepare(examples)
    cut = inputs.spans.mask(target)[:, :, None] & inputs.spans.mask(source)[:, None]
    cut &= ~torch.eye(cut.shape[1], dtype=torch.bool)

    def edit(scores):
        if mode == "zero":
            return scores.softmax(-1) * ~cut[:, None]
        return scores.masked_fill(cut[:, None], torch.finfo(scores.dtype).min).softmax(-1)

    want = plain_outcome(llava_maker, inputs, margin, edit, (1, 2), monkeypatch)
    assert result.details["value"].tolist() == pytest.approx(want.tolist(), abs=1e-5)
    assert result.details["untouched"].tolist() != pytest.approx(want.tolist(), abs=1e-4)
    assert rows(result) == pytest.approx([(result.details["value"] - result.details["untouched"]).mean()])


@pytest.mark.parametrize("mode", ["zero", "renormalised"])
def test_knockout_of_everything_is_attention_that_writes_nothing(
    model, llava_maker, pictured, margin, mode, monkeypatch
):
    examples = list(pictured.unsafe)
    everything = {"source": "all", "target": "all", "itself": True, "layers": [(0, 1, 2)], "modes": (mode,)}
    result = knockout(model, examples, outcome=margin, **everything, **QUICK)
    inputs = model.prepare(examples)
    want = plain_outcome(llava_maker, inputs, margin, torch.zeros_like, (0, 1, 2), monkeypatch)
    assert result.details["value"].tolist() == pytest.approx(want.tolist(), abs=1e-5)


def test_effects_of_pairs(found):
    wide = {effect: rows(found, effect=effect) for effect in ("safe change", "unsafe change", "TE change")}
    for safe, unsafe, total in zip(*wide.values(), strict=True):
        assert total == pytest.approx(unsafe - safe, abs=1e-6)
    assert set(found.frame.n) == {2}  # one pair has no picture
    assert found.frame.layers.drop_duplicates().tolist() == ["0", "2", "0-2"]
    assert rows(found, mode="zero") != rows(found, mode="renormalised")
    assert (found.frame.ci_low <= found.frame["value"]).all() and (found.frame["value"] <= found.frame.ci_high).all()


def test_batches_make_no_difference(found, model, pairs, margin):
    small = knockout(
        model, pairs, source="image", target="last", outcome=margin, layers=[0, 2, (0, 1, 2)], batch_size=1, **QUICK
    )
    pd.testing.assert_frame_equal(small.frame, found.frame, atol=1e-5)


def test_what_is_later_cannot_be_cut(model, pictured, margin):
    """The picture comes before the last token, and a causal model has no attention to what comes after."""
    result = knockout(model, list(pictured.safe), source="last", target="image", outcome=margin, **QUICK)
    assert rows(result) == pytest.approx([0.0] * 6, abs=1e-6)


def test_windows(model, pictured, margin):
    result = knockout(
        model, list(pictured.safe), source="image", target="text", outcome=margin, window=2, modes=("zero",), **QUICK
    )
    assert result.frame.layers.tolist() == ["0-1", "1-2"]


def test_patterns_by_hand():
    pattern = torch.tensor([[[[1.0, 0.0], [0.25, 0.75]]]])
    cut = torch.tensor([[[True, False], [True, False]]])
    assert cut_attention(pattern, cut, mode="zero").tolist() == [[[[0, 0], [0, 0.75]]]]
    assert cut_attention(pattern, cut, mode="renormalised").tolist() == [[[[0, 0], [0, 1]]]]
    assert pattern[0, 0, 0, 0] == 1


def test_refusals(model, pictured, margin, monkeypatch):
    examples = list(pictured.safe)
    options = {"source": "image", "target": "last", "outcome": margin, **QUICK}
    for change, said in (
        ({"source": "sky"}, "spans"),
        ({"layers": [7]}, "layers 0 to 2"),
        ({"layers": []}, "at least one window"),
        ({"window": 4}, "window"),
        ({"modes": ()}, "modes"),
        ({"batch_size": 0}, "batch_size"),
    ):
        with pytest.raises(ValueError, match=said):
            knockout(model, examples, **{**options, **change})
    with pytest.raises(ValueError, match="something to be cut"):
        knockout(model, [Example("yes")], **options)
    site = next(iter(model.sites(tower="language", component="attn.hook_pattern")))
    monkeypatch.setitem(model._seams.read_only, site, "it shows a pattern that was used already")
    with pytest.raises(ValueError, match=r"must be editable .* used already"):
        knockout(model, examples, **options)


def test_hooks_are_gone_after_an_exception(model, pictured):
    inputs = model.prepare(list(pictured.safe))
    calls = []

    def fails(logits, inputs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("inside")
        return logits[:, -1, 0]

    with torch.no_grad():
        before = model(inputs)
    with pytest.raises(RuntimeError, match="inside"):
        knockout(model, list(pictured.safe), source="image", target="last", outcome=fails, **QUICK)
    with torch.no_grad():
        assert torch.equal(model(inputs), before)


def test_save_and_load_and_draw(found, tmp_path):
    found.save(tmp_path, "knockout")
    back = KnockoutResult.load(tmp_path, "knockout")
    pd.testing.assert_frame_equal(back.frame, found.frame)
    pd.testing.assert_frame_equal(back.details, found.details, check_exact=True)
    assert back.settings == json.loads(json.dumps(found.settings))
    assert len(found.plot().data) == 6
