"""Regions: areas against pixels counted, effects against exchanging those tokens by hand in plain Hugging Face models."""

import importlib
import pkgutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from zoo.plain import Plain

from care_lens.core import Example, PairedExamples, Site
from care_lens.core.spans import PatchGrid
from care_lens.lvlm import HookedLVLM
from care_lens.mediation import MediationResult, PatchMapResult, Region, attribute, knockout, mediate, patch_map

SPECIMENS = {
    specimen.name: specimen
    for module in pkgutil.iter_modules(zoo.__path__)
    for specimen in getattr(importlib.import_module(f"zoo.{module.name}"), "SPECIMENS", [])
}
SIZE = (48, 32)
GRID = PatchGrid(start=3, rows=4, cols=6, width=48, height=32)


def last_logit(logits, inputs):
    return logits[:, -1, 5]


def overlapping(grids, box):
    """Positions whose rectangles overlap a box, worked out edge by edge."""
    x0, y0, x1, y1 = box
    found = []
    for grid in grids:
        for row in range(grid.rows):
            for col in range(grid.cols):
                left, right = (grid.left + grid.width * (col + i) / grid.cols for i in (0, 1))
                upper, lower = (grid.top + grid.height * (row + i) / grid.rows for i in (0, 1))
                if min(right, x1) - max(left, x0) > 1e-9 and min(lower, y1) - max(upper, y0) > 1e-9:
                    found.append(grid.start + row * (grid.stride or grid.cols) + col)
    return sorted(found)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_shares_are_the_pixels_counted(seed):
    """A mask, a box and a polygon of whole pixels against counting; a polygon of any corners against a fine raster."""
    generator = np.random.default_rng(seed)
    height, width = generator.integers(3, 12, size=2)
    mask = generator.random((height, width)) < 0.5
    mask[0, 0] = True
    x = np.sort(generator.choice(width + 1, size=2, replace=False))
    y = np.sort(generator.choice(height + 1, size=2, replace=False))
    rectangle = (float(x[0]), float(y[0]), float(x[1]), float(y[1]))
    share = mask[y[0] : y[1], x[0] : x[1]].mean()
    assert Region.mask(mask).shares([rectangle])[0] == pytest.approx(share)
    a, b = (
        np.sort(generator.choice(width + 1, size=2, replace=False)),
        np.sort(generator.choice(height + 1, size=2, replace=False)),
    )
    filled = np.zeros_like(mask)
    filled[b[0] : b[1], a[0] : a[1]] = True
    box = Region.box(int(a[0]), int(b[0]), int(a[1]), int(b[1]))
    assert box.shares([rectangle])[0] == pytest.approx(filled[y[0] : y[1], x[0] : x[1]].mean())
    corners = generator.random((3, 2)) * [width, height]
    fine = (np.arange(300) + 0.5) / 300
    px, py = np.meshgrid(x[0] + fine * (x[1] - x[0]), y[0] + fine * (y[1] - y[0]))
    signs = []
    for i in range(3):
        (ax, ay), (bx, by) = corners[i - 1], corners[i]
        signs.append((bx - ax) * (py - ay) - (by - ay) * (px - ax) > 0)
    inside = np.logical_and.reduce(signs) | ~np.logical_or.reduce(signs)
    assert Region.polygon(corners.tolist()).shares([rectangle])[0] == pytest.approx(inside.mean(), abs=0.01)


def test_concave_polygons_covers_and_complements():
    ell = Region.polygon([(0, 0), (48, 0), (48, 8), (8, 8), (8, 32), (0, 32)])
    size = (48, 32)
    mask = np.zeros((32, 48))
    mask[:8], mask[:, :8] = 1, 1
    assert ell.tokens([GRID], size=size) == Region.mask(mask).tokens([GRID], size=size) == [3, 4, 5, 6, 7, 8, 9, 15, 21]
    assert sorted(ell.tokens([GRID], size=size) + ell.outside().tokens([GRID], size=size)) == GRID.positions()
    assert ell.outside().outside().tokens([GRID], size=size) == ell.tokens([GRID], size=size)
    assert Region.box(0, 0, 12, 8).tokens([GRID], size=size) == [3, 4]
    assert Region.box(0, 0, 12, 8, cover=0.5).tokens([GRID], size=size) == [3, 4]
    assert Region.box(0, 0, 12, 8, cover=0.51).tokens([GRID], size=size) == [3]
    assert Region.box(0, 0, 12, 8, image=1).tokens([GRID], size=size) == []


def pairs_of(picture, names=("what is red", "what is blue")):
    return PairedExamples.from_pairs(
        [(Example(names[0], image=picture(0, SIZE)), Example(names[0], image=picture(1, SIZE)))]
    )


@pytest.mark.parametrize("name", ["llava-clip", "llava-next", "idefics3", "qwen2_5_vl", "gemma3", "internvl"])
def test_effects_equal_exchanging_those_tokens_by_hand(name, picture):
    """Language tower: any grid, tiles, newlines, merged patches. Plain Hugging Face, plain torch hooks."""
    specimen, box = SPECIMENS[name], (10, 5, 30, 15)
    pairs = pairs_of(picture)
    plain, _ = specimen.make()
    plain.set_attn_implementation("eager")
    with HookedLVLM.from_hf(*specimen.make()) as lvlm:
        site, region = Site("language", 1, "hook_resid_pre"), Region.box(*box, name="sign")
        inputs = [lvlm.prepare(side[0]) for side in (pairs.safe, pairs.unsafe)]
        at = overlapping(inputs[0].spans.grids[0], box)
        positions = (region, region.outside())
        found = mediate(lvlm, pairs, outcome=last_logit, sites=[site], positions=positions, n_boot=2, progress=False)
        mapped = patch_map(lvlm, pairs, outcome=last_logit, site=site, region=region, n_boot=2, progress=False)
    assert 0 < len(at) < int(inputs[0].spans.image.sum())
    on_grid = sorted(p for grid in inputs[0].spans.grids[0] for p in grid.positions())
    runs = [Plain(specimen, plain, one) for one in inputs]
    held = []
    for run in runs:
        run.logits(site, lambda value: held.append(value.clone()) or value)
    for label, chosen in (("sign", at), ("not sign", [p for p in on_grid if p not in at])):
        for row, (own, other) in enumerate(((0, 1), (1, 0))):

            def exchange(value, chosen=chosen, other=other):
                out = value.clone()
                out[:, chosen] = held[other][:, chosen]
                return out

            by_hand = float(runs[own].logits(site, exchange)[0, -1, 5])
            details = found.details[found.details.position == label].iloc[0]
            assert details[("safe_patched", "unsafe_patched")[row]] == pytest.approx(by_hand, abs=2e-5)
    assert abs(details["safe_patched"] - details["safe"]) > 1e-4
    # The map of the region's patches: each of them, and no other.
    order = [p for grid in inputs[0].spans.grids[0] for p in grid.positions()]
    assert [order[patch] for patch in mapped.frame.patch] == [p for p in order if p in at]
    first = order[mapped.frame.patch.iloc[0]]

    def one_patch(value):
        out = value.clone()
        out[:, first] = held[1][:, first]
        return out

    by_hand = float(runs[0].logits(site, one_patch)[0, -1, 5]) - float(runs[0].logits()[0, -1, 5])
    assert mapped.frame["value"].iloc[0] == pytest.approx(by_hand, abs=2e-5)
    assert [grid.shape for grid in mapped.grids] == [(g.rows, g.cols) for g in inputs[0].spans.grids[0]]
    assert mapped.plot() is not None


@pytest.mark.parametrize(("name", "finer"), [("llava-siglip", 1), ("qwen2_5_vl", 2), ("gemma3", 2)])
def test_patches_of_the_vision_tower_by_hand(name, finer, picture):
    specimen, box = SPECIMENS[name], (0, 0, 23, 15)
    pairs = pairs_of(picture)
    plain, _ = specimen.make()
    plain.set_attn_implementation("eager")
    with HookedLVLM.from_hf(*specimen.make()) as lvlm:
        site, region = Site("vision", 1, "hook_mlp_out"), Region.box(*box, name="sign")
        inputs = [lvlm.prepare(side[0]) for side in (pairs.safe, pairs.unsafe)]
        found = mediate(lvlm, pairs, outcome=last_logit, sites=[site], positions=(region,), n_boot=2, progress=False)
    assert found.frame.position.unique().tolist() == ["sign"]
    grid = inputs[0].spans.grids[0][0]
    fine = replace(grid, start=0, rows=grid.rows * finer, cols=grid.cols * finer, stride=None)
    raster = overlapping([fine], box)
    assert 0 < len(raster) < fine.rows * fine.cols
    runs, held = [Plain(specimen, plain, one) for one in inputs], []
    for run in runs:
        run.logits(site, lambda value: held.append(value.clone()) or value)

    def exchange(value):
        out = value.clone()
        out[:, raster] = held[1][:, raster]  # the specimen gives patches in raster order
        return out

    by_hand = float(runs[0].logits(site, exchange)[0, -1, 5])
    details = found.details.iloc[0]
    assert details["safe_patched"] == pytest.approx(by_hand, abs=2e-5)
    assert abs(details["safe_patched"] - details["safe"]) > 1e-4


def test_attributions_of_a_region_and_the_rest_add_up(model, pictured, margin, tmp_path):
    region = Region.box(0, 0, 8, 16, name="left")
    sites = ["blocks.1.attn.hook_z", "vision.blocks.0.hook_attn_out", "projector.hook_out"]
    options = {"outcome": margin, "sites": sites, "patches": (), "points": 2, "n_boot": 2, "progress": False}
    found = attribute(model, pictured, positions=("image", region, region.outside()), **options).frame
    for _, part in found.groupby(["mediator"]):
        value = part.set_index("position")["value"]
        whole = value["image"] if "image" in value else value["all"]
        classes = 0.0
        if part.tower.iloc[0] == "vision":  # the class token is no patch of the picture
            classes = whole - value["left"] - value["not left"]
            patches = attribute(
                model, pictured, positions=("all",), **{**options, "sites": (), "patches": [part.mediator.iloc[0]]}
            )
            assert value["left"] == pytest.approx(
                patches.frame[patches.frame.patch.isin([0, 2])]["value"].sum(), abs=1e-6
            )
        assert value["left"] + value["not left"] + classes == pytest.approx(whole, abs=1e-6)


def test_knockout_of_a_region(model, pictured, margin):
    options = {"target": "last", "outcome": margin, "layers": [1], "modes": ("zero",), "n_boot": 2, "progress": False}
    whole = knockout(model, pictured, source="image", **options)
    box = knockout(model, pictured, source=Region.box(0, 0, 16, 16), **options)
    np.testing.assert_allclose(box.details["value"], whole.details["value"], atol=1e-6)
    left = Region.box(0, 0, 8, 16, name="left")
    mine = knockout(model, pictured, source=Region.each([left, left], name="left"), **options)
    assert mine.frame.position.iloc[0] == "left->last" and mine.settings["regions"]["left"]["kind"] == "each"
    inputs = model.prepare(pictured.safe[0])
    tokens = [g.positions()[i] for g in inputs.spans.grids[0] for i in (0, 2)]
    last = inputs.spans.last_index()[0]

    def cut(pattern, hook):
        out = pattern.clone()
        out[:, :, last, tokens] = 0
        return out

    with torch.no_grad():
        by_hand = margin(model.run_with_hooks(inputs, fwd_hooks=[("blocks.1.attn.hook_pattern", cut)]), inputs)
    assert mine.details["value"].iloc[0] == pytest.approx(float(by_hand), abs=1e-5)


def test_each_pair_its_own_and_what_is_saved(model, pictured, margin, tmp_path):
    left, right = Region.box(0, 0, 8, 16), Region.box(8, 0, 16, 16)
    own = Region.each([left, right], name="object")
    options = {"outcome": margin, "sites": ["blocks.1.hook_resid_pre"], "n_boot": 2, "progress": False}
    found = mediate(model, pictured, positions=(own, left, right), **options)
    table = found.details.pivot(index="pair", columns="position", values="safe_patched")
    assert table.loc[0, "object"] == table.loc[0, left.name] and table.loc[1, "object"] == table.loc[1, right.name]
    assert table.loc[0, left.name] != table.loc[0, right.name]
    found.save(tmp_path, "regions")
    pd.testing.assert_frame_equal(MediationResult.load(tmp_path, "regions").frame, found.frame)
    image = pictured.unsafe[0].image
    from care_lens.plots import plot_regions

    figure = plot_regions(
        found,
        [own, right],
        image,
        site="blocks.1.hook_resid_pre",
        grids=model.prepare(pictured.unsafe[0]).spans.grids[0],
    )
    assert any("object: NIE" in (trace.name or "") and "n = 2" in trace.name for trace in figure.data)
    checkpoint = tmp_path / "cells.jsonl"
    mediate(model, pictured, positions=(Region.box(0, 0, 8, 16, name="a"),), checkpoint=checkpoint, **options)
    with pytest.raises(ValueError, match="same settings"):
        mediate(model, pictured, positions=(Region.box(8, 0, 16, 16, name="a"),), checkpoint=checkpoint, **options)


def test_patch_maps_of_tiles_are_saved_and_drawn(picture, tmp_path):
    with HookedLVLM.from_hf(*SPECIMENS["idefics3"].make()) as lvlm:
        found = patch_map(lvlm, pairs_of(picture), outcome=last_logit, n_boot=2, progress=False)
        with pytest.raises(ValueError, match="cut in tiles"):
            patch_map(lvlm, pairs_of(picture), outcome=last_logit, site="vision.blocks.0.hook_mlp_out", progress=False)
    assert [grid.shape for grid in found.grids] == [(2, 2)] * 5 and len(found.frame) == 20
    found.save(tmp_path, "map")
    back = PatchMapResult.load(tmp_path, "map")
    pd.testing.assert_frame_equal(back.details, found.details)
    assert len(back.plot().data) == 5
    from care_lens.plots import plot_tiles

    image = pairs_of(picture).unsafe[0].image
    drawn = plot_tiles(back, image=image)
    assert len(drawn.layout.images) == 5
    for at, heat in enumerate(drawn.data):
        tile = back.details[(back.details["grid"] == at) & (back.details["pair"] == 0)]
        axes = drawn.layout[f"x{heat.xaxis[1:]}".replace("x", "xaxis")], drawn.layout[heat.yaxis.replace("y", "yaxis")]
        assert list(axes[0].range) == [tile["x0"].min(), tile["x1"].max()]
        assert list(axes[1].range) == [tile["y1"].max(), tile["y0"].min()]
        np.testing.assert_allclose([heat.x0 - heat.dx / 2, heat.y0 - heat.dy / 2], [tile["x0"].min(), tile["y0"].min()])
    assert len(plot_tiles(back, image=[image] * 5).layout.images) == 5
    first = back.details[back.details["grid"] != 4]
    fewer = replace(back, details=pd.concat([first, back.details.assign(pair=1)]))
    assert len(plot_tiles(fewer, image=image).layout.images) == 5  # the first pair has not every grid
    boxes = ["x0", "x1", "y0", "y1"]
    larger = back.details.assign(pair=back.details["pair"] + 1, **{box: 3 * back.details[box] for box in boxes})
    two = plot_tiles(replace(back, details=pd.concat([back.details, larger])), image=image)
    # The picture that is drawn is the first pair's.
    assert [heat.dx for heat in two.data] == [heat.dx for heat in drawn.data]
    with pytest.raises(ValueError, match="one for each of 5 grids, got 2"):
        plot_tiles(back, image=[image] * 2)
    with pytest.raises(ValueError, match="which rectangle"):
        plot_tiles(back.frame, image=image)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Region.box(5, 0, 5, 9), "x0 < x1"),
        (lambda: Region.box(0, 0, float("nan"), 9), "x0 < x1"),
        (lambda: Region.polygon([(0, 0), (1, 1)]), "three corners"),
        (lambda: Region.polygon([(0, 0), (1, 1), (2, 2)]), "not on one line"),
        (lambda: Region.mask(np.zeros((4, 4))), "one or more"),
        (lambda: Region.mask(np.zeros((4, 4, 3))), r"\[height, width\]"),
        (lambda: Region.box(0, 0, 4, 4, name="image"), "name of its own"),
        (lambda: Region.box(0, 0, 4, 4, name="7"), "name of its own"),
        (lambda: Region.box(0, 0, 4, 4, cover=2.0), "cover must be"),
        (lambda: Region.each([], name="x"), "one simple region"),
    ],
)
def test_regions_that_are_none(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ((Region.box(100, 100, 120, 120),), "must overlap image tokens"),
        ((Region.mask(np.ones((4, 4))),), "as large as the picture, 16 x 16"),
        ((Region.box(0, 0, 8, 8, name="a"), Region.box(0, 0, 16, 8, name="a")), "names of their own"),
        ((Region.each([Region.box(0, 0, 8, 8)], name="a"),), "one a pair, got 1 for pair 1"),
    ],
)
def test_refusals(model, pictured, margin, positions, message):
    with pytest.raises(ValueError, match=message):
        mediate(model, pictured, outcome=margin, sites=["blocks.0.hook_mlp_out"], positions=positions, progress=False)


def test_pictures_of_two_sizes_and_text_alone_are_refused(model, pairs, margin, picture):
    twins = PairedExamples.from_pairs(
        [(Example("what", image=picture(0, (16, 16))), Example("what", image=picture(1, (32, 32))))]
    )
    options = {
        "outcome": margin,
        "sites": ["blocks.0.hook_mlp_out"],
        "positions": (Region.box(0, 0, 8, 8),),
        "progress": False,
    }
    with pytest.raises(ValueError, match=r"pictures of one size for regions.*pair 0"):
        mediate(model, twins, **options)
    with pytest.raises(ValueError, match="text alone"):
        mediate(model, pairs[2:], **options)
    assert mediate(model, pairs, n_boot=2, **options).frame.n.tolist() == [2] * 6


def test_masks_of_pictures_and_tensors():
    pixels = np.zeros((32, 48), dtype=np.uint8)
    pixels[:8, :8] = 255
    for given_as in (pixels, torch.from_numpy(pixels), Image.fromarray(pixels), pixels > 0):
        assert Region.mask(given_as).tokens([GRID], size=(48, 32)) == [3]
