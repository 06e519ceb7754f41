import json

import pytest
import torch
from moments_rows import assert_same, filled, rows_of
from subspace_rows import unchecked

from care_lens.core.files import _sum
from care_lens.subspace import (
    Moments,
    MomentsKey,
    MomentsTable,
    NonFiniteError,
    RowsNeededError,
    SubspaceError,
    SubspaceFileError,
    TooFewRowsError,
    WidthError,
    fold_of_group,
)


@pytest.mark.parametrize("keep", ["auto", "rows", "sums"])
def test_the_total_is_that_of_all_rows_and_leaving_a_fold_out_is_exact(keep):
    table, rows = filled(keep=keep), rows_of(40, 5, 40)
    assert_same(table.total("benign", "visual"), Moments.from_rows(rows))
    folds = torch.tensor([fold_of_group(f"item {i // 2}", 4) for i in range(40)])
    for fold in range(4):
        assert_same(table.total("benign", "visual", without=[fold]), Moments.from_rows(rows[folds != fold]))
        assert_same(table.total("benign", "visual", only=[fold]), Moments.from_rows(rows[folds == fold]))


def test_rows_are_kept_only_while_that_is_smaller():
    few, many = filled(50), filled(5)
    assert few.total("benign", "visual").centred.shape == (40, 50)
    with pytest.raises(RowsNeededError):
        _ = many.total("benign", "visual").centred
    assert filled(5, keep="rows").total("benign", "visual").centred.shape == (40, 5)
    assert many.nbytes < filled(5, keep="rows").nbytes + 8 * 8 * (25 + 20)


def test_a_group_has_one_fold_whatever_comes_before():
    folds = [fold_of_group(f"prompt {i}", 4) for i in range(4000)]
    assert folds == [fold_of_group(f"prompt {i}", 4) for i in range(4000)]
    assert folds != [fold_of_group(f"prompt {i}", 4, seed=1) for i in range(4000)]
    counts = [folds.count(fold) for fold in range(4)]
    assert sum(counts) == 4000
    assert min(counts) > 900
    with pytest.raises(SubspaceError, match="folds must be 1 or more, got 0"):
        fold_of_group("a", 0)


def test_tables_of_shards_are_merged():
    rows, groups = rows_of(30, 4), [str(i) for i in range(30)]
    shards = [MomentsTable(4), MomentsTable(4)]
    for shard, part in zip(shards, (slice(0, 11), slice(11, 30)), strict=True):
        shard.update(rows[part], label="benign", modality="textual", groups=groups[part])
    merged = shards[0].merge(shards[1])
    assert_same(merged.total("benign", "textual"), Moments.from_rows(rows))
    assert sum(shards[0][key].count for key in shards[0]) == 11
    with pytest.raises(SubspaceError, match="one width, number of folds and seed"):
        shards[0].merge(MomentsTable(4, folds=3))


@pytest.mark.parametrize("width", [5, 50])
def test_what_is_loaded_is_what_was_saved(tmp_path, width):
    table = filled(width, folds=3, seed=2)
    loaded = MomentsTable.load(table.save(tmp_path / "new"))
    assert list(loaded) == list(table)
    assert (loaded.width, loaded.folds, loaded.keep, loaded.seed) == (width, 3, "auto", 2)
    for key in table:
        assert (loaded[key].rows is None) == (table[key].rows is None)
        assert loaded[key].fourth == table[key].fourth
        assert torch.equal(loaded[key].covariance(), table[key].covariance())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["moments.json", "moments.safetensors"]


def edit(path, **changes):
    """As somebody would who knows how the manifest is sealed."""
    manifest = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({**manifest, "manifest_sha256": _sum(manifest)}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 99}, "update care_lens"),
        ({"kind": "other"}, "must hold a care_lens.MomentsTable"),
        ({"width": 6}, r"of shape .6,"),
        ({"entries": [{"fold": 0}]}, "hold a whole MomentsTable"),
        ({"files": {"safetensors": "0"}}, "checksum differs"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, changes, message):
    filled().save(tmp_path)
    edit(tmp_path / "moments.json", **changes)
    with pytest.raises(SubspaceFileError, match=message):
        MomentsTable.load(tmp_path)


def test_damage_and_absence_are_noticed(tmp_path):
    filled().save(tmp_path)
    (tmp_path / "moments.json").write_text("{")
    with pytest.raises(SubspaceFileError, match="got no JSON"):
        MomentsTable.load(tmp_path)
    (tmp_path / "moments.json").unlink()
    with pytest.raises(FileNotFoundError):
        MomentsTable.load(tmp_path)


def test_nothing_is_added_of_rows_that_are_wrong():
    table = MomentsTable(3, folds=2)
    bad = torch.ones(4, 3)
    bad[3, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="first: row 3"):
        table.update(bad, label="benign", modality="visual", groups=list("abcd"))
    with pytest.raises(SubspaceError, match="groups must be as many as the rows, 4, got 3"):
        table.update(torch.ones(4, 3), label="benign", modality="visual", groups=list("abc"))
    with unchecked(), pytest.raises(WidthError, match=r"rows must be \[n, 3\]"):
        table.update(torch.ones(4, 2), label="benign", modality="visual", groups=list("abcd"))
    table.update(torch.ones(0, 3), label="benign", modality="visual", groups=[])
    assert len(table) == 0
    with pytest.raises(TooFewRowsError, match="benign must have rows of modality visual"):
        table.total("benign", "visual")


def test_keys_are_read_by_name():
    key = next(iter(filled()))
    assert key == MomentsKey(key.fold, "benign", "visual")
    with unchecked(), pytest.raises(SubspaceError, match="keep must be"):
        MomentsTable(3, keep="all")
