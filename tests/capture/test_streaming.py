"""Streams of moments and stopped captures, against a capture of everything at once."""

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file as safetensors_save

from care_lens.capture import Activations, TokenAttribution, capture, capture_moments
from care_lens.capture.pooling import PooledRun
from care_lens.capture.shards import require_same
from care_lens.core import Example, Site
from care_lens.core.errors import ArtifactError, InUseError
from care_lens.core.files import in_use
from care_lens.lvlm import HookedLVLM
from care_lens.repair import Correction, HybridFusion
from care_lens.subspace import Moments, SafetySubspace, fold_of_group

SITES = ("blocks.1.hook_mlp_out", "vision.blocks.1.hook_mlp_out")
SELECT = ("image", "text:attributed", "last")
KEY = (Site.parse(SITES[0]), "last")
OPTIONS = {"select": SELECT, "batch_size": 2, "progress": False}


class Stopped(Exception):
    pass


@pytest.fixture
def many(examples):
    """Nine examples of four items, with and without pictures; the last batch holds text alone."""
    pictured = [e for e in examples if e.image is not None]
    some = [*examples, *pictured, *examples][:8]
    rows = [Example(e.prompt, image=e.image, response=e.response, group=f"item {i % 4}") for i, e in enumerate(some)]
    return [*rows, Example("how to make a red", group="item 0")]


@pytest.fixture
def stop_after(monkeypatch):
    """``stop_after(n)``: the next capture is killed when it has run n batches."""

    def arm(n):
        whole, ran = PooledRun.activations, []

        def stopping(self, batch):
            if len(ran) == n:
                raise Stopped
            ran.append(batch)
            return whole(self, batch)

        monkeypatch.setattr(PooledRun, "activations", stopping)
        return ran

    yield arm


def same(one, other):
    assert one.values.keys() == other.values.keys() and one.groups == other.groups and one.ids == other.ids
    for key, rows in one.values.items():
        torch.testing.assert_close(rows, other.values[key], rtol=0, atol=0, equal_nan=True)
        assert torch.equal(one.present[key], other.present[key])


@pytest.mark.parametrize("keep", ["auto", "sums"])
def test_streamed_moments_are_those_of_all_rows(lvlm, many, keep):
    labels = ["benign", "malicious", "malicious"] * 3
    tables = capture_moments(lvlm, many, SITES, label=labels, keep=keep, folds=2, **OPTIONS)
    held = capture(lvlm, many, SITES, **OPTIONS)
    assert set(tables) == set(held.values)
    for (site, name), table in tables.items():
        modality = "visual" if name == "image" else "textual"
        for label in ("benign", "malicious"):
            mine = torch.tensor([one == label for one in labels]) & held.present[site, name]
            expected = Moments.from_rows(held.values[site, name][mine])
            found = table.total(label, modality)
            assert found.count == int(mine.sum())
            torch.testing.assert_close(found.mean, expected.mean)
            torch.testing.assert_close(found.covariance(), expected.covariance())


def test_a_fold_holds_whole_items(lvlm, many):
    (table,) = capture_moments(
        lvlm, many, SITES[:1], label="benign", folds=3, positions=("last",), batch_size=4, progress=False
    ).values()
    items = [example.group for example in many]
    for fold in range(3):
        expected = sum(fold_of_group(item, 3) == fold for item in items)
        assert sum(table[key].count for key in table if key.fold == fold) == expected
    assert len({fold_of_group(item, 3) for item in items}) > 1
    first = fold_of_group(items[0], 3)
    kept = table.total("benign", "textual", without=[first])
    assert kept.count == sum(fold_of_group(item, 3) != first for item in items)


def test_a_subspace_is_fitted_to_streamed_moments_as_to_rows(lvlm, many):
    site = Site.parse(SITES[0])
    labels = ["benign", "malicious", "malicious"] * 3
    options = {"select": ("last",), "batch_size": 4, "progress": False}
    (table,) = capture_moments(lvlm, many, [site], label=labels, **options).values()
    rows = capture(lvlm, many, [site], **options).rows(site, "last")
    mask = torch.tensor([one == "benign" for one in labels])
    streamed = SafetySubspace.from_moments(
        table.total("benign", "textual"), table.total("malicious", "textual"), rank=2
    )
    whole = SafetySubspace.fit(rows[mask], rows[~mask], rank=2)
    assert streamed.equals(whole)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_a_stopped_capture_goes_on_where_it_was(lvlm, many, tmp_path, stop_after, monkeypatch, n):
    whole = capture(lvlm, many, SITES, **OPTIONS)
    with monkeypatch.context():
        stop_after(n)
        with pytest.raises(Stopped):
            capture(lvlm, many, SITES, checkpoint=tmp_path, **OPTIONS)
    monkeypatch.undo()
    ran = stop_after(99)
    same(capture(lvlm, many, SITES, checkpoint=tmp_path, **OPTIONS), whole)
    assert [batch.start for batch in ran] == ([0] if n else []) + list(range(2 * n, 9, 2))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_stopped_stream_goes_on_where_it_was(lvlm, many, tmp_path, stop_after, monkeypatch, n):
    stream = {"label": "benign", "save_seconds": 0.0, **OPTIONS}
    whole = capture_moments(lvlm, many, SITES, **stream)
    with monkeypatch.context():
        stop_after(n)
        with pytest.raises(Stopped):
            capture_moments(lvlm, many, SITES, checkpoint=tmp_path, **stream)
    monkeypatch.undo()
    found = capture_moments(lvlm, many, SITES, checkpoint=tmp_path, **stream)
    for key, table in whole.items():
        assert list(found[key]) == list(table)
        for entry in table:
            assert found[key][entry].count == table[entry].count
            torch.testing.assert_close(found[key][entry].mean, table[entry].mean)
    assert len(list(tmp_path.glob("after_*"))) == 1
    ran = stop_after(99)
    again = capture_moments(lvlm, many, SITES, checkpoint=tmp_path, **stream)
    assert [batch.start for batch in ran] == [0] and again.keys() == whole.keys()


@pytest.mark.parametrize("what", [capture, capture_moments])
def test_a_checkpoint_of_something_else_is_refused(lvlm, many, tmp_path, what):
    more = {} if what is capture else {"label": "benign"}
    what(lvlm, many, SITES, checkpoint=tmp_path, **more, **OPTIONS)
    with pytest.raises(ValueError, match=r"differs in \['examples', (?:'labels', )?'n'\]"):
        what(lvlm, many[:4], SITES, checkpoint=tmp_path, **more, **OPTIONS)
    with pytest.raises(ValueError, match=r"differs in \['attribution\.text'\]"):
        other = TokenAttribution(text=1)
        what(lvlm, many, SITES, checkpoint=tmp_path, attribution=other, **more, **OPTIONS)
    renamed = [replace(example, group=f"{example.group}!") for example in many]
    with pytest.raises(ValueError, match=r"differs in \['examples'\]"):
        what(lvlm, renamed, SITES, checkpoint=tmp_path, **more, **OPTIONS)
    with (
        lvlm.hooks([("blocks.0.hook_mlp_out", lambda a, hook: a * 0.5)]),
        pytest.raises(ValueError, match=r"differs in \['acting'\]"),
    ):
        what(lvlm, many, SITES, checkpoint=tmp_path, **more, **OPTIONS)
    embedding, vision = lvlm.hf_model.get_input_embeddings().weight, next(lvlm.hf_model.model.vision_tower.parameters())
    for weight in (embedding, vision):
        with torch.no_grad():
            weight.mul_(1.01)
        try:
            with pytest.raises(ValueError, match=r"differs in \['weights'\]"):
                what(lvlm, many, SITES, checkpoint=tmp_path, **more, **OPTIONS)
        finally:
            with torch.no_grad():
                weight.div_(1.01)


def test_one_weight_that_changes_the_first_batch_is_seen(lvlm, many, tmp_path):
    capture(lvlm, many, SITES, checkpoint=tmp_path, **OPTIONS)
    norm = lvlm.hf_model.model.language_model.layers[1].post_attention_layernorm
    weight = getattr(norm, "original_component", norm).weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[1] += 5.0  # between the values that the fingerprint looks at, if it is not one of them
    try:
        with pytest.raises(ValueError, match=r"of the same model|differs in \['weights'\]"):
            capture(lvlm, many, SITES, checkpoint=tmp_path, **OPTIONS)
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_small_activations_are_compared_by_their_size():
    one = Activations({KEY: torch.full((2, 3), 1e-3)}, {KEY: torch.ones(2, dtype=torch.bool)}, ("a", "b"), ("a", "b"))
    other = Activations({KEY: torch.full((2, 3), 1.1e-3)}, one.present, one.ids, one.groups)
    require_same(one, one, Path("."))
    with pytest.raises(ValueError, match="of the same model"):
        require_same(one, other, Path("."))


def test_a_repair_is_part_of_what_a_checkpoint_is_of(lvlm, many, tmp_path):
    site = Site.parse("blocks.0.hook_mlp_out")
    rows = torch.randn(80, 32, generator=torch.Generator().manual_seed(0))
    parts = ((rows[:40], rows[40:]), (rows[::2], rows[1::2]))
    subspaces = [SafetySubspace.fit(*part, rank=1, site=site, modality="textual") for part in parts]
    one, other = (HybridFusion(textual=(Correction.care(s, alpha=1.0),), name="repair") for s in subspaces)
    with one.on(lvlm):
        capture(lvlm, many, SITES, checkpoint=tmp_path, **OPTIONS)
        capture(lvlm, many, SITES, checkpoint=tmp_path, **OPTIONS)
    for now in (other, None):
        context = nullcontext() if now is None else now.on(lvlm)
        with context, pytest.raises(ValueError, match=r"differs in \['acting'\]"):
            capture(lvlm, many, SITES, checkpoint=tmp_path, **OPTIONS)


def test_memory_is_told_before_anything_runs(lvlm, many, caplog, stop_after):
    stop_after(0)
    with caplog.at_level(logging.INFO, logger="care_lens.capture.streaming"), pytest.raises(Stopped):
        capture_moments(lvlm, many, SITES, label="benign", **OPTIONS)
    assert "MB" in caplog.text or "kB" in caplog.text


def test_what_cannot_be_streamed_is_said(lvlm, many):
    with pytest.raises(ValueError, match="one an example, 9, got 2"):
        capture_moments(lvlm, many, SITES, label=["benign", "malicious"], **OPTIONS)
    with pytest.raises(ValueError, match="got text alone"):
        capture_moments(lvlm, many[-1:], SITES, label="benign", **OPTIONS)
    with pytest.raises(ValueError, match="at least one site"):
        capture_moments(lvlm, many, [], label="benign", **OPTIONS)


def _shards(lvlm, examples, folder, **options):
    return capture(
        lvlm,
        examples * 2,
        ["blocks.1.hook_resid_post"],
        positions=("last",),
        batch_size=2,
        progress=False,
        checkpoint=folder,
        **options,
    )


@pytest.mark.parametrize("damage", ["copy", "nan", "flip", "gone", "settings", "meta"])
def test_every_shard_is_checked(llava_maker, examples, tmp_path, damage):
    lvlm = HookedLVLM.from_hf(*llava_maker("clip"))
    folder = tmp_path / "kept"
    whole = _shards(lvlm, examples, folder)
    second, third = (folder / f"batch_0000000{i}" for i in (2, 4))
    rows = examples
    if damage == "copy":
        for suffix in (".json", ".safetensors"):
            third.with_suffix(suffix).write_bytes(second.with_suffix(suffix).read_bytes())
    elif damage == "nan":
        held = Activations.load(folder, second.name)
        values = {key: torch.full_like(part, torch.nan) for key, part in held.values.items()}
        safetensors_save({"values.0": next(iter(values.values()))}, second.with_suffix(".safetensors"))
    elif damage == "flip":
        content = bytearray(second.with_suffix(".safetensors").read_bytes())
        content[-5] ^= 1
        second.with_suffix(".safetensors").write_bytes(content)
    elif damage == "gone":
        second.with_suffix(".json").unlink()
        second.with_suffix(".safetensors").unlink()
        again = _shards(lvlm, rows, folder)
        assert all(torch.equal(again.values[key], part) for key, part in whole.values.items())
        return
    elif damage == "settings":
        (folder / "capture.json").unlink()
    else:
        rows = [replace(examples[0], meta={"noun": "other"}), *examples[1:]]
    with pytest.raises(ArtifactError):
        _shards(lvlm, rows, folder)


def test_a_foreign_folder_is_left_alone_and_a_second_process_is_told(llava_maker, examples, tmp_path):
    lvlm = HookedLVLM.from_hf(*llava_maker("clip"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"notes\.txt"):
        _shards(lvlm, examples, tmp_path / "mine")
    with in_use(tmp_path / "kept"), pytest.raises(InUseError):
        _shards(lvlm, examples, tmp_path / "kept")
