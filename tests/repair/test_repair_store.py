import contextlib
import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from fitted import make_correction, make_subspace
from safetensors.torch import load_file, save_file
from unchecking import unchecked

from care_lens.core import Site
from care_lens.core.digests import held_digest
from care_lens.core.files import _sum
from care_lens.core.identity import repair_fingerprint
from care_lens.repair import (
    ConformalGate,
    Correction,
    EnergyReader,
    HookRepair,
    HybridFusion,
    KindError,
    LinearReader,
    MaxReader,
    RepairFileError,
    RepairMismatchError,
    SiteReader,
    Writer,
    kinds,
    load_repair,
    register_kind,
    save_repair,
)
from care_lens.subspace import ModelIdentity

FILES = Path(__file__).parent / "files"


@pytest.fixture()
def fusion():
    energy = EnergyReader.from_subspace(make_subspace("blocks.0.hook_resid_post"), positions=("last", "generated"))
    linear = LinearReader.from_subspace(make_subspace(seed=4), pooling="mean").standardised(torch.randn(9))
    gate = ConformalGate(threshold=3.5, epsilon=0.02, n=60, width=0.5)
    shared = MaxReader(readers=(energy, linear), location=0.25, scale=2.0)
    writer = Writer.towards("blocks.2.hook_resid_pre", target=torch.randn(32), source=torch.randn(32))
    return HybridFusion(
        visual=(Correction(writer=writer, reader=shared, gate=gate, modality="visual", name="see"),),
        textual=(
            Correction(writer=make_correction("blocks.2.hook_mlp_out").writer, reader=shared, gate=gate),
            make_correction("blocks.0.hook_mlp_out", scope="text", alpha=0.5),
        ),
        rule="parallel",
        weights=(0.25, 0.5),
        scope=("image", "last"),
        name="ours",
        provenance={"model": "tiny", "n": 3},
    )


def test_round_trip(fusion, tmp_path, model, inputs):
    fusion.save(tmp_path / "a")
    loaded = HybridFusion.load(tmp_path / "a")
    assert loaded.describe() == fusion.describe()
    assert loaded.textual[0].reader is loaded.visual[0].reader and len(loaded.readers) == 1
    assert loaded.readers[0].leaves[0].site == Site.parse("blocks.0.hook_resid_post")
    assert torch.equal(loaded.visual[0].writer.write, fusion.visual[0].writer.write)
    with torch.no_grad():
        a, b = (model.run_with_hooks(inputs, fwd_hooks=f.fwd_hooks(inputs)) for f in (fusion, loaded))
    assert torch.equal(a, b)
    loaded.save(tmp_path / "b")
    for name in ("repair.json", "repair.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_describe_says_what_is_done_where(fusion):
    described = json.loads(json.dumps(fusion.describe()))
    assert described["name"] == "ours" and described["rule"] == "parallel"
    assert described["visual"][0]["writer"]["site"] == "blocks.2.hook_resid_pre"
    assert described["visual"][0]["writer"]["write"]["shape"] == [32, 1]
    assert described["visual"][0]["gate"] == {
        "kind": "ConformalGate",
        "threshold": 3.5,
        "epsilon": 0.02,
        "n": 60,
        "width": 0.5,
    }
    assert [part["kind"] for part in described["visual"][0]["reader"]["readers"]] == [
        "EnergyReader",
        "LinearReader",
    ]
    assert described["provenance"] == {"model": "tiny", "n": 3}


def seal(directory, **changes):
    """As somebody would who knows how the manifest is sealed."""
    path = directory / "repair.json"
    manifest = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({**manifest, "manifest_sha256": _sum(manifest)}))


def test_a_file_of_schema_1_is_loaded_and_saved_as_the_present_one(tmp_path):
    """The file was written by the version that had this schema."""
    loaded = HybridFusion.load(FILES / "schema_1")
    assert (loaded.name, loaded.rule, loaded.weights, loaded.scope) == (
        "ours",
        "parallel",
        (0.25, 0.5),
        ("image", "last"),
    )
    assert loaded.textual[0].reader is loaded.visual[0].reader and loaded.model is None
    assert loaded.provenance == {"model": "tiny", "n": 3}
    stored = load_file(FILES / "schema_1" / "repair.safetensors")
    assert torch.equal(loaded.visual[0].writer.write, stored["0"])
    loaded.save(tmp_path)
    assert json.loads((tmp_path / "repair.json").read_text())["schema"] == 2
    assert held_digest(HybridFusion.load(tmp_path)) == held_digest(loaded)


def test_a_file_of_schema_1_is_named_as_unchecked_and_can_be_saved_where_it_stands(tmp_path):
    import shutil

    shutil.copytree(FILES / "schema_1", tmp_path / "a")
    with pytest.warns(UserWarning, match="schema 1, which had no checksum"):
        loaded = HybridFusion.load(tmp_path / "a")
    loaded.save(tmp_path / "a")
    assert held_digest(HybridFusion.load(tmp_path / "a")) == held_digest(loaded)


def test_schema_1_with_wrong_numbers_is_refused(tmp_path):
    """It had no sums: what its numbers must fulfil is all there is."""
    import shutil

    shutil.copytree(FILES / "schema_1", tmp_path / "a")
    path = tmp_path / "a" / "repair.json"
    for old, new in (('"epsilon": 0.02', '"epsilon": 2.0'), ('"n": 60,', '"n": 6,'), ('"alpha": 0.5', '"alpha": -1')):
        text = (FILES / "schema_1" / "repair.json").read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        with unchecked(), pytest.raises(RepairFileError, match="cannot be made"):
            HybridFusion.load(tmp_path / "a")
    shutil.copy(FILES / "schema_1" / "repair.json", path)
    tensors = load_file(FILES / "schema_1" / "repair.safetensors")
    for change in (torch.zeros_like, lambda t: t * torch.nan, lambda t: t[:-1]):
        save_file({**tensors, "0": change(tensors["0"]).contiguous()}, tmp_path / "a" / "repair.safetensors")
        with unchecked(), pytest.raises(RepairFileError, match="cannot be made"):
            HybridFusion.load(tmp_path / "a")


def test_refused(fusion, tmp_path):
    fusion.save(tmp_path)
    whole = json.loads((tmp_path / "repair.json").read_text())
    part = whole["repair"]
    for change, match in (
        ({"schema": 99}, "schema of .* must be 2 or less"),
        ({"repair": {"kind": "Hex"}}, "got 'Hex'; import the module that registers it first, or update care_lens"),
        ({"repair": {"kind": "Hex", "module": "their.readers"}}, "import their.readers that registers it first"),
        ({"repair": {"kind": "Hex", "module": "os; x"}}, "update care_lens"),
        ({"repair": {"kind": "AlwaysOpen"}}, "must hold a HybridFusion, got a AlwaysOpen"),
        ({"repair": {"kind": ["HybridFusion"]}}, "kind must be one of"),
        ({"repair": {**part, "strange": 1}}, "no other fields"),
        ({"repair": {**part, "visual": {"tensor": "999"}}}, "cannot be made"),
        ({"repair": {**part, "visual": [{"same_as": 99}]}}, "cannot be made"),
        ({"repair": {**part, "rule": "both"}}, "rule must be one of"),
        ({"repair": {**part, "model": {"model": {"nom": "x"}}}}, "cannot be made"),
        ({"repair": None}, "must hold a HybridFusion"),
        ({"kind": "FrameResult"}, "must hold a care_lens.Repair"),
        ({"files": {}}, "must have a .safetensors file"),
    ):
        (tmp_path / "repair.json").write_text(json.dumps(whole))
        seal(tmp_path, **change)
        with unchecked(), pytest.raises(RepairFileError, match=match):
            HybridFusion.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        HybridFusion.load(tmp_path / "nowhere")


def test_no_flipped_bit_is_missed(fusion, tmp_path):
    """300 random ones over both files: each is refused, or changed nothing (as in white space)."""
    fusion.save(tmp_path)
    same = held_digest(fusion)
    generator = random.Random(0)
    undetected = 0
    for number in range(300):
        path = tmp_path / ("repair.json" if number % 2 else "repair.safetensors")
        whole = path.read_bytes()
        data = bytearray(whole)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        with contextlib.suppress(RepairFileError):
            undetected += held_digest(HybridFusion.load(tmp_path)) != same
        path.write_bytes(whole)
    assert undetected == 0
    assert held_digest(HybridFusion.load(tmp_path)) == same


def test_a_save_that_is_cut_off_between_its_files_is_noticed(fusion, tmp_path):
    fusion.save(tmp_path)
    dataclasses.replace(fusion, visual=()).save(tmp_path / "other")
    (tmp_path / "repair.safetensors").write_bytes((tmp_path / "other" / "repair.safetensors").read_bytes())
    with pytest.raises(RepairFileError, match="its save was cut off"):
        HybridFusion.load(tmp_path)
    (tmp_path / "repair.safetensors").unlink()
    with pytest.raises(RepairFileError, match="must be there"):
        HybridFusion.load(tmp_path)


def test_what_cannot_be_stored_is_refused_before_anything_is_written(fusion, tmp_path):
    for provenance in ({"a": object()}, {"a": torch.ones(2)}):
        with pytest.raises(TypeError):
            dataclasses.replace(fusion, provenance=provenance).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_repair_says_which_model_it_was_made_for(fusion, model, inputs, tmp_path):
    own = ModelIdentity.from_model(model.hf_model)
    assert own.fingerprint and own.architecture
    made = dataclasses.replace(fusion, model=own)
    made.save(tmp_path)
    loaded = HybridFusion.load(tmp_path)
    assert loaded.model == own and loaded.match == "exact"
    with loaded.on(model):
        pass
    other = dataclasses.replace(own, fingerprint="0" * 16)
    with pytest.raises(RepairMismatchError, match="fit on this model"):
        dataclasses.replace(fusion, model=other).check(model)
    for identity, match, allowed in (
        (other, "architecture", True),
        (dataclasses.replace(other, architecture="Other"), "architecture", False),
        (dataclasses.replace(other, architecture="Other"), "width", True),
    ):
        repair = dataclasses.replace(fusion, model=identity, match=match)
        if allowed:
            with repair.on(model):
                pass
        else:
            with pytest.raises(RepairMismatchError, match="architecture"), repair.on(model):
                pass
    assert HybridFusion.load(tmp_path, match="width").match == "width"
    # The weights decide where no revision is known: one changed weight of those that are sampled is another model.
    weight = next(iter(model.hf_model.parameters()))
    with torch.no_grad():
        before = weight.view(-1)[0].item()
        weight.view(-1)[0] += 1
        with pytest.raises(RepairMismatchError, match="its weights are others"):
            loaded.check(model)
        weight.view(-1)[0] = before
    loaded.check(model)


@register_kind
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Cubic(SiteReader):
    """A foreign reader."""

    direction: torch.Tensor
    powers: tuple[int, ...] = (3,)

    @property
    def width(self):
        return len(self.direction)

    def raw(self, activation):
        return sum((activation @ self.direction.to(activation)) ** power for power in self.powers)


@register_kind
@dataclasses.dataclass(frozen=True)
class Square:
    """A foreign gate."""

    level: float

    def __call__(self, score):
        return (score > self.level).to(score.dtype)


@register_kind
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Louder(Writer):
    """A foreign writer."""

    gain: float = 2.0

    def delta(self, activation):
        return self.gain * super().delta(activation)


@register_kind
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Steering(HookRepair):
    """A foreign defence."""

    vector: torch.Tensor
    at: str
    name: str = "steering"

    def fwd_hooks(self, inputs):
        return [(self.at, lambda activation, hook: activation + self.vector.to(activation))]

    def check(self, lvlm):
        pass

    def describe(self):
        return {"name": self.name, "at": self.at}


def foreign():
    writer = make_correction().writer
    louder = Louder(**{f.name: getattr(writer, f.name) for f in dataclasses.fields(writer)}, gain=3.0)
    reader = Cubic(site=writer.site, direction=torch.linspace(-1, 1, 32), powers=(1, 3))
    return HybridFusion(visual=(Correction(writer=louder, reader=reader, gate=Square(0.25)),))


def test_foreign_kinds_are_described_saved_and_loaded(tmp_path, model, inputs):
    fusion = foreign()
    fusion.save(tmp_path)
    loaded = HybridFusion.load(tmp_path)
    assert held_digest(loaded) == held_digest(fusion)
    assert loaded.describe() == fusion.describe() and loaded.describe()["visual"][0]["gate"] == {
        "kind": "Square",
        "level": 0.25,
    }
    with torch.no_grad():
        a, b = (model.run_with_hooks(inputs, fwd_hooks=f.fwd_hooks(inputs)) for f in (fusion, loaded))
    assert torch.equal(a, b)
    steering = Steering(vector=torch.arange(32.0), at="blocks.1.hook_resid_post")
    save_repair(steering, tmp_path / "defence")
    again = load_repair(Steering, tmp_path / "defence")
    assert torch.equal(again.vector, steering.vector) and again.describe() == steering.describe()
    assert isinstance(load_repair(HookRepair, tmp_path / "defence"), Steering)


def test_an_unknown_kind_says_what_to_import(tmp_path, monkeypatch):
    foreign().save(tmp_path)
    monkeypatch.delitem(kinds._KINDS, "Square")
    with pytest.raises(RepairFileError, match=f"got 'Square'; import {__name__} that registers it first"):
        HybridFusion.load(tmp_path)


def test_classes_that_are_no_kind_are_refused():
    with pytest.raises(KindError, match="frozen dataclass"):
        register_kind(type("Plain", (), {}))
    with pytest.raises(KindError, match="frozen dataclass"):
        register_kind(dataclasses.make_dataclass("Thawed", ["a"]))
    with pytest.raises(KindError, match="must not be called"):
        register_kind(dataclasses.make_dataclass("Odd", ["kind"], frozen=True))
    with pytest.raises(KindError, match="name of its own"):
        register_kind(dataclasses.make_dataclass("Writer", ["a"], frozen=True))
    again = dataclasses.make_dataclass("Anew", ["a"], frozen=True)
    try:
        assert register_kind(again) is again
        assert register_kind(dataclasses.make_dataclass("Anew", ["a", "b"], frozen=True)) is not again
    finally:
        kinds._KINDS.pop("Anew", None)


def test_a_reader_of_ones_own_can_be_used_but_not_saved_unless_registered(tmp_path):
    class Mine(LinearReader):
        pass

    own = Mine(site=Site.parse("blocks.0.hook_mlp_out"), direction=torch.ones(32), centre=torch.zeros(32))
    fusion = HybridFusion(visual=(Correction(writer=make_correction().writer, reader=own),))
    with pytest.raises(TypeError, match="Mine"):
        fusion.save(tmp_path)


def changes_of(fusion):
    """Every number and every setting of a repair, changed in the least way."""

    def correction(**change):
        return dataclasses.replace(fusion, visual=(dataclasses.replace(fusion.visual[0], **change),))

    first = fusion.visual[0]
    for name in ("write", "left", "target"):
        tensor = getattr(first.writer, name).clone()
        tensor.view(-1)[-1] = torch.nextafter(tensor.view(-1)[-1], torch.tensor(9.0))
        yield name, correction(writer=dataclasses.replace(first.writer, **{name: tensor}))
    for name, value in (("alpha", 1.0000001), ("scope", "text"), ("site", Site.parse("blocks.2.hook_resid_post"))):
        yield name, correction(writer=dataclasses.replace(first.writer, **{name: value}))
    leaf, other = first.reader.readers
    for name, value in (
        ("centre", leaf.centre + 1e-6),
        ("location", 1e-9),
        ("scale", 1.000001),
        ("pooling", "mean"),
        ("positions", "last"),
    ):
        changed = dataclasses.replace(leaf, **{name: value})
        yield name, correction(reader=dataclasses.replace(first.reader, readers=(changed, other)))
    for name, value in (("threshold", 3.5000001), ("epsilon", 0.021), ("n", 61), ("width", 0.25)):
        yield name, correction(gate=dataclasses.replace(first.gate, **{name: value}))
    for name, value in (("modality", None), ("pulse", True), ("name", "saw")):
        yield name, correction(**{name: value})
    for name, value in (
        ("rule", "adaptive"),
        ("weights", (0.5, 0.25)),
        ("scope", ("last", "image")),
        ("name", "other"),
        ("provenance", {"n": 4}),
        ("model", ModelIdentity("x")),
        ("match", "width"),
        ("visual", ()),
    ):
        yield f"fusion {name}", dataclasses.replace(fusion, **{name: value})


def test_the_fingerprint_sees_every_number_and_every_setting(fusion, tmp_path):
    own = repair_fingerprint(fusion)
    found = {name: repair_fingerprint(changed) for name, changed in changes_of(fusion)}
    assert len({*found.values(), own}) == len(found) + 1, found
    fusion.visual[0].writer.delta(torch.zeros(1, 32))  # what is cached while it is used does not count
    assert repair_fingerprint(fusion) == own
    fusion.save(tmp_path)
    assert repair_fingerprint(HybridFusion.load(tmp_path)) == own


def test_the_fingerprint_sees_what_a_foreign_defence_does_not_describe():
    class Plain(HookRepair):
        name = "plain"

        def fwd_hooks(self, inputs):
            return []

        def check(self, lvlm):
            pass

        def __init__(self, **parts):
            self.__dict__.update(parts)

        def describe(self):
            return {"name": self.name}

    def scaled(factor):
        return lambda x: x * factor

    layer = torch.nn.Linear(2, 2)
    with torch.no_grad():
        other = torch.nn.Linear(2, 2)
        other.load_state_dict(layer.state_dict())
        alike = repair_fingerprint(Plain(layer=other))
        other.bias[0] += 1e-6
    parts = [
        {"a": 1},
        {"a": 1.0},
        {"a": True},
        {"a": "1"},
        {"a": np.arange(3)},
        {"a": np.arange(3.0)},
        {"a": torch.arange(3)},
        {"a": torch.tensor([2**62])},
        {"a": torch.tensor([2**62 + 1])},
        {"a": torch.tensor([1 + 2j])},
        {"a": torch.tensor([1 + 0j])},
        {"a": {1, 2}},
        {"a": {1, 3}},
        {"a": [1, [2]]},
        {"a": [[1], 2]},
        {"layer": layer},
        {"layer": other},
        {"f": scaled(2)},
        {"f": scaled(3)},
        {"f": lambda x: x + 1},
        {"f": lambda x: x + 2},
    ]
    assert len({repair_fingerprint(Plain(**part)) for part in parts}) == len(parts)
    assert repair_fingerprint(Plain(layer=layer)) == alike
    assert repair_fingerprint(Plain(a={"x": 1, "y": 2})) == repair_fingerprint(Plain(a={"y": 2, "x": 1}))
    circle = Plain()
    circle.me = circle
    assert repair_fingerprint(circle) != repair_fingerprint(Plain())
