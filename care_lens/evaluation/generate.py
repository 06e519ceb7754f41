"""Generate the answers of examples under a defence into a store, leaving out what is there already."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from care_lens.core.examples import Example
from care_lens.core.identity import digest, example_fingerprint, model_fingerprint, repair_fingerprint
from care_lens.core.outcome import Repair
from care_lens.evaluation.store import GenerationStore, StoredAnswer
from care_lens.lvlm.hooked import HookedLVLM

logger = logging.getLogger(__name__)

#: What an answer says of its example that the model was not given.
_OF_THE_EXAMPLE = ("group", "harmful", "reference", "meta")


def generate_all(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    *,
    store: GenerationStore,
    defence_name: str = "none",
    repair: Repair | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 32,
    generation: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> list[StoredAnswer]:
    """Answer examples, each once.

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
        max_new_tokens: Most tokens of an answer.
        batch_size: Examples at a time.
        generation: Further options of Hugging Face's ``generate``, such as ``{"do_sample": True}``;
            JSON-able.
        seed: Recorded with every answer; together with the ids it seeds each batch, which matters for
            sampling only.
        progress: Whether to show a progress bar.

    Returns:
        One answer an example, in the examples' order.

    Raises:
        ValueError: If ids are missing or repeated in a channel, or ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    _require_ids(examples)
    options = dict(generation or {})
    sampled = _samples(lvlm, options)
    settings = {
        "model": model_fingerprint(lvlm.hf_model),
        "defence": None if repair is None else repair.describe(),
        "defence_fingerprint": None if repair is None else repair_fingerprint(repair),
        "max_new_tokens": max_new_tokens,
        "generation": options,
        # Draws depend on which answers share a batch.
        **({"batch_size": batch_size} if sampled else {}),
    }
    run = _Run(lvlm, defence_name, store.add_settings(settings), max_new_tokens, options, seed)
    blanks = [run.blank(example) for example in examples]
    lengths = [_length(lvlm, example) for example in examples]
    held = [store.get(blank.key) for blank in blanks]
    # What is known of the examples may have changed since they were answered.
    relabelled = [
        replace(answer, **{name: getattr(blank, name) for name in _OF_THE_EXAMPLE})
        for answer, blank in zip(held, blanks, strict=True)
        if answer is not None and any(getattr(answer, name) != getattr(blank, name) for name in _OF_THE_EXAMPLE)
    ]
    store.add(relabelled)
    todo = {i for i, answer in enumerate(held) if answer is None or answer.missing}
    order = sorted(range(len(examples)) if sampled else todo, key=lambda i: lengths[i], reverse=True)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with (
        repair.on(lvlm) if repair is not None and todo else nullcontext(),
        tqdm(total=len(todo), desc=f"answers: {defence_name}", disable=not progress or not todo) as bar,
    ):
        for batch in batches:
            wanted = [i in todo for i in batch]
            if any(wanted):
                # Where answers are drawn, a batch is run as it was before some of it were kept, so that the draws are the same.
                made = run.answer([examples[i] for i in batch])
                store.add([answer for answer, want in zip(made, wanted, strict=True) if want])
                bar.update(sum(wanted))
    return [store.get(blank.key) or blank for blank in blanks]


@dataclass(frozen=True)
class _Run:
    """What all answers of one call share."""

    lvlm: HookedLVLM
    defence: str
    settings: str
    max_new_tokens: int
    options: dict[str, Any]
    seed: int

    def blank(self, example: Example, *, missing: str = "not generated") -> StoredAnswer:
        """The record of an example without an answer."""
        return self._record(example, response=None, missing=missing, tokens=0)

    def answer(self, examples: Sequence[Example]) -> list[StoredAnswer]:
        """The answers of a batch; halves of it where it fails."""
        try:
            with torch.random.fork_rng(devices=[self.lvlm.device] if self.lvlm.device.type == "cuda" else []):
                torch.manual_seed(int(digest([self.seed, *(example.id for example in examples)]), 16) % 2**63)
                inputs = self.lvlm.prepare(examples)
                made = self.lvlm.generate(inputs, max_new_tokens=self.max_new_tokens, **self.options)
        except Exception as error:
            if len(examples) > 1:
                half = len(examples) // 2
                return self.answer(examples[:half]) + self.answer(examples[half:])
            name = type(error).__name__
            logger.warning(
                "no answer for example %r in channel %r: %s: %s",
                examples[0].id,
                examples[0].channel,
                name,
                error,
            )
            return [self.blank(examples[0], missing=name)]
        counts = _token_counts(made.new_tokens, self.lvlm.hf_model.generation_config.eos_token_id)
        return [
            self._record(example, response=text, missing="", tokens=count)
            for example, text, count in zip(examples, made.texts, counts, strict=True)
        ]

    def _record(self, example: Example, *, response: str | None, missing: str, tokens: int) -> StoredAnswer:
        return StoredAnswer(
            defence=self.defence,
            channel=example.channel,
            id=example.id,
            group=example.group,
            seed=self.seed,
            prompt=example.prompt,
            response=response,
            missing=missing,
            tokens=tokens,
            settings=self.settings,
            example=example_fingerprint(example),
            harmful=example.harmful,
            reference=example.response,
            meta=dict(example.meta),
        )


def _require_ids(examples: Sequence[Example]) -> None:
    seen: set[tuple[str, str]] = set()
    for i, example in enumerate(examples):
        if not example.id:
            raise ValueError(f"examples must have ids, got none for example {i}; answers are stored by them")
        if (name := (example.channel, example.id)) in seen:
            raise ValueError(f"ids must differ within a channel, got {example.id!r} twice in {example.channel!r}")
        seen.add(name)


def _samples(lvlm: HookedLVLM, options: Mapping[str, Any]) -> bool:
    """Whether answers are drawn at random."""
    return bool(options.get("do_sample", getattr(lvlm.hf_model.generation_config, "do_sample", False)))


def _length(lvlm: HookedLVLM, example: Example) -> tuple[bool, int]:
    return example.image is not None, len(lvlm.tokenizer(example.prompt)["input_ids"])


def _token_counts(new_tokens: Int[Tensor, "batch new"], eos: int | list[int] | None) -> list[int]:
    """Tokens of each answer up to and including its end of sequence."""
    ends = torch.isin(new_tokens, torch.tensor([] if eos is None else eos, device=new_tokens.device).long())
    after = ends.long().cumsum(dim=1) - ends.long()
    return (after == 0).sum(dim=1).tolist()
