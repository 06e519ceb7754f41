"""Readers made of several: all of them, any of them, a weighted mean, and pictures and words apart."""

import dataclasses
import math

import pytest
import torch
from fitted import make_correction, make_subspace
from hypothesis import given, settings
from hypothesis import strategies as st
from unchecking import unchecked

from care_lens.core import Site
from care_lens.core.identity import repair_fingerprint
from care_lens.lvlm import HookedLVLM
from care_lens.repair import (
    AllOf,
    AnyOf,
    ConformalGate,
    EnergyReader,
    HybridFusion,
    LinearReader,
    MaxReader,
    RepairError,
    SumReader,
    TooFewCalibrationError,
    WeightedReader,
    in_threshold_units,
    modality_detector,
    read_scores,
)
from care_lens.repair.positions import BatchView
from care_lens.repair.reading import Readings

NAN, INF = math.nan, math.inf
GATE = ConformalGate(threshold=1.0, epsilon=0.1, n=9)
LOW, HIGH = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"


def axis(i, positions="last", site=LOW, width=2, **options):
    """A reader of one coordinate."""
    return LinearReader(
        site=Site.parse(site),
        direction=torch.eye(width)[i],
        centre=torch.zeros(width),
        positions=positions,
        **options,
    )


def combined(reader, *values):
    """The reader's score where its leaves have these."""
    return float(reader.combine(dict(zip(reader.leaves, map(torch.tensor, values), strict=True))))


@pytest.mark.parametrize(
    ("a", "b"),
    [(3.0, 7.0), (7.0, 3.0), (-1.0, 2.0), (-INF, 5.0), (-INF, -INF), (INF, 0.0), (NAN, 0.0), (-INF, NAN), (NAN, INF)],
)
def test_combinations_by_hand(a, b):
    pair = (axis(0), axis(1))
    broken = math.isnan(a) or math.isnan(b)

    def weighted(w, v, floor):
        if a == b == -INF:
            return -INF
        return (w * max(a, floor) + v * max(b, floor)) / (w + v)

    total = -INF if -INF in (a, b) else a + b
    for reader, expected in (
        (AllOf(readers=pair), min(a, b)),
        (AllOf(readers=pair, location=1.0, scale=4.0), (min(a, b) - 1) / 4),
        (AnyOf(readers=pair), max(a, b)),
        (SumReader(readers=pair), total),
        (SumReader(readers=pair, location=1.0, scale=4.0), (total - 1) / 4),
        (WeightedReader(readers=pair, weights=(1, 3)), weighted(1, 3, 0.0)),
        (WeightedReader(readers=pair, weights=(1.0, 3.0), floor=-2.0), weighted(1, 3, -2.0)),
    ):
        found = combined(reader, a, b)
        assert math.isnan(found) if broken else found == pytest.approx(expected)


def test_a_sum_beyond_its_dtype_opens_and_is_not_taken_for_nothing_read():
    reader = SumReader(readers=(axis(0), axis(1)))
    assert math.isnan(combined(reader, -2e38, -2e38)) and combined(reader, -2e38, 1.0) == pytest.approx(-2e38)
    assert combined(reader, -INF, 1.0) == -INF


def test_a_reader_of_weight_0_says_nothing_but_that_it_broke():
    reader = WeightedReader(readers=(axis(0), axis(1)), weights=(0.0, 2.0))
    assert combined(reader, INF, 3.0) == 3.0 and combined(reader, 9.0, -INF) == -INF
    assert math.isnan(combined(reader, NAN, 3.0))


numbers = st.one_of(st.floats(-50, 50), st.just(-INF))


@settings(max_examples=60, deadline=None)
@given(low=st.tuples(numbers, numbers, numbers), more=st.tuples(*[st.floats(0, 50)] * 3), read=st.integers(0, 7))
def test_no_score_falls_where_one_of_its_readers_grows_or_begins_to_read(low, more, read):
    """Else a gate that has opened would close again."""
    leaves = (axis(0, width=3), axis(1, width=3), axis(2, width=3))
    high = [max(a, -50.0) + b if read >> i & 1 else a + b for i, (a, b) in enumerate(zip(low, more, strict=True))]
    inner = AllOf(readers=leaves[:2])
    for reader in (
        inner,
        AllOf(readers=(MaxReader(readers=leaves[:2]), leaves[2])),
        WeightedReader(readers=(inner, leaves[2]), weights=(2.0, 1.0), floor=-10.0),
        SumReader(readers=(inner, leaves[2])),
    ):
        before, after = (
            combined(reader, *[values[leaves.index(leaf)] for leaf in reader.leaves]) for values in (low, high)
        )
        assert after >= before - 1e-4


def test_in_the_unit_of_its_threshold_a_reader_exceeds_1_exactly_above_it():
    reader = dataclasses.replace(axis(0), location=0.5, scale=2.0)
    own = reader.with_threshold(3.0, zero=-1.0)
    states = torch.tensor([[[x, 0.0] for x in (-1.5, 2.5, 6.5, 6.6, 10.5)]])
    raw, units = reader.tokens(states)[0], own.tokens(states)[0]
    assert units.tolist() == pytest.approx([(s + 1) / 4 for s in raw.tolist()])
    assert (raw > 3.0).tolist() == (units > 1.0).tolist() == [False, False, False, True, True]
    for threshold, zero, match in ((1.0, 1.0, "threshold"), (NAN, 0.0, "threshold"), (2.0, -INF, "zero")):
        with pytest.raises(RepairError, match=match):
            reader.with_threshold(threshold, zero=zero)


def test_units_from_benign_scores():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(199, 2, generator=generator) * torch.tensor([1.0, 30.0]) + torch.tensor([0.0, 500.0])
    scores[:40, 1] = -INF  # requests without a picture
    readers = in_threshold_units((axis(0), axis(1)), scores, epsilon=0.1)
    units = torch.stack(
        [readers[i].combine({readers[i]: (scores[:, i] - readers[i].location) / readers[i].scale}) for i in (0, 1)], 1
    )
    for i in (0, 1):
        assert int((units[:, i] > 1).sum()) == 19  # the 20th largest is the threshold, 20 = 200 * 0.1
        assert float(units[:, i][units[:, i].isfinite()].mean()) == pytest.approx(0, abs=1e-5)
    assert int((units.amin(dim=1) > 1).sum()) <= 20
    with pytest.raises(RepairError, match=r"\[n, 1\]"):
        in_threshold_units((axis(0),), scores, epsilon=0.1)
    with pytest.raises(TooFewCalibrationError):
        in_threshold_units((axis(0),), scores[:8, :1], epsilon=0.1)
    with pytest.raises(RepairError, match="must be finite"):
        in_threshold_units((axis(0),), torch.full((19, 1), -INF), epsilon=0.1)


def conjunction(**options):
    """Opens where the last prompt token is unusual, and some token of the answer."""
    prompt = EnergyReader.from_subspace(make_subspace(LOW, seed=101)).with_threshold(20.0)
    answer = EnergyReader.from_subspace(make_subspace(HIGH, seed=102), positions="generated").with_threshold(
        30.0, zero=5.0
    )
    correction = make_correction("blocks.2.hook_resid_post", seed=1, **options)
    return HybridFusion(textual=(dataclasses.replace(correction, reader=AllOf(readers=(prompt, answer)), gate=GATE),))


@torch.no_grad()
def test_signs_at_different_tokens_are_put_together_by_loops(model, examples):
    inputs = model.prepare(examples, responses=True)
    (reader,) = conjunction().readers
    _, cache = model.run_with_cache(inputs, sites=[LOW, HIGH])
    readings = Readings(BatchView(inputs))
    for leaf in reader.leaves:
        readings.update(leaf, cache[str(leaf.site)])
    found = readings.score(reader)
    prompt, answer = (leaf.tokens(cache[str(leaf.site)]) for leaf in reader.leaves)
    for row in range(len(examples)):
        said = -INF
        for pos in range(found.shape[1]):
            if bool(inputs.spans.response[row, pos]):
                said = max(said, float(answer[row, pos]))
            if not bool(inputs.spans.padding[row, pos]):
                asked = float(prompt[row][inputs.spans.last[row]])
                assert float(found[row, pos]) == pytest.approx(min(asked, said), rel=1e-5)


def opening(model, examples):
    """The repair with its thresholds set so that some rows open, some of them while they answer."""
    fusion = conjunction()
    (reader,) = fusion.readers
    scores = read_scores(model, examples, [reader, *reader.leaves], max_new_tokens=6, progress=False)
    torch.testing.assert_close(scores[:, 0], scores[:, 1:].amin(dim=1))
    return fusion.with_gate(dataclasses.replace(GATE, threshold=float(scores[:, 0].median()) - 1e-4))


@torch.no_grad()
def test_rows_in_a_batch_alone_and_attached_are_the_same(llava_maker, examples):
    plain, processor = llava_maker("clip")
    model = HookedLVLM.from_hf(plain, processor)
    fusion = opening(model, examples)
    options = {"max_new_tokens": 6, "min_new_tokens": 6}
    bare = model.generate(model.prepare(examples), **options).new_tokens
    with fusion.recording(model) as seen:
        together = model.generate(model.prepare(examples), **options).new_tokens
        alone = torch.cat([model.generate(model.prepare(e), **options).new_tokens for e in examples])
    assert torch.equal(together, alone)
    frame = seen.to_dataframe()
    opened = frame[frame.batch == 0].groupby("row").gate_textual.max()
    assert 0 < int(opened.sum()) < len(examples)
    assert frame[(frame.span != "generated")].gate_textual.max() == 0
    same = [bool((a == b).all()) for a, b in zip(bare, together, strict=True)]
    assert all(same[row] for row in range(len(examples)) if not opened[row])
    model.unwrap()
    with fusion.attach(plain, processor) as handle:
        assert torch.equal(handle.lvlm.generate(handle.lvlm.prepare(examples), **options).new_tokens, together)


def test_described_fingerprinted_saved_loaded_and_explained(tmp_path):
    picture = axis(0, "image", width=32)
    words = axis(1, ("text",), width=32)
    detectors = {
        how: modality_detector(
            picture, words, combine=how, thresholds=(2.0, 3.0) if how == "both" else None, weights=(1.0, 3.0)
        )
        for how in ("max", "min", "both", "weighted")
    }
    found = {}
    detectors["sum"] = SumReader(readers=(picture, words))
    for how, reader in {**detectors, "floor": dataclasses.replace(detectors["weighted"], floor=0.5)}.items():
        repair = HybridFusion(textual=(dataclasses.replace(make_correction(HIGH), reader=reader, gate=GATE),))
        repair.save(tmp_path / how)
        loaded = HybridFusion.load(tmp_path / how)
        assert loaded.describe() == repair.describe() and repair_fingerprint(loaded) == repair_fingerprint(repair)
        assert type(loaded.readers[0]) is type(reader)
        found[how] = repair_fingerprint(repair)
        told = str(repair.explain())
        assert f"{type(reader).__name__} of LinearReader (image, max), LinearReader (text, max)" in told, told
        assert repair.explain().frame.multiply_adds[0] == 2 * 2 * 32 * 3 + 2 * 32
    assert len({*found.values()}) == 6
    assert loaded.describe()["textual"][0]["reader"]["weights"] == [1.0, 3.0]
    assert [type(one).__name__ for one in detectors.values()] == [
        "MaxReader",
        "AllOf",
        "AllOf",
        "WeightedReader",
        "SumReader",
    ]


def test_a_picture_and_words_are_read_apart(model, examples):
    inputs = model.prepare(examples)
    activation = torch.zeros(*inputs.input_ids.shape, 32)
    activation[..., 0] = torch.where(inputs.spans.image, 8.0, 100.0)
    activation[..., 1] = torch.where(inputs.spans.text, 3.0, 100.0)
    seen, said = axis(0, "image", width=32), axis(1, "text", width=32)
    has = torch.tensor([example.image is not None for example in examples])
    assert 0 < int(has.sum()) < len(examples)
    for options, with_picture, without in (
        ({}, 8.0, 3.0),
        ({"combine": "min"}, 3.0, -INF),
        ({"combine": "both", "thresholds": (16.0, 2.0)}, 0.5, -INF),
        ({"combine": "weighted", "weights": (1.0, 4.0)}, 4.0, 2.4),
    ):
        reader = modality_detector(seen, said, **options)
        readings = Readings(BatchView(inputs))
        for leaf in reader.leaves:
            readings.update(leaf, activation)
        score = readings.score(reader).expand(inputs.input_ids.shape)[:, -1]
        expected = torch.where(has, with_picture, without)
        torch.testing.assert_close(score, expected)


def test_refused():
    image, text = axis(0, "image"), axis(1, "text")
    with pytest.raises(RepairError, match="at least one"):
        AllOf(readers=())
    for weights, match in (
        ((1.0,), "one for each"),
        ((0.0, 0.0), "not all be 0"),
        ((1.0, -1.0), "0 or more"),
        ((1.0, NAN), "finite"),
    ):
        with pytest.raises(RepairError, match=match):
            WeightedReader(readers=(image, text), weights=weights)
    with pytest.raises(RepairError, match="floor"):
        WeightedReader(readers=(image, text), weights=(1.0, 1.0), floor=INF)
    for options, match in (
        ({"combine": "both"}, "thresholds must be given"),
        ({"thresholds": (1.0, 1.0)}, "thresholds must be given"),
    ):
        with pytest.raises(RepairError, match=match):
            modality_detector(image, text, **options)
    with pytest.raises(RepairError, match='image must read at positions="image"'):
        modality_detector(axis(0, "all"), text)
    with pytest.raises(RepairError, match="text must read at"):
        modality_detector(image, axis(0, ("text", "image")))
    with unchecked():
        with pytest.raises(RepairError, match="combine must be one of"):
            modality_detector(image, text, combine="mean")
        with pytest.raises(RepairError, match="tuple of readers"):
            AllOf(readers=(1,))
