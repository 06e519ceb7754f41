"""Neighbours against a search by hand; translators against least squares, TransformerLens and autograd; the page that shows them."""

import base64
import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from care_lens.core import Example, PairedExamples
from care_lens.lens import (
    LensError,
    LensTranslators,
    TextBank,
    fit_jacobian_lens,
    fit_tuned_lens,
    logit_lens,
    nearest_text,
    picture_reading,
    write_viewer,
)
from care_lens.mediation import patch_map

TEXTS = ["what is red", "how to make a blue", "yes sure", "no sorry i cannot help"]


@pytest.fixture(scope="module")
def bank(model):
    return TextBank.of(model, TEXTS, batch_size=3, progress=False)


@pytest.fixture(scope="module")
def seen(picture):
    return [
        Example("what is red", image=picture(0), id="a", group="red"),
        Example("how is blue", image=picture(1), id="b", group="blue"),
    ]


def test_neighbours_are_those_of_a_search_by_hand(model, bank, seen, tmp_path):
    found = nearest_text(model, seen, bank, sites=["blocks.1.hook_resid_pre"], top_k=3, n_boot=5, progress=False)
    words, states, layers = [], [], []
    for text in TEXTS:
        inputs = model.prepare(Example(text))
        sites = [*model.sites(tower="language", component="hook_resid_pre"), "blocks.2.hook_resid_post"]
        with torch.no_grad():
            cache = model.run_with_cache(inputs, sites=sites)[1]
        for layer, site in enumerate(sites):
            states.append(cache[str(site)][0])
            layers += [layer] * len(states[-1])
            words += [model.tokenizer.decode([token]) for token in inputs.input_ids[0].tolist()]
    states, layers = torch.cat(states), np.array(layers)
    inputs = model.prepare(seen[0])
    with torch.no_grad():
        own = model.run_with_cache(inputs, sites=["blocks.1.hook_resid_pre"])[1]["blocks.1.hook_resid_pre"][0][
            inputs.spans.image[0]
        ]
    cosine = torch.nn.functional.cosine_similarity(own[:, None], states[None], dim=-1)
    mine = found.details[(found.details.example == 0) & (found.details["rank"] == 1)]
    best = cosine.max(dim=1)
    np.testing.assert_allclose(mine.value, best.values, atol=2e-3)  # the bank is kept in half precision
    assert mine.word.tolist() == [words[i] for i in best.indices.tolist()]
    assert mine.bank_layer.tolist() == layers[best.indices.numpy()].tolist()
    bank.save(tmp_path, "bank")
    back = TextBank.load(tmp_path, "bank")
    assert back.words == bank.words and all(
        torch.equal(back.states[layer], bank.states[layer]) for layer in bank.states
    )
    similarity = found.frame.set_index("metric").loc["similarity"]
    assert similarity["value"] == pytest.approx(found.details[found.details["rank"] == 1].value.mean(), rel=1e-6)
    assert -1 < similarity["chance"] < 1


def test_a_text_state_is_its_own_neighbour(model, bank):
    rows = [Example(TEXTS[1])]
    found = nearest_text(model, rows, bank, positions=("text",), same_layer=True, top_k=1, n_boot=2, progress=False)
    assert found.details.value.min() > 0.999
    assert (found.details.word == found.details.token).all()


def test_ridge_is_least_squares_and_the_last_layer_is_left_as_it_is(model, seen, tmp_path):
    rows = [
        replace(row, group=f"{row.group}{i}", prompt=f"{row.prompt} {word}")
        for i, word in enumerate(TEXTS)
        for row in seen
    ]
    tuned = fit_tuned_lens(model, rows, progress=False, batch_size=3)
    last = "blocks.2.hook_resid_post"
    torch.testing.assert_close(tuned.matrices[last], torch.eye(len(tuned.biases[last])), atol=1e-4, rtol=0)
    tuned.save(tmp_path, "tuned")
    back = LensTranslators.load(tmp_path, "tuned")
    state = torch.randn(4, len(tuned.biases[last]))
    torch.testing.assert_close(back("blocks.1.hook_resid_pre", state), tuned("blocks.1.hook_resid_pre", state))
    plain = logit_lens(model, rows, positions=("text",), n_boot=2, progress=False).frame
    better = logit_lens(model, rows, positions=("text",), translators=tuned, n_boot=2, progress=False).frame
    taken = [
        frame[(frame.metric == "kl to output") & (frame.component == "hook_resid_pre")].value.to_numpy()
        for frame in (plain, better)
    ]
    assert (taken[1] < taken[0]).all()
    closer = fit_tuned_lens(model, rows, sites=["blocks.1.hook_resid_pre"], method="kl", steps=30, progress=False)
    assert closer.method == "kl" and closer.settings["steps"] == 30
    with pytest.raises(LensError, match="two groups"):
        fit_tuned_lens(model, seen[:1], progress=False)
    with pytest.raises(LensError, match="one of the translators'"):
        closer("blocks.0.hook_resid_pre", state)


def test_ridge_is_the_formula():
    from care_lens.lens.translators import _ridge

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator)
    a, b = torch.randn(4, 4, generator=generator), torch.randn(4, generator=generator)
    out = torch.arange(60) % 5 == 0
    matrix, bias, ridge = _ridge(x, x @ a.T + b, out)
    assert ridge == 1e-4
    torch.testing.assert_close(matrix.float(), a, atol=1e-3, rtol=0)
    torch.testing.assert_close(bias.float(), b, atol=1e-3, rtol=0)


def test_jacobian_is_autograds(model, seen):
    site, last = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_post"
    found = fit_jacobian_lens(model, seen, sites=[site], positions="image", batch_size=2, progress=False)
    total = 0
    for row in seen:
        inputs = model.prepare(row)
        with torch.no_grad():
            start = model.run_with_cache(inputs, sites=[site])[1][site]
        image = inputs.spans.image[0]

        def end(value, inputs=inputs):
            held = {}
            hooks = [(site, lambda a, hook: value), (last, lambda a, hook: held.update(end=a))]
            model.run_with_hooks(inputs, fwd_hooks=hooks)
            return held["end"][0]

        jacobian = torch.autograd.functional.jacobian(end, start)[:, :, 0]  # [pos, d, pos, d]
        total = total + jacobian[image][:, :, image].sum(dim=0).mean(dim=1)
    torch.testing.assert_close(found.matrices[site], total / 2, rtol=1e-3, atol=1e-5)
    assert found.biases[site].abs().max() == 0


def test_the_page_holds_everything_and_asks_for_nothing(model, bank, seen, picture, margin, tmp_path):
    rows = [replace(seen[0], prompt="what is </script> red"), seen[1]]
    words = logit_lens(model, rows, top_k=2, n_boot=2, progress=False)
    near = nearest_text(model, rows, bank, top_k=2, n_boot=2, progress=False)
    page = write_viewer(words, tmp_path / "page", neighbours=near).read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and "http" not in page.replace(
        "http://www.w3.org/2000/svg", ""
    )
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1]
    data = json.loads(text)
    assert [kind["title"] for kind in data["kinds"]] == ["words of the lens", "nearest words in context"]
    # What the page's script reads for one token is what the result holds.
    site = data["kinds"][0]["sites"].index("blocks.1.hook_resid_pre")
    table = np.frombuffer(base64.b64decode(data["examples"][1]["layers"][0][site]["w"]), dtype="<u2").reshape(-1, 2)
    shown = [[data["words"][0][w] for w in row] for row in table]
    mine = words.details[
        (words.details.example == 1) & (words.details.tower == "language") & (words.details.layer == 1)
    ]
    mine = mine[mine.component == "hook_resid_pre"]
    assert shown == [part.sort_values("rank").word.tolist() for _, part in mine.groupby("token_index")]
    with pytest.raises(LensError, match=r"end in \.html"):
        words.viewer(tmp_path / "page.pdf")


def test_a_picture_is_read_patch_by_patch(model, bank, seen, picture, margin):
    pairs = PairedExamples.from_pairs([(replace(row, image=picture(5 + i)), row) for i, row in enumerate(seen)])
    effects = patch_map(model, pairs, outcome=margin, n_boot=5, progress=False)
    words = logit_lens(model, seen, targets=["red", "blue"], top_k=20, n_boot=2, progress=False)
    near = nearest_text(model, seen, bank, n_boot=2, progress=False)
    found = picture_reading(words, effects, example=1, neighbours=near, image=seen[1].image)
    np.testing.assert_array_equal(found.frame.effect, effects.details[effects.details.pair == 1].value)
    top = words.details[(words.details.example == 1) & (words.details.layer == 0) & (words.details.tower == "language")]
    blue = model.tokenizer.convert_tokens_to_ids("blue")
    at = top[(top.grid >= 0) & (top.component == "hook_resid_pre")]
    assert found.frame.target_rank.tolist() == [
        next(iter(part[part.word_id == blue]["rank"]), 0) for _, part in at.groupby("token_index")
    ]
    assert sum(found.settings["counts"].values()) == len(found.frame) == 4
    assert [trace.type for trace in found.plot().data][:3] == ["heatmap"] * 3
    drawn = found.plot().data
    most = float(found.frame.effect.abs().max())
    assert list(drawn[2].colorbar.tickvals) == [-most, 0, most]
    with pytest.raises(LensError, match="example 7"):
        picture_reading(words, effects, example=7)


def test_results_of_other_items_or_pictures_are_told(model, bank, seen, picture, margin):
    pairs = PairedExamples.from_pairs([(replace(row, image=picture(5 + i)), row) for i, row in enumerate(seen)])
    effects = patch_map(model, pairs, outcome=margin, n_boot=2, progress=False)
    words = logit_lens(model, seen, top_k=2, n_boot=2, progress=False)
    near = nearest_text(model, seen, bank, n_boot=2, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture_reading(words, effects, example=1, neighbours=near, image=seen[1].image, n_boot=2)
    turned = replace(
        effects, details=effects.details.assign(group=effects.details["group"].map(lambda g: f"other {g}"))
    )
    with pytest.warns(UserWarning, match=r"words are of item '\w+', effects of item 'other \w+'"):
        picture_reading(words, turned, example=1, n_boot=2)
    reversed_near = nearest_text(model, seen[::-1], bank, n_boot=2, progress=False)
    with pytest.warns(UserWarning, match=r"words are of \w+ '\w+', neighbours of .*the picture of neighbours"):
        picture_reading(words, effects, example=0, neighbours=reversed_near, n_boot=2)
    with pytest.warns(UserWarning, match=r"image \(.* pixels\) is not the picture of words"):
        picture_reading(words, effects, example=1, image=picture(17), n_boot=2)


def test_a_map_without_an_effect_has_patches_that_act_unless_more_is_demanded(model, seen, picture, margin):
    pairs = PairedExamples.from_pairs([(replace(row, image=picture(5 + i)), row) for i, row in enumerate(seen)])
    effects = patch_map(model, pairs, outcome=margin, n_boot=5, progress=False)
    words = logit_lens(model, seen, targets=["red", "blue"], top_k=20, n_boot=2, progress=False)
    idle = replace(effects, details=effects.details.assign(value=effects.details["value"] * 1e-6))

    def acting(found):
        return picture_reading(words, found, example=1, n_boot=2).frame.acts.tolist()

    assert any(acting(effects)) and acting(idle) == acting(effects)
    size = effects.details[effects.details.pair == 1].value.abs()
    least = float(size.sort_values().iloc[-2])
    strict = picture_reading(words, effects, example=1, min_effect=least, n_boot=2)
    assert strict.frame.acts.sum() == 2 and strict.settings["min_effect"] == least
    assert strict.settings["largest"] == float(size.max())
    none = picture_reading(words, idle, example=1, min_effect=least, n_boot=2)
    assert not none.frame.acts.any() and not set(none.frame.kind) - {"merely legible", "neither"}
    # The intervals of the mean: one excludes 0 on the side of this picture's effect, one on the other side, two hold 0.
    own = effects.details[effects.details.pair == 1].value.to_numpy()
    sign = np.sign(own)
    assert (sign != 0).all() and len(own) == 4
    low, high = np.array([1.0, 1.0, -1.0, -1.0]), np.array([2.0, 2.0, 1.0, 1.0])
    turned = np.stack([low, high]) * (sign * [1, -1, 1, 1])
    frame = effects.frame.assign(ci_low=turned.min(axis=0), ci_high=turned.max(axis=0))
    sure = picture_reading(words, replace(effects, frame=frame), example=1, acts=0, significant=True, n_boot=2)
    assert sure.frame.acts.tolist() == [True, False, False, False] and sure.settings["significant"]
    bare = replace(effects, frame=effects.frame.assign(ci_low=np.nan, ci_high=np.nan))
    for options, message in (
        ({"significant": True}, "must have intervals"),
        ({"acts": 2}, "acts must be"),
        ({"min_effect": -1}, "min_effect 0 or more"),
    ):
        with pytest.raises(LensError, match=message):
            picture_reading(words, bare, example=1, **options)


def test_transformer_lens_has_the_same_jacobian_on_text(model):
    """Its estimator on the same tokens, with one more, since it leaves the last position out; a causal model does not look ahead."""
    from transformer_lens.tools.analysis import jacobian_lens

    text = Example("how to make a blue")
    found = fit_jacobian_lens(model, [text], sites=["blocks.0.hook_resid_post"], progress=False)
    tokens = torch.cat([model.prepare(text).input_ids, torch.tensor([[5]])], dim=1)
    theirs = jacobian_lens._jacobian_for_prompt(
        model.bridge,
        tokens,
        source_layers=[0],
        dim_batch=8,
        skip_first_positions=0,
        backward_provider=jacobian_lens._ordinary_vjp,
    )
    torch.testing.assert_close(found.matrices["blocks.0.hook_resid_post"], theirs[0], rtol=1e-3, atol=1e-5)
