"""PaliGemma, with either decoder: the prompt without a chat template, read in both directions, and causal answers."""

import pytest
import torch
from forced import forced_logits
from PIL import Image
from zoo.paligemma import make_paligemma

from care_lens.core import Example
from care_lens.lvlm import HookedLVLM

WINDOW = 6
NAMES = {"gemma": "paligemma", "gemma2": "paligemma2"}


@pytest.fixture(scope="module", params=NAMES)
def text(request):
    return request.param


@pytest.fixture(scope="module")
def paligemma(text):
    return HookedLVLM.from_hf(*make_paligemma(text))


@pytest.fixture
def rows(picture):
    return [
        Example("what is", image=picture(0, (40, 20)), more_images=(picture(1, (16, 32)),), response="sure red"),
        Example("how to make a blue", response="no no"),
        Example("red", image=picture(2), response="yes red"),
    ]


def test_the_text_tower_decides_the_family(paligemma, text):
    assert paligemma.family.name == NAMES[text]


@pytest.mark.parametrize("side", ["left", "right"])
def test_images_come_first_and_a_newline_last(paligemma, rows, side):
    inputs = paligemma.prepare(rows, responses=True, padding_side=side)
    for row, example in enumerate(rows):
        ids = inputs.input_ids[row]
        prompt = ["<image>"] * 4 * len(example.images) + ["<bos>", *example.prompt.split(), "\n"]
        real = paligemma.tokenizer.convert_ids_to_tokens(ids[~inputs.spans.padding[row]])
        assert real == [*prompt, *example.response.split(), "<eos>"]
        types = inputs.token_inputs["token_type_ids"][row]
        assert torch.equal(types.bool(), inputs.spans.response[row])
        assert inputs.position_ids[row][~inputs.spans.padding[row]].tolist() == list(range(1, len(real) + 1))
    assert inputs.image_rows == (0, 0, 2) and len(inputs.pixel_values) == 3
    assert [[grid.image for grid in grids] for grids in inputs.spans.grids] == [[0, 1], [], [0]]


def test_rectangles(paligemma, rows):
    first, second = paligemma.prepare(rows).spans.grids[0]
    assert first.rectangle(first.positions()[1]) == (20.0, 0.0, 40.0, 10.0)
    assert second.rectangle(second.positions()[2]) == (0.0, 16.0, 8.0, 32.0)
    assert second.start == first.stop


@torch.no_grad()
@pytest.mark.parametrize("token", range(4))
def test_a_painted_patch_is_where_the_grid_says(paligemma, token):
    sites = ["vision.hook_embed", "blocks.0.hook_resid_pre"]
    image = Image.new("RGB", (32, 32), (120, 120, 120))
    clean = paligemma.prepare(Example("red", image=image))
    grid = clean.spans.grids[0][0]
    changed = image.copy()
    changed.paste((255, 0, 30), tuple(int(edge) for edge in grid.rectangle(grid.positions()[token])))
    _, before = paligemma.run_with_cache(clean, sites=sites)
    _, after = paligemma.run_with_cache(paligemma.prepare(Example("red", image=changed)), sites=sites)
    embed, stream = ((after[site] - before[site])[0].norm(dim=-1) for site in sites)
    assert embed.nonzero()[:, 0].tolist() == [token]
    assert stream.argmax() == grid.positions()[token] and not stream[~clean.spans.image[0]].any()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_prompt_is_read_whole_and_the_response_is_causal(paligemma, text, rows, side):
    inputs = paligemma.prepare(rows, responses=True, padding_side=side)
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]
    _, cache = paligemma.run_with_cache(inputs, sites=names)
    n = inputs.input_ids.shape[1]
    query, key = torch.arange(n)[:, None], torch.arange(n)[None]
    windows = (WINDOW, n, WINDOW) if text == "gemma2" else (n, n, n)
    for row in range(len(rows)):
        prompt, real = inputs.spans.prompt[row], ~inputs.spans.padding[row]
        for name, window in zip(names, windows, strict=True):
            past = (query >= key) & (query - key < window)
            expected = ((past | (prompt[:, None] & prompt[None])) & real[None])[real]
            assert torch.equal(cache[name][row].amin(0)[real] > 0, expected), name


@torch.no_grad()
def test_a_response_is_read_as_it_would_be_generated(paligemma, text, rows):
    plain, _ = make_paligemma(text)
    inputs = paligemma.prepare(rows, responses=True)
    answers = [ids[mask].tolist() for ids, mask in zip(inputs.input_ids, inputs.spans.response, strict=True)]
    steps = forced_logits(plain, paligemma.prepare(rows), answers)
    torch.testing.assert_close(paligemma(inputs)[:, -4:-1], steps, rtol=1e-4, atol=1e-4)
