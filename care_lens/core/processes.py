"""One job in several processes: which of them this is, which part of the work is its own, and how the parts come together.

`torchrun` and `accelerate launch` start the same command once for each GPU and say in the environment which process it is (RANK,
WORLD_SIZE, LOCAL_RANK). Each takes its part of the examples, works as if it were alone, and leaves what it made in the folder of the job
with a note that it is done. The first process waits for the notes and puts the parts together in their order. Nothing is sent between
the processes but files, so that they may stand on several machines with one file system, need not run at the same time, and
a part that is done is not done again after a kill.

    process = Process.current()
    mine = examples[process.shard(len(examples), block=batch_size)]  # whole batches, so that these are those of one process
    done(folder, "answers", process, of=job)
    if process.first:
        wait_for(folder, "answers", process, of=job)
"""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_lens.core.errors import ArtifactError, CareLensError
from care_lens.core.files import load_artifact, save_artifact

_KIND = "part of a job"
_POLL = 0.2
WAIT = 6 * 3600.0
"""Seconds that the first process waits for the others."""


class ProcessError(CareLensError, RuntimeError):
    """A part of the job is not there, or the environment does not say which process this is."""


@dataclass(frozen=True)
class Process:
    """One of the processes of a job.

    Attributes:
        rank: Its number, from 0.
        world: How many there are.
        local_rank: Its number on its machine, which is that of its GPU.

    Raises:
        ProcessError: If the numbers contradict one another. It is a RuntimeError.

    Example:
        >>> [Process(rank, 2).shard(10, block=4) for rank in range(2)]
        [slice(0, 4, None), slice(4, 10, None)]
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world or self.local_rank < 0:
            raise ProcessError(
                f"rank must be from 0 to below the number of processes, got rank {self.rank} of {self.world} and local rank "
                f"{self.local_rank}; start the job with torchrun or accelerate launch, which set them"
            )

    @classmethod
    def current(cls, environment: Mapping[str, str] | None = None) -> "Process":
        """This process, as RANK, WORLD_SIZE and LOCAL_RANK say; the only one where they are not set.

        Args:
            environment: Where they are looked up; None: ``os.environ``.

        Raises:
            ProcessError: If one of them is set and another is missing, or one is no number.
        """
        environment = os.environ if environment is None else environment
        if "WORLD_SIZE" not in environment and "RANK" not in environment:
            return cls()
        try:
            rank, world = int(environment["RANK"]), int(environment["WORLD_SIZE"])
            return cls(rank, world, int(environment.get("LOCAL_RANK", rank)))
        except (KeyError, ValueError) as error:
            held = {name: environment.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
            raise ProcessError(
                f"RANK and WORLD_SIZE must both be numbers, got {held} ({error}); start the job with torchrun or accelerate launch, or "
                "take them out of the environment"
            ) from None

    @property
    def first(self) -> bool:
        """Whether it puts the parts together."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.world == 1

    @property
    def name(self) -> str:
        """What its part is called: "3-of-8"."""
        return f"{self.rank}-of-{self.world}"

    def shard(self, n: int, *, block: int = 1) -> slice:
        """Its part of n things, which are dealt in whole blocks of neighbours.

        Args:
            n: How many there are.
            block: The size of a block, such as a batch; the last may be smaller.

        Raises:
            ValueError: If n is below 0 or the block below 1.
        """
        if n < 0 or block < 1:
            raise ValueError(f"n must be 0 or more and block 1 or more, got {n} and {block}")
        blocks = -(-n // block)
        start, stop = (blocks * rank // self.world * block for rank in (self.rank, self.rank + 1))
        return slice(min(start, n), min(stop, n))

    def device(self) -> str:
        """The GPU of its number on this machine, or the CPU where there is none.

        Raises:
            ProcessError: If there are more processes on the machine than GPUs.
        """
        import torch

        if not torch.cuda.is_available():
            return "cpu"
        if self.local_rank >= torch.cuda.device_count():
            raise ProcessError(
                f"each process must have a GPU of its own, got local rank {self.local_rank} and {torch.cuda.device_count()} GPUs; start as "
                "many processes as there are GPUs"
            )
        return f"cuda:{self.local_rank}"


def done(folder: str | Path, name: str, process: Process, *, of: str, content: Mapping[str, Any] | None = None) -> None:
    """Note that this process has finished its part, after all its files are written.

    Args:
        folder: Of the job.
        name: Of the step.
        process: This one.
        of: A digest of what the part depends on; notes of another job are not taken for those of this one.
        content: What else to note, JSON-able.
    """
    save_artifact(
        folder,
        f"{name}.{process.name}",
        kind=_KIND,
        schema=1,
        data={},
        content={"of": of, "content": dict(content or {})},
    )


def is_done(folder: str | Path, name: str, process: Process, *, of: str) -> dict[str, Any] | None:
    """What a process has noted of its finished part, or None if it has not finished it (for this job)."""
    try:
        _, held = load_artifact(folder, f"{name}.{process.name}", kind=_KIND, schema=1)
    except FileNotFoundError:
        return None
    except ArtifactError:
        return None  # it is being written, or is damaged: it will be written again
    return dict(held["content"]) if held["of"] == of else None


def wait_for(
    folder: str | Path, name: str, process: Process, *, of: str, seconds: float | int = WAIT
) -> list[dict[str, Any]]:
    """Wait until all processes have finished their part of a step.

    Args:
        folder: Of the job.
        name: Of the step.
        process: One of the processes; its number says how many there are.
        of: As of :func:`done`.
        seconds: How long at most.

    Returns:
        What each of them noted, in the order of their ranks.

    Raises:
        ProcessError: If one has not finished by then; the message names it. It is a RuntimeError.
    """
    deadline = time.monotonic() + seconds
    peers = [Process(rank, process.world) for rank in range(process.world)]
    while True:
        notes = [is_done(folder, name, peer, of=of) for peer in peers]
        lacking = [peer.name for peer, note in zip(peers, notes, strict=True) if note is None]
        if not lacking:
            return [note for note in notes if note is not None]
        if time.monotonic() > deadline:
            raise ProcessError(
                f"all parts of {name!r} must be in {folder}, got none of {', '.join(lacking)} within {seconds:g} s; see the log of "
                "those processes, and start the same job again: what is done is kept"
            )
        time.sleep(_POLL)
