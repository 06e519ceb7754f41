"""Answers that need no second generation: those of requests on which a gated defence stays closed.

A defence whose gates stay closed on a request gives the undefended answer (:mod:`care_lens.repair.opening`). Where the store has that answer
with its tokens, one forward pass over request and answer says for which requests a gate opens, for any number of defences at once; the
other answers are taken over. What a generation without a defence was told to look for is known already.
"""

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from care_lens.core.defence import defended
from care_lens.core.examples import Example
from care_lens.core.identity import repair_fingerprint
from care_lens.core.outcome import Repair
from care_lens.evaluation.store import GenerationStore, StoredAnswer
from care_lens.lvlm.hooked import HookedLVLM
from care_lens.lvlm.inputs import LVLMInputs
from care_lens.repair.opening import Gated, Watch, which_open

logger = logging.getLogger(__name__)


class Looking(NamedTuple):
    """A defence whose gates are read on undefended passes, and the digest it is known by."""

    defence: Gated
    fingerprint: str


def looking(defences: Sequence[Repair | None]) -> list[Looking]:
    """Those of the defences that can say which requests they touch, each once."""
    made = [Looking(d, repair_fingerprint(d)) for d in defences if isinstance(d, Gated) and _may_close(d)]
    return list({one.fingerprint: one for one in made}.values())


def _may_close(defence: Repair) -> bool:
    """Whether a defence can say which requests it touches; what has ``gated`` says by it that it touches all."""
    return isinstance(defence, Gated) and bool(getattr(defence, "gated", True))


def watches(lvlm: HookedLVLM, inputs: LVLMInputs, defences: Sequence[Looking]) -> list[tuple[Looking, Watch]]:
    """The hooks of the defences for a batch; those that touch every request are left out."""
    made = [(one, one.defence.watch(lvlm, inputs)) for one in defences]
    return [(one, watch) for one, watch in made if watch is not None]


def unopened(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    repair: Repair,
    others: Sequence[Repair | None],
    *,
    store: GenerationStore,
    undefended: str,
    seed: int,
) -> list[StoredAnswer | None]:
    """The undefended answers of a batch for the examples on which a defence stays closed.

    Args:
        lvlm: The model, without the defence on it.
        examples: A batch.
        repair: The defence.
        others: Defences that will be asked for the same examples, which the same pass is for.
        store: Where undefended answers are, and what is known of gates.
        undefended: Digest of the settings of the undefended answers.
        seed: Of the undefended answers.

    Returns:
        One for each example; None where the answer must be generated with the defence on.
    """
    found: list[StoredAnswer | None] = [None] * len(examples)
    if not _may_close(repair) or lvlm.acting():
        return found
    held = [store.undefended(undefended, example, seed) for example in examples]
    there = [(i, answer) for i, answer in enumerate(held) if answer is not None and answer.token_ids]
    if not there:
        return found
    (this,) = looking([repair])
    if unknown := [(i, answer) for i, answer in there if store.touched(this.fingerprint, answer) is None]:
        answers = [answer for _, answer in unknown]
        more = [one for one in looking(others) if any(store.touched(one.fingerprint, a) is None for a in answers)]
        asked = list({one.fingerprint: one for one in (this, *more)}.values())
        _read(lvlm, [examples[i] for i, _ in unknown], answers, asked, store)
    with repair.on(lvlm) if hasattr(repair, "examples") else nullcontext():
        same = [a is b or a == b for a, b in zip(defended(repair, examples), examples, strict=True)]
    for i, answer in there:
        if same[i] and store.touched(this.fingerprint, answer) is False:
            found[i] = answer
    return found


def _read(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    answers: Sequence[StoredAnswer],
    asked: Sequence[Looking],
    store: GenerationStore,
) -> None:
    """Note for each answer which defences would have touched it; halves of the batch where that fails."""
    try:
        found: Any = which_open(
            [one.defence for one in asked],
            lvlm,
            lvlm.prepare(examples),
            [answer.token_ids for answer in answers],
        )
    except Exception as error:
        if len(examples) > 1:
            half = len(examples) // 2
            _read(lvlm, examples[:half], answers[:half], asked, store)
            _read(lvlm, examples[half:], answers[half:], asked, store)
            return
        logger.info("gates on example %r could not be read beside the model (%s): it is run", examples[0].id, error)
        found = [[True]] * len(asked)
    for one, rows in zip(asked, found, strict=True):
        for answer, touched in zip(answers, rows, strict=True):
            store.note_touched(one.fingerprint, answer, bool(touched))
