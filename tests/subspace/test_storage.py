import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from subspace_rows import planted, unchecked

from care_lens.subspace import (
    ModelIdentity,
    SafetySubspace,
    SubspaceError,
    SubspaceFileError,
    SubspaceMismatchError,
)
from care_lens.subspace.storage import _manifest_sum

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
    """As somebody would who knows how the manifest is sealed."""
    path = directory / "subspace.json"
    manifest = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({**manifest, "manifest_sha256": _manifest_sum(manifest)}))


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


def test_sealed_tensors_that_are_no_subspace_are_noticed(saved):
    import hashlib

    path = saved[1] / "subspace.safetensors"
    tensors = load_file(path)
    tensors["left"] = tensors["left"] + 1
    save_file(tensors, path)
    edit(saved[1], files={"safetensors": hashlib.sha256(path.read_bytes()).hexdigest()})
    with pytest.raises(SubspaceFileError, match=r"left( and write)? .*must"):
        SafetySubspace.load(saved[1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "update care_lens"),
        ({"kind": "something else"}, "manifest of a SafetySubspace"),
        ({"width": 13}, "width 12 and rank 2"),
        ({"files": {}}, "must have a .safetensors file"),
        ({"files": {"../x": "0"}}, "files beside it"),
        ({"site": "blocks.x"}, "the name of a site"),
        ({"site": 3}, "the name of a site"),
        ({"modality": "audio"}, "modality"),
        ({"model": {"name": 1}}, "model"),
        ({"model": {"revision": "a"}}, "model"),
        ({"model": []}, "model"),
        ({"diagnostics": []}, "diagnostics"),
        ({"provenance": "x"}, "provenance"),
        ({"rank": True}, "width 12 and rank 2"),
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


IDENTITY = ModelIdentity("org/model", "abc123", "LlavaForConditionalGeneration")


FILES = Path(__file__).parent / "files"


@pytest.mark.parametrize("schema", [1, 2])
def test_older_versions_are_migrated_and_saved_as_the_present_one(schema, tmp_path):
    """The files were written by the versions that had these schemas."""
    directory = FILES / f"schema_{schema}"
    before = (directory / "subspace.json").read_bytes()
    loaded = SafetySubspace.load(directory, site="vision.blocks.3.hook_mlp_out", modality="visual", width=12)
    assert loaded.model == (IDENTITY if schema == 2 else None)
    assert loaded.provenance == {"rows": ["a", "b"]} and loaded.rank == 2
    stored = load_file(directory / "subspace.safetensors")
    for name in TENSORS:
        assert torch.equal(getattr(loaded, name), stored[name])
    assert (directory / "subspace.json").read_bytes() == before
    again = loaded.save(tmp_path / "again")
    assert json.loads((again / "subspace.json").read_text())["schema"] == 3
    assert SafetySubspace.load(again).equals(loaded)
    if schema == 1:
        with pytest.raises(SubspaceMismatchError, match="fitted without a model"):
            SafetySubspace.load(directory, model=IDENTITY)


def test_a_changed_manifest_is_noticed(saved):
    path = saved[1] / "subspace.json"
    path.write_text(path.read_text().replace("vision.blocks.3", "vision.blocks.4"))
    with pytest.raises(SubspaceFileError, match="checksum differs"):
        SafetySubspace.load(saved[1])
    # Another layout of the same content is the same manifest.
    path.write_text(json.dumps(json.loads(path.read_text().replace("vision.blocks.4", "vision.blocks.3")), indent=7))
    assert SafetySubspace.load(saved[1]).rank == 2


def test_a_damaged_file_of_an_older_version_is_noticed(tmp_path):
    import shutil

    for schema, flipped in ((1, "subspace.safetensors"), (2, "subspace.safetensors"), (2, "subspace.json")):
        directory = tmp_path / f"{schema}{flipped}"
        shutil.copytree(FILES / f"schema_{schema}", directory)
        path = directory / flipped
        data = bytearray(path.read_bytes())
        data[-40] ^= 1
        path.write_bytes(data)
        with pytest.raises(SubspaceFileError, match="checksum differs"):
            SafetySubspace.load(directory)


def test_notes_that_strict_json_lacks_come_back(saved, tmp_path):
    notes = {"inf": float("inf"), "deep": [float("-inf"), {"float": "nan"}], "object": {"object": 1}}
    subspace = dataclasses.replace(saved[0], provenance=notes)
    assert SafetySubspace.load(subspace.save(tmp_path / "x")).provenance == notes
    assert "NaN" not in (tmp_path / "x" / "subspace.json").read_text()


@pytest.mark.parametrize("schema", [0, "2", True, None, 1, 2])
def test_schemas_that_are_none_are_refused(saved, schema):
    edit(saved[1], schema=schema)
    with pytest.raises(SubspaceFileError, match="schema"):
        SafetySubspace.load(saved[1])


@pytest.fixture
def of_a_model(tmp_path):
    benign, malicious, _ = planted(40, 30, 12)
    subspace = SafetySubspace.fit(benign, malicious, rank=1, site="blocks.3.hook_mlp_out", model=IDENTITY)
    return subspace, subspace.save(tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({}, {"exact", "architecture", "width"}),
        ({"revision": "def456"}, {"architecture", "width"}),
        ({"revision": None}, {"architecture", "width"}),
        ({"name": "org/tuned"}, {"architecture", "width"}),
        ({"architecture": "Qwen2_5_VLForConditionalGeneration"}, {"width"}),
    ],
)
def test_models_are_refused_by_level(of_a_model, change, allowed):
    _, directory = of_a_model
    other = dataclasses.replace(IDENTITY, **change)
    for match in ("exact", "architecture", "width"):
        options = {"model": other, "match": match, "site": "blocks.3.hook_mlp_out", "width": 12}
        if match in allowed:
            assert SafetySubspace.load(directory, **options).model == IDENTITY
        else:
            what = next(iter(change))
            with pytest.raises(
                SubspaceMismatchError, match=f"the model's {what} must be {getattr(IDENTITY, what)} as in the fit"
            ):
                SafetySubspace.load(directory, **options)
        # Site and width are refused at every level.
        for wrong in ({"site": "blocks.4.hook_mlp_out"}, {"width": 13}):
            with pytest.raises(SubspaceMismatchError, match=next(iter(wrong))):
                SafetySubspace.load(directory, **{**options, **wrong})


def test_what_the_fit_did_not_note_cannot_be_matched():
    with pytest.raises(SubspaceMismatchError, match="the fit did not note it"):
        ModelIdentity("here").require(ModelIdentity("here"), "exact")
    ModelIdentity("here").require(ModelIdentity("there"), "width")
    with unchecked(), pytest.raises(SubspaceError, match="match must be"):
        IDENTITY.require(IDENTITY, "roughly")


def test_an_identity_is_read_off_a_hugging_face_config():
    from transformers import LlavaConfig

    config = LlavaConfig(architectures=["LlavaForConditionalGeneration"])
    config.name_or_path, config._commit_hash = "org/model", "abc123"
    assert ModelIdentity.from_config(config) == IDENTITY
    with pytest.raises(SubspaceError, match="neither"):
        ModelIdentity.from_config(object())


class Hub:
    """The part of HfApi that is used, keeping repositories in a directory."""

    root = None

    def create_repo(self, repo_id, *, private, exist_ok):
        assert exist_ok
        (Hub.root / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, *, repo_id, folder_path, revision, commit_message, allow_patterns):
        from types import SimpleNamespace

        from huggingface_hub.utils import filter_repo_objects

        paths = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        for path in filter_repo_objects(paths, allow_patterns=allow_patterns):
            target = Hub.root / repo_id / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((Path(folder_path) / path).read_bytes())
        return SimpleNamespace(commit_url=f"hub://{repo_id}/{commit_message}")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    Hub.root = tmp_path / "hub"
    calls = []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        calls.append((repo_id, revision))
        target = tmp_path / "cache"
        source = Hub.root / repo_id
        paths = [str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()]
        for path in filter_repo_objects(paths, allow_patterns=allow_patterns):
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / path).write_bytes((source / path).read_bytes())
        return str(target)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


@pytest.mark.parametrize("subfolder", [None, "blocks.3/visual"])
def test_through_the_hub_and_back(of_a_model, hub, subfolder):
    subspace, _ = of_a_model
    url = subspace.push_to_hub("me/subspace", subfolder=subfolder, license="mit", description="For a test.")
    assert url.startswith("hub://me/subspace/Safety subspace of rank 1 at blocks.3")
    loaded = SafetySubspace.from_pretrained(
        "me/subspace", subfolder=subfolder, revision="v1", site="blocks.3.hook_mlp_out", model=IDENTITY
    )
    assert hub == [("me/subspace", "v1")]
    assert loaded.equals(subspace) and torch.equal(loaded.read, subspace.read)
    with pytest.raises(SubspaceMismatchError, match="revision"):
        SafetySubspace.from_pretrained(
            "me/subspace", subfolder=subfolder, model=dataclasses.replace(IDENTITY, revision="other")
        )
    with pytest.raises(SubspaceFileError, match="in elsewhere"):
        SafetySubspace.from_pretrained("me/subspace", subfolder="elsewhere")


def test_a_directory_goes_before_the_hub(saved, hub):
    subspace, directory = saved
    assert SafetySubspace.from_pretrained(directory).equals(subspace)
    assert SafetySubspace.from_pretrained(str(directory.parent), subfolder="here", modality="visual").equals(subspace)
    assert hub == []


def test_the_card_says_what_it_is_and_how_to_load_it(of_a_model):
    from huggingface_hub import ModelCard

    subspace, directory = of_a_model
    card = ModelCard(subspace.card(repo_id="me/subspace", license="mit", description="For a test."))
    assert (card.data.library_name, card.data.license, card.data.base_model) == ("care_lens", "mit", "org/model")
    for words in ("For a test.", "blocks.3.hook_mlp_out", "abc123", "1 of width 12", "Not measured"):
        assert words in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    lines = code.replace("'me/subspace'", repr(str(directory))).splitlines()
    names = {}
    exec("\n".join(line for line in lines if "apply" not in line), names)
    assert names["subspace"].equals(subspace)


def test_the_card_states_what_was_measured():
    benign, malicious, _ = planted(40, 30, 12)
    fitted = SafetySubspace.fit(benign, malicious, rank=1)
    result = fitted.uncertainty(benign, malicious, n_boot=10, n_halves=4, seed=3)
    text = fitted.with_uncertainty(result).card()
    total = result.of("heldout_ratio").iloc[0]
    assert f"{total['value']:.3g} [{total['ci_low']:.3g}, {total['ci_high']:.3g}]" in text
    assert "of 10 resamples of items, and of 4 halvings" in text
    assert "40 benign and 30 malicious items, seed 3" in text
    assert "base_model" not in text


@pytest.mark.parametrize(
    "subfolder", ["..", "../x", "a/../../x", "/abs", "a//b", "a/", "", ".", "a\\b", "c:x", "*", "a?", "[ab]", "a\nb"]
)
def test_subfolders_that_lead_elsewhere_are_refused(of_a_model, hub, subfolder):
    subspace, directory = of_a_model
    with pytest.raises(SubspaceError, match="subfolder must be folders within the repository"):
        SafetySubspace.from_pretrained(directory.parent, subfolder=subfolder)
    with pytest.raises(SubspaceError, match="subfolder must be folders within the repository"):
        subspace.push_to_hub("me/subspace", subfolder=subfolder)
    assert hub == []


def test_a_link_out_of_the_folder_and_a_file_for_a_folder_are_refused(of_a_model, tmp_path):
    _, directory = of_a_model
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo" / "away").symlink_to(directory)
    with pytest.raises(SubspaceFileError, match="must lie within"):
        SafetySubspace.from_pretrained(tmp_path / "repo", subfolder="away")
    with pytest.raises(SubspaceFileError, match="got the file"):
        SafetySubspace.from_pretrained(directory / "subspace.json")


def test_what_the_hub_says_is_passed_on():
    with pytest.raises(SubspaceFileError, match="must be a directory, or a repository"):
        SafetySubspace.from_pretrained("not a/repository/name")
