"""Work shared with copies of the process: the same as alone, in order, and nothing is left behind."""

import multiprocessing
import os
import pickle
import signal
import time

import pytest
import torch

from care_lens.core.files import InUseError, in_use
from care_lens.core.forked import forked, in_workers, workers


def pids(_):
    return os.getpid()


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_results_are_in_the_order_of_the_jobs(n):
    held = torch.arange(7.0)
    with in_workers(n):
        assert list(forked(lambda i: (i, held[i].item() * 2), range(7))) == [(i, 2.0 * i) for i in range(7)]
    assert workers() == 1 and not multiprocessing.active_children()


def test_jobs_are_dealt_to_as_many_processes_and_threads_are_one_each():
    with in_workers(3):
        found = list(forked(lambda i: time.sleep(0.3) or pids(i), range(6)))
        assert len({*found}) == 3 and os.getpid() not in found
        assert {*forked(lambda _: torch.get_num_threads(), range(3))} == {1}
        assert {*forked(pids, range(6), alone=True)} == {os.getpid()}
        assert list(forked(pids, [0])) == [os.getpid()]  # one job is not worth a copy
        # Within a copy nothing is forked again.
        assert all(
            inner == [pid] * 2 for pid, inner in forked(lambda _: (os.getpid(), [*forked(pids, range(2))]), range(3))
        )


def test_what_a_job_raises_is_raised_here_and_no_process_is_left():
    def job(i):
        if i == 3:
            raise KeyError(f"job {i}")
        return i

    with in_workers(2):
        made = forked(job, range(6))
        assert [next(made) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(KeyError, match="job 3"):
            next(made)
        with pytest.raises((AttributeError, pickle.PicklingError), match="pickle"):
            list(forked(lambda _: lambda: None, range(2)))
    assert not multiprocessing.active_children()


def test_the_jobs_of_a_copy_that_dies_are_done_here():
    me = os.getpid()

    def job(i):
        if i == 2 and os.getpid() != me:
            os.kill(os.getpid(), signal.SIGKILL)
        return i, os.getpid() == me

    with in_workers(2):
        found = list(forked(job, range(6)))
    assert [i for i, _ in found] == [*range(6)] and found[2][1] and not found[0][1]
    assert not multiprocessing.active_children()


def test_copies_end_with_what_reads_them():
    with in_workers(2):
        made = forked(lambda i: time.sleep(0.01 * i) or i, range(100))
        assert next(made) == 0
        made.close()
    assert not multiprocessing.active_children()


def test_copies_are_not_waited_for_where_nobody_reads_what_they_make():
    def job(i):
        if i == 1:
            raise KeyError(i)
        return time.sleep(60 * i) or i

    def interrupted(i):
        if i == 0:
            os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)

    begun = time.monotonic()
    with in_workers(2):
        made = forked(job, range(9))
        assert next(made) == 0
        with pytest.raises(KeyError):
            next(made)
        made = forked(lambda i: time.sleep(60 * i) or i, range(9))
        assert next(made) == 0
        made.close()
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of pytest-xdist pass over it
        try:
            with pytest.raises(KeyboardInterrupt):
                list(forked(interrupted, range(9)))
        finally:
            signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun < 30 and not multiprocessing.active_children()


def at_work(folder, told):
    """What the process that is killed does: it is a copy of this one, which need not import all of this again."""
    try:
        with in_use(folder), in_workers(2):
            for made in forked(lambda i: time.sleep(0.5 if i < 2 else 600) or os.getpid(), range(4)):
                os.write(told, f"{made}\n".encode())
    finally:
        os._exit(1)


def lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_kill_ends_the_copies_too_and_the_folder_is_free_again(tmp_path):
    reading, writing = os.pipe()
    if (killed := os.fork()) == 0:
        at_work(tmp_path, writing)
    os.close(writing)
    try:
        with os.fdopen(reading) as told:
            copies = {int(told.readline()) for _ in range(2)}
        assert len(copies) == 2 and killed not in copies and all(map(lives, copies))
        with pytest.raises(InUseError, match=f"process {killed} on "), in_use(tmp_path):
            pass
    finally:
        os.kill(killed, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(killed, 0)[1]) == signal.SIGKILL
    for _ in range(100):
        if not any(map(lives, copies)):
            break
        time.sleep(0.1)
    assert not [pid for pid in copies if lives(pid)]
    with in_use(tmp_path):
        pass


@pytest.mark.parametrize("n", [0, -1, True])
def test_a_number_of_processes_is_asked_for(n):
    with pytest.raises(ValueError, match="number of processes from 1"), in_workers(n):
        pass


def test_copies_of_a_broken_pool_are_gone_before_their_jobs_are_done_here(tmp_path):
    """Also where the program handles SIGTERM, by which a broken pool ends the others: two of them would write one file."""
    me, told = os.getpid(), tmp_path / "told"

    def job(i):
        copied = os.getpid() != me
        if i == 1 and copied:
            time.sleep(0.3)
            os.kill(os.getpid(), signal.SIGKILL)
        if i == 0:
            time.sleep(1.0 if copied else 1.5)
            with told.open("a") as file:
                file.write(f"{os.getpid()}\n")
        return i

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with in_workers(2):
            assert list(forked(job, range(2))) == [0, 1]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told.read_text() == f"{me}\n" and not multiprocessing.active_children()
