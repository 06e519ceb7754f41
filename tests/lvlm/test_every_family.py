"""Every family: the numbers of plain Hugging Face, and every site against plain torch hooks."""

import importlib
import pkgutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zoo
from zoo.plain import Plain

from care_lens.core import Example, ExampleError
from care_lens.core.site import BLOCK_COMPONENTS
from care_lens.lvlm import HookedLVLM

SPECIMENS = {
    specimen.name: specimen
    for module in pkgutil.iter_modules(zoo.__path__)
    for specimen in getattr(importlib.import_module(f"zoo.{module.name}"), "SPECIMENS", [])
}


def bump(activation):
    generator = torch.Generator().manual_seed(activation.numel())
    return 0.7 * activation + 0.5 * torch.randn(activation.shape, generator=generator).to(activation)


@pytest.fixture(scope="module", params=SPECIMENS)
def specimen(request):
    return SPECIMENS[request.param]


@pytest.fixture(scope="module")
def twins(specimen):
    """A HookedLVLM and a plain model of the same weights."""
    model, processor = specimen.make()
    plain, _ = specimen.make()
    plain.set_attn_implementation("eager")
    return HookedLVLM.from_hf(model, processor), plain


@pytest.fixture(scope="module")
def edited(twins, rows):
    """Logits under `bump` at a site, run once for all tests of a specimen."""
    held = {}

    @torch.no_grad()
    def logits(site):
        if site not in held:
            lvlm, _ = twins
            held[site] = lvlm.run_with_hooks(lvlm.prepare(rows), fwd_hooks=[(site, lambda a, hook: bump(a))])
        return held[site]

    return logits


@pytest.fixture(scope="module")
def rows(picture):
    return [
        Example("what is in the picture", image=picture(0, (32, 32)), response="sure red"),
        Example("how to make a blue", response="sorry i cannot help"),
        Example("red", image=picture(1, (56, 28)), response="no"),
    ]


def padding_free(inputs):
    return inputs.attention_mask.bool()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("responses", [False, True])
def test_logits_equal_plain_hugging_face(twins, rows, side, responses):
    lvlm, plain = twins
    inputs = lvlm.prepare(rows, padding_side=side, responses=responses)
    assert torch.equal(lvlm(inputs), plain(**inputs.model_kwargs()).logits)


@torch.no_grad()
def test_one_row_equals_what_the_processor_alone_would_give(twins, rows):
    lvlm, plain = twins
    for example in rows[:2]:
        inputs = lvlm.prepare(example)
        text = lvlm.family.prompt(lvlm.processor, example.prompt, len(example.images)) if lvlm.family.prompt else None
        if text is None:
            content = [{"type": "image"} for _ in example.images] + [{"type": "text", "text": example.prompt}]
            turns = [{"role": "user", "content": content}]
            text = lvlm.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        kwargs = {"images": list(example.images)} if example.images else {}
        bos = lvlm.tokenizer.bos_token
        special = bos is None or not text.startswith(bos)
        encode = lvlm.processor
        if lvlm.family.needs_images and not example.images:
            encode, kwargs = lvlm.tokenizer, {"return_token_type_ids": True}
        raw = encode(text=[text], add_special_tokens=special, return_tensors="pt", **kwargs)
        assert torch.equal(raw["input_ids"], inputs.input_ids)
        torch.testing.assert_close(plain(**raw).logits, lvlm(inputs), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_conversations_are_what_the_chat_template_makes_of_them(twins, picture):
    lvlm, plain = twins
    first, second = picture(2, (32, 32)), picture(3, (28, 56))
    chat = [
        {"role": "user", "content": [{"type": "image", "image": first}, {"type": "text", "text": "what is"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "red blue"}]},
        {"role": "user", "content": [{"type": "image", "image": second}, {"type": "text", "text": "how to make a"}]},
    ]
    for several in (True, False):
        messages = chat if several else [*chat[:2], {"role": "user", "content": [{"type": "text", "text": "how to"}]}]
        example = Example.from_messages([*messages, {"role": "assistant", "content": "sure i"}])
        if lvlm.family.prompt is not None:
            with pytest.raises(ExampleError, match="no chat template"):
                lvlm.prepare(example)
            example = Example("how to make a", image=first, prefill="sure i")
            text = lvlm.family.prompt(lvlm.processor, example.prompt, 1)
        else:
            text = lvlm.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        inputs = lvlm.prepare(example)
        bos = lvlm.tokenizer.bos_token
        special = bos is None or not text.startswith(bos)
        images = [list(example.images)] if lvlm.family.nested_images else list(example.images)
        raw = lvlm.processor(text=[text], images=images, add_special_tokens=special, return_tensors="pt")
        begun = lvlm.tokenizer("sure i", add_special_tokens=False)["input_ids"]
        assert inputs.input_ids[0].tolist() == raw["input_ids"][0].tolist() + begun
        spans = inputs.spans
        assert spans.prefill[0].nonzero()[:, 0].tolist() == [
            *range(spans.last_index()[0] + 1, inputs.input_ids.shape[1])
        ]
        assert torch.equal(spans.prefill, spans.response) and bool(spans.context_end[0, -1])
        made = lvlm.generate(inputs, max_new_tokens=3)
        pad = lvlm.tokenizer.pad_token_id
        expected = plain.generate(**inputs.generate_kwargs(), max_new_tokens=3, do_sample=False, pad_token_id=pad)
        assert torch.equal(made.sequences, expected)
        whole = [*begun, *made.new_tokens[0].tolist()]
        assert made.answers == [lvlm.tokenizer.decode(whole, skip_special_tokens=True)]


@torch.no_grad()
def test_a_row_is_the_same_alone_and_in_a_batch(twins, rows):
    lvlm, _ = twins
    for side in ("left", "right"):
        inputs = lvlm.prepare(rows, padding_side=side)
        batch = lvlm(inputs)
        for row, example in enumerate(rows):
            alone = lvlm(lvlm.prepare(example))[0]
            torch.testing.assert_close(batch[row][~inputs.spans.padding[row]], alone, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_rows_of_a_batch_are_a_batch(twins, rows):
    lvlm, _ = twins
    inputs = lvlm.prepare(rows)
    logits = lvlm(inputs)
    for index in ([2, 0], [1], [0, 0, 2]):
        part = inputs.rows(index)
        keep = ~part.spans.padding
        torch.testing.assert_close(lvlm(part)[keep], logits[index][keep], rtol=1e-3, atol=1e-3)
    entries = len(inputs.image_rows)
    if entries:
        _, cache = lvlm.run_with_cache(inputs, sites=["vision.blocks.0.hook_resid_pre"])
        assert cache["vision.blocks.0.hook_resid_pre"].shape[0] == entries


@torch.no_grad()
def test_rows_of_a_cache_are_those_of_the_rows_alone(twins, rows):
    lvlm, _ = twins
    inputs = lvlm.prepare(rows)
    _, cache = lvlm.run_with_cache(inputs, sites=None)
    for wanted in (0, 1, -1, [2, 1], [1, 1], (1, 3), [2, 0, 2]):
        index = torch.arange(3)[slice(*wanted) if isinstance(wanted, tuple) else wanted].reshape(-1).tolist()
        alone = lvlm.run_with_cache(inputs.rows(index), sites=None)[1]
        if isinstance(wanted, int):
            alone.remove_batch_dim()
        part = cache.apply_slice_to_batch_dim(wanted)
        assert part.has_batch_dim == alone.has_batch_dim and {*part.keys()} == {*alone.keys()}
        for name, value in alone.items():
            assert part[name].ndim == value.ndim
            if name.startswith(("vision", "projector")):  # towers of several sizes are filled up to the largest picture
                there = part[name][tuple(slice(n) for n in value.shape)]
                torch.testing.assert_close(there, value, rtol=1e-3, atol=1e-3, msg=f"{name} of {wanted}")
            elif "pattern" not in name:
                real = ~inputs.spans.padding[index[0] if isinstance(wanted, int) else index]
                torch.testing.assert_close(
                    part[name][real], value[real], rtol=1e-3, atol=1e-3, msg=f"{name} of {wanted}"
                )
        again = part.apply_slice_to_batch_dim([0]) if part.has_batch_dim else None
        if again is not None:
            first = cache.apply_slice_to_batch_dim([index[0]])
            assert {*again.keys()} == {*first.keys()} and all(torch.equal(again[k], first[k]) for k in first)
    for unknown in (3, [0, 5], [], -4):
        with pytest.raises(ValueError, match="batch_slice must"):
            cache.apply_slice_to_batch_dim(unknown)


@pytest.mark.parametrize("rows_of", [[0], [1], [0, 1, 2]], ids=["image", "text", "mixed"])
def test_generation_equals_plain_hugging_face(twins, rows, rows_of):
    lvlm, plain = twins
    inputs = lvlm.prepare([rows[row] for row in rows_of])
    ours = lvlm.generate(inputs, max_new_tokens=6)
    pad = lvlm.tokenizer.pad_token_id
    theirs = plain.generate(**inputs.generate_kwargs(), max_new_tokens=6, do_sample=False, pad_token_id=pad)
    assert torch.equal(ours.sequences, theirs)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_numbers_of_plain_hugging_face(twins, rows, dtype):
    lvlm, plain = twins
    inputs = lvlm.prepare(rows)
    real = ~inputs.spans.padding
    with torch.autocast("cpu", dtype=dtype):
        ours = lvlm(inputs)
        # Readers inside a norm make TransformerLens take its other way through it.
        inside = (".hook_scale", ".hook_normalized")
        norms = [name for name in lvlm.bridge.hook_dict if name.startswith("blocks.") and name.endswith(inside)]
        read = lvlm.run_with_hooks(inputs, fwd_hooks=[(name, lambda x, hook: None) for name in norms])
        theirs = plain(**inputs.model_kwargs()).logits
        answer = lvlm.generate(inputs, max_new_tokens=4).sequences
        pad = lvlm.tokenizer.pad_token_id
        expected = plain.generate(**inputs.generate_kwargs(), max_new_tokens=4, do_sample=False, pad_token_id=pad)
        kept = lvlm.run_with_cache(inputs, sites=lvlm.sites(tower="language"))[1]
    assert theirs.dtype == ours.dtype == dtype
    assert bool(theirs[real].isfinite().all())
    assert torch.equal(ours[real], theirs[real]) and torch.equal(read[real], theirs[real])
    assert torch.equal(answer, expected)
    for name, value in kept.items():
        rows_of = value if name.endswith("pattern") else value[real]
        assert bool(rows_of.isfinite().all()), name


@torch.no_grad()
def test_every_site_acts_as_its_name_says(specimen, twins, rows, edited):
    lvlm, plain = twins
    inputs = lvlm.prepare(rows)
    clean, cache = lvlm.run_with_cache(inputs, sites=None)
    reference, real = Plain(specimen, plain, inputs), padding_free(inputs)
    torch.testing.assert_close(reference.logits(), clean)
    assert {site.layer for site in lvlm.sites(tower="vision")} - {None} == set(range(specimen.depth))
    for site in lvlm.sites():
        expected = reference.logits(site, bump)
        seen, held = reference.seen, cache[str(site)]
        assert seen is not None, f"{site}: the reference never came there"
        if site.tower == "language":
            shown = (
                (seen.transpose(1, 2)[real], held.transpose(1, 2)[real])
                if site.component == "attn.hook_pattern"
                else (seen[real].flatten(1), held[real].flatten(1))
            )
        else:
            shown = (seen, held)
        torch.testing.assert_close(*shown[::-1], rtol=1e-3, atol=1e-4, msg=lambda m, s=site: f"{s} reads wrong: {m}")
        if not lvlm.site_info(site).editable:
            continue
        found = edited(site)
        torch.testing.assert_close(
            found[real], expected[real], rtol=1e-3, atol=1e-3, msg=lambda m, s=site: f"{s} edits wrong: {m}"
        )
        assert (found - clean)[real].abs().max() > 1e-3, f"{site}: the edit does nothing"


@torch.no_grad()
def test_an_edit_in_place_that_is_returned_acts_as_a_new_tensor_does(twins, rows, edited):
    lvlm, _ = twins
    inputs = lvlm.prepare(rows)

    def in_place(activation, hook):
        activation[...] = bump(activation)
        return activation

    # Of every component one block, not always the same: how a hook's tensor is passed on does not depend on the layer.
    for site in {(site.tower, site.component): site for site in lvlm.sites()}.values():
        # What enters a vision block is the very tensor that may be recorded as the output of the block before.
        recorded = site.tower == "vision" and site.component == "hook_resid_pre"
        if lvlm.site_info(site).editable and not recorded:
            assert torch.equal(lvlm.run_with_hooks(inputs, fwd_hooks=[(site, in_place)]), edited(site)), site


@torch.no_grad()
def test_pixels_of_other_images_are_refused(twins, rows):
    lvlm, _ = twins
    inputs = lvlm.prepare(rows)
    twice = torch.cat([inputs.pixel_values, inputs.pixel_values])
    with pytest.raises(ValueError, match="pixel_values must be of the batch's images"):
        lvlm(replace(inputs, pixel_values=twice))


@torch.no_grad()
def test_writing_back_what_was_read_changes_no_bit(twins, rows):
    lvlm, _ = twins
    inputs = lvlm.prepare(rows)
    clean, cache = lvlm.run_with_cache(inputs, sites=None)
    met = {}

    def put_back(site):
        def hook(activation, hook):
            met[site] = torch.equal(activation, cache[str(site)])
            return cache[str(site)]

        return site, hook

    sites = [site for site in lvlm.sites() if lvlm.site_info(site).editable]
    # All in one pass: a bit that writing at one site changed is met at the next site on its way, or in the logits.
    back = lvlm.run_with_hooks(inputs, fwd_hooks=[put_back(site) for site in sites])
    assert [site for site in sites if not met[site]] == [] and torch.equal(back, clean)


@torch.no_grad()
def test_site_info_tells_the_shape_and_the_bridge_knows_the_names(twins, rows):
    lvlm, _ = twins
    inputs = lvlm.prepare(rows)
    _, cache = lvlm.run_with_cache(inputs, sites=None)
    names = lvlm.bridge.hook_dict
    for site in lvlm.sites():
        info, shape = lvlm.site_info(site), cache[str(site)].shape
        assert len(info.axes) == len(shape) and str(site) in names, site
        assert info.width in (None, shape[-1]), site


@torch.no_grad()
def test_patch_grids_hold_the_image_tokens(twins, rows):
    lvlm, _ = twins
    inputs = lvlm.prepare(rows)
    for row, grids in enumerate(inputs.spans.grids):
        tokens = set(inputs.spans.image[row].nonzero()[:, 0].tolist())
        positions = [p for grid in grids for p in grid.positions()]
        assert len(positions) == len(set(positions)) and set(positions) <= tokens
        assert bool(tokens) == bool(rows[row].images)
        for grid in grids:
            width, height = rows[row].images[grid.image].size
            x0, y0, *_ = grid.rectangle(grid.positions()[0])
            *_, x1, y1 = grid.rectangle(grid.positions()[-1])
            assert x0 < x1 and y0 < y1 and x1 > 0 and y1 > 0 and x0 < width and y0 < height


@torch.no_grad()
def test_pictures_without_their_placeholders_are_refused(twins, rows, picture):
    lvlm, _ = twins
    text = lvlm.family.image_text(lvlm.processor)
    with pytest.raises(ValueError, match="placeholder"):
        lvlm.prepare(Example(f"what is in {text} the picture"))
    with pytest.raises(ValueError, match="placeholder"):
        lvlm.prepare(replace(rows[0], prompt=f"what is in {text} the picture"))


@torch.no_grad()
def test_bfloat16_equals_hugging_face_and_takes_float32_hooks(specimen, rows):
    model, processor = specimen.make()
    plain, _ = specimen.make()
    plain.set_attn_implementation("eager")
    lvlm, plain = HookedLVLM.from_hf(model.to(torch.bfloat16), processor), plain.to(torch.bfloat16)
    inputs = lvlm.prepare(rows)
    clean = lvlm(inputs)
    assert torch.equal(clean, plain(**inputs.model_kwargs()).logits)
    for site in lvlm.sites():
        if lvlm.site_info(site).editable and site.layer in (None, 1):
            same = lvlm.run_with_hooks(inputs, fwd_hooks=[(site, lambda a, hook: a.float())])
            assert torch.equal(same, clean), site


TABLE = Path(__file__).parents[2] / "docs" / "reference" / "site_table.md"


def mark(lvlm, tower, component):
    """What a component of a tower is: editable, read, or absent; "some" if only some layers have it."""
    sites = lvlm.sites(tower=tower, component=component)
    if not sites:
        return "absent"
    if not all(lvlm.site_info(site).editable for site in sites):
        return "read"
    layers = lvlm.n_layers(tower) if sites[0].layer is not None else 1
    return "editable" if len(sites) == layers else "some layers"


def test_the_table_of_sites_in_the_documentation_is_what_was_tested():
    rows = []
    for name, specimen in sorted(SPECIMENS.items()):
        with HookedLVLM.from_hf(*specimen.make()) as lvlm:
            cells = [mark(lvlm, "language", c) for c in BLOCK_COMPONENTS]
            cells += [mark(lvlm, "vision", c) for c in BLOCK_COMPONENTS]
            cells += [mark(lvlm, "vision", "hook_embed"), mark(lvlm, "projector", "hook_in")]
            cells += [mark(lvlm, "projector", "hook_out")]
            rows.append((name, cells))
    columns = [*BLOCK_COMPONENTS, *(f"vision {c}" for c in BLOCK_COMPONENTS)]
    columns += ["vision.hook_embed", "projector.hook_in", "projector.hook_out"]
    lines = ["| site | " + " | ".join(name for name, _ in rows) + " |", "| --- " * (len(rows) + 1) + "|"]
    lines += [f"| `{c}` | " + " | ".join(cells[i] for _, cells in rows) + " |" for i, c in enumerate(columns)]
    text = "\n".join(lines) + "\n"
    if not TABLE.exists() or TABLE.read_text() != text:
        TABLE.write_text(text)
        pytest.fail(
            f"{TABLE.name} was out of date and has been written anew from the models at hand; look at it, commit it"
        )


def test_gradients_reach_every_site_from_the_logits(twins, rows):
    lvlm, _ = twins
    inputs, kept = lvlm.prepare(rows), {}

    def keeper(site):
        def keep(activation, hook):
            activation.requires_grad_() if activation.is_leaf else activation.retain_grad()
            kept[site] = activation
            return activation

        return keep

    sites = [site for site in lvlm.sites() if site.layer in (None, 1) and lvlm.site_info(site).editable]
    with torch.enable_grad():
        logits = lvlm.run_with_hooks(inputs, fwd_hooks=[(site, keeper(site)) for site in sites])
        logits[inputs.attention_mask.bool()].square().sum().backward()
    blind = [str(s) for s in sites if kept[s].grad is None or not kept[s].grad.abs().sum() > 0]
    assert not blind
