"""Streams of moments and stopped captures, against a capture of everything at once."""

import logging

import pytest
import torch

from care_lens.capture import TokenAttribution, capture, capture_moments
from care_lens.capture.pooling import PooledRun
from care_lens.core import Example, Site
from care_lens.subspace import Moments, SafetySubspace

SITES = ("blocks.1.hook_mlp_out", "vision.blocks.1.hook_mlp_out")
SELECT = ("image", "text:attributed", "last")
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
        lvlm, many, SITES[:1], label="benign", folds=3, select=("last",), batch_size=4, progress=False
    ).values()
    counts = [
        sum(table[key].count for key in table if key.fold == fold) for fold in range(3)
    ]  # items 1 to 3 have two examples each, item 0 three
    assert sum(counts) == 9 and {9 - n for n in counts} <= {9, 7, 6, 5, 4, 3, 2, 0}
    assert table.total("benign", "textual", without=[0]).count == 9 - counts[0]


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
    with pytest.raises(ValueError, match=r"differs in \['attribution'\]"):
        other = TokenAttribution(text=1)
        what(lvlm, many, SITES, checkpoint=tmp_path, attribution=other, **more, **OPTIONS)
    weight = lvlm.hf_model.get_input_embeddings().weight
    with torch.no_grad():
        weight.mul_(3.0)
    try:
        with pytest.raises(ValueError, match="of the same model"):
            what(lvlm, many, SITES, checkpoint=tmp_path, **more, **OPTIONS)
    finally:
        with torch.no_grad():
            weight.div_(3.0)


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
