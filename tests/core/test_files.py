"""Files that are whole or not there, artifacts that notice every change, and locks."""

import json
import multiprocessing
import os
import stat

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from care_lens.core.errors import ArtifactError, InUseError
from care_lens.core.files import in_use, load_artifact, save_artifact, write_whole

DATA = {"csv": b"a,b\n1,2\n", "safetensors": bytes(range(64))}


def _save(folder, **content):
    return save_artifact(folder, "effects", kind="Effects", schema=2, data=DATA, content={"n": 3, **content})


def test_what_was_saved_is_loaded(tmp_path):
    _save(tmp_path, settings={"seed": (1, 2)})
    data, content = load_artifact(tmp_path, "effects", kind="Effects", schema=2)
    assert data == DATA
    assert content["n"] == 3 and content["settings"] == {"seed": [1, 2]}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["effects.csv", "effects.json", "effects.safetensors"]


@settings(max_examples=300, deadline=None)
@given(
    place=st.floats(0, 1, exclude_max=True),
    bit=st.integers(0, 7),
    suffix=st.sampled_from(["csv", "safetensors", "json"]),
)
def test_every_flipped_bit_is_found(tmp_path_factory, place, bit, suffix):
    folder = tmp_path_factory.mktemp("flip")
    _save(folder)
    path = folder / f"effects.{suffix}"
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    path.write_bytes(content)
    try:
        data, loaded = load_artifact(folder, "effects", kind="Effects", schema=2)
    except ArtifactError:
        return
    # A flip in the manifest's white space changes no content.
    assert suffix == "json" and data == DATA and loaded["n"] == 3


@pytest.mark.parametrize("gone", ["effects.csv", "effects.safetensors"])
def test_a_missing_data_file_is_named(tmp_path, gone):
    _save(tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(ArtifactError, match=gone):
        load_artifact(tmp_path, "effects", kind="Effects", schema=2)


def test_other_kinds_newer_schemas_and_foreign_files_are_refused(tmp_path):
    _save(tmp_path)
    with pytest.raises(ArtifactError, match="must hold a Other, got a Effects"):
        load_artifact(tmp_path, "effects", kind="Other", schema=2)
    with pytest.raises(ArtifactError, match="update care_lens"):
        load_artifact(tmp_path, "effects", kind="Effects", schema=1)
    (tmp_path / "notes.json").write_text(json.dumps({"mine": 1}))
    with pytest.raises(ArtifactError, match="another file"):
        load_artifact(tmp_path, "notes", kind="Effects", schema=2)
    with pytest.raises(FileNotFoundError):
        load_artifact(tmp_path, "absent", kind="Effects", schema=2)


@pytest.mark.parametrize(
    "theirs",
    [
        {"kind": "svc", "schema": 1, "mine": 2},
        {"kind": "Effects", "schema": "draft-07"},
        {"schema": 1, "versions": {}},
        [],
    ],
)
def test_files_of_other_programs_that_have_a_kind_too_are_left_as_they_are(tmp_path, theirs):
    (tmp_path / "effects.json").write_text(json.dumps(theirs))
    (tmp_path / "effects.csv").write_text("my table")
    with pytest.raises(ArtifactError, match="care_lens did not write"):
        _save(tmp_path)
    assert json.loads((tmp_path / "effects.json").read_text()) == theirs
    assert (tmp_path / "effects.csv").read_text() == "my table" and len(list(tmp_path.iterdir())) == 2


def test_a_file_where_the_folder_should_be_is_left_as_it_is(tmp_path):
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ArtifactError, match="must be a folder"):
        _save(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"


def test_content_keeps_off_the_manifests_keys_and_off_nan(tmp_path):
    with pytest.raises(ValueError, match="kind"):
        _save(tmp_path, kind="x")
    with pytest.raises(ValueError):
        _save(tmp_path, figure=float("nan"))
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_what_stood_there(tmp_path, monkeypatch):
    path = write_whole(tmp_path / "a.txt", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_permissions_and_links_stay(tmp_path):
    path = write_whole(tmp_path / "a.txt", "old")
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_mask()
    path.chmod(0o640)
    (tmp_path / "link").symlink_to(path)
    write_whole(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _hold(path, held, free):
    with in_use(path):
        held.set()
        free.wait(30)


def test_a_second_process_is_told_who_holds_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")  # it takes the lock itself, and need not import all of this again
    held, free = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "run", held, free))
    other.start()
    try:
        assert held.wait(60)
        with pytest.raises(InUseError, match=f"process {other.pid} on "), in_use(tmp_path / "run"):
            pass
    finally:
        free.set()
        other.join()
    with in_use(tmp_path / "run"):
        pass


def test_a_lock_is_free_after_its_holder_was_killed(tmp_path):
    context = multiprocessing.get_context("fork")
    held, free = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path / "run", held, free))
    other.start()
    assert held.wait(60)
    other.kill()
    other.join()
    with in_use(tmp_path / "run"):
        pass
