"""One job in several processes: the shares are a partition in whole blocks, and a part of another job is never taken for one of this."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from care_lens.core.processes import Process, ProcessError, done, is_done, wait_for


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 90), st.integers(1, 9), st.integers(1, 12))
def test_shares_are_a_partition_in_whole_blocks(n, world, block):
    things, parts = list(range(n)), [Process(rank, world).shard(n, block=block) for rank in range(world)]
    assert [thing for part in parts for thing in things[part]] == things
    assert all(part.start % block == 0 or part.start == n for part in parts)
    blocks = [-(-len(things[part]) // block) for part in parts]
    assert max(blocks) - min(blocks) <= 1


def test_which_process_this_is():
    assert Process.current({}) == Process() and Process().alone and Process().first
    found = Process.current({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})
    assert (found.rank, found.world, found.local_rank, found.name, found.first) == (5, 8, 1, "5-of-8", False)
    assert Process.current({"RANK": "1", "WORLD_SIZE": "2"}).local_rank == 1
    for wrong in (
        {"RANK": "1"},
        {"WORLD_SIZE": "2"},
        {"RANK": "x", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
    ):
        with pytest.raises(ProcessError, match=r"torchrun or accelerate launch"):
            Process.current(wrong)
    with pytest.raises(ValueError, match="block 1 or more"):
        Process().shard(3, block=0)


def test_the_first_waits_for_parts_of_its_own_job_alone(tmp_path):
    first, second = (Process(rank, 2) for rank in range(2))
    done(tmp_path, "step", first, of="a", content={"n": 1})
    done(tmp_path, "step", second, of="another job")
    with pytest.raises(ProcessError, match=r"got none of 1-of-2 within 0 s; .* start the same job again"):
        wait_for(tmp_path, "step", first, of="a", seconds=0)
    assert is_done(tmp_path, "step", second, of="a") is None
    done(tmp_path, "step", second, of="a", content={"n": 2})
    assert wait_for(tmp_path, "step", first, of="a", seconds=0) == [{"n": 1}, {"n": 2}]
    (tmp_path / "step.1-of-2.json").write_text("{")  # cut off: it is not taken for a part
    assert is_done(tmp_path, "step", second, of="a") is None
