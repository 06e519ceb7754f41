"""Attribution: exact on a linear model, finite differences, completeness, and exact patching as the judge."""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch
from zoo.straight import straight

from care_lens.core import Example, LogitDifference, PairedExamples
from care_lens.core.outcome import KLDivergence, PrefixMargin
from care_lens.mediation import heads, mediate, neurons
from care_lens.mediation.attribution import AttributionResult, attribute
from care_lens.mediation.pairs import pair_batches

QUICK = {"n_boot": 20, "progress": False}


def of(result, site, position="all"):
    """The units of a site, in order."""
    frame = result.frame
    at = frame[(frame.mediator.str.split("[").str[0] == site) & (frame.position == position)]
    return at["value"].to_numpy(dtype=float)


def patches_of(result, site):
    frame = result.frame
    return frame[(frame.kind == "patch") & (frame.mediator == site)]["value"].to_numpy(dtype=float)


@pytest.fixture(scope="module")
def linear_lvlm(llava_maker):
    return straight(llava_maker)


@pytest.fixture(scope="module")
def integrated(model, pictured, margin):
    return attribute(model, pictured, outcome=margin, points=24, **QUICK)


def test_on_a_linear_model_attributions_are_the_exact_effects(linear_lvlm, pictured):
    toward, away = linear_lvlm.tokenizer.convert_tokens_to_ids(["sure", "sorry"])
    outcome = LogitDifference((toward,), (away,))
    sites = ["blocks.0.hook_resid_pre", "blocks.0.hook_attn_out", "blocks.1.hook_attn_out", "blocks.1.hook_resid_pre"]
    positions = ("all", "image", "last")
    exact = mediate(linear_lvlm, pictured, outcome=outcome, sites=sites, positions=positions, **QUICK)
    by_head = mediate(linear_lvlm, pictured, outcome=outcome, sites=heads(linear_lvlm), positions=("all",), **QUICK)
    z = [f"blocks.{layer}.attn.hook_z" for layer in (0, 1)]
    for options in ({"method": "gradient"}, {"method": "integrated", "points": 3}):
        found = attribute(
            linear_lvlm, pictured, outcome=outcome, sites=[*sites, *z], positions=positions, **options, **QUICK
        )
        for effects, effect_sites, where in ((exact, sites, positions), (by_head, z, ("all",))):
            nie = effects.frame[effects.frame.effect == "NIE"]
            for site in effect_sites:
                for position in where:
                    rows = nie[(nie.mediator.str.split("[").str[0] == site) & (nie.position == position)]
                    want = rows["value"].to_numpy(dtype=float)
                    np.testing.assert_allclose(of(found, site, position), want, atol=2e-4, rtol=2e-4)
        assert np.abs(of(found, z[0])).min() > 1e-3


def test_points_are_as_many_as_completeness_takes(model, pictured, margin, caplog):
    """With 2 points the sum misses the total effect, which is said; by default it does not."""
    few = attribute(model, pictured, outcome=margin, sites=["blocks.0.attn.hook_z"], patches=(), points=2, **QUICK)
    assert few.settings["points"] == 2 and few.settings["gap"] > 0.005 and "miss the total effect" in caplog.text
    caplog.clear()
    found = attribute(model, pictured, outcome=margin, sites=["blocks.0.attn.hook_z"], patches=(), **QUICK)
    assert found.settings["points"] >= 8 and found.settings["gap"] <= 0.005 and not caplog.text
    assert found.settings["entering"] == pytest.approx(found.settings["TE"], abs=0.005 * abs(few.settings["TE"]) + 1e-3)


def test_gradients_agree_with_finite_differences(model, pictured, margin):
    """A small step from the safe towards the unsafe activation, at sites of every kind and of both towers."""
    pair = pictured[:1]

    def outcome(logits, inputs):
        return logits[:, -1, margin.comply[0]] - logits[:, -1, margin.refuse[0]] ** 2

    sites = [
        "vision.hook_embed",
        "vision.blocks.1.attn.hook_z",
        "vision.blocks.1.mlp.hook_post",
        "vision.blocks.2.hook_resid_mid",
        "projector.hook_out",
        "blocks.0.hook_resid_pre",
        "blocks.0.attn.hook_z",
        "blocks.1.hook_resid_mid",
        "blocks.1.mlp.hook_post",
        "blocks.1.hook_attn_out",
        "blocks.2.hook_mlp_out",
        "blocks.2.hook_resid_post",
    ]
    batch = pair_batches(model, pair, outcome=outcome, batch_size=2)[0]
    found = attribute(model, pair, outcome=outcome, sites=sites, method="gradient", **QUICK)
    safe = batch.inputs.rows([0])
    with torch.no_grad():
        _, cache = model.run_with_cache(batch.inputs, sites=sites)
        for site in sites:
            delta = cache[site][1:] - cache[site][:1]

            def at(step, site=site, delta=delta):
                hook = (site, lambda activation, hook: activation + step * delta)
                return float(outcome(model.run_with_hooks(safe, fwd_hooks=[hook]).double(), safe)[0])

            # Fourth order, because softmax and norms are in float32 and steps must not be tiny.
            slope = (8 * (at(5e-3) - at(-5e-3)) - (at(1e-2) - at(-1e-2))) / (12 * 5e-3)
            assert of(found, site).sum() == pytest.approx(slope, abs=5e-5, rel=5e-3), site
            assert abs(slope) > 4e-4, site


def test_what_enters_adds_up_to_the_total_effect(integrated, pictured, margin, model):
    gap = integrated.settings["entering"] - integrated.settings["TE"]
    assert abs(gap) < 1e-5 < 1e-3 < abs(integrated.settings["TE"])
    rough = attribute(model, pictured, outcome=margin, method="gradient", sites=["blocks.0.hook_attn_out"], **QUICK)
    assert abs(rough.settings["entering"] - rough.settings["TE"]) > 20 * abs(gap)
    words = attribute(
        model, pictured, outcome=margin, sites=["blocks.0.hook_resid_pre"], path="embeddings", points=24,
        positions=("all", "image", "text"), **QUICK,
    )  # fmt: skip
    everything, image, text = (
        float(of(words, "blocks.0.hook_resid_pre", name)[0]) for name in ("all", "image", "text")
    )
    assert everything == pytest.approx(words.settings["TE"], abs=1e-5)
    assert everything == pytest.approx(image + text, abs=1e-6)
    assert patches_of(words, "blocks.0.hook_resid_pre").sum() == pytest.approx(image, abs=1e-6)


def test_units_add_up_to_their_site(integrated, model, pictured, margin):
    whole = attribute(
        model, pictured, outcome=margin, sites=["projector.hook_out", "vision.hook_embed"], points=24, **QUICK
    )
    classless = patches_of(whole, "vision.hook_embed")
    assert len(classless) == 4
    # The class token of CLIP is the same for every picture.
    assert classless.sum() == pytest.approx(float(of(whole, "vision.hook_embed")[0]), abs=1e-5)
    # Heads write through a linear map, so that theirs add up to the attention output's; so do neurons to the MLP output's.
    for parts, out in (("attn.hook_z", "hook_attn_out"), ("mlp.hook_post", "hook_mlp_out")):
        for tower in ("", "vision."):
            name = f"{tower}blocks.1."
            assert of(integrated, name + parts).sum() == pytest.approx(of(integrated, name + out)[0], abs=1e-5)


def test_patching_tells_how_good_it_is(integrated, model, pictured, margin):
    exact = mediate(
        model, pictured, outcome=margin, sites=neurons("blocks.2.mlp.hook_post", range(48)), positions=("all",), **QUICK
    )
    want = exact.frame[exact.frame.effect == "NIE"]["value"].to_numpy(dtype=float)
    assert np.corrcoef(of(integrated, "blocks.2.mlp.hook_post"), want)[0, 1] > 0.8


def test_pairs_without_pictures_go_along(model, pairs, margin, pictured, integrated):
    both = attribute(model, pairs, outcome=margin, points=24, positions=("all", "image"), batch_size=2, **QUICK)
    counts = both.frame.groupby(["tower", "kind", "position"])["n"].agg(["min", "max"])
    assert counts.loc[("language", "site", "all")].tolist() == [3, 3]
    assert counts.loc[("language", "site", "image")].tolist() == [2, 2]
    assert counts.loc[("vision", "head", "all")].tolist() == [2, 2]
    site = "vision.blocks.1.attn.hook_z"
    np.testing.assert_allclose(of(both, site), of(integrated, site), atol=1e-5)
    assert both.details.pair.max() == 2


def test_kl_has_no_slope_at_its_reference(model, same_text):
    options = {"outcome": KLDivergence(), "sites": ["projector.hook_out"], "patches": (), **QUICK}
    assert of(attribute(model, same_text, method="gradient", **options), "projector.hook_out")[0] == pytest.approx(
        0, abs=1e-5
    )
    found = attribute(model, same_text, points=16, **options)
    assert found.settings["entering"] == pytest.approx(found.settings["TE"], abs=1e-5)
    assert found.settings["TE"] > 5e-4


@dataclass(frozen=True)
class _Raises:
    def __call__(self, logits, inputs):
        if logits.requires_grad:
            raise RuntimeError("inside")
        return logits[:, -1, 0]


def test_hooks_and_gradients_are_gone(model, pictured, margin):
    inputs = model.prepare(list(pictured.safe))
    with torch.no_grad():
        before = model(inputs)
    with pytest.raises(RuntimeError, match="inside"):
        attribute(model, pictured, outcome=_Raises(), **QUICK)
    with torch.no_grad():
        assert torch.equal(model(inputs), before)
    attribute(model, pictured, outcome=margin, sites=["blocks.0.hook_mlp_out"], method="gradient", **QUICK)
    assert all(parameter.grad is None for parameter in model.hf_model.parameters())
    with torch.no_grad():
        assert torch.equal(model(inputs), before)


def test_frozen_weights_are_no_hindrance(llava_maker, pictured, margin, integrated):
    from care_lens.lvlm import HookedLVLM

    plain, processor = llava_maker("clip")
    frozen = HookedLVLM.from_hf(plain.requires_grad_(False), processor)
    found = attribute(frozen, pictured, outcome=margin, points=24, sites=["blocks.1.attn.hook_z"], patches=(), **QUICK)
    np.testing.assert_allclose(of(found, "blocks.1.attn.hook_z"), of(integrated, "blocks.1.attn.hook_z"), atol=1e-5)


def test_refusals(model, pictured, margin, picture):
    for options, said in (
        ({"points": 0}, "points"),
        ({"outcome": PrefixMargin(("sure",), ("sorry",))}, "one run"),
        ({"sites": ["blocks.0.attn.hook_pattern"]}, "editable and have positions"),
        ({"sites": ["vision.blocks.0.hook_mlp_out"], "path": "embeddings"}, "language tower"),
        ({"outcome": lambda logits, inputs: logits[:, -1, 0].detach()}, "differentiable"),
        ({"outcome": lambda logits, inputs: logits[:, -1]}, "one finite number"),
    ):
        with pytest.raises(ValueError, match=said):
            attribute(model, pictured, **{"outcome": margin, **QUICK, **options})
    odd = PairedExamples((Example("yes", image=picture(0)),), (Example("yes yes", image=picture(0)),))
    with pytest.raises(ValueError, match=r"aligned .* pairs \[0\]"):
        attribute(model, odd, outcome=margin, **QUICK)
    plain = PairedExamples((Example("yes"),), (Example("no"),))
    with pytest.raises(ValueError, match="text alone"):
        attribute(model, plain, outcome=margin, sites=["projector.hook_out"], **QUICK)


def test_save_and_load_and_draw(integrated, tmp_path):
    integrated.save(tmp_path, "attribution")
    back = AttributionResult.load(tmp_path, "attribution")
    pd.testing.assert_frame_equal(back.frame, integrated.frame)
    pd.testing.assert_frame_equal(back.details, integrated.details, check_exact=True)
    assert back.settings == json.loads(json.dumps(integrated.settings))
    assert len(integrated.plot().data) >= 1
