"""Attacks by defences: every attack made without the defence, made against it, and its controls, in one table.

An attack that did not see a defence says nothing about what the defence withstands. So each attack that searches is made once against the
undefended model, whose examples meet every defence (transfer), and once against each defence by itself (adaptive). The controls (clean
pictures, and random noise of the same size for attacks with a bound on pixels) stand beside them.

    table = attack_table(lvlm, requests, [PGD(epsilon=16), Prefill()], {"none": None, "repair": repair}, judge=study.judge)
    print(table.to_markdown(metrics=("asr",)))

Columns: "PGD" is the attack without the defence, "PGD, adaptive" the one against it. Success is counted on pictures that were saved as PNG
and read back.
"""

import inspect
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from care_lens.attacks import Clean, RandomNoise
from care_lens.attacks.common import identity, run_settings
from care_lens.core.attack import Attack, AttackResult
from care_lens.core.defence import require_defences
from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example
from care_lens.core.identity import digest
from care_lens.core.outcome import Judge, Repair
from care_lens.core.progress import Steps
from care_lens.evaluation.evaluate import evaluate
from care_lens.evaluation.store import GenerationStore
from care_lens.evaluation.table import DefenceTable
from care_lens.lvlm.hooked import HookedLVLM

ADAPTIVE = ", adaptive"
"""What is added to an attack's name where it was made against the defence of its row."""


class AttackTableError(CareLensError, ValueError):
    """Attacks or defences that do not make a table."""


def attack_table(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    attacks: Sequence[Attack],
    defences: Mapping[str, Repair | None],
    *,
    judge: Judge,
    benign: Mapping[str, Sequence[Example]] | None = None,
    adaptive: bool = True,
    controls: bool = True,
    directory: str | Path | None = None,
    store: GenerationStore | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    n_boot: int = 2000,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> DefenceTable:
    """Attack requests in every way, under every defence, and put attack success in a table.

    Args:
        lvlm: The model.
        examples: Harmful requests, with ids; those that gradient attacks change need pictures and, unless the attack says what it aims
            at, responses.
        attacks: The attacks, of different names.
        defences: Defences by name; None is the model as it is.
        judge: Judge of the answers.
        benign: Benign suites by channel, evaluated beside them.
        adaptive: Whether attacks that look at the model are made against each defence too. One with a class attribute
            ``searches = False`` does not look at it.
        controls: Whether to add clean requests, and random noise of the size of each attack with an ``epsilon``.
        directory: Where results are saved, one folder an attack and defence; what is there from the same attack, model, defence and
            requests is not made again, and a stopped attack goes on. None: a folder that is removed at the end.
        store: Where answers are kept; None: in memory.
        max_new_tokens: Most tokens of an answer.
        batch_size: Requests at a time when answers are generated.
        n_boot: Resamples of bootstrapped intervals.
        seed: Of attacks, generation and bootstrap.
        progress: Whether to show progress bars.
        **options: Further options of :func:`~care_lens.evaluation.evaluate`.

    Returns:
        The table; channels are the attacks, and those made against the row's own defence end in ", adaptive". The undefended model has
        none of these: every attack on it sees it.

    Raises:
        AttackTableError: If there are no attacks or defences, two attacks share a name, or a request is not harmful or has no id.
    """
    named = _all_attacks(attacks, controls)
    _require(examples, defences)
    require_defences(defences)
    plain = next((name for name, defence in defences.items() if defence is None), None)
    store = GenerationStore() if store is None else store
    settings: dict[str, Any] = {
        "attacks": {name: attack.describe() for name, attack in named.items()},
        "adaptive": adaptive,
    }
    asked = {
        "judge": judge,
        "store": store,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "n_boot": n_boot,
    }
    asked |= {"seed": seed, "progress": progress, **options}
    alone: dict[str, Any] = {name: value for name, value in asked.items() if name not in ("graders", "ordinary")}
    alone["fidelity"] = False
    against = {name: d for name, d in defences.items() if d is not None} if adaptive else {}
    searching = [name for name, attack in named.items() if getattr(attack, "searches", True)]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()) if directory is None else directory)
        bar = stack.enter_context(
            Steps(total=len(named) + len(against) * len(searching), desc="attacks", disable=not progress)
        )

        def made(name: str, defence_name: str | None, channel: str) -> list[Example]:
            bar.set_postfix_str(channel if defence_name is None else f"{name} against {defence_name}")
            defence = None if defence_name is None else defences[defence_name]
            where = folder / _folder(name, defence_name)
            found = _saved(where, named[name], lvlm, examples, defence, seed)
            bar.update()
            return [replace(e, channel=channel) for e in found.examples]

        suites = {name: made(name, None, name) for name in named}
        main = evaluate(lvlm, {**suites, **(benign or {})}, defences, **{"fidelity": plain is not None, **asked})
        trials = [main.trials]
        for defence_name, defence in against.items():
            own = {f"{name}{ADAPTIVE}": made(name, defence_name, f"{name}{ADAPTIVE}") for name in searching}
            if own:
                trials.append(evaluate(lvlm, own, {defence_name: defence}, **alone).trials)
    return DefenceTable.from_trials(
        pd.concat(trials, ignore_index=True),
        settings={**main.settings, **settings},
        n_boot=n_boot,
        seed=seed,
        max_missing=options.get("max_missing", 0.02),
    )


def _saved(
    where: Path, attack: Attack, lvlm: HookedLVLM, examples: Sequence[Example], defence: Any, seed: int
) -> AttackResult:
    """What an attack made, as it is read back from its folder; made first if it is not there."""
    about = digest([run_settings(attack, examples, defence, seed), identity(lvlm, examples, defence)])
    where = where.with_name(f"{where.name}.{about[:8]}")
    if not (where / "attack.json").exists():
        where.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {}
        run: Any = attack.run
        if "checkpoint" in inspect.signature(run).parameters:
            options["checkpoint"] = where / "checkpoint.jsonl"
        run(lvlm, examples, defence, seed, **options).save(where)
    return AttackResult.load(where)


def _all_attacks(attacks: Sequence[Attack], controls: bool) -> dict[str, Attack]:
    """The attacks by name, controls first.

    Raises:
        AttackTableError: If there are none, one is no attack, or two share a name.
    """
    if not attacks:
        raise AttackTableError("attacks must hold at least one attack, got none")
    if wrong := [type(one).__name__ for one in attacks if not isinstance(one, Attack)]:
        raise AttackTableError(f"attacks must have name, run and describe, got {wrong[0]}; see care_lens.core.Attack")
    own: list[Any] = [Clean()] if controls else []
    sizes = dict.fromkeys(getattr(one, "epsilon", None) for one in attacks) if controls else {}
    own += [RandomNoise(epsilon=e, name=f"random noise {e:g}") for e in sizes if e is not None]
    kept = [one for one in own if one.name not in {attack.name for attack in attacks}]
    names = [one.name for one in (*kept, *attacks)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise AttackTableError(f"attacks must have different names, got {twice} twice; give them name=...")
    return {one.name: one for one in (*kept, *attacks)}


def _require(examples: Sequence[Example], defences: Mapping[str, Any]) -> None:
    if not defences:
        raise AttackTableError("defences must hold at least one defence (None is the model as it is), got none")
    if not examples or any(not e.harmful or not e.id for e in examples):
        bad = next((e.id or e.prompt for e in examples if not e.harmful or not e.id), "no examples")
        raise AttackTableError(f"examples must be harmful requests with ids, got {bad!r}; benign ones go into benign=")


def _folder(attack: str, defence: str | None) -> str:
    """A folder's name, without what file systems do not like; the digest that follows tells like ones apart."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", attack if defence is None else f"{attack}.against.{defence}")
