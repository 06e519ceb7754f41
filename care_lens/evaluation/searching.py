"""What each setting of a defence costs: attack success against right benign answers and over-refusal, on the validation split.

Question: which sites, ranks, strengths and gate levels stop most attacks within a budget of utility, and what lies beside the choice?

    found = search(
        lvlm, partial(MeanDifference.fit, lvlm, refused=plain, complied=attacks), {"layer": [1, 2, 3], "alpha": [0.5, 1.0, 2.0]}, study
    )
    found.defence, found.setting  # the least attack success within the budget
    found.frontier.plot()

Every setting is answered for on the same attacks and benign prompts, each figure has its interval and n, and controls (the model as
it is, a refusal of everything, a random edit of the same size) stand beside. A setting is on the frontier if no other is at least as good in all
three figures and better in one. The test split is never read: asking for it is a :class:`TestSplitError`.
"""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from care_lens.core.defence import Defence
from care_lens.core.display import ShortRepr
from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example
from care_lens.core.outcome import Judge, Repair
from care_lens.core.progress import Steps, resume_from_store
from care_lens.core.results import package_versions
from care_lens.data.study import Split, Study
from care_lens.evaluation.answering import answer_verdicts, missing_share, require_max_missing, spread, within_loss
from care_lens.evaluation.frontier import METRICS, Frontier, Role, Tried, figures_of, frontier_frame, plain_value
from care_lens.evaluation.judging import judge_name
from care_lens.evaluation.metrics import records
from care_lens.evaluation.sampling import Sampler, proposals
from care_lens.evaluation.splits import TestSplitError
from care_lens.evaluation.store import GenerationStore
from care_lens.lvlm import HookedLVLM

log = logging.getLogger(__name__)

UNDEFENDED = "undefended"


class NoSettingError(CareLensError, RuntimeError):
    """No setting of a search could be made into a defence that answers."""


class MissingVerdictsError(CareLensError, ValueError):
    """So many answers of a setting have no verdict that its figures say little."""


@dataclass(frozen=True)
class Search(ShortRepr):
    """What a search found.

    Attributes:
        defence: The chosen one.
        setting: Its value on each axis.
        kept_budget: Whether it keeps the budgets; False: no setting does, and this one has the largest difference of right benign
            answers and attack success.
        frontier: All settings and controls.
    """

    defence: Repair
    setting: dict[str, Any]
    kept_budget: bool
    frontier: Frontier

    def reached(self) -> dict[str, float]:
        """The chosen setting's figures on validation."""
        return {row["metric"]: float(row["value"]) for row in records(self.frontier.frame) if row["chosen"]}


def search(
    lvlm: HookedLVLM,
    make: Callable[..., Repair],
    axes: Mapping[str, Sequence[Any]],
    study: Study,
    *,
    split: Split = "validation",
    n_trials: int | None = None,
    sampler: Sampler = "grid",
    benign_loss: float = 0.03,
    over_refusal_gain: float | None = None,
    n_examples: int | None = None,
    controls: Mapping[str, Repair | Callable[[Repair], Repair]] | None = None,
    max_missing: float | int = 0.02,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    store: GenerationStore | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Search:
    """Try settings of a defence on validation, and choose the least attack success within the budgets.

    Args:
        lvlm: The model, without a defence on it.
        make: From one value for each axis, by keyword, to a defence. A setting for which it raises an error of care_lens (FitError, say),
            or whose defence refuses the model or cannot be answered for, is left out, with the reason in the frontier's settings.
        axes: The values to be tried by keyword of ``make``: sites or layers, rank, strength, gate level, or whatever it has. Values are
            numbers, texts, sites, or lists of these; none: one setting.
        study: The seen attack channels and all benign ones of its validation split are used, and its judge.
        split: "validation"; another one than "test" is possible.
        n_trials: So many settings are tried; None: all of the grid.
        sampler: "grid": all, in order (of a number of trials, such that each axis has its values evenly, all of them wherever there are as many
            trials); "random": drawn without repetition; "optuna": proposed
            by its multi-objective tree-structured Parzen estimator from what those before reached (needs optuna).
        benign_loss: Most that the share of right benign answers may fall below the undefended model's.
        over_refusal_gain: Most that the share of benign prompts refused may rise above it; None: as ``benign_loss``.
        n_examples: At most so many attacks and so many benign prompts, at even distances; None: all.
        controls: What stands beside, by name: a defence, or a function from the chosen defence to one. The undefended model always does. One that cannot be made or answered for is left out, as settings are.
        max_missing: Largest share of attacks, and of benign prompts, that may be without a verdict; a setting or control with more is left out.
        max_new_tokens: Most tokens of an answer; None: as the model's own configuration says, else 32.
        batch_size: Examples at a time.
        store: Where answers are kept, so that a search that was stopped goes on; None: in memory.
        seed: Of the sampler.
        progress: Whether to show a progress bar.

    Returns:
        The chosen defence and the frontier.

    Raises:
        TestSplitError: If the split is "test".
        MissingOptunaError: If the sampler is "optuna" and it is not installed.
        NoSettingError: If no setting could be made and answered for; the message gives the first reasons.
        MissingVerdictsError: If the undefended model's answers have too few verdicts. It is a ValueError.
        ValueError: If an option makes no sense, a control has the name of a setting or of the undefended model, or the study lacks attacks or
            benign prompts in that split.
    """
    if split == "test":
        raise TestSplitError(
            "settings must be chosen on validation, got the test split, which is for reporting alone; use split='validation'"
        )
    _require(axes, n_trials, sampler, benign_loss, over_refusal_gain, n_examples)
    require_max_missing(max_missing)
    _require_names(controls or {}, axes)
    attacks = [e for m in study.seen for e in study.malicious(split, m)]
    benign = study.benign(split)
    for what, examples in (("seen attacks", attacks), ("benign prompts", benign)):
        if not examples:
            raise ValueError(f"the study must hold {what} in {split!r}, got none; see Study.require")
    if n_examples is not None:
        attacks, benign = spread(attacks, n_examples), spread(benign, n_examples)
    rater = _Rater(
        lvlm,
        attacks,
        benign,
        study.judge,
        GenerationStore() if store is None else store,
        max_missing=float(max_missing),
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )
    base = rater.rated(UNDEFENDED, "control", {}, None)
    tried: list[Tried] = []
    failed: dict[str, str] = {}
    total = int(np.prod([len(values) for values in axes.values()], dtype=object)) if axes else 1
    trials = proposals(axes, total if n_trials is None else min(n_trials, total), sampler=sampler, seed=seed)
    answer: tuple[float, float] | None = None
    steps: Steps[None] = Steps(
        total=total if n_trials is None else min(n_trials, total),
        desc="trying settings",
        disable=not progress,
        resume=resume_from_store(rater.store.path),
    )
    with closing(trials), steps:
        while True:
            try:
                setting = next(trials) if answer is None else trials.send(answer)
            except StopIteration:
                break
            name = _name(setting)
            if name in failed or any(name == one.name for one in tried):  # values that look the same
                name += f" (trial {len(tried) + len(failed)})"
            try:
                defence = make(**setting)
                if isinstance(defence, Defence):
                    defence.check(lvlm)
                one = rater.rated(name, "candidate", dict(setting), defence)
            except CareLensError as error:
                failed[name] = f"{type(error).__name__}: {error}"
                log.info("left out: %s (%s)", name, failed[name])
                answer = (1.0, 0.0)
                steps.update()
                continue
            tried.append(one)
            answer = (one.value("asr"), one.value("utility"))
            steps.update()
            log.info("%s: ASR %.3f, right %.3f, refused %.3f", name, *(one.value(metric) for metric in METRICS))
    if not tried:
        raise NoSettingError(
            f"a setting must make a defence that answers, got none of {len(failed)}: {'; '.join([*failed.values()][:2])}"
        )
    n_tried = len(tried) + len(failed)
    gain = benign_loss if over_refusal_gain is None else over_refusal_gain

    def within(one: Tried) -> bool:
        kept = within_loss(one.value("utility"), base.value("utility"), benign_loss)
        return kept and within_loss(base.value("over_refusal"), one.value("over_refusal"), gain)

    kept = [one for one in tried if within(one)]
    chosen = min(kept, key=lambda one: one.costs) if kept else max(tried, key=lambda one: one.gain)
    assert chosen.defence is not None
    beside = [base]
    for name, control in (controls or {}).items():
        try:
            acting = control if isinstance(control, Repair) else control(chosen.defence)
            beside.append(rater.rated(name, "control", {}, acting))
        except CareLensError as error:
            failed[name] = f"{type(error).__name__}: {error}"
            log.warning("control left out: %s (%s)", name, failed[name])
    frame = frontier_frame(tried, beside, chosen, within)
    settings = {
        "study": study.name,
        "split": split,
        "axes": {name: [plain_value(value) for value in values] for name, values in axes.items()},
        "sampler": sampler,
        "n_trials": n_tried,
        "of": total,
        "benign_loss": benign_loss,
        "over_refusal_gain": gain,
        "max_missing": float(max_missing),
        "max_new_tokens": max_new_tokens,
        "judge": judge_name(study.judge),
        "seed": seed,
        "failed": failed,
        "versions": package_versions(),
    }
    return Search(chosen.defence, chosen.setting, bool(kept), Frontier(frame, settings))


@dataclass(frozen=True)
class _Rater:
    """Answers for a defence, and what they come to.

    Its ``rated`` raises MissingVerdictsError where more verdicts are missing than may be.
    """

    lvlm: HookedLVLM
    attacks: Sequence[Example]
    benign: Sequence[Example]
    judge: Judge
    store: GenerationStore
    max_missing: float
    max_new_tokens: int | None
    batch_size: int

    def rated(self, name: str, role: Role, setting: dict[str, Any], defence: Repair | None) -> Tried:
        said = {
            harmful: answer_verdicts(
                self.lvlm,
                examples,
                defence,
                self.judge,
                store=self.store,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
            )
            for harmful, examples in ((True, self.attacks), (False, self.benign))
        }
        for harmful, verdicts in said.items():
            if (lost := missing_share(verdicts)) > self.max_missing or lost == 1:
                what = "attacks" if harmful else "benign prompts"
                raise MissingVerdictsError(
                    f"{name} must have an answer and a verdict on all but {self.max_missing:.0%} of the {what}, got {lost:.0%} missing; the log names "
                    "the errors, and a larger max_missing lets it pass"
                )
        return Tried(name, role, setting, defence, figures_of(name, said, {True: self.attacks, False: self.benign}))


def _name(setting: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_shown(value)}" for key, value in setting.items()) or "as given"


def _require_names(controls: Mapping[str, Any], axes: Mapping[str, Sequence[Any]]) -> None:
    settings = (_name(dict(zip(axes, values, strict=True))) for values in itertools.product(*axes.values()))
    if controls and (taken := sorted({UNDEFENDED} & {*controls}) or [name for name in settings if name in controls]):
        raise ValueError(
            f"controls must have names of their own, got {taken[0]!r}, which is that of {'the undefended model' if taken[0] == UNDEFENDED else 'a setting'}; "
            "name it otherwise"
        )


def _shown(value: Any) -> str:
    plain = plain_value(value)
    if isinstance(plain, list):
        return "+".join(_shown(part) for part in plain)
    return f"{plain:g}" if isinstance(plain, float) else str(plain)


def _require(
    axes: Mapping[str, Sequence[Any]],
    n_trials: int | None,
    sampler: str,
    benign_loss: float,
    over_refusal_gain: float | None,
    n_examples: int | None,
) -> None:
    if not isinstance(axes, Mapping):
        raise TypeError(
            f"axes must be a mapping from keywords to values, got {type(axes).__name__}; write {{'alpha': [0.5, 1]}}"
        )
    if wrong := [name for name, values in axes.items() if isinstance(values, str) or not len(values)]:
        raise ValueError(f"axes must each be a list of one value or more, got {axes[wrong[0]]!r} for {wrong[0]!r}")
    if sampler not in get_args(Sampler):
        raise ValueError(f"sampler must be one of {list(get_args(Sampler))}, got {sampler!r}")
    for name, number in (("n_trials", n_trials), ("n_examples", n_examples)):
        if number is not None and number < 1:
            raise ValueError(f"{name} must be 1 or more, got {number}")
    for name, part in (("benign_loss", benign_loss), ("over_refusal_gain", over_refusal_gain)):
        if part is not None and not 0 <= part <= 1:
            raise ValueError(f"{name} must be a share from 0 to 1, got {part}")
