"""Generate the answers of examples under a defence into a store, leaving out what is there already."""

import json
import logging
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from care_lens.core.defence import defended, require_defences
from care_lens.core.examples import Example
from care_lens.core.forked import forked, workers
from care_lens.core.identity import digest, example_fingerprint, model_fingerprint, repair_fingerprint
from care_lens.core.outcome import Repair
from care_lens.core.progress import Steps, resume_from_store
from care_lens.evaluation.store import GenerationStore, StoredAnswer
from care_lens.evaluation.unopened import Looking, looking, unopened, watches
from care_lens.lvlm.errors import GenerationOptionError
from care_lens.lvlm.hooked import HookedLVLM

logger = logging.getLogger(__name__)

#: What an answer says of its example beside the prompt: what the model was not given, and what earlier versions did not store.
_OF_THE_EXAMPLE = ("group", "harmful", "reference", "meta", "behaviour", "system", "turns", "prefill")
#: Examples of a batch at least, where batches are cut for several processes: with fewer, what a step of the model costs by itself outweighs.
_LEAST = 16


def generate_all(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    *,
    store: GenerationStore,
    defence_name: str = "none",
    repair: Repair | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    generation: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    watched: Sequence[Repair | None] = (),
) -> list[StoredAnswer]:
    """Answer examples, each once.

    Where a defence's gates stay closed on a request, its answer is the undefended one, which is taken over if the store has it with its
    tokens: the gates are read in one forward pass over request and answer, and only what a gate opens for is generated again
    (:mod:`care_lens.repair.opening`). Sampled answers are generated in full.

    On a CPU, batches may be shared with other processes (:func:`~care_lens.core.forked.in_workers`).

    Examples of like length share a batch. A batch that fails is split until the examples that cannot be
    answered are alone; those are stored as missing, with the name of the error, and tried again by the next
    run.

    Args:
        lvlm: The model.
        examples: The examples; within a channel their ids must differ.
        store: Where answers are kept; those in it already, from the same model, defence, settings, seed and
            example, are not generated again.
        defence_name: Name of the defence in the store.
        repair: The defence; None: the model as it is.
        max_new_tokens: Most tokens of an answer; None: as ``generation`` or the model's own configuration says, else 32.
        batch_size: Examples at a time, at most: processes that share them have smaller batches. Where answers are sampled they depend on it (then
            it is kept to), and stored ones of another size are not used.
        generation: Further options of ``HookedLVLM.generate``, such as ``{"do_sample": True}`` or ``{"generation_config": config}``;
            JSON-able but for that configuration. The settings of the answers tell what was in force, the model's own
            configuration included.
        seed: Recorded with every answer; together with the ids it seeds each batch, which matters for sampling only.
        progress: Whether to show a progress bar.
        watched: Gated defences that will answer the same examples from the same store: their gates are read beside this generation, if
            it is of the undefended model, or in the same pass as those of ``repair``, so that no pass is needed for each.

    Returns:
        One answer an example, in the examples' order.

    Raises:
        ValueError: If ids are missing or repeated in a channel, ``batch_size`` is below 1, or options of generation contradict
            one another.
    """
    return generate_several(
        lvlm,
        [Ask(examples, defence_name, repair)],
        store=store,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        generation=generation,
        seed=seed,
        progress=progress,
        watched=watched,
    )[0]


class Ask(NamedTuple):
    """What one defence is asked.

    Attributes:
        examples: The examples; within a channel their ids must differ.
        defence_name: Name of the defence in the store.
        repair: The defence; None: the model as it is.
    """

    examples: Sequence[Example]
    defence_name: str = "none"
    repair: Repair | None = None


def generate_several(
    lvlm: HookedLVLM,
    asks: Sequence[Ask],
    *,
    store: GenerationStore,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    generation: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    desc: str | None = None,
    watched: Sequence[Repair | None] = (),
) -> list[list[StoredAnswer]]:
    """The answers under several defences, as :func:`generate_all` gives them one by one.

    Processes that share the work (:func:`~care_lens.core.forked.in_workers`) have the batches of all defences before them, so that none
    waits at the end of each. Undefended answers that are taken over must be in the store before; those of all defences are written first, then what is
    generated, by defence.

    Args:
        lvlm: The model.
        asks: What each defence is asked.
        store: As :func:`generate_all` has it, and so are the others.
        max_new_tokens: Most tokens of an answer.
        batch_size: Examples at a time.
        generation: Further options of generation.
        seed: Recorded with every answer.
        progress: Whether to show a progress bar.
        desc: What it says, which then counts the answers that are there too; None: the names of the defences.
        watched: Gated defences whose gates are read on the way.

    Returns:
        For each ask its answers, in the order of its examples.

    Raises:
        ValueError: As :func:`generate_all` has it.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    for ask in asks:
        _require_ids(ask.examples)
        require_defences({ask.defence_name: ask.repair})
    options = _options(generation, max_new_tokens)
    in_force = lvlm.generation_settings(**options)
    try:
        json.dumps(in_force)
    except TypeError as error:
        raise ValueError(
            f"generation must hold JSON-able options, which answers are stored under, got {error}"
        ) from None
    parts = [_Part.of(lvlm, ask, store, options, in_force, batch_size, seed, watched) for ask in asks]
    awaited: set[Any] = set()
    for part in parts:  # what two of them want is generated for the first
        part.todo.difference_update([i for i in part.todo if part.blanks[i].key in awaited])
        awaited.update(part.blanks[i].key for i in part.todo)
    left = sum(len(part.todo) for part in parts)
    every = sum(len(ask.examples) for ask in asks)
    with Steps(
        total=left if desc is None else every,
        desc=desc or f"answers: {', '.join(ask.defence_name for ask in asks)}",
        disable=not progress or (desc is None and not left),
        resume=resume_from_store(store.path),
    ) as bar:
        if desc is not None:
            bar.update(every - left)
        for part in parts:
            bar.update(part.take_over(store, batch_size, watched))
        shared = workers() > 1 and lvlm.device.type == "cpu"
        pieces = -(-2 * workers() // max(1, sum(bool(part.todo) for part in parts))) if shared else None
        dealt = [(part, part.batches(batch_size, pieces)) for part in parts]
        jobs = [(part, batch) for part, batches in dealt for batch in batches]
        with closing(forked(_answer, jobs) if shared else _in_turn(dealt)) as answered:
            for (part, batch), (made, touched) in zip(jobs, answered, strict=True):
                wanted = part.todo.intersection(batch)
                store.add([answer for i, answer in zip(batch, made, strict=True) if i in wanted])
                for one in touched:
                    store.note_touched(*one)
                bar.update(len(wanted))
    return [[store.get(blank.key) or blank for blank in part.blanks] for part in parts]


@dataclass(frozen=True)
class _Part:
    """What one defence is still to be asked."""

    run: "_Run"
    examples: Sequence[Example]
    blanks: list[StoredAnswer]
    todo: set[int]
    order: list[int]
    samples: bool

    @classmethod
    def of(
        cls,
        lvlm: HookedLVLM,
        ask: Ask,
        store: GenerationStore,
        options: dict[str, Any],
        in_force: dict[str, Any],
        batch_size: int,
        seed: int,
        watched: Sequence[Repair | None],
    ) -> "_Part":
        """What the store does not have yet."""
        examples, defence_name, repair = ask
        samples = bool(in_force.get("do_sample"))
        settings = {
            "model": model_fingerprint(lvlm.hf_model),
            "defence": None if repair is None else repair.describe(),
            "defence_fingerprint": None if repair is None else repair_fingerprint(repair),
            "max_new_tokens": in_force.get("max_new_tokens"),
            "generation": in_force,
            # What is drawn for a row depends on the rows beside it.
            **({"batch_size": batch_size} if samples else {}),
        }
        looks = repair is None and not samples and not lvlm.acting() and (in_force.get("num_beams") or 1) == 1
        run = _Run(
            lvlm,
            repair,
            defence_name,
            store.add_settings(settings),
            options,
            in_force.get("eos_token_id"),
            seed,
            tuple(looking(watched)) if looks else (),
            digest({**settings, "defence": None, "defence_fingerprint": None})
            if repair is not None and not samples and (in_force.get("num_beams") or 1) == 1
            else None,
        )
        blanks = [run.blank(example) for example in examples]
        held = [store.get(blank.key) for blank in blanks]
        # What is known of the examples may have changed since they were answered.
        relabelled = [
            replace(answer, **{name: getattr(blank, name) for name in _OF_THE_EXAMPLE})
            for answer, blank in zip(held, blanks, strict=True)
            if answer is not None and any(getattr(answer, name) != getattr(blank, name) for name in _OF_THE_EXAMPLE)
        ]
        store.add(relabelled)
        todo = {i for i, answer in enumerate(held) if answer is None or answer.missing}
        # Sampled batches are cut from all examples, so that those of a run that goes on are those of one that was never stopped.
        order = sorted(
            range(len(examples)) if samples else todo,
            key=lambda i: (*map(int.__neg__, prompt_length(lvlm, examples[i])), i),
        )
        return cls(run, examples, blanks, todo, order, samples)

    def take_over(self, store: GenerationStore, batch_size: int, watched: Sequence[Repair | None]) -> int:
        """Take over undefended answers where the defence's gates stay closed; how many."""
        run = self.run
        if run.repair is None or run.undefended is None or not self.todo:
            return 0
        before = len(self.todo)
        for batch in _cut(self.order, batch_size):
            asked = [self.examples[i] for i in batch]
            taken = unopened(
                run.lvlm, asked, run.repair, watched, store=store, undefended=run.undefended, seed=run.seed
            )
            over = [(i, answer) for i, answer in zip(batch, taken, strict=True) if answer is not None]
            store.add([run.taken(self.examples[i], answer) for i, answer in over])
            self.todo.difference_update(i for i, _ in over)
        return before - len(self.todo)

    def batches(self, batch_size: int, pieces: int | None) -> list[Sequence[int]]:
        """The batches that hold something to be done; for several processes of about one size, and so many pieces at least."""
        order = self.order if self.samples else [i for i in self.order if i in self.todo]
        if pieces is not None and not self.samples and order:
            cut = min(pieces, len(order) // _LEAST)
            least = max(-(-len(order) // batch_size), cut if cut < workers() else cut - cut % workers())
            batch_size = -(-len(order) // least)
        return [batch for batch in _cut(order, batch_size) if self.todo.intersection(batch)]

    def on(self) -> AbstractContextManager[None]:
        """Inside, the defence is on the model."""
        return nullcontext() if self.run.repair is None else self.run.repair.on(self.run.lvlm)

    def answer(self, batch: Sequence[int]) -> "_Answered":
        """The answers to a batch, as `_Run.answer` has them."""
        return self.run.answer([self.examples[i] for i in batch])


_Answered = tuple[list[StoredAnswer], list[tuple[str, StoredAnswer, bool]]]


def _answer(job: tuple[_Part, Sequence[int]]) -> _Answered:
    part, batch = job
    with part.on():
        return part.answer(batch)


def _in_turn(dealt: Iterable[tuple[_Part, Sequence[Sequence[int]]]]) -> Generator[_Answered, None, None]:
    """The answers by this process; a defence is put on the model once for all of its batches, since that may change weights."""
    for part, batches in dealt:
        if batches:
            with part.on():
                yield from map(part.answer, batches)


@dataclass(frozen=True)
class _Run:
    """What all answers of one call share."""

    lvlm: HookedLVLM
    repair: Repair | None
    defence: str
    settings: str
    options: dict[str, Any]
    ends: int | list[int] | None
    seed: int
    watched: tuple[Looking, ...] = ()
    undefended: str | None = None  # the settings of the answers that may be taken over

    def blank(self, example: Example, *, missing: str = "not generated") -> StoredAnswer:
        """The record of an example without an answer."""
        return self._record(example, response=None, missing=missing, token_ids=())

    def taken(self, example: Example, undefended: StoredAnswer) -> StoredAnswer:
        """The undefended answer as that of this run."""
        return self._record(example, response=undefended.response, missing="", token_ids=undefended.token_ids)

    def answer(self, examples: Sequence[Example]) -> _Answered:
        """The answers of a batch, and what the gates that were read beside them would have touched; halves of it where it fails."""
        try:
            with torch.random.fork_rng(devices=[self.lvlm.device] if self.lvlm.device.type == "cuda" else []):
                torch.manual_seed(int(digest([self.seed, *(example.id for example in examples)]), 16) % 2**63)
                inputs = self.lvlm.prepare(defended(self.repair, examples))
                seen = watches(self.lvlm, inputs, self.watched)
                hooks: Any = [pair for _, watch in seen for pair in watch.hooks]
                made = self.lvlm.generate(inputs, **self.options, **({"fwd_hooks": hooks} if hooks else {}))
        except Exception as error:
            if self.watched:  # it may have been a hook of theirs
                logger.info("gates are not read beside the answers to %d examples: %s", len(examples), error)
                return replace(self, watched=()).answer(examples)
            if len(examples) > 1:
                half = len(examples) // 2
                first, second = self.answer(examples[:half]), self.answer(examples[half:])
                return first[0] + second[0], first[1] + second[1]
            name = type(error).__name__
            logger.warning(
                "no answer for example %r in channel %r: %s: %s",
                examples[0].id,
                examples[0].channel,
                name,
                error,
            )
            return [self.blank(examples[0], missing=name)], []
        counts = _token_counts(made.new_tokens, self.ends)
        answers = [
            self._record(example, response=text, missing="", token_ids=tuple(ids[:count]))
            for example, text, ids, count in zip(examples, made.answers, made.new_tokens.tolist(), counts, strict=True)
        ]
        touched = [
            (one.fingerprint, answer, opened)
            for one, watch in seen
            for answer, opened in zip(answers, watch.opened(counts).tolist(), strict=True)
        ]
        return answers, touched

    def _record(
        self, example: Example, *, response: str | None, missing: str, token_ids: tuple[int, ...]
    ) -> StoredAnswer:
        return StoredAnswer(
            defence=self.defence,
            channel=example.channel,
            id=example.id,
            group=example.group,
            seed=self.seed,
            prompt=example.prompt,
            response=response,
            missing=missing,
            tokens=len(token_ids),
            settings=self.settings,
            example=example_fingerprint(example),
            harmful=example.harmful,
            reference=example.response,
            meta=dict(example.meta),
            behaviour=example.behaviour,
            system=example.system,
            turns=tuple((turn.role, turn.text) for turn in example.turns),
            prefill=example.prefill,
            token_ids=token_ids,
        )


def _options(generation: Mapping[str, Any] | None, max_new_tokens: int | None) -> dict[str, Any]:
    """The options of generation of a call, each given once."""
    options = dict(generation or {})
    if max_new_tokens is not None and options.setdefault("max_new_tokens", max_new_tokens) != max_new_tokens:
        raise GenerationOptionError(
            f"max_new_tokens must be given once, got {max_new_tokens} and {options['max_new_tokens']} in generation"
        )
    if options.get("num_return_sequences") not in (None, 1):
        raise GenerationOptionError(
            f"num_return_sequences must be 1, got {options['num_return_sequences']}: one answer an example is stored; "
            "call generate_all with another seed for more"
        )
    return options


def _cut(order: Sequence[int], batch_size: int) -> list[Sequence[int]]:
    """Batches of an order."""
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _require_ids(examples: Sequence[Example]) -> None:
    seen: set[tuple[str, str]] = set()
    for i, example in enumerate(examples):
        if not example.id:
            raise ValueError(f"examples must have ids, got none for example {i}; answers are stored by them")
        if (name := (example.channel, example.id)) in seen:
            raise ValueError(f"ids must differ within a channel, got {example.id!r} twice in {example.channel!r}")
        seen.add(name)


def prompt_length(lvlm: HookedLVLM, example: Example) -> tuple[bool, int]:
    """Whether an example has pictures, and how many tokens its text has: what batches are ordered by."""
    try:
        return bool(example.images), len(lvlm.tokenizer(example.prompt)["input_ids"])
    except Exception:  # half a character, say: its batch fails and is split, and it is stored as missing
        return bool(example.images), 0


def _token_counts(new_tokens: Int[Tensor, "batch new"], eos: int | list[int] | None) -> list[int]:
    """Tokens of each answer up to and including its end of sequence."""
    ends = torch.isin(new_tokens, torch.tensor([] if eos is None else eos, device=new_tokens.device).long())
    after = ends.long().cumsum(dim=1) - ends.long()
    return (after == 0).sum(dim=1).tolist()
