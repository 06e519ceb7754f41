"""Defences by channels, from generation to the table, with the same settings for safety and utility."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from care_lens.core.defence import require_defences
from care_lens.core.examples import Example
from care_lens.core.outcome import Judge, Repair, Verdict
from care_lens.core.results import package_versions
from care_lens.core.verdicts import JudgeError, require_verdicts
from care_lens.evaluation.abnormal import abnormal_trials
from care_lens.evaluation.fidelity import fidelity_trials
from care_lens.evaluation.generate import Ask, generate_several
from care_lens.evaluation.grading import Grader, graded_scores, graded_trials
from care_lens.evaluation.judging import judge_answers, judge_name, verdict_frame
from care_lens.evaluation.metrics import BENIGN_METRICS, HARMFUL_METRICS, RATES, require_options, verdict_trials
from care_lens.evaluation.settings import GenerationSettings
from care_lens.evaluation.store import GenerationStore, StoredAnswer
from care_lens.evaluation.table import DefenceTable
from care_lens.lvlm.hooked import HookedLVLM
from care_lens.repair.explaining import Explainable

Accuracy = Judge | Callable[[Sequence[Example], Sequence[str]], Sequence[bool | Verdict]]
"""What says whether benign answers are right: a judge ("complied" is right), or a function that returns
booleans."""


def evaluate(
    lvlm: HookedLVLM,
    suites: Mapping[str, Sequence[Example]],
    defences: Mapping[str, Repair | None],
    *,
    judge: Judge,
    accuracy: Accuracy | None = None,
    graders: Mapping[str, Grader] | None = None,
    ordinary: Collection[str] = (),
    store: GenerationStore | None = None,
    max_new_tokens: int | None = None,
    min_new_tokens: int | None = None,
    do_sample: bool | None = None,
    temperature: float | int | None = None,
    top_p: float | int | None = None,
    top_k: int | None = None,
    system: str | None = None,
    batch_size: int = 32,
    generation: Mapping[str, Any] | None = None,
    fidelity: bool | int = True,
    n_boot: int = 2000,
    max_missing: int | float = 0.02,
    seed: int = 0,
    progress: bool = True,
) -> DefenceTable:
    """Answer every suite under every defence, judge the answers, and put the figures in a table.

    Harmful suites get "asr" and "refusal", benign ones "accuracy" and "refusal" (over-refusal) and, for each
    defence beside the undefended model, "agreement", "retained", "kl" and "kl_answer" on the prompts that the
    undefended model answers rightly. One set of generation settings holds for all suites.

    Args:
        lvlm: The model.
        suites: Examples by channel; those of a channel are all harmful or all benign, with different ids.
        defences: Defences by name; None is the model as it is.
        judge: Judge of harmful answers, and of refusals everywhere.
        accuracy: What says whether a benign answer is right; None: the judge, which must then know right
            answers (one that only looks for refusals does not).
        graders: Graders by benign channel (:mod:`care_lens.evaluation.graders`); such a channel has the grader's metric in place of "accuracy", and an answer is
            right for fidelity if its score is 1. Of a grader whose metric is no share (captions) no answer is known to be right, and there is no fidelity.
        ordinary: Benign channels of ordinary requests, which get "sarr" too: the share of abnormal answers.
        store: Where answers are kept, so that a rerun generates only what is missing; None: in memory.
        max_new_tokens: Most tokens of an answer; None: as ``generation`` or the model's own configuration says, else 32.
        min_new_tokens: Least tokens of an answer; this and the four below: None: as ``generation`` or the model's own configuration says.
        do_sample: Whether to sample.
        temperature: Of the samples.
        top_p: Share of the probability that is sampled from.
        top_k: Number of tokens that are sampled from.
        system: System prompt of the examples that have none of their own.
        batch_size: Examples at a time.
        generation: Further options of Hugging Face's ``generate``.
        fidelity: Whether to measure fidelity in benign suites; a number: on at most so many examples a suite, at even
            distances. One defence must then be None.
        n_boot: Resamples of bootstrapped intervals.
        max_missing: Largest share of missing answers in a cell.
        seed: Seed of generation (where it samples) and of the bootstrap.
        progress: Whether to show progress bars.

    Returns:
        The table; its settings hold the digests of the generation settings in the store.

    Raises:
        ValueError: If suites or defences are empty, a suite mixes harmful and benign examples, fidelity is
            wanted without an undefended model, or a grader or ``ordinary`` names no benign suite.
        TooManyMissingError: If more answers failed than ``max_missing`` allows.
    """
    require_options(n_boot, max_missing)
    if fidelity < 0:
        raise ValueError(f"fidelity must be True, False or a number of examples from 0, got {fidelity}")
    require_defences(defences)
    for one in (judge, accuracy, *(graders or {}).values()):
        if isinstance(one, type):
            raise JudgeError(
                f"a judge or grader must be an object, got the class {one.__name__}; write {one.__name__}()"
            )
    for repair in defences.values():  # before any answer is generated
        if isinstance(repair, Explainable) and callable(check := getattr(repair, "check", None)):
            check(lvlm)
    benign = _benign_channels(suites)
    base = next((name for name, repair in defences.items() if repair is None), None)
    if not defences or (fidelity and benign and base is None):
        raise ValueError(
            f"defences must include the undefended model (None), got {list(defences)}; add it, or set fidelity=False"
        )
    graders = dict(graders or {})
    if unknown := sorted({*graders, *ordinary} - {*benign}):
        raise ValueError(f"graders and ordinary must name benign suites, some of {benign}, got {unknown}")
    options = GenerationSettings(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        system=system,
    )
    store = GenerationStore() if store is None else store
    examples = [replace(example, channel=channel) for channel, suite in suites.items() for example in suite]
    examples = options.examples(examples)
    run = _Judged(examples, judge, judge if accuracy is None else accuracy, set(benign), graders)
    made: dict[str, list[StoredAnswer]] = {}
    # The undefended model first: its answers are those of every request on which a gate stays closed.
    for there in (True, False):
        names = [name for name, repair in defences.items() if (repair is None) is there]
        answers = generate_several(
            lvlm,
            [Ask(examples, name, defences[name]) for name in names],
            store=store,
            batch_size=batch_size,
            generation=options.options(generation),
            seed=seed,
            progress=progress,
            watched=list(defences.values()),
        )
        made |= dict(zip(names, answers, strict=True))
    for name in defences:
        run.answers[name] = made[name]
        run.judge(name)
    trials = [run.trials(), *run.abnormal(ordinary)]
    if fidelity and benign and base is not None:
        measured = _measured(examples, benign, fidelity)
        for name in dict.fromkeys(run.truth_of(channel) for channel in benign):
            keep = [i for i in measured if run.truth_of(examples[i].channel) == name]
            trials.append(
                fidelity_trials(
                    lvlm,
                    [examples[i] for i in keep],
                    {name: [answers[i] for i in keep] for name, answers in run.answers.items()},
                    {name: [verdicts[i] for i in keep] for name, verdicts in run.right.items()},
                    repairs={name: repair for name, repair in defences.items() if repair is not None},
                    base=base,
                    judge=name,
                    batch_size=batch_size,
                    progress=progress,
                )
            )
    settings = {
        "channels": {channel: len(suite) for channel, suite in suites.items()},
        "benign": benign,
        "defences": {name: None if repair is None else repair.describe() for name, repair in defences.items()},
        "judge": judge_name(judge),
        "accuracy": run.accuracy_name,
        **({"graders": {channel: grader.name for channel, grader in graders.items()}} if graders else {}),
        **({"ordinary": sorted(ordinary)} if ordinary else {}),
        **({"system": system} if system is not None else {}),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "generation": sorted({answer.settings for answers in run.answers.values() for answer in answers}),
        "versions": package_versions(),
    }
    return DefenceTable.from_trials(
        pd.concat([part for part in trials if len(part)], ignore_index=True),
        settings=settings,
        n_boot=n_boot,
        seed=seed,
        max_missing=max_missing,
    )


def _measured(examples: Sequence[Example], benign: Sequence[str], fidelity: bool | int) -> list[int]:
    """Indices of the examples whose fidelity is measured."""
    keep = []
    for channel in benign:
        here = [i for i, example in enumerate(examples) if example.channel == channel]
        n = len(here) if fidelity is True else min(int(fidelity), len(here))
        keep += [here[k * len(here) // n] for k in range(n)]
    return keep


class _Judged:
    """Answers and what the judges say of them, by defence."""

    def __init__(
        self,
        examples: list[Example],
        judge: Judge,
        accuracy: Accuracy,
        benign: set[str],
        graders: Mapping[str, Grader],
    ) -> None:
        self.examples, self._judge, self._accuracy, self._benign = examples, judge, accuracy, benign
        self._graders, self._graded = graders, list[pd.DataFrame]()
        self.judge_name, self.accuracy_name = judge_name(judge), judge_name(accuracy)
        self.answers: dict[str, list[StoredAnswer]] = {}
        self.verdicts: dict[str, list[Verdict]] = {}
        self.right: dict[str, list[Verdict]] = {}

    def judge(self, defence: str) -> None:
        """Judge the answers under a defence; whether they are right is asked of benign ones only."""
        answers = self.answers[defence]
        verdicts = judge_answers(answers, self._judge, examples=self.examples)
        self.verdicts[defence] = self.right[defence] = verdicts
        if self._accuracy is not self._judge:
            known = self._benign - {*self._graders}
            keep = [i for i, example in enumerate(self.examples) if example.channel in known]
            asked = [self.examples[i] for i in keep]
            said = judge_answers([answers[i] for i in keep], self._as_judge, examples=asked) if keep else []
            self.right[defence] = list(verdicts)
            for i, verdict in zip(keep, said, strict=True):
                self.right[defence][i] = verdict
        if self._graders:
            self.right[defence] = list(self.right[defence])
        for channel, grader in self._graders.items():
            self._grade(defence, channel, grader)

    def truth_of(self, channel: str) -> str:
        """The name of what says whether answers of a benign channel are right."""
        return self._graders[channel].name if channel in self._graders else self.accuracy_name

    def _grade(self, defence: str, channel: str, grader: Grader) -> None:
        keep = [i for i, example in enumerate(self.examples) if example.channel == channel]
        answers, asked = [self.answers[defence][i] for i in keep], [self.examples[i] for i in keep]
        scores = graded_scores(grader, answers, asked)
        self._graded.append(graded_trials(grader, answers, examples=asked, scores=scores))
        share = grader.metric in RATES  # 1 says right of a share alone: CIDEr-D, say, goes to 10
        for i, score in zip(keep, scores, strict=True):
            self.right[defence][i] = (
                Verdict.MISSING if score != score or not share else Verdict.COMPLIED if score >= 1 else Verdict.OTHER
            )

    def abnormal(self, ordinary: Collection[str]) -> list[pd.DataFrame]:
        """Trials of "sarr" in ordinary channels."""
        keep = [i for i, example in enumerate(self.examples) if example.channel in ordinary]
        asked = [self.examples[i] for i in keep]
        return [
            abnormal_trials([answers[i] for i in keep], self._judge, examples=asked)
            for answers in self.answers.values()
            if keep
        ]

    def trials(self) -> pd.DataFrame:
        """Trials of all answers."""
        parts = []
        for name, answers in self.answers.items():
            for benign, metrics in ((False, HARMFUL_METRICS), (True, BENIGN_METRICS)):
                keep = [i for i, answer in enumerate(answers) if (answer.channel in self._benign) is benign]
                for metric, counted in metrics.items():
                    right = metric == "accuracy"
                    chosen = [i for i in keep if not (right and answers[i].channel in self._graders)]
                    verdicts = (self.right if right else self.verdicts)[name]
                    judge = self.accuracy_name if right else self.judge_name
                    frame = verdict_frame([answers[i] for i in chosen], [verdicts[i] for i in chosen], judge)
                    parts.append(verdict_trials(frame, metrics={metric: counted}))
        parts += self._graded
        return pd.concat([part for part in parts if len(part)], ignore_index=True)

    def _as_judge(self, examples: Sequence[Example], texts: Sequence[str]) -> list[Verdict]:
        return require_verdicts(self._accuracy(examples, texts), len(texts), judge=self.accuracy_name, yes_no=True)


def _benign_channels(suites: Mapping[str, Sequence[Example]]) -> list[str]:
    if not suites or any(not suite for suite in suites.values()):
        sizes = {name: len(suite) for name, suite in suites.items()}
        raise ValueError(f"suites must each hold an example, got {sizes}")
    for name, suite in suites.items():
        if len({example.harmful for example in suite}) != 1:
            raise ValueError(f"suite {name!r} must be all harmful or all benign, got both; split it in two")
    return [name for name, suite in suites.items() if not suite[0].harmful]
