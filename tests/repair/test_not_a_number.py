"""Scores and activations that are no numbers: the correction acts, it is not left out."""

import dataclasses

import pytest
import torch
from fitted import make_correction, make_subspace
from unchecking import unchecked

from care_lens.core import Site
from care_lens.repair import (
    AllOf,
    AlwaysOpen,
    ConformalGate,
    Correction,
    EnergyReader,
    HybridFusion,
    LinearReader,
    MaxReader,
    RepairError,
    SumReader,
    WeightedReader,
    Writer,
)
from care_lens.repair.fuse import GatedWriter, modality_edit
from care_lens.repair.gate import openness
from care_lens.repair.positions import BatchView
from care_lens.repair.reading import Readings

NAN, INF = float("nan"), float("inf")
SITE = "blocks.1.hook_resid_post"
GATE = ConformalGate(threshold=1e30, epsilon=0.1, n=9)
"""Never opens on a number of these tests."""


@pytest.mark.parametrize("width", [0.0, 2.0])
def test_a_gate_opens_on_what_is_no_number(width):
    gate = ConformalGate(threshold=1.0, epsilon=0.1, n=9, width=width)
    score = torch.tensor([[NAN, INF], [-INF, 0.0]])
    assert gate(score).tolist() == openness(gate, score).tolist() == [[1, 1], [0, 0]]
    assert openness(AlwaysOpen(), score).tolist() == [[1, 1], [1, 1]]


def test_any_gate_opens_on_what_is_no_number_and_must_return_shares():
    def foreign(score):
        return (score > 0).to(score.dtype)

    assert openness(foreign, torch.tensor([NAN, 1.0, -1.0])).tolist() == [1, 1, 0]
    assert openness(lambda score: score * NAN, torch.tensor([NAN])).tolist() == [1]
    with unchecked():
        for wrong in (
            lambda s: s + 5,
            lambda s: s - 5,
            lambda s: s * NAN,
            lambda s: s[:0],
            lambda s: 1.0,
            lambda s: s * 1j,
        ):
            with pytest.raises(RepairError, match="must return"):
                openness(wrong, torch.tensor([0.5, 0.25]))


def readers():
    energy = EnergyReader.from_subspace(make_subspace(SITE), positions="all")
    linear = LinearReader.from_subspace(make_subspace(SITE, seed=3), positions="all")
    mean = dataclasses.replace(energy, pooling="mean")
    standard = linear.standardised(torch.arange(9.0))
    both = (energy, standard)
    made = {"max": MaxReader(readers=both), "all": AllOf(readers=both)}
    made["weighted"] = WeightedReader(readers=both, weights=(1.0, 2.0))
    made["sum"] = SumReader(readers=both)
    return {"energy": energy, "linear": linear, "mean": mean, **made}


@pytest.mark.parametrize("name", ["energy", "linear", "mean", "max", "all", "weighted", "sum"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_row_whose_reading_broke_is_open_from_there_on_and_no_other_is(model, inputs, name, value):
    reader = readers()[name]
    spans = inputs.spans
    rows, pos = spans.padding.shape
    for row in range(rows):
        for token in (int((~spans.padding[row]).nonzero()[0]), pos - 1):
            activation = torch.zeros(rows, pos, 32)
            activation[row, token, 5] = value
            readings = Readings(BatchView(inputs))
            for leaf in reader.leaves:
                readings.update(leaf, activation)
            opened = openness(GATE, readings.score(reader))
            assert bool((opened[row] == 1).all()) and float(opened.sum()) == pos
            for leaf in reader.leaves:  # and stays open while the row is generated
                readings.update(leaf, torch.zeros(rows, 1, 32))
            assert openness(GATE, readings.score(reader))[:, 0].tolist() == [float(i == row) for i in range(rows)]
    # A token that breaks while it is generated opens its own row.
    readings = Readings(BatchView(inputs))
    for leaf in reader.leaves:
        readings.update(leaf, torch.zeros(rows, pos, 32))
    step = torch.zeros(rows, 1, 32)
    step[1, 0, 5] = value
    for leaf in reader.leaves:
        readings.update(leaf, step)
    assert openness(GATE, readings.score(reader))[:, 0].tolist() == [0, 1] + [0] * (rows - 2)


def test_padding_that_is_no_number_opens_nothing(inputs):
    activation = torch.zeros(*inputs.spans.padding.shape, 32).masked_fill(inputs.spans.padding[..., None], NAN)
    for reader in readers().values():
        readings = Readings(BatchView(inputs))
        for leaf in reader.leaves:
            readings.update(leaf, activation)
        assert float(openness(GATE, readings.score(reader)).sum()) == 0


@pytest.mark.parametrize("rule", ["adaptive", "sequential", "parallel", "modality"])
@pytest.mark.parametrize("pulse", [False, True])
def test_a_fused_repair_acts_on_the_row_whose_reading_broke(model, inputs, rule, pulse):
    """The reader's site is broken by a hook before it; the writer's is not, so the edit must be that of an open gate."""
    plain = make_correction("blocks.2.hook_resid_pre")
    reader = EnergyReader.from_subspace(make_subspace("blocks.0.hook_mlp_out"), positions="last")
    gated = dataclasses.replace(plain, reader=reader, gate=GATE, pulse=pulse)
    open_, shut = (HybridFusion(visual=(c,), textual=(c,), rule=rule) for c in (plain, gated))
    activation = torch.randn(*inputs.input_ids.shape, 32, generator=torch.Generator().manual_seed(0))
    broken = activation.clone()
    broken[1, -1] = NAN

    def run(fusion):
        hooks = fusion.fwd_hooks(inputs)
        for name, hook in hooks:
            if name == "blocks.0.hook_mlp_out":
                hook(broken, None)
        return next(hook for name, hook in hooks if name == "blocks.2.hook_resid_pre")(activation, None)

    edited, found = run(open_), run(shut)
    torch.testing.assert_close(found[1], edited[1])
    assert not torch.equal(found[1], activation[1])
    others = [row for row in range(len(activation)) if row != 1]
    assert torch.equal(found[others], activation[others])


def test_a_token_that_is_no_number_is_left_alone_where_the_gate_is_closed():
    writer = make_correction(SITE).writer
    activation = torch.zeros(1, 3, 32)
    activation[0, 0, 1], activation[0, 1, 1] = INF, NAN
    edit = modality_edit(activation, [GatedWriter(writer, torch.tensor([[0.0, 0.0, 1.0]]))])
    assert bool(edit[0, :2].eq(0).all()) and bool(edit[0, 2].isfinite().all())


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": NAN},
        {"threshold": INF},
        {"threshold": True},
        {"threshold": "1"},
        {"epsilon": 0.0},
        {"epsilon": 1.0},
        {"epsilon": NAN},
        {"epsilon": -0.1},
        {"n": 0},
        {"n": -3},
        {"n": 2.5},
        {"n": True},
        {"n": 8},
        {"width": NAN},
        {"width": INF},
        {"width": -1.0},
    ],
)
def test_gates_that_make_no_sense(options):
    with unchecked(), pytest.raises(RepairError, match="must be"):
        ConformalGate(**{"threshold": 1.0, "epsilon": 0.1, "n": 9, **options})


WRITER = {
    "site": Site.parse(SITE),
    "write": torch.eye(4)[:, :2],
    "left": torch.eye(4)[:, :2],
    "target": torch.zeros(4),
}


@pytest.mark.parametrize(
    "options",
    [
        {"target": torch.full((4,), NAN)},
        {"target": torch.zeros(5)},
        {"target": torch.zeros(1, 4)},
        {"target": torch.zeros(4, dtype=torch.long)},
        {"target": None},
        {"write": torch.eye(4)[:, :2] * NAN},
        {"write": torch.eye(4)[:, 0]},
        {"write": torch.zeros(4, 0), "left": torch.zeros(4, 0)},
        {"left": torch.eye(5)[:, :2]},
        {"left": torch.zeros(4, 2)},
        {"alpha": NAN},
        {"alpha": -1.0},
        {"alpha": True},
        {"alpha": "1"},
        {"scope": "everything"},
        {"scope": ()},
        {"scope": ["image"]},
        {"scope": None},
        {"site": SITE},
    ],
)
def test_writers_that_make_no_sense(options):
    with unchecked(), pytest.raises(RepairError, match="must be"):
        Writer(**{**WRITER, **options})


@pytest.mark.parametrize(
    "options",
    [
        {"direction": torch.tensor([NAN, 0.0])},
        {"direction": torch.zeros(2, 2)},
        {"centre": torch.zeros(3)},
        {"centre": torch.tensor([0, 1])},
        {"location": NAN},
        {"scale": 0.0},
        {"scale": INF},
        {"scale": -1.0},
        {"pooling": "median"},
        {"positions": "first"},
        {"positions": ["last"]},
    ],
)
def test_readers_that_make_no_sense(options):
    made = {"site": Site.parse(SITE), "direction": torch.ones(2), "centre": torch.zeros(2)}
    with unchecked(), pytest.raises(RepairError, match="must be"):
        LinearReader(**{**made, **options})


def test_other_parts_that_make_no_sense():
    writer, reader = Writer(**WRITER), EnergyReader.from_subspace(make_subspace(SITE))
    correction = Correction(writer=writer)
    with unchecked():
        for options in (
            {"writer": None},
            {"reader": "x"},
            {"gate": 1},
            {"modality": "audio"},
            {"pulse": 1},
            {"name": None},
        ):
            with pytest.raises(RepairError, match="must be"):
                Correction(**{"writer": writer, **options})
        for options in (
            {"visual": correction},
            {"visual": ("x",)},
            {"rule": "none"},
            {"weights": (1.0,)},
            {"weights": (NAN, 1.0)},
            {"weights": (-1.0, 1.0)},
            {"weights": 0.5},
            {"scope": "words"},
            {"name": 3},
            {"provenance": "x"},
            {"model": "x"},
            {"match": "roughly"},
        ):
            with pytest.raises(RepairError, match=r"must (be|hold)"):
                HybridFusion(**{"textual": (correction,), **options})
        with pytest.raises(RepairError, match="tuple of readers"):
            MaxReader(readers=("x",))
        for part in (reader.tokens, writer.delta):
            with pytest.raises(RepairError, match="floating point"):
                part(torch.zeros(1, 2, part.__self__.width, dtype=torch.long))
        with pytest.raises(RepairError, match="finite"):
            Writer.towards(SITE, target=torch.full((4,), NAN), source=torch.zeros(4))
        with pytest.raises(RepairError, match="alpha"):
            Writer.from_subspace(make_subspace(SITE), alpha=NAN)
