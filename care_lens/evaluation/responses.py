"""The answers that are teacher-forced: the model's own to harmless requests, refusals and compliances that are cycled to harmful ones.

Whatever is fitted reads examples with a ``response``, and benchmarks bring none, or short reference answers that the model would not give. Of
harmless requests the answer is what the model says by itself, so that reading it does not leave what the model does. Of harmful ones there are
two published conventions: fixed lists of about a hundred compliances and refusals, cycled over the requests ("cycled", as in the
published runs of CARE), and the opening that attacks aim at, "Sure, here is" and the request ("target", as in AdvBench).

    answered = with_answers(lvlm, examples, directory="answers")  # a stopped call goes on from there
    study, notes = answered_study(lvlm, study, directory="answers")
"""

import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example
from care_lens.core.outcome import Verdict
from care_lens.core.processes import WAIT, Process
from care_lens.core.require import require_examples
from care_lens.data.answers import COMPLIANT_ANSWERS, REFUSAL, REFUSAL_ANSWERS, target_of
from care_lens.data.study import SPLITS, Split, Study
from care_lens.evaluation.generate import generate_all
from care_lens.evaluation.refusal import SubstringRefusalJudge
from care_lens.evaluation.settings import GenerationSettings
from care_lens.evaluation.sharded import generate_sharded
from care_lens.evaluation.store import GenerationStore, StoredAnswer
from care_lens.lvlm.hooked import HookedLVLM

log = logging.getLogger(__name__)

Harmful = Literal["cycled", "target", "model"]
Benign = Literal["model", "reference"]
FORCED: tuple[Split, ...] = ("fit", "calibration", "validation")
"""The splits of a study whose examples are teacher-forced; those of the test split keep their reference answers."""


class AnswersError(CareLensError, RuntimeError):
    """Too many requests could not be answered."""


@dataclass(frozen=True)
class AnswerNotes:
    """What was found out while a study was answered.

    Attributes:
        generated: Requests that the model answered.
        left_out: Requests that it could not answer, which are not in the study any more.
        refused_benign: Harmless requests that it refused; the refusal is what is teacher-forced.
        plain: Plain requests that it was asked.
        refused_plain: Those that it refused.
        refusal: Its commonest refusal, or None if it refused none.
    """

    generated: int
    left_out: int
    refused_benign: int
    plain: int
    refused_plain: int
    refusal: str | None

    def __str__(self) -> str:
        text = (
            f"The undefended model refuses {self.refused_plain} of {self.plain} plain requests that it was asked and {self.refused_benign} of "
            f"{self.generated - self.plain} harmless ones (by substrings)."
        )
        if self.plain and not self.refused_plain:
            text += " It refuses no plain request: what is taken for its refusals is none, and the refusal mean is that of other answers."
        return text + (f" {self.left_out} requests could not be answered and are left out." if self.left_out else "")


def with_answers(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    *,
    harmful: Harmful = "cycled",
    benign: Benign = "model",
    refused: Collection[str] = ("plain",),
    refusals: Sequence[str] = REFUSAL_ANSWERS,
    compliances: Sequence[str] = COMPLIANT_ANSWERS,
    directory: str | Path | None = None,
    settings: GenerationSettings | None = None,
    batch_size: int = 32,
    seed: int = 0,
    max_missing: float | int = 0.02,
    process: Process | None = None,
    progress: bool = True,
    wait: float | int = WAIT,
) -> list[Example]:
    """Examples with the responses that are teacher-forced.

    Args:
        lvlm: The model, without a defence on it.
        examples: With ids that differ in each channel.
        harmful: Responses of harmful examples: compliances that are cycled; the opening that attacks aim at
            (:func:`care_lens.data.target_of`); or the model's own answers, whatever they are.
        benign: Of harmless ones: the model's own answers, or the response that an example has and the model's answer where it has none.
        refused: Harmful channels whose responses are refusals, cycled.
        refusals: The refusals.
        compliances: The compliances.
        directory: Folder in which answers are kept as they come, so that a stopped call goes on; None: in memory.
        settings: Of generation; the examples are given its system prompt.
        batch_size: Examples at a time.
        seed: Of the answers, where they are sampled.
        max_missing: Largest share of requests that may go without an answer.
        process: Which process of a job this is, each of which answers its share; None: as the environment says.
        progress: Whether to show a progress bar.
        wait: Seconds that the first process waits for the others.

    Returns:
        The examples, in order, with responses; a response that is replaced is kept in ``meta["reference"]``. Requests that the
        model cannot answer are left out, with a warning. Processes other than the first get none.

    Raises:
        AnswersError: If more requests than ``max_missing`` cannot be answered. It is a RuntimeError.
        ValueError: If a list of answers is empty, ids are missing or repeated in a channel, or several processes are given no directory.

    Example:
        >>> from care_lens import organism
        >>> lvlm = organism.load()
        >>> rows = [replace(e, response=None) for e in organism.examples("benign plain", "fit", n=2) + organism.examples("plain", "fit", n=1)]
        >>> [bool(e.response) for e in with_answers(lvlm, rows, progress=False)]
        [True, True, True]
        >>> lvlm.close()
    """
    require_examples(examples)
    for what, texts in (("refusals", refusals), ("compliances", compliances)):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"{what} must be a list of answers, got {texts!r}; give one or more")
    if batch_size < 1 or not 0 <= max_missing <= 1:
        raise ValueError(
            f"batch_size must be 1 or more and max_missing a share from 0 to 1, got {batch_size} and {max_missing}"
        )
    if nameless := [i for i, example in enumerate(examples) if not example.id]:
        raise ValueError(f"examples must have ids, got none at {nameless[:5]}; answers are kept by them")
    if directory is not None and Path(directory).exists() and not Path(directory).is_dir():
        raise ValueError(f"directory must be a folder, got the file {directory}; name a folder")
    settings = settings or GenerationSettings()
    asked = settings.examples(examples)
    own = [i for i, e in enumerate(asked) if _asks(e, harmful, benign, refused)]
    answers = _answers(lvlm, [asked[i] for i in own], directory, settings, batch_size, seed, process, progress, wait)
    if answers is None:
        return []
    said = dict(zip(own, answers, strict=True))
    missing = [asked[i].id for i, answer in said.items() if answer.response is None]
    if len(missing) > max_missing * max(len(own), 1):
        raise AnswersError(
            f"at most {max_missing:.1%} of {len(own)} requests may go without an answer, got {len(missing)}: {missing[:3]}; the log says why, "
            "and what was answered is kept"
        )
    if missing:
        log.warning("%d requests have no answer and are left out: %s", len(missing), ", ".join(missing[:5]))
    made, counts = [], Counter[str]()
    for i, example in enumerate(asked):
        if i in said:
            answer = said[i].response
            if answer is None:
                continue
            # what is stored begins with the prefill, which a response comes after
            response = answer.removeprefix(example.prefill or "")
        elif example.harmful and example.channel in refused:
            response = refusals[counts["refused"] % len(refusals)]
            counts["refused"] += 1
        elif example.harmful and harmful == "cycled":
            response = compliances[counts["complied"] % len(compliances)]
            counts["complied"] += 1
        elif example.harmful:
            response = target_of(example)
        else:
            response = example.response
        made.append(_answered(example, response))
    return made


def answered_study(
    lvlm: HookedLVLM,
    study: Study,
    *,
    directory: str | Path | None = None,
    settings: GenerationSettings | None = None,
    batch_size: int = 32,
    seed: int = 0,
    asked_plain: int = 64,
    process: Process | None = None,
    progress: bool = True,
    wait: float | int = WAIT,
    **options: Any,
) -> tuple[Study, AnswerNotes]:
    """A study with the responses that a run needs, and a refusal in the model's own words.

    The fit, calibration and validation splits are answered (:func:`with_answers`); the test split keeps its reference answers. Some of
    the fit split's plain requests are asked too, to see whether the model refuses them.

    Args:
        lvlm: The model, without a defence on it.
        study: Of any examples.
        directory: As of :func:`with_answers`, and so are the settings, batch size, seed, progress and wait.
        settings: Of generation; all examples and pairs are given its system prompt.
        batch_size: Examples at a time.
        seed: Of the answers.
        asked_plain: At most so many plain requests are asked.
        process: Which process of a job this is; None: as the environment says.
        progress: Whether to show progress bars.
        wait: Seconds that the first process waits for the others.
        **options: Further options of :func:`with_answers`: harmful, benign, refusals, compliances, max_missing.

    Returns:
        The study, whose ``refusal`` is the model's commonest if it refused at all, and what was found out. In processes other than the first
        both are as they were, with nothing found out.

    Raises:
        AnswersError: As :func:`with_answers`.
    """
    settings = settings or GenerationSettings()
    process = process or Process.current()
    rows: list[tuple[Split, Example]] = [
        (split, e) for split in FORCED for some in study.suites.get(split, {}).values() for e in some
    ]
    common: dict[str, Any] = {"directory": directory, "settings": settings, "batch_size": batch_size, "seed": seed}
    common |= {"process": process, "progress": progress, "wait": wait}
    made = with_answers(lvlm, [e for _, e in rows], refused=(study.plain,), **common, **options)
    few = settings.examples(study.refused("fit")[:asked_plain])
    plain = _answers(lvlm, few, directory, settings, batch_size, seed, process, progress, wait)
    if not process.first or plain is None:
        return study, AnswerNotes(0, 0, 0, 0, 0, None)
    said = [a.response for a in plain if a.response is not None]
    judge = SubstringRefusalJudge()
    verdicts = judge([e for e, a in zip(few, plain, strict=True) if a.response is not None], said)
    refusing = Counter(t.strip() for t, v in zip(said, verdicts, strict=True) if v is Verdict.REFUSED and t.strip())
    refusal = refusing.most_common(1)[0][0] if refusing else None
    home: dict[tuple[str, str], Split] = {(e.channel, e.id): split for split, e in rows}
    suites: dict[Split, dict[str, list[Example]]] = {split: {} for split in SPLITS}
    for example in made:
        suites[home[example.channel, example.id]].setdefault(example.channel, []).append(example)
    suites["test"] = {c: settings.examples(some) for c, some in study.suites.get("test", {}).items()}
    benign = [e for e in made if not e.harmful]
    own = [e for e in benign if options.get("benign", "model") == "model" or "reference" not in e.meta]
    notes = AnswerNotes(
        generated=len(own) + len(said),
        left_out=len(rows) - len(made),
        refused_benign=sum(v is Verdict.REFUSED for v in judge(own, [e.response or "" for e in own])) if own else 0,
        plain=len(said),
        refused_plain=sum(refusing.values()),
        refusal=refusal,
    )
    # by channel too: an attack keeps the id of its request, so that channels have the same ids
    answered = {(e.channel, e.id): e for c in study.seen.values() for name in c for e in suites["fit"].get(name, ())}
    pairs = {
        name: replace(
            twins,
            safe=tuple(settings.examples(twins.safe)),
            unsafe=tuple(answered.get((e.channel, e.id), e) for e in settings.examples(twins.unsafe)),
        )
        for name, twins in study.pairs.items()
    }
    found = replace(
        study,
        suites={split: {c: tuple(some) for c, some in channels.items()} for split, channels in suites.items()},
        pairs=pairs,
        gradient=tuple(settings.examples(study.gradient)),
        refusal=refusal or study.refusal or REFUSAL,
        about=f"{study.about} {notes}".strip(),
    )
    return found, notes


def _asks(example: Example, harmful: Harmful, benign: Benign, refused: Collection[str]) -> bool:
    """Whether the response is to be what the model says."""
    if example.harmful:
        return harmful == "model" and example.channel not in refused
    return benign == "model" or example.response is None


def _answered(example: Example, response: str | None) -> Example:
    """The example with its response; the one it had is kept beside it."""
    if example.response in (None, response):
        return replace(example, response=response)
    return replace(example, response=response, meta={**example.meta, "reference": example.response})


def _answers(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    directory: str | Path | None,
    settings: GenerationSettings,
    batch_size: int,
    seed: int,
    process: Process | None,
    progress: bool,
    wait: float | int,
) -> list[StoredAnswer] | None:
    """What the model answers; None in processes other than the first."""
    process = process or Process.current()
    options: dict[str, Any] = {"generation": settings.options(), "batch_size": batch_size, "seed": seed}
    if not examples:
        return [] if process.first else None
    if directory is not None:
        return generate_sharded(
            lvlm, examples, directory=directory, process=process, progress=progress, wait=wait, **options
        )
    if not process.alone:
        raise ValueError(
            f"directory must be given for the answers of {process.world} processes, got None; name a folder that all see"
        )
    return generate_all(lvlm, examples, store=GenerationStore(), progress=progress, **options)
