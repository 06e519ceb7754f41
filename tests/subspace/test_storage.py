import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from subspace_rows import planted

from care_lens.subspace import SafetySubspace, SubspaceFileError, SubspaceMismatchError

TENSORS = ("basis", "read", "write", "left", "eigenvalues", "mean_benign", "mean_malicious")


@pytest.fixture
def saved(tmp_path):
    benign, malicious, _ = planted(40, 30, 12)
    subspace = SafetySubspace.fit(
        benign,
        malicious,
        rank=2,
        site="vision.blocks.3.hook_mlp_out",
        modality="visual",
        provenance={"model": "none", "rows": ["a", "b"]},
    )
    return subspace, subspace.save(tmp_path / "deep" / "here")


def edit(directory, **changes):
    path = directory / "subspace.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, **changes}))


def test_what_is_loaded_is_what_was_saved(saved):
    subspace, directory = saved
    loaded = SafetySubspace.load(directory, site="vision.blocks.3.hook_mlp_out", modality="visual", width=12)
    for name in TENSORS:
        assert torch.equal(getattr(loaded, name), getattr(subspace, name))
    for name in ("site", "modality", "diagnostics", "provenance", "rank", "width"):
        assert getattr(loaded, name) == getattr(subspace, name)
    assert sorted(path.name for path in directory.iterdir()) == ["subspace.json", "subspace.safetensors"]


def test_a_bare_subspace_and_other_dtypes_are_kept(tmp_path):
    benign, malicious, _ = planted(40, 30, 12)
    SafetySubspace.fit(benign, malicious, rank=1).to(dtype=torch.bfloat16).save(tmp_path)
    loaded = SafetySubspace.load(tmp_path)
    assert (loaded.site, loaded.modality, loaded.read.dtype) == (None, None, torch.bfloat16)


@pytest.mark.parametrize(
    "wrong",
    [{"site": "blocks.3.hook_mlp_out"}, {"modality": "textual"}, {"width": 13}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_another_place_is_refused(saved, wrong):
    with pytest.raises(SubspaceMismatchError, match=next(iter(wrong))):
        SafetySubspace.load(saved[1], **wrong)


def test_a_changed_byte_is_noticed(saved):
    path = saved[1] / "subspace.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SubspaceFileError, match="checksum differs"):
        SafetySubspace.load(saved[1])


def test_tensors_that_the_manifest_does_not_describe_are_noticed(saved):
    import hashlib

    path = saved[1] / "subspace.safetensors"
    tensors = load_file(path)
    tensors["read"] = tensors["read"] + 1
    save_file(tensors, path)
    edit(saved[1], sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(SubspaceFileError, match="as the manifest describes them"):
        SafetySubspace.load(saved[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "update care_lens"),
        ({"kind": "something else"}, "manifest of a SafetySubspace"),
        ({"width": 13}, "width 12 and rank 2"),
        ({"tensors": {}}, "as the manifest describes them"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused(saved, changes, message):
    edit(saved[1], **changes)
    with pytest.raises(SubspaceFileError, match=message):
        SafetySubspace.load(saved[1])


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "care_lens.SafetySubspace", "schema": 1}'])
def test_a_manifest_that_is_none_is_refused(saved, text):
    (saved[1] / "subspace.json").write_text(text)
    with pytest.raises(SubspaceFileError, match=r"subspace\.json"):
        SafetySubspace.load(saved[1])


def test_missing_files_are_named(saved, tmp_path):
    with pytest.raises(FileNotFoundError):
        SafetySubspace.load(tmp_path / "nowhere")
    (saved[1] / "subspace.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"subspace\.json"):
        SafetySubspace.load(saved[1])


def test_provenance_that_is_not_json_is_refused_before_anything_is_written(tmp_path):
    benign, malicious, _ = planted(40, 30, 12)
    subspace = SafetySubspace.fit(benign, malicious, rank=1, provenance={"model": object()})
    with pytest.raises(TypeError):
        subspace.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
