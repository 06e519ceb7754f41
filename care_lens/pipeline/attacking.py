"""Attacks by defences on a study's requests: what the command `attack` names, and the table it makes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from care_lens.attacks import AttackKindError, GradientAttack, attack
from care_lens.core.attack import Attack
from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example
from care_lens.core.files import in_use, swept
from care_lens.core.outcome import Repair
from care_lens.data.answers import target_of
from care_lens.data.study import Study
from care_lens.evaluation import DefenceTable, GenerationSettings, GenerationStore, attack_table
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline.generating import generating
from care_lens.pipeline.saved import UNDEFENDED

log = logging.getLogger(__name__)


class AttackRunError(CareLensError, ValueError):
    """An attack or requests were named that there are not."""


def read_attack(text: str) -> Attack:
    """An attack as a command line names it: its class, and after a colon its fields, with commas between them.

    Args:
        text: Such as "pgd" or "autopgd:epsilon=64,steps=100,name=auto-PGD 64"; values are yaml's.

    Raises:
        AttackRunError: If there is no such attack, or it does not have the field.

    Example:
        >>> from care_lens.pipeline.attacking import read_attack
        >>> read_attack("pgd:epsilon=64,steps=100").epsilon
        64
    """
    kind, _, fields = text.partition(":")
    options: dict[str, Any] = {}
    for field in filter(None, (part.strip() for part in fields.split(","))):
        name, equals, value = field.partition("=")
        if not equals:
            raise AttackRunError(
                f"an attack's fields must be NAME=VALUE with commas between them, got {field!r} in {text!r}"
            )
        try:
            options[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise AttackRunError(
                f"the value of {name.strip()} in {text!r} must be yaml, got {value!r} ({error})"
            ) from None
    try:
        return attack(kind.strip(), **options)
    except AttackKindError as error:
        raise AttackRunError(f"{text!r}: {error}") from None
    except (TypeError, ValueError) as error:
        raise AttackRunError(f"{text!r} must be an attack with its fields: {error}") from error


def attacked_requests(
    study: Study, attacks: Sequence[Attack], *, channels: Sequence[str] | None = None, n: int | None = None
) -> list[Example]:
    """The harmful test requests that are attacked.

    Args:
        study: The study.
        attacks: If one of them changes pictures by gradients, requests without a picture are left out, and those without an answer get the
            opening that is aimed at (:func:`~care_lens.data.answers.target_of`): test requests of ``care-lens study`` have none.
        channels: Harmful channels of the test split. None: the study's requests for gradient attacks, or, where it has none, its
            plain channel; for gradient attacks the channels with pictures, if those have none.
        n: Of each channel at most.

    Raises:
        AttackRunError: If a channel is not there or not harmful, or no request is left.
    """
    test = study.channels("test", harmful=True)
    if channels is None:
        chosen = {"gradient": study.gradient} if study.gradient else {study.plain: test.get(study.plain, ())}
        if any(isinstance(one, GradientAttack) for one in attacks) and not _pictured(chosen):
            # Plain requests of public files have none: an attack on pictures is then made where there are some.
            chosen = {c: test[c] for c in _pictured(test)}
            log.info("requests without pictures cannot be attacked by gradients: those of %s are", list(chosen))
    else:
        if odd := [channel for channel in channels if channel not in test]:
            raise AttackRunError(f"channels must be harmful ones of the test split, {[*test]}, got {odd}")
        chosen = {channel: test[channel] for channel in channels}
    if any(isinstance(one, GradientAttack) for one in attacks):
        fit = {c: [e for e in examples if e.image is not None] for c, examples in chosen.items()}
        asked, left = sum(map(len, chosen.values())), sum(map(len, fit.values()))
        if left < asked:
            log.info("%d of %d requests have no picture, and are left out", asked - left, asked)
        if bare := sum(not e.response for examples in fit.values() for e in examples):
            log.info("%d of %d requests have no answer to aim at: 'Sure, here is' and the request is", bare, left)
        chosen = {
            c: [e if e.response else replace(e, response=target_of(e)) for e in examples] for c, examples in fit.items()
        }
    found = [replace(e, id=f"{channel}/{e.id}") for channel, examples in chosen.items() for e in examples[:n]]
    if not found:
        raise AttackRunError(
            "requests must be one or more, with a picture for gradient attacks, got none; name other channels (--channels): "
            f"{_pictured(test) or [*test]} {'have pictures' if _pictured(test) else 'have none either'}"
        )
    return found


def _pictured(channels: Mapping[str, Sequence[Example]]) -> list[str]:
    """The channels in which a request has a picture."""
    return [channel for channel, examples in channels.items() if any(e.image is not None for e in examples)]


def attack_study(
    lvlm: HookedLVLM,
    study: Study,
    attacks: Sequence[Attack],
    defences: Mapping[str, Repair],
    directory: Path,
    *,
    channels: Sequence[str] | None = None,
    n: int | None = None,
    benign: int = 4,
    adaptive: bool = True,
    generation: GenerationSettings | None = None,
    batch_size: int = 8,
    n_boot: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> DefenceTable:
    """Every attack under every defence, on test requests of a study; what is finished is kept in the folder.

    Args:
        lvlm: The model.
        study: Its test split is attacked.
        attacks: The attacks, of different names.
        defences: By name; the undefended model is added as "none".
        directory: Where attacks (PNG, json), answers and tables go; a stopped call goes on there.
        channels, n: See :func:`attacked_requests`.
        benign: Harmless requests of each benign channel that are answered beside them, under the channel "benign"; 0: none.
        adaptive: Whether attacks that look at the model are also made against each defence.
        generation: Settings of every answer.
        batch_size: Requests at a time.
        n_boot: Resamples of bootstrapped intervals.
        seed: Of attacks and bootstrap.
        progress: Whether to show progress bars.

    Raises:
        AttackRunError: If a defence has the name "none", or there are no requests.
    """
    if UNDEFENDED in defences:
        raise AttackRunError(f"a defence must not be called {UNDEFENDED!r}, the undefended model is; give NAME=PATH")
    requests = attacked_requests(study, attacks, channels=channels, n=n)
    suites = study.channels("test", harmful=False)
    harmless = [replace(e, id=f"{channel}/{e.id}") for channel, suite in suites.items() for e in suite[:benign]]
    generation = generation or GenerationSettings()
    expected = (len(requests) * len(attacks) * (2 if adaptive else 1) + len(harmless)) * (1 + len(defences))
    with in_use(directory), generating(lvlm, generation):
        swept(directory)  # what a kill has left
        table = attack_table(
            lvlm,
            requests,
            attacks,
            {UNDEFENDED: None, **defences},
            judge=study.judge,
            benign={"benign": harmless} if harmless else None,
            adaptive=adaptive,
            directory=directory / "attacks",
            store=GenerationStore.in_folder(directory, expected=expected),
            batch_size=batch_size,
            n_boot=n_boot,
            seed=seed,
            progress=progress,
            fidelity=False,
            **generation.given(),
        )
        table.save(directory, "attacks")
    return table
