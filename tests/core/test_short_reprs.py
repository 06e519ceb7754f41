"""What is shown in a terminal is short: no exported class writes out tensors, tables or examples."""

import dataclasses
import importlib
import inspect

import pytest
import torch

import care_lens
from care_lens import organism
from care_lens.capture import Activations
from care_lens.core import PairedExamples, Site, TokenSpans
from care_lens.core.display import LinesRepr, ShortRepr
from care_lens.evaluation import GenerationStore
from care_lens.subspace import Moments, MomentsTable

ROOMS = ("attacks", "capture", "core", "data", "defences", "evaluation", "lens", "lvlm", "mediation", "pipeline", "repair", "subspace")  # fmt: skip
LARGE = ("Tensor", "Float[", "Bool[", "Int[", "DataFrame", "core.examples.Example")


def exported():
    for room in ROOMS:
        module = importlib.import_module(f"{care_lens.__name__}.{room}")
        for name in dir(module):
            value = getattr(module, name)
            if inspect.isclass(value) and value.__module__.startswith(care_lens.__name__):
                yield value


def large_fields(cls):
    return [field.name for field in dataclasses.fields(cls) if field.repr and any(word in str(field.type) for word in LARGE)
            and "Callable" not in str(field.type)]  # fmt: skip


def test_no_exported_class_writes_out_what_it_holds():
    generated = {
        cls.__name__: large_fields(cls)
        for cls in exported()
        if dataclasses.is_dataclass(cls)
        and not issubclass(cls, ShortRepr)
        and inspect.unwrap(cls.__repr__).__code__.co_filename == "<string>"  # dataclasses wrote it
    }
    assert "PGD" in generated  # what dataclasses wrote is recognised
    assert [name for name, fields in generated.items() if fields] == []


def lines(thing):
    assert thing._repr_html_().startswith("<table>")
    return repr(thing).splitlines()


def test_pairs_show_how_many_and_the_first():
    pairs = organism.pairs("typographic", "fit", n=3)
    told = lines(pairs)
    assert told[0] == "PairedExamples: 3 pairs"
    assert repr(pairs.safe[0].prompt) in told[2] and repr(pairs.unsafe[0].prompt) in told[3]
    assert "(with a picture), ..." in told[2]
    assert lines(PairedExamples((), ())) == ["PairedExamples: 0 pairs"]


def test_activations_show_where_they_are_of():
    site = Site.parse("blocks.1.hook_mlp_out")
    rows = {(site, "last"): torch.full((2, 3), 7.125)}
    shown = Activations(rows, {(site, "last"): torch.ones(2, dtype=torch.bool)}, ("a", "b"), ("g", "g"), {"model": "M"})
    told = "\n".join(lines(shown))
    assert told.startswith("Activations: 2 examples\n") and "7.125" not in told
    assert "blocks.1.hook_mlp_out" in told and "last" in told and "1 groups" in told and "M" in told


def test_stores_and_tables_show_what_they_hold(tmp_path):
    assert lines(GenerationStore()) == ["GenerationStore: 0 answers", "  kept  in memory only", "  see   .answers()"]
    assert str(tmp_path) in lines(GenerationStore(tmp_path / "a.jsonl"))[1]
    table = MomentsTable(3, folds=2)
    table.update(torch.eye(3), label="benign", modality="visual", groups=["a", "b", "c"])
    assert lines(table)[0] == f"MomentsTable: {len(table)} entries" and "benign visual" in lines(table)[3]


@pytest.mark.parametrize("thing", [Moments.from_rows(torch.eye(3)), TokenSpans], ids=["Moments", "TokenSpans"])
def test_tensors_are_shown_by_their_shape(thing):
    assert inspect.isclass(thing) or ("tensor(" not in repr(thing) and "[3]" in repr(thing))
    assert issubclass(thing if inspect.isclass(thing) else type(thing), ShortRepr)
    assert not issubclass(TokenSpans, LinesRepr)
