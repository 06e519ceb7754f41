"""Batched token attribution against one sample at a time, and its way back to patches, strings and gradients."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from care_lens.capture import (
    TokenAttribution,
    attribution,
    score_tokens,
    select_tokens,
    text_scores,
    token_gradients,
    visual_scores,
)
from care_lens.core import PatchGrid, Site, TokenSpans

KERNELS = ["gaussian", "laplace", "cosine", "linear"]


def batch(layers=2, rows=3, pos=9, d=4, seed=0):
    """Tokens with images of different lengths (none in the last row) and with padding, which holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(layers, rows, pos, d, generator=generator, dtype=torch.float64)
    image = torch.zeros(rows, pos, dtype=torch.bool)
    padding = torch.zeros(rows, pos, dtype=torch.bool)
    for row in range(rows - 1):
        image[row, 2 : 4 + row] = True
        padding[row, :row] = True
    tokens[:, padding] = torch.nan
    return tokens, image, ~image & ~padding


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("pairs", [1, 2**24])
def test_a_batch_is_its_samples(kernel, pairs, monkeypatch):
    monkeypatch.setattr(attribution, "_PAIRS", pairs)
    tokens, image, text = batch()
    found = TokenAttribution(kernel=kernel, distance_weight=0.4).scores(tokens, image=image, text=text)
    for layer in range(2):
        for row in range(3):
            words = tokens[layer, row, text[row]]
            torch.testing.assert_close(
                found[layer, row, text[row]], text_scores(words, distance_weight=0.4, kernel=kernel)
            )
            if image[row].any():
                expected = visual_scores(tokens[layer, row, image[row]], words, kernel=kernel)
                torch.testing.assert_close(found[layer, row, image[row]], expected)
            assert found[layer, row, ~(image[row] | text[row])].isnan().all()


def test_the_linear_kernels_diagonal_is_the_squared_distance_from_the_mean():
    text = batch()[0][0, 2]
    squared = (text - text.mean(0)).square().sum(1)
    expected = (squared - squared.min()) / (squared.max() - squared.min())
    torch.testing.assert_close(text_scores(text, distance_weight=0.0, kernel="linear"), expected)


def test_the_laplace_and_cosine_kernels_are_their_formulas():
    rng = np.random.default_rng(0)
    visual, text = rng.normal(size=(6, 3)), rng.normal(size=(5, 3))
    lengths = np.linalg.norm(visual[:, None] - text[None], axis=-1)
    about = [part - text.mean(0) for part in (visual, text)]
    cosine = about[0] @ about[1].T / np.outer(*[np.linalg.norm(part, axis=1) for part in about])
    for kernel, values in (("laplace", np.exp(-lengths / np.median(lengths))), ("cosine", cosine)):
        raw = ((values - values.mean(1, keepdims=True)) ** 2).sum(1)
        expected = (raw - raw.min()) / (raw.max() - raw.min())
        found = visual_scores(torch.from_numpy(visual), torch.from_numpy(text), kernel=kernel)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 0.3, 0.5, 1.0]), st.sampled_from([1, 3, 0.25, 1.0]))
@settings(max_examples=25, deadline=None)
def test_what_is_kept_is_what_select_tokens_keeps(seed, visual, text):
    tokens, image, words = batch(seed=seed)
    how = TokenAttribution(visual=visual, text=text)
    scores = how.scores(tokens, image=image, text=words)
    kept = how.keep(tokens, image=image, text=words)
    for mask, amount in ((image, visual), (words, text)):
        option = {"k": amount} if isinstance(amount, int) else {"ratio": amount}
        for layer in range(2):
            for row in range(3):
                if mask[row].any():
                    expected = select_tokens(scores[layer, row, mask[row]], **option)
                    assert torch.equal(kept[layer, row, mask[row]], expected)
    assert not kept[:, ~(image | words)].any()


def test_all_and_last_keep_what_they_say():
    tokens, image, text = batch()
    kept = TokenAttribution(method="all").keep(tokens, image=image, text=text)
    assert torch.equal(kept, (image | text).expand_as(kept))
    kept = TokenAttribution(method="last").keep(tokens, image=image, text=text)
    assert [row.nonzero()[:, 0].tolist() for row in kept[0]] == [[3, 8], [4, 8], [8]]
    assert TokenAttribution(method="last").keep_text(tokens[0, 2]).nonzero()[:, 0].tolist() == [8]


def test_gradient_scores_are_gradient_times_activation():
    tokens, image, text = batch()
    slopes = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    how = TokenAttribution(method="gradient", text=2)
    found = how.scores(tokens, image=image, text=text, gradient=slopes)
    raw = (tokens * slopes).sum(-1).abs()[1, 0, text[0]]
    torch.testing.assert_close(found[1, 0, text[0]], (raw - raw.min()) / (raw.max() - raw.min()))
    assert (how.keep(tokens, image=image, text=text, gradient=slopes) & text).sum(-1).eq(2).all()
    with pytest.raises(ValueError, match="token_gradients"):
        how.keep_text(tokens[0, 2])


def test_an_image_without_text_is_named():
    tokens, image, text = batch()
    text[1] = False
    with pytest.raises(ValueError, match=r"none in row 1 \(2 such rows\)"):
        TokenAttribution().scores(tokens, image=image, text=text)


@pytest.mark.parametrize("option", [{"method": "guess"}, {"kernel": "magic"}, {"distance_weight": 2.0}])
def test_unknown_options_are_named(option):
    from subspace_rows import unchecked

    with unchecked(), pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
        TokenAttribution(**option)


def scored(**options):
    tokens, image, text = batch()
    grids = [[PatchGrid(2, 1, 2, 20, 10)], [PatchGrid(2, 1, 3, 30, 10, image=0)], []]
    nothing = torch.zeros_like(image)
    spans = TokenSpans.from_masks(image=image, padding=~(image | text), response=nothing, grids=grids)
    strings = [[f"{row}:{position}" for position in range(9)] for row in range(3)]
    sites = {f"blocks.{layer}.hook_mlp_out": tokens[layer] for layer in range(2)}
    return score_tokens(sites, spans, strings=strings, attribution=TokenAttribution(**options)), tokens


def test_scores_find_their_patches_and_strings():
    scores, _ = scored()
    frame = scores.to_dataframe()
    patch = frame[(frame["site"] == "blocks.1.hook_mlp_out") & (frame["row"] == 1) & (frame["position"] == 3)].iloc[0]
    assert (patch["x0"], patch["y0"], patch["x1"], patch["y1"], patch["modality"]) == (10, 0, 20, 10, "visual")
    assert patch["token"] == "1:3"
    assert patch["score"] == float(scores.patch_map("blocks.1.hook_mlp_out", 1)[0, 1])
    words = frame[frame["modality"] == "textual"]
    assert words["x0"].isna().all() and (words["image"] == -1).all()
    assert frame["kept"].sum() == int(scores.kept.sum())
    assert len(frame) == 2 * (9 + 8 + 9)
    with pytest.raises(KeyError, match="that was scored"):
        scores.at("blocks.7.hook_mlp_out")
    with pytest.raises(ValueError, match="number of patch grids of row 2"):
        scores.patch_map(Site("language", 0, "hook_mlp_out"), 2)


def test_agreement_is_jaccard_and_spearman():
    paper, _ = scored()
    everything, _ = scored(method="all")
    same = paper.agreement(paper)
    assert (same["jaccard"] == 1).all()
    assert same["spearman"].dropna().to_numpy() == pytest.approx(1)
    against = paper.agreement(everything)
    kept = paper.kept[0, 2].sum() / paper.spans.text[2].sum()
    row = against[(against["row"] == 2) & (against["site"] == "blocks.0.hook_mlp_out")].iloc[0]
    assert row["jaccard"] == pytest.approx(float(kept)) == pytest.approx(row["chance"])
    assert np.isnan(row["spearman"])


def test_token_gradients_are_finite_differences(lvlm, examples):
    inputs = lvlm.prepare(examples)
    site = "blocks.1.hook_resid_post"

    def outcome(logits, inputs):
        return logits[inputs.spans.last.to(logits.device)].double().square().mean(-1)

    held, slopes = token_gradients(lvlm, inputs, [site, "blocks.0.hook_mlp_out"], outcome)
    at = Site.parse(site)
    direction = torch.randn(held[at].shape, generator=torch.Generator().manual_seed(0))

    def value(step):
        with torch.no_grad():
            return outcome(
                lvlm.run_with_hooks(inputs, fwd_hooks=[(site, lambda h, hook: h + step * direction)]), inputs
            )

    slope = (value(1e-2) - value(-1e-2)) / 2e-2
    expected = (slopes[at] * direction).sum((1, 2)).double()
    torch.testing.assert_close(slope.double(), expected, rtol=2e-2, atol=1e-4)
    assert held[at].shape == slopes[at].shape
    assert all(parameter.grad is None for parameter in lvlm.hf_model.parameters())
    with pytest.raises(ValueError, match="language tower"):
        token_gradients(lvlm, inputs, ["projector.hook_out"], outcome)
