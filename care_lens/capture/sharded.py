"""Capture in several processes: each runs its share of the batches, the first puts the rows or the moments together.

Batches are those of one process, so that the rows are too, to the last bit. Moments are merged in the order of the processes by the
exact formula of :meth:`~care_lens.subspace.MomentsTable.merge`; they differ from those of one process by rounding in float64 alone.

    rows = capture_sharded(lvlm, examples, sites, directory="capture")  # None in all processes but the first
    tables = capture_moments_sharded(lvlm, examples, sites, label="benign", directory="moments")

Each process works in a folder of its own, ``part.RANK-of-WORLD``, and goes on from there after a kill if the job is started with as many
processes again.
"""

from collections.abc import Sequence
from pathlib import Path

from care_lens.capture.activations import Activations, Key
from care_lens.capture.attribution import TokenAttribution
from care_lens.capture.pooling import PooledRun
from care_lens.capture.shards import Shards, held
from care_lens.capture.streaming import stream
from care_lens.core import BaseOutcome, Example, Outcome, SiteLike
from care_lens.core.identity import digest
from care_lens.core.processes import WAIT, Process, done, wait_for
from care_lens.core.progress import Steps
from care_lens.core.renames import renamed
from care_lens.lvlm import HookedLVLM
from care_lens.subspace import MomentsTable
from care_lens.subspace.memory import Keep

_STEP = "captured"


@renamed(select="positions")
def capture_sharded(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    sites: Sequence[SiteLike],
    *,
    directory: str | Path,
    process: Process | None = None,
    positions: Sequence[str] = ("image", "text", "last"),
    attribution: TokenAttribution | None = None,
    outcome: Outcome | BaseOutcome | None = None,
    responses: bool = False,
    batch_size: int = 32,
    progress: bool = True,
    wait: float | int = WAIT,
) -> Activations | None:
    """Pooled activations, captured by all processes of a job together; see :func:`~care_lens.capture.capture`.

    Args:
        lvlm: The model.
        examples: All examples, the same in every process.
        sites: The sites.
        directory: Folder of the job, on a file system that all processes see.
        process: Which process this is; None: as the environment says.
        positions: As of ``capture``, and so are the four below.
        attribution: How attributed selections score tokens.
        outcome: What its method "gradient" differentiates.
        responses: Whether responses are appended.
        batch_size: Examples a forward pass.
        progress: Whether the first process shows a progress bar.
        wait: Seconds that the first process waits for the others.

    Returns:
        In the first process the rows of all examples, in order; in the others None.

    Raises:
        ProcessError: If another process does not finish.
        ValueError: As ``capture``.
    """
    process, directory = process or Process.current(), Path(directory)
    run = PooledRun.of(
        lvlm, examples, sites, positions=positions, attribution=attribution, outcome=outcome, responses=responses,
        batch_size=batch_size,
    )  # fmt: skip
    batches, job = run.batches(), digest(run.settings())
    own = directory / f"part.{process.name}"
    mine = batches[process.shard(len(batches))]
    with held(own):
        shards = Shards(own, run)
        for batch in Steps(mine, desc="capturing", disable=not (progress and process.first)):
            shards.activations(batch)
    done(directory, _STEP, process, of=job)
    if not process.first:
        return None
    wait_for(directory, _STEP, process, of=job, seconds=wait)
    parts = []
    for rank in range(process.world):
        peer = Process(rank, process.world)
        shards = Shards(directory / f"part.{peer.name}", run)
        parts += [shards.activations(batch) for batch in batches[peer.shard(len(batches))]]
    return Activations.concatenate(parts)


@renamed(select="positions")
def capture_moments_sharded(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    sites: Sequence[SiteLike],
    *,
    label: str | Sequence[str],
    directory: str | Path,
    process: Process | None = None,
    positions: Sequence[str] = ("image", "text"),
    folds: int = 4,
    keep: Keep = "auto",
    seed: int = 0,
    attribution: TokenAttribution | None = None,
    outcome: Outcome | BaseOutcome | None = None,
    responses: bool = False,
    batch_size: int = 32,
    progress: bool = True,
    save_seconds: float = 60.0,
    wait: float | int = WAIT,
) -> dict[Key, MomentsTable] | None:
    """Moments of pooled activations, streamed by all processes of a job together; see :func:`~care_lens.capture.capture_moments`.

    Args:
        lvlm: The model.
        examples: All examples, the same in every process.
        sites: The sites.
        label: The class of the examples, or of each.
        directory: Folder of the job, on a file system that all processes see.
        process: Which process this is; None: as the environment says.
        positions: As of ``capture_moments``, and so are the seven below.
        folds: Folds of items.
        keep: "auto", "rows" or "sums".
        seed: Of the folds.
        attribution: How attributed selections score tokens.
        outcome: What its method "gradient" differentiates.
        responses: Whether responses are appended.
        batch_size: Examples a forward pass.
        progress: Whether the first process shows a progress bar.
        save_seconds: Least time between two saves of a process's tables.
        wait: Seconds that the first process waits for the others.

    Returns:
        In the first process a table by site and selection, of all examples; in the others None.

    Raises:
        ProcessError: If another process does not finish.
        ValueError: As ``capture_moments``.
    """
    process, directory = process or Process.current(), Path(directory)
    run = PooledRun.of(
        lvlm, examples, sites, positions=positions, attribution=attribution, outcome=outcome, responses=responses,
        batch_size=batch_size,
    )  # fmt: skip
    labels = [label] * len(run.examples) if isinstance(label, str) else list(label)
    if len(labels) != len(run.examples):
        raise ValueError(f"label must be one word or one an example, {len(run.examples)}, got {len(labels)}")
    about = {"folds": folds, "keep": keep, "seed": seed}
    batches, job = run.batches(), digest([run.settings(), labels, about])

    def empty() -> dict[Key, MomentsTable]:
        return {key: MomentsTable(lvlm.width(key[0]), folds=folds, keep=keep, seed=seed) for key in run.keys}

    own, mine = directory / f"part.{process.name}", batches[process.shard(len(batches))]
    if mine:
        tables = stream(
            run, mine, empty(), labels=labels, about=about, progress=progress and process.first, checkpoint=own,
            save_seconds=save_seconds,
        )  # fmt: skip
        for number, table in enumerate(tables.values()):
            table.save(directory / f"tables.{process.name}" / str(number))
    done(directory, _STEP, process, of=job, content={"batches": len(mine)})
    if not process.first:
        return None
    notes = wait_for(directory, _STEP, process, of=job, seconds=wait)
    merged = empty()
    for rank, note in enumerate(notes):
        if note["batches"]:
            home = directory / f"tables.{Process(rank, process.world).name}"
            merged = {
                key: table.merge(MomentsTable.load(home / str(number)))
                for number, (key, table) in enumerate(merged.items())
            }
    return merged
