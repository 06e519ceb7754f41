"""No flipped bit of a stored artifact is missed."""

import random
from pathlib import Path

import pytest
import torch
from subspace_rows import planted, unchecked

from care_lens.core.digests import held_digest
from care_lens.subspace import MomentsKey, MomentsTable, SafetySubspace, SubspaceFileError

FILES = Path(__file__).parent / "files"


def subspace(directory):
    benign, malicious, _ = planted(40, 30, 12)
    return SafetySubspace.fit(benign, malicious, rank=2, site="blocks.3.hook_mlp_out", modality="visual").save(
        directory
    )


def table(directory):
    made = MomentsTable(5, folds=2)
    benign, malicious, _ = planted(40, 30, 5)
    made.update(benign[:4], label="benign", modality="visual", groups=list("abcd"))
    made.update(malicious, label="malicious", modality="visual", groups=[str(i) for i in range(30)])
    return made.save(directory)


@pytest.mark.parametrize(
    ("make", "cls", "name"), [(subspace, SafetySubspace, "subspace"), (table, MomentsTable, "moments")]
)
def test_no_flipped_bit_is_missed(tmp_path, make, cls, name):
    """300 random ones over both files: each is refused, or changed nothing (as in white space)."""
    make(tmp_path)
    same = held_digest(cls.load(tmp_path))
    generator = random.Random(1)
    missed, refused = [], 0
    for number in range(300):
        path = tmp_path / f"{name}.{'json' if number % 2 else 'safetensors'}"
        whole = path.read_bytes()
        data = bytearray(whole)
        place, bit = generator.randrange(len(data)), generator.randrange(8)
        data[place] ^= 1 << bit
        path.write_bytes(data)
        try:
            if held_digest(cls.load(tmp_path)) != same:
                missed.append((path.name, place, bit))
        except SubspaceFileError:
            refused += 1
        path.write_bytes(whole)
    assert missed == [] and refused > 200
    assert held_digest(cls.load(tmp_path)) == same


def test_a_moments_table_of_schema_1_is_loaded_and_saved_as_the_present_one(tmp_path):
    """The file was written by the version that had this schema."""
    old = MomentsTable.load(FILES / "moments_1")
    assert [old[key].rows is None for key in old] == [False, True, False, True]
    again = MomentsTable.load(old.save(tmp_path))
    assert [*again] == [*old] and '"schema": 2' in (tmp_path / "moments.json").read_text()
    for key in old:
        assert torch.equal(again[key].mean, old[key].mean) and again[key].count == old[key].count
        assert torch.equal(again[key].covariance(), old[key].covariance())


@pytest.mark.parametrize("wrong", ["nan", "shape", "negative", "dtype"])
def test_moments_that_are_none_are_refused_though_their_sums_are_right(tmp_path, wrong):
    from care_lens.subspace.moments import Moments, Sums

    made = MomentsTable.load(table(tmp_path))
    key = MomentsKey(0, "malicious", "visual")
    sums = made[key].sums
    scatter = {
        "nan": sums.scatter * torch.nan,
        "shape": sums.scatter[:-1],
        "negative": -sums.scatter,
        "dtype": sums.scatter.float(),
    }[wrong]
    with unchecked():
        rest = (sums.fourth, sums.third, sums.cubes, sums.quartics)
        made._entries[key] = Moments(made[key].mean, None, Sums(sums.count, scatter.contiguous(), *rest))
        made.save(tmp_path)
    with pytest.raises(SubspaceFileError, match="of entry"):
        MomentsTable.load(tmp_path)
