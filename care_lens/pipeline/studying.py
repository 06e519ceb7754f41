"""A study out of benchmark files, in order: read, join, answer, write.

made = make_study(lvlm, ["FigStep/data", "xstest=XSTest"], "my_study", name="mine", comply=["Sure"], refuse=["I'm sorry"])
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example
from care_lens.core.files import in_use, swept
from care_lens.core.outcome import UnsafeMargin
from care_lens.core.processes import Process
from care_lens.data.answers import REFUSAL
from care_lens.data.benchmarks import READERS, Benchmark
from care_lens.data.benchmarks.own import OwnExamples
from care_lens.data.directory import outcome_of, write_study
from care_lens.data.joining import limited
from care_lens.data.jsonl import read_examples
from care_lens.data.preflight import benchmarks_in
from care_lens.data.study import Study, StudyError
from care_lens.evaluation import AnswerNotes, GenerationSettings, SubstringRefusalJudge, answered_study
from care_lens.lvlm import HookedLVLM

log = logging.getLogger(__name__)

COMPLY = ("Sure", "Of", "Certainly", "Yes", "Absolutely", "Here", "To", "1")
"""First words of compliant answers."""
REFUSE = ("I", "Sorry", "Unfortunately", "My", "As", "No")
"""First words of refusals."""


class SourceError(CareLensError, ValueError):
    """A benchmark cannot be taken into a study; the message says which and why."""


@dataclass(frozen=True)
class MadeStudy:
    """What :func:`make_study` made.

    Attributes:
        study: The study, as it is read from the folder; its judge is refusal substrings.
        folder: Where it is.
        notes: What was found out about the model's answers.
        problems: Rows of the benchmarks that give no example, by benchmark.
    """

    study: Study
    folder: Path
    notes: AnswerNotes
    problems: dict[str, int]


def read_source(source: str | Path, *, options: dict[str, Any] | None = None) -> Benchmark | list[Example]:
    """The benchmark of a folder, zip or table, or the examples of a jsonl file of one's own.

    Args:
        source: A path, or "NAME=PATH" with the name of a reader (:data:`care_lens.data.benchmarks.READERS`), which is found out otherwise.
            A jsonl file that no benchmark has, or a folder with ``examples.jsonl``, is read by :func:`~care_lens.data.read_examples`.
        options: Of the reader.

    Raises:
        SourceError: If no benchmark or several are found there, or the name is none. It is a ValueError.
        BenchmarkError: If its files cannot be read.
        DataFileError: If a file of one's own is not as it must be. It is a ValueError.
    """
    name, _, path = str(source).partition("=")
    if not path:
        name, path = "", str(source)
    if name and name not in READERS:
        raise SourceError(f"the benchmark of {source!r} must be one of {sorted(READERS)}, got {name!r}")
    if not name:
        found = benchmarks_in(path)
        own = Path(path) / "examples.jsonl" if Path(path).is_dir() else Path(path)
        if found in ([], [OwnExamples.name]) and own.suffix == ".jsonl" and own.is_file():
            return read_examples(own)
        if len(found) != 1 or found[0] not in READERS:
            raise SourceError(
                f"{path} must hold one benchmark, got {found or 'none that is known'}; say which as NAME={path}, with a name out of "
                f"{sorted(READERS)}"
            )
        name = found[0]
    return READERS[name](path, **(options or {}))


def make_study(
    lvlm: HookedLVLM,
    sources: Sequence[str | Path | Sequence[Example]] | Mapping[str, Sequence[Example]],
    out: str | Path,
    *,
    name: str,
    comply: Sequence[str] = COMPLY,
    refuse: Sequence[str] = REFUSE,
    limit: int | None = None,
    held_out: Sequence[str] | None = None,
    held_templates: float = 0.3,
    pairs: int = 32,
    settings: GenerationSettings | None = None,
    batch_size: int = 8,
    seed: int = 0,
    process: Process | None = None,
    progress: bool = True,
    **options: Any,
) -> MadeStudy | None:
    """A study of several benchmarks in a folder that ``care-lens run --study`` takes.

    Args:
        lvlm: The model that answers harmless requests.
        sources: Benchmarks as of :func:`read_source`, or examples; or such that are read, by what they are to be called.
        out: The folder; answers are kept in ``OUT/answers``, so that a stopped call goes on.
        name: For the report.
        comply: Openings of compliant answers, whose first tokens make the unsafe margin.
        refuse: Openings of refusals.
        limit: At most so many examples a channel.
        held_out: Attack channels or benchmarks that the fit may not use. None: the attack channel with the fewest examples, if there
            are three or more.
        held_templates: Share of each channel's jailbreak templates that the test split alone has.
        pairs: Pairs a channel for mediation.
        settings: Of generation.
        batch_size: Examples at a time.
        seed: Of the deal and the answers.
        process: Which process of a job this is; None: as the environment says.
        progress: Whether to show progress bars.
        **options: Of :func:`care_lens.evaluation.with_answers`: harmful, benign, refusals, compliances, max_missing.

    Returns:
        The study; None in processes other than the first.

    Raises:
        SourceError: If a source cannot be taken.
        StudyError: If the examples make no study. It is a ValueError.
        DataFileError: If comply and refuse begin with one token. It is a ValueError.
    """
    process, out = process or Process.current(), Path(out)
    outcome = outcome_of(lvlm.tokenizer, comply, refuse)
    taken: list[Sequence[Example]] = []
    problems: dict[str, int] = {}
    for source in sources.values() if isinstance(sources, Mapping) else sources:
        rows = read_source(source) if isinstance(source, (str, Path)) else source
        taken.append(limited(list(rows), limit))
        if isinstance(rows, Benchmark):
            problems[rows.name] = len(rows.problems)
    study = joined(
        taken, name=name, outcome=outcome, held_out=held_out, held_templates=held_templates, pairs=pairs, seed=seed
    )
    study, notes = answered_study(
        lvlm,
        study,
        directory=out / "answers",
        settings=settings,
        batch_size=batch_size,
        seed=seed,
        process=process,
        progress=progress,
        **options,
    )
    if not process.first:
        return None
    log.info("%s", notes)
    made = {
        "sources": [str(s) if isinstance(s, (str, Path)) else "examples" for s in sources],
        "left_out_rows": problems,
        "held_out": list(study.held_out()),
        "seed": seed,
        "generation": (settings or GenerationSettings()).given(),
        "answers": {key: value for key, value in options.items() if isinstance(value, str)},
    }
    with in_use(out):
        swept(out)  # what a kill has left; the other processes have finished their part
        write_study(study, out, comply=comply, refuse=refuse, made=made)
    return MadeStudy(study, out, notes, problems)


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Nothing below an error is logged by a part of the package."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _require_usable(study: Study) -> None:
    """Refuse a study that no answers would make whole, before any are generated.

    Raises:
        SourceError: Naming what the sources lack, and which benchmarks have it.
    """
    filled = {
        split: {c: tuple(replace(e, response="") for e in some) for c, some in channels.items()}
        for split, channels in study.suites.items()
    }
    try:
        replace(study, suites=filled, pairs={}).require()
    except StudyError as error:
        raise SourceError(
            f"sources must make a study with attacks, plain and harmless requests in each split; {error}. Attacks come with figstep, "
            "jailbreakv, mmsafetybench and others, harmless requests with xstest, orbench, mossbench, mmvet, mmbench, scienceqa, vqav2 and cococaptions, plain ones with advbench, jailbreakbench, redteam2k, xstest, "
            "and with attacks that state their behaviour (figstep, jailbreakv, mmsafetybench); give more of them, or a larger --limit"
        ) from None


def joined(
    sources: Sequence[Sequence[Example]],
    *,
    name: str,
    outcome: UnsafeMargin,
    held_out: Sequence[str] | None = None,
    held_templates: float = 0.3,
    pairs: int = 32,
    seed: int = 0,
) -> Study:
    """The study of some benchmarks, not answered yet; see :func:`make_study`, whose arguments these are."""
    common: dict[str, Any] = {
        "name": name, "judge": SubstringRefusalJudge(), "outcome": outcome, "refusal": REFUSAL, "twins": True,
        "held_templates": held_templates, "pairs": pairs, "seed": seed,
    }  # fmt: skip
    with _unlogged("care_lens.data"):  # it says the same of the study that is taken
        study = Study.from_examples(sources, **{**common, "pairs": 0})
    seen = [c for channels in study.seen.values() for c in channels]
    if held_out is None and len(seen) >= 3:
        counts = {c: sum(len(study.suites[s].get(c, ())) for s in study.suites) for c in seen}
        held_out = [min(seen, key=lambda c: (counts[c], c))]
    thin = [c for c in seen if any(not study.suites[s].get(c) for s in ("fit", "validation", "test"))]
    if thin := [c for c in thin if c not in (held_out or ())]:
        log.warning("%s: too few behaviours for fit, validation and test, and so held out: %s", name, ", ".join(thin))
    study = Study.from_examples(sources, held_out=[*(held_out or ()), *thin], **common)
    _require_usable(study)
    seen = [c for channels in study.seen.values() for c in channels]
    about = f"Attacks that the fit uses: {', '.join(seen) or 'none'}; held out of it: {', '.join(study.held_out()) or 'none'}."
    if not study.held_out():
        log.warning("%s: no attack is held out of the fit, so that nothing is said about new ones", name)
    return replace(study, about=about)
