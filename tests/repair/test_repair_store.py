import json

import pytest
import torch
from fitted import make_correction, make_subspace

from care_lens.core import Site
from care_lens.repair import (
    ConformalGate,
    Correction,
    EnergyReader,
    HybridFusion,
    LinearReader,
    MaxReader,
    Writer,
)


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


def test_refused(fusion, tmp_path):
    fusion.save(tmp_path)
    manifest = json.loads((tmp_path / "repair.json").read_text())
    for change, match in (
        ({"schema": 99}, "schema must be"),
        ({"repair": {"kind": "Hex"}}, "kind must be one of"),
    ):
        (tmp_path / "repair.json").write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ValueError, match=match):
            HybridFusion.load(tmp_path)
    manifest["repair"] = {"kind": "AlwaysOpen"}
    (tmp_path / "repair.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="must hold a HybridFusion"):
        HybridFusion.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        HybridFusion.load(tmp_path / "nowhere")


def test_a_reader_of_ones_own_can_be_used_but_not_saved(tmp_path):
    class Mine(LinearReader):
        pass

    own = Mine(site=Site.parse("blocks.0.hook_mlp_out"), direction=torch.ones(32), centre=torch.zeros(32))
    fusion = HybridFusion(visual=(Correction(writer=make_correction().writer, reader=own),))
    with pytest.raises(TypeError, match="Mine"):
        fusion.save(tmp_path)
