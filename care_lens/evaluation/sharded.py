"""Answers in several processes: each generates its share of the examples, the first puts them in one store.

Batches are those of one process, and a whole batch goes to one process; so the answers are those of one process, sampled ones too.
Each process writes a store of its own, ``answers.RANK-of-WORLD.jsonl``, since locks are not to be relied on over network file systems. A job
that was stopped goes on, with another number of processes if you like: what any of them has answered is not generated again.

    table = evaluate_sharded(lvlm, suites, defences, judge=judge, directory="results/table")  # None in all processes but the first
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from care_lens.core.examples import Example
from care_lens.core.identity import digest, examples_digest, model_fingerprint, repair_fingerprint
from care_lens.core.outcome import Judge, Repair
from care_lens.core.processes import WAIT, Process, done, wait_for
from care_lens.evaluation.evaluate import evaluate
from care_lens.evaluation.generate import generate_all, prompt_length
from care_lens.evaluation.settings import GenerationSettings
from care_lens.evaluation.store import GenerationStore, StoredAnswer
from care_lens.evaluation.table import DefenceTable
from care_lens.lvlm.hooked import HookedLVLM

log = logging.getLogger(__name__)

ANSWERS = "answers"


def own_share(lvlm: HookedLVLM, examples: Sequence[Example], process: Process, *, batch_size: int) -> list[Example]:
    """The examples that a process answers: whole batches of those that one process would make.

    Args:
        lvlm: The model.
        examples: All of them.
        process: Which process.
        batch_size: Examples at a time.
    """
    order = sorted(range(len(examples)), key=lambda i: (*map(int.__neg__, prompt_length(lvlm, examples[i])), i))
    return [examples[i] for i in order[process.shard(len(order), block=batch_size)]]


def generate_sharded(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    *,
    directory: str | Path,
    process: Process | None = None,
    defence_name: str = "none",
    repair: Repair | None = None,
    batch_size: int = 32,
    generation: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    wait: float | int = WAIT,
) -> list[StoredAnswer] | None:
    """Answers to examples, made by all processes of a job together.

    Args:
        lvlm: The model.
        examples: All examples, the same in every process.
        directory: Folder of the job, on a file system that all processes see.
        process: Which process this is; None: as the environment says.
        defence_name: As of :func:`~care_lens.evaluation.generate_all`, and so are the five below.
        repair: The defence.
        batch_size: Examples at a time.
        generation: Options of generation.
        seed: Of the answers.
        progress: Whether the first process shows a progress bar.
        wait: Seconds that the first process waits for the others.

    Returns:
        In the first process one answer an example, in order, which stand in ``answers.jsonl`` too (``answers.sqlite`` where that is there, or one process has more than 20,000); in the others None.

    Raises:
        ProcessError: If another process does not finish.
        ValueError: As ``generate_all``.
    """
    process, directory = process or Process.current(), Path(directory)
    options: dict[str, Any] = {"defence_name": defence_name, "repair": repair, "batch_size": batch_size, "seed": seed}
    options |= {"generation": generation, "progress": progress and process.first}
    if process.alone:
        store = _job_store(directory, examples, expected=len(examples))
        return generate_all(lvlm, examples, store=store, **options)
    mine = own_share(lvlm, examples, process, batch_size=batch_size)
    own = GenerationStore(directory / f"{ANSWERS}.{process.name}.jsonl")
    _take_over(own, [path for path in _stores(directory) if path != own.path], mine)
    generate_all(lvlm, mine, store=own, **options)
    made_of = [
        examples_digest(examples),
        model_fingerprint(lvlm.hf_model),
        lvlm.generation_settings(**(generation or {})),
    ]
    job = digest([*made_of, defence_name, None if repair is None else repair_fingerprint(repair), batch_size, seed])
    step = f"{ANSWERS}.{job}"
    done(directory, step, process, of=job)
    if not process.first:
        return None
    wait_for(directory, step, process, of=job, seconds=wait)
    return generate_all(lvlm, examples, store=_job_store(directory, examples), **options)


def evaluate_sharded(
    lvlm: HookedLVLM,
    suites: Mapping[str, Sequence[Example]],
    defences: Mapping[str, Repair | None],
    *,
    judge: Judge,
    directory: str | Path,
    settings: GenerationSettings | None = None,
    process: Process | None = None,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
    wait: float | int = WAIT,
    **options: Any,
) -> DefenceTable | None:
    """The table of defences by channels, with the answers made by all processes of a job together.

    Judging, fidelity and intervals are the first process's work.

    Args:
        lvlm: The model.
        suites: Examples by channel, the same in every process.
        defences: Defences by name; None is the model as it is.
        judge: As of :func:`~care_lens.evaluation.evaluate`.
        directory: Folder of the job.
        settings: Of generation, for all suites; None: the model's own.
        process: Which process this is; None: as the environment says.
        batch_size: Examples at a time.
        seed: Of generation and of the bootstrap.
        progress: Whether the first process shows progress bars.
        wait: Seconds that the first process waits for the others.
        **options: Further options of ``evaluate``: accuracy, graders, ordinary, fidelity, n_boot, max_missing.

    Returns:
        The table in the first process, None in the others.

    Raises:
        ProcessError: If another process does not finish.
        ValueError: As ``evaluate``.
    """
    process, settings = process or Process.current(), settings or GenerationSettings()
    # As evaluate() asks them, so that it finds their answers.
    examples = settings.examples([replace(e, channel=channel) for channel, suite in suites.items() for e in suite])
    if not process.alone:
        for name, repair in defences.items():
            generate_sharded(
                lvlm, examples, directory=directory, process=process, defence_name=name, repair=repair, batch_size=batch_size,
                generation=settings.options(), seed=seed, progress=progress, wait=wait,
            )  # fmt: skip
    if not process.first:
        return None
    return evaluate(
        lvlm,
        suites,
        defences,
        judge=judge,
        store=_job_store(Path(directory), examples, expected=len(examples) * len(defences) if process.alone else 0),
        batch_size=batch_size,
        seed=seed,
        progress=progress,
        **settings.given(),
        **options,
    )


def _job_store(directory: Path, examples: Sequence[Example], *, expected: int = 0) -> GenerationStore:
    """The store of a job, with what its processes have answered; new ones of several processes are JSON lines, for SQLite's locks too are
    not to be relied on over network file systems."""
    store = GenerationStore.in_folder(directory, ANSWERS, expected=expected)
    _take_over(store, [path for path in _stores(directory) if path != store.path], examples)
    return store


def _stores(directory: Path) -> list[Path]:
    """The store of the job and those of its processes, of whatever number they were."""
    of_the_job = (directory / f"{ANSWERS}{suffix}" for suffix in (".jsonl", ".sqlite"))
    return sorted({*(path for path in of_the_job if path.exists()), *directory.glob(f"{ANSWERS}.*-of-*.jsonl")})


def _take_over(store: GenerationStore, others: Sequence[Path], examples: Sequence[Example]) -> None:
    """Put into a store what others have answered of some examples and it has not."""
    wanted = {(example.channel, example.id) for example in examples}
    for path in others:
        other = GenerationStore(path)
        held = [a for a in other.answers() if (a.channel, a.id) in wanted and not a.missing]
        new = [answer for answer in held if (mine := store.get(answer.key)) is None or mine.missing]
        if new:
            for settings in other.settings.values():
                store.add_settings(settings)
            store.add(new)
            log.info("%d answers taken over from %s", len(new), path.name)
