"""Capture against plain Hugging Face runs of single, unpadded examples."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from care_lens.capture import Activations, TokenAttribution, capture, text_scores, token_gradients, visual_scores
from care_lens.core import Site, UnsafeMargin
from care_lens.core.errors import ArtifactError

SITES = ("blocks.0.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post")
VISION = ("vision.blocks.1.hook_mlp_out", "projector.hook_out")
SELECT = ("image", "text", "last", "all", "response", "image:attributed", "text:attributed")


@pytest.fixture(scope="module")
def held(lvlm, examples):
    return capture(lvlm, examples, (*SITES, *VISION), positions=SELECT, responses=True, batch_size=3, progress=False)


def alone(lvlm, example, site):
    """Spans and activation [pos, d] of one example on its own: no padding, whole cache."""
    inputs = lvlm.prepare(example, responses=True)
    with torch.no_grad():
        _, cache = lvlm.run_with_cache(inputs, sites=[site])
    return inputs.spans, cache[site][0]


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("select", ["image", "text", "last", "all", "response"])
def test_rows_are_the_means_over_the_spans_of_unpadded_runs(lvlm, examples, held, site, select):
    for row, example in enumerate(examples):
        spans, activation = alone(lvlm, example, site)
        mask = spans.mask(select)[0]
        assert bool(held.has(site, select)[row]) == bool(mask.any())
        if mask.any():
            torch.testing.assert_close(
                held.values[Site.parse(site), select][row], activation[mask].mean(0), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("site", SITES)
def test_attributed_rows_are_means_over_the_best_half(lvlm, examples, held, site):
    for row, example in enumerate(examples):
        spans, activation = alone(lvlm, example, site)
        text, image = activation[spans.text[0]], activation[spans.image[0]]
        best = text_scores(text).argsort(descending=True, stable=True)[: len(text) // 2]
        found = held.values[Site.parse(site), "text:attributed"][row]
        torch.testing.assert_close(found, text[best].mean(0), atol=1e-5, rtol=1e-5)
        if len(image):
            best = visual_scores(image, text).argsort(descending=True, stable=True)[: len(image) // 2]
            found = held.values[Site.parse(site), "image:attributed"][row]
            torch.testing.assert_close(found, image[best].mean(0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "how", [TokenAttribution(method="last"), TokenAttribution(text=2, visual=0.25, kernel="cosine")]
)
def test_every_way_of_attribution_reaches_the_rows(lvlm, examples, how):
    names = ("image:attributed", "text:attributed")
    held = capture(lvlm, examples, SITES[:1], positions=names, attribution=how, batch_size=3, progress=False)
    for row, example in enumerate(examples):
        inputs = lvlm.prepare(example)
        activation = lvlm.run_with_cache(inputs, sites=SITES[:1])[1][SITES[0]][0].detach()
        text, image = activation[inputs.spans.text[0]], activation[inputs.spans.image[0]]
        found = {name: held.values[Site.parse(SITES[0]), name][row] for name in names}
        torch.testing.assert_close(found[names[1]], text[how.keep_text(text)].mean(0), atol=1e-5, rtol=1e-5)
        if len(image):
            kept = how.keep_visual(image, text)
            torch.testing.assert_close(found[names[0]], image[kept].mean(0), atol=1e-5, rtol=1e-5)


def test_gradients_choose_tokens_where_an_outcome_is_given(lvlm, examples):
    how, outcome = TokenAttribution(method="gradient", text=1, visual=1), UnsafeMargin(comply=(5,), refuse=(6,))
    site, names = Site.parse(SITES[1]), ("image:attributed", "text:attributed")
    options = {"select": names, "attribution": how, "progress": False}
    held = capture(lvlm, examples, [site], outcome=outcome, batch_size=3, **options)
    for row, example in enumerate(examples):
        inputs = lvlm.prepare(example)
        activation, slope = (found[site][0] for found in token_gradients(lvlm, inputs, [site], outcome))
        size = (activation.double() * slope.double()).sum(-1).abs()
        for name, span in zip(names, (inputs.spans.image[0], inputs.spans.text[0]), strict=True):
            if span.any():
                best = size.masked_fill(~span, -1).argmax()
                torch.testing.assert_close(held.values[site, name][row], activation[best], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="outcome must be given"):
        capture(lvlm, examples, [site], **options)


def test_vision_rows_are_means_over_patches(lvlm, examples, held):
    skipped = 1 if lvlm.hf_model.config.vision_config.model_type == "clip_vision_model" else 0
    for row, example in enumerate(examples):
        assert bool(held.has(VISION[0], "image")[row]) == (example.image is not None)
        if example.image is not None:
            _, tower = alone(lvlm, example, VISION[0])
            _, projected = alone(lvlm, example, VISION[1])
            torch.testing.assert_close(
                held.values[Site.parse(VISION[0]), "image"][row],
                tower[skipped:].mean(0),
                atol=1e-5,
                rtol=1e-5,
            )
            torch.testing.assert_close(
                held.values[Site.parse(VISION[0]), "all"][row], tower.mean(0), atol=1e-5, rtol=1e-5
            )
            torch.testing.assert_close(
                held.values[Site.parse(VISION[1]), "image"][row], projected.mean(0), atol=1e-5, rtol=1e-5
            )
    assert held.selections(VISION[0]) == ("image", "all")


def test_batches_and_order_change_nothing(lvlm, examples, held):
    again = capture(
        lvlm, examples[::-1], (*SITES, *VISION), positions=SELECT, responses=True, batch_size=1, progress=False
    ).subset([2, 1, 0])
    assert again.ids == held.ids
    for key, rows in held.values.items():
        torch.testing.assert_close(again.values[key], rows, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_one_forward_pass_a_batch_and_no_more_hooks(lvlm, examples):
    calls = []
    handle = lvlm.hf_model.register_forward_hook(lambda *_: calls.append(1))
    capture(lvlm, examples, (*SITES, *VISION), positions=SELECT, responses=True, batch_size=2, progress=False)
    handle.remove()
    assert len(calls) == 2
    assert not any(point.fwd_hooks for point in lvlm.bridge.hook_dict.values())


def test_missing_rows_are_refused_and_can_be_left_out(held):
    with pytest.raises(ValueError, match=r"1 of 3 have none \(first: 'b'\)"):
        held.rows(SITES[0], "image")
    kept = held.subset(held.has(SITES[0], "image"))
    assert kept.ids == ("a", "c")
    assert kept.rows(SITES[0], "image").shape == (2, 32)
    assert kept.rows(SITES[0], "image").dtype == torch.float32


def test_counts_of_kept_tokens(lvlm, examples):
    spans, activation = alone(lvlm, examples[0], SITES[1])
    held = capture(
        lvlm,
        examples[:1],
        [SITES[1]],
        positions=("image:attributed",),
        attribution=TokenAttribution(visual=1),
        responses=True,
        progress=False,
    )
    best = visual_scores(activation[spans.image[0]], activation[spans.text[0]]).argmax()
    torch.testing.assert_close(
        held.rows(SITES[1], "image:attributed")[0], activation[spans.image[0]][best], atol=1e-5, rtol=1e-5
    )


def first_version(held, folder, **changes):
    """Files as the version of schema 1 wrote them: without sums."""
    keys = [(str(site), select) for site, select in held.values]
    manifest = {"schema": 1, "kind": "Activations", "keys": keys, "ids": held.ids, "groups": held.groups}
    tensors = {f"values.{i}": held.values[key].contiguous() for i, key in enumerate(held.values)}
    tensors |= {f"present.{i}": held.present[key].contiguous() for i, key in enumerate(held.values)}
    save_file(tensors, folder / "rows.safetensors")
    (folder / "rows.json").write_text(json.dumps({**manifest, "provenance": held.provenance, **changes}, indent=2))


def test_files_of_schema_1_are_loaded_and_saved_as_the_present_one(held, tmp_path):
    first_version(held, tmp_path)
    for _ in range(2):
        back = Activations.load(tmp_path, "rows")
        assert (back.ids, back.groups, back.sites, back.provenance) == (
            held.ids, held.groups, held.sites, held.provenance
        )  # fmt: skip
        for key, rows in held.values.items():
            torch.testing.assert_close(back.values[key], rows, rtol=0, atol=0, equal_nan=True)
            assert torch.equal(back.present[key], held.present[key])
        back.save(tmp_path, "rows")
    assert json.loads((tmp_path / "rows.json").read_text())["schema"] == 2


@pytest.mark.parametrize(
    "changes",
    [{"kind": "Other"}, {"ids": ["a"]}, {"keys": [["blocks.9.hook_mlp_out", "last"]] * 9}, {"keys": [["nowhere", "last"]]},
     {"keys": None}, {"schema": 0}, {"schema": 99}],
)  # fmt: skip
def test_files_of_schema_1_that_do_not_fit_are_refused(held, tmp_path, changes):
    first_version(held, tmp_path, **changes)
    with pytest.raises(ArtifactError, match=r"rows\.json"):
        Activations.load(tmp_path, "rows")


def test_files_of_schema_1_that_are_cut_off_are_refused(held, tmp_path):
    first_version(held, tmp_path)
    for name in ("rows.safetensors", "rows.json"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ArtifactError, match="rows"):
            Activations.load(tmp_path, "rows")
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "rows.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        Activations.load(tmp_path, "rows")


def test_save_and_load(held, tmp_path):
    held.save(tmp_path, "rows")
    back = Activations.load(tmp_path, "rows")
    assert (back.ids, back.groups, back.sites, back.provenance) == (
        held.ids,
        held.groups,
        held.sites,
        held.provenance,
    )
    for key, rows in held.values.items():
        torch.testing.assert_close(back.values[key], rows, atol=0, rtol=0, equal_nan=True)
        assert torch.equal(back.present[key], held.present[key])


def test_concatenate(held):
    both = Activations.concatenate([held.subset([0]), held.subset([1, 2])])
    assert (both.ids, both.groups) == (held.ids, held.groups) == (("a", "b", "c"), ("red", "blue", "red"))
    assert torch.equal(both.rows(SITES[0], "last"), held.rows(SITES[0], "last"))
    other = replace(held, values={}, present={})
    with pytest.raises(ValueError, match="same sites"):
        Activations.concatenate([held, other])


def test_refusals(lvlm, examples):
    with pytest.raises(ValueError, match="positions must include"):
        capture(lvlm, examples, [VISION[0]], positions=("last",), progress=False)
    with pytest.raises(ValueError, match="positions must name"):
        capture(lvlm, examples, SITES, positions=("middle",), progress=False)
    with pytest.raises(ValueError, match="three axes"):
        capture(lvlm, examples, ["blocks.0.attn.hook_z"], progress=False)
    with pytest.raises(ValueError, match="image"):
        capture(lvlm, examples[1:2], [VISION[0]], positions=("image",), progress=False)
    with pytest.raises(KeyError, match="not captured"):
        capture(lvlm, examples, SITES, positions=("last",), progress=False).rows(SITES[0], "text")
