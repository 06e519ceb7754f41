"""One registry of kinds for repairs and defences, and no circle of imports in their rooms."""

import ast
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from fitted import make_correction

import care_lens
from care_lens import defences, repair
from care_lens.core import Site
from care_lens.core.errors import ArtifactError
from care_lens.core.identity import repair_fingerprint
from care_lens.defences import Batch, HiddenDetect, HookDefence, StoredDefence, StoredPart, load_defence
from care_lens.repair import (
    Correction,
    HybridFusion,
    KindError,
    SiteReader,
    Writer,
    kinds,
    register_kind,
    save_repair,
)

ROOT = Path(care_lens.__file__).parent


@register_kind
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Loudness(SiteReader):
    """A foreign reader: the norm of an activation."""

    size: int

    @property
    def width(self):
        return self.size

    def raw(self, activation):
        return activation.norm(dim=-1)


@register_kind
@dataclasses.dataclass(frozen=True)
class RampGate:
    """A foreign gate: opens from one score to another."""

    low: float
    high: float

    def __call__(self, score):
        return ((score - self.low) / (self.high - self.low)).clamp(0, 1)


@register_kind
@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Reflecting(Writer):
    """A foreign writer: as far on the other side."""

    def delta(self, activation):
        return 2 * super().delta(activation)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Part(StoredPart):
    """A foreign part that is registered as it is defined."""

    vector: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Guided(HookDefence):
    """A foreign defence that holds a reader and a gate of a repair, and a part of its own."""

    reader: SiteReader
    gate: RampGate
    part: Part
    name: str = "guided"

    def widths(self):
        return {self.reader.site: self.reader.width}

    def edits(self, batch: Batch):
        def push(h):
            mask = batch.mask("last", prefill=True) if batch.is_prefill(h.shape) else torch.ones(h.shape[:2]).bool()
            opened = self.gate(self.reader.score(h, mask))
            return h + opened[:, None, None] * self.part.vector.to(h)

        return [batch.edit(self.reader.site, push, positions=("last", "generated"))]


def foreign_fusion():
    writer = make_correction(alpha=1.0).writer
    fields = {f.name: getattr(writer, f.name) for f in dataclasses.fields(writer)}
    reader = Loudness(site=writer.site, size=32, positions=("last", "generated"))
    return HybridFusion(visual=(Correction(writer=Reflecting(**fields), reader=reader, gate=RampGate(0.0, 9.0)),))


def answers(model, examples, defence):
    with torch.no_grad(), defence.on(model):
        made = model.generate(model.prepare(examples), max_new_tokens=5, min_new_tokens=5)
    return made.new_tokens


def test_a_foreign_reader_gate_and_writer_are_saved_and_give_the_same_tokens(model, examples, tmp_path):
    fusion = foreign_fusion()
    fusion.save(tmp_path)
    again = HybridFusion.load(tmp_path)
    expected = answers(model, examples, fusion)
    assert torch.equal(answers(model, examples, again), expected)
    with torch.no_grad():
        inputs = model.prepare(examples)
        plain = model(inputs)
        with fusion.on(model):
            assert not torch.equal(model(inputs), plain), "a repair that changes nothing shows nothing"
    assert again.describe() == fusion.describe() and repair_fingerprint(again) == repair_fingerprint(fusion)


def test_a_foreign_defence_holds_foreign_parts_of_a_repair(model, examples, tmp_path):
    reader = Loudness(site=Site.parse("blocks.1.hook_resid_post"), size=32)
    defence = Guided(reader=reader, gate=RampGate(0.0, 4.0), part=Part(vector=torch.linspace(-2, 2, 32)))
    defence.save(tmp_path / "a")
    again = load_defence(tmp_path / "a")
    assert torch.equal(answers(model, examples, again), answers(model, examples, defence))
    assert again.describe() == defence.describe() and repair_fingerprint(again) == repair_fingerprint(defence)
    other = dataclasses.replace(defence, gate=RampGate(0.0, 4.0000001))
    assert repair_fingerprint(other) != repair_fingerprint(defence)
    # The other kind of file holds it too: there is one registry.
    save_repair(defence, tmp_path / "b")
    assert repair.load_repair(Guided, tmp_path / "b").describe() == defence.describe()
    assert {"Guided", "Part", "RampGate", "HybridFusion", "PublishedCARE"} <= {*kinds.registered()}
    assert defences.register_kind is repair.register_kind


@pytest.mark.parametrize("name", ["RampGate", "Part", "Guided"])
def test_an_unknown_kind_in_a_defence_names_the_module(tmp_path, monkeypatch, name):
    reader = Loudness(site=Site.parse("blocks.1.hook_resid_post"), size=32)
    Guided(reader=reader, gate=RampGate(0.0, 1.0), part=Part(vector=torch.ones(32))).save(tmp_path)
    monkeypatch.delitem(kinds._KINDS, name)
    with pytest.raises(ArtifactError, match=f"got '{name}'; import {__name__} that registers it first"):
        load_defence(tmp_path)


def test_a_defence_file_of_schema_1_is_read(tmp_path):
    """It named no modules."""
    from care_lens.core import files
    from care_lens.defences import MeanAblation

    defence = MeanAblation(means={Site.parse("blocks.1.hook_resid_post"): torch.arange(4.0)})
    defence.save(tmp_path)
    manifest = json.loads((tmp_path / "defence.json").read_text())
    assert manifest["schema"] == 2 and manifest["fields"].pop("module") == "care_lens.defences.ablation"
    data = {"safetensors": (tmp_path / "defence.safetensors").read_bytes()}
    content = {key: manifest[key] for key in ("versions", "fields")}
    files.save_artifact(tmp_path, "defence", kind="Defence", schema=1, data=data, content=content)
    assert load_defence(tmp_path).describe() == defence.describe()
    content["fields"]["kind"] = "Theirs"
    files.save_artifact(tmp_path, "defence", kind="Defence", schema=1, data=data, content=content)
    with pytest.raises(
        ArtifactError, match="got 'Theirs'; import the module that registers it first, or update care_lens"
    ):
        load_defence(tmp_path)


def test_a_detector_that_is_switched_off_is_saved(tmp_path):
    off = HiddenDetect(layers=(0, 1), refusal_tokens=(1,), refusal_ids=(1, 2), threshold=float("inf"), width=8)
    off.save(tmp_path)
    assert load_defence(tmp_path).threshold == float("inf") and load_defence(tmp_path).off


def test_what_cannot_be_a_kind_is_said_when_it_is_saved(tmp_path):
    class Loose(StoredDefence):
        name = "loose"

    with pytest.raises(KindError, match="frozen dataclass"):
        Loose().save(tmp_path)
    with pytest.raises(KindError, match="name of its own"):

        class Writer(StoredPart):
            pass

    kinds._KINDS.pop("Loose", None)


def imports_of(path: Path, name: str) -> set[str]:
    """Modules of care_lens that a module imports, lazily ones included, those for type checkers alone left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("care_lens"):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found - {name}


def test_no_module_of_the_rooms_of_repairs_imports_one_that_imports_it():
    """Over files, not packages: ``from care_lens.repair import store`` is an import of the module store."""
    rooms = [path for room in ("subspace", "repair", "defences") for path in sorted((ROOT / room).rglob("*.py"))]
    names = {".".join(["care_lens", *path.relative_to(ROOT).with_suffix("").parts]): path for path in rooms}
    graph = {name: imports_of(path, name) & names.keys() for name, path in names.items()}
    assert "care_lens.repair.store" in graph["care_lens.repair.fusion"], (
        "the graph must see imports of modules from a package"
    )
    assert "care_lens.repair.fusion" not in graph["care_lens.repair.store"]
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, " -> ".join([*above[above.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())
