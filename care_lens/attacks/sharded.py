"""Attacks in several processes: each attacks its share of the examples, the first puts the attacked examples together in order.

    def attack(part, folder):
        return pgd(lvlm, part, epsilon=16, batch_size=8, checkpoint=folder / "pgd.jsonl").apply(part)

    attacked = attack_sharded(attack, examples, directory="attack", settings={"epsilon": 16}, block=8)  # None but in the first

Any function of examples and a folder will do. Where it works in batches, ``block`` is their size, and its random draws must belong to the
example or the batch and not to the place in the list (those of care_lens do): the pictures are then those of one process.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from care_lens.core.examples import Example, examples_digest
from care_lens.core.identity import digest
from care_lens.core.processes import WAIT, Process, done, is_done, wait_for
from care_lens.core.require import require_examples
from care_lens.data.jsonl import read_examples, write_examples

Attacking = Callable[[Sequence[Example], Path], Sequence[Example]]
"""Attacks some examples, and may keep what it has finished in a folder."""


def attack_sharded(
    attack: Attacking,
    examples: Sequence[Example],
    *,
    directory: str | Path,
    settings: Mapping[str, Any],
    block: int = 1,
    process: Process | None = None,
    wait: float | int = WAIT,
) -> list[Example] | None:
    """Examples attacked by all processes of a job together.

    Args:
        attack: What attacks a part of the examples; its second argument is a folder of that part, for its checkpoint.
        examples: All examples, with ids that differ, the same in every process.
        directory: Folder of the job, on a file system that all processes see. Parts are kept there as ``attacked.RANK-of-WORLD.jsonl`` with
            their pictures as PNG.
        settings: What the attack depends on, JSON-able: a part of other settings is not taken over.
        block: Examples are dealt in blocks of so many.
        process: Which process this is; None: as the environment says.
        wait: Seconds that the first process waits for the others.

    Returns:
        In the first process the attacked examples in order, with their pictures as read back from the files; in the others None.

    Raises:
        ProcessError: If another process does not finish.
        ValueError: If ids are missing or stand twice, or the attack gives another number of examples than it is given.
    """
    require_examples(examples)
    process, directory = process or Process.current(), Path(directory)
    ids = [example.id for example in examples]
    if "" in ids or len({*ids}) < len(ids):
        raise ValueError("examples must have ids that differ, got one twice or none; give each an id")
    job = digest([examples_digest(examples), dict(settings), block])
    if is_done(directory, "attacked", process, of=job) is None:
        part = list(examples[process.shard(len(examples), block=block)])
        folder = directory / f"part.{process.name}"
        folder.mkdir(parents=True, exist_ok=True)
        found = list(attack(part, folder)) if part else []
        if len(found) != len(part):
            raise ValueError(f"attack must give one example for each of {len(part)}, got {len(found)}")
        write_examples(found, _file(directory, process))
        done(directory, "attacked", process, of=job)
    if not process.first:
        return None
    wait_for(directory, "attacked", process, of=job, seconds=wait)
    return [e for rank in range(process.world) for e in read_examples(_file(directory, Process(rank, process.world)))]


def _file(directory: Path, process: Process) -> Path:
    return directory / f"attacked.{process.name}.jsonl"
