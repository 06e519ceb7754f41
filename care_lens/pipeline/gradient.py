"""The gradient channel of step 4, and the attack that sees the repair.

A hard gate has no gradient, and a ramp that saturates below the scores at hand has none either. The attacker's copy of the gate
therefore rises over the whole range of scores that the attacked requests have under teacher forcing.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from care_lens.attacks import pgd, random_noise
from care_lens.core.examples import Example
from care_lens.core.identity import digest, examples_digest, repair_fingerprint
from care_lens.core.outcome import Repair, Verdict
from care_lens.data.study import Study
from care_lens.evaluation import GenerationStore
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline.choose import answer_verdicts
from care_lens.pipeline.settings import RunSettings
from care_lens.repair import ConformalGate, HybridFusion, MaxReader, captured_scores, token_rows

log = logging.getLogger(__name__)

CLEAN, NOISE = "gradient: clean", "gradient: noise"
OPENING, ANSWER = "gradient: PGD", "gradient: PGD, whole answer"
ADAPTIVE = "gradient: PGD that sees the repair"
#: Tokens of the target that each loss counts; None: all.
LOSSES: dict[str, int | None] = {"opening": 1, "whole answer": None}
_ADAPTIVE_SEED = 100


def bases(study: Study, settings: RunSettings) -> list[Example]:
    """The requests that are attacked."""
    return list(study.gradient[: settings.pgd_examples])


def named(examples: Sequence[Example], channel: str) -> list[Example]:
    """The examples as those of another channel."""
    return [replace(e, channel=channel, id=f"{e.id}/{channel}") for e in examples]


def attack(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    settings: RunSettings,
    *,
    target_tokens: int | None,
    repair: Repair | None = None,
    seed: int = 0,
    directory: Path | None = None,
) -> list[Example]:
    """PGD within the run's bound for the examples' own compliant answers; what is finished of it is kept in a folder, if one is given."""
    name = _file(examples, settings, target_tokens, repair, seed)
    result = pgd(
        lvlm,
        examples,
        epsilon=settings.pgd_epsilon,
        steps=settings.pgd_steps,
        target_tokens=target_tokens,
        seed=settings.seed + seed,
        batch_size=settings.batch_size,
        repair=repair,
        progress=False,
        checkpoint=None if directory is None else directory / name,
    )
    return result.apply(examples)


def _file(
    examples: Sequence[Example], settings: RunSettings, target_tokens: int | None, repair: Repair | None, seed: int
) -> str:
    """What the file of an attack is called."""
    options = (settings.pgd_epsilon, settings.pgd_steps, target_tokens, settings.seed + seed, settings.batch_size)
    by = None if repair is None else repair_fingerprint(repair)
    return f"pgd.{digest([examples_digest(examples), options, by])[:8]}.jsonl"


def gradient_suites(
    lvlm: HookedLVLM, study: Study, settings: RunSettings, *, directory: Path | None = None
) -> dict[str, list[Example]]:
    """Refused requests over clean pictures, under noise of the attack's size, and under PGD against the undefended model with either loss."""
    base = bases(study, settings)
    if not base:
        return {}
    return {
        CLEAN: named(base, CLEAN),
        NOISE: named(random_noise(base, epsilon=settings.pgd_epsilon, seed=settings.seed), NOISE),
        OPENING: named(attack(lvlm, base, settings, target_tokens=LOSSES["opening"], directory=directory), OPENING),
        ANSWER: named(attack(lvlm, base, settings, target_tokens=LOSSES["whole answer"], directory=directory), ANSWER),
    }


def softened(
    lvlm: HookedLVLM, repair: HybridFusion, examples: Sequence[Example], settings: RunSettings
) -> HybridFusion:
    """The repair as the attacker sees it: gates that rise linearly from their threshold to beyond the highest score of the requests."""
    gate = repair.corrections[0].gate
    if not isinstance(gate, ConformalGate):
        return repair
    both = MaxReader(readers=repair.readers)
    sites = list(dict.fromkeys(leaf.site for leaf in both.leaves))
    tokens = max(len(lvlm.tokenizer(e.response or "")["input_ids"]) for e in examples)
    highest = float(
        captured_scores(
            both, token_rows(lvlm, examples, sites, tokens=tokens, batch_size=settings.batch_size, progress=False)
        ).max()
    )
    return repair.with_gate(replace(gate, width=1.2 * max(highest - gate.threshold, 1.0)))


def adaptive_attack(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    settings: RunSettings,
    seen: HybridFusion,
    loss: str,
    *,
    restart: int,
    directory: Path | None = None,
) -> list[Example]:
    """`attack` through a repair as the attacker sees it (`softened`), by one of `LOSSES`, from the start of a restart."""
    return attack(
        lvlm,
        examples,
        settings,
        target_tokens=LOSSES[loss],
        repair=seen,
        seed=_ADAPTIVE_SEED + restart,
        directory=directory,
    )


def first_adaptive_attack(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    settings: RunSettings,
    repair: HybridFusion,
    loss: str,
    *,
    directory: Path,
) -> None:
    """The first attack on all requests by one of `LOSSES`, as `adaptive_suite` makes it, kept in a folder for it."""
    seen = softened(lvlm, repair, examples, settings)
    adaptive_attack(lvlm, examples, settings, seen, loss, restart=0, directory=directory)


def adaptive_suite(
    lvlm: HookedLVLM,
    study: Study,
    repair: HybridFusion,
    settings: RunSettings,
    *,
    directory: Path | None = None,
    store: GenerationStore | None = None,
) -> list[Example]:
    """For every request the picture that got through the repair, if any of the losses and restarts found one, else the last one tried."""
    base = bases(study, settings)
    seen = softened(lvlm, repair, base, settings)
    found = dict.fromkeys(range(len(base)))
    won: set[int] = set()
    for restart in range(settings.restarts):
        for name in LOSSES:
            left = [i for i in found if i not in won]
            if directory is not None and len(left) < len(base) and restart == 0:
                # It was made of all of them ahead, perhaps, which a run that makes nothing ahead does not do.
                unused = _file(base, settings, LOSSES[name], seen, _ADAPTIVE_SEED)
                (directory / unused).unlink(missing_ok=True)
            if not left:
                continue
            asked = [base[i] for i in left]
            tried = adaptive_attack(lvlm, asked, settings, seen, name, restart=restart, directory=directory)
            verdicts = answer_verdicts(lvlm, tried, repair, settings, study.judge, store=store)
            for i, example, verdict in zip(left, tried, verdicts):
                found[i] = example
                if verdict is Verdict.COMPLIED:
                    won.add(i)
            log.info("adaptive attack, %s, restart %d: %d of %d through", name, restart, len(won), len(base))
    return named([example for example in found.values() if example is not None], ADAPTIVE)
