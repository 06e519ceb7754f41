"""Which requests would a gated defence touch, without running it?

A defence whose gates stay closed on a request gives the undefended answer, token for token: its hooks return what they were given. So its
hooks can be run beside the undefended model, and what they return looked at and thrown away. A row in which no hook changed anything
would have been answered the same with the defence on, since by then every activation was the same in both; only the others must be
generated again. Hooks of any number of defences look on at once.

    watches = [defence.watch(lvlm, inputs) for defence in candidates]
    made = lvlm.generate(inputs, fwd_hooks=[pair for watch in watches for pair in watch.hooks])
    opened = [watch.opened(counts) for watch in watches]  # counts: tokens of each answer

or, where the undefended answers are known, in one forward pass: ``opens(defence, lvlm, inputs, answers)``. The first is what happens in a
run with the defence to the bit; in the second the model computes the answer's activations in one pass instead of token by token, which
moves their last bits as another batch size does.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from care_lens.core.spans import TokenSpans
from care_lens.lvlm import HookedLVLM, LVLMInputs
from care_lens.repair.errors import RepairError

_TOKENS = "embed.hook_in"
_LOGITS = "unembed.hook_out"


class Watch:
    """The hooks of a defence, which look on and change nothing.

    Args:
        hooks: Of the defence, for this batch: pairs of a place and a function that returns what it was given, or None, where the
            defence leaves a row alone. State of theirs that says which rows are touched must not depend on what they returned.
        inputs: The batch.

    Attributes:
        hooks: What to give the model, as ``fwd_hooks``, for one forward pass or one generation.
    """

    def __init__(self, hooks: Sequence[tuple[Any, Callable[..., Any]]], inputs: LVLMInputs) -> None:
        self._inputs = inputs
        self._passes: list[Tensor] = []
        self._early = self._nobody()
        self._places = {str(place) for place, _ in hooks}
        self.hooks: list[tuple[Any, Callable[..., Any]]] = [
            (_TOKENS, self._begin),
            *((place, self._looking(fn)) for place, fn in hooks),
        ]

    @property
    def sees_logits(self) -> bool:
        """Whether a hook is at the logits, so that those of every position must be computed where an answer is teacher-forced."""
        return _LOGITS in self._places

    def opened(self, counts: Sequence[int] | None = None) -> Bool[Tensor, "batch"]:
        """The rows that the defence would have touched.

        Args:
            counts: Tokens of each row's answer, its end included, after a generation: what happens after the end of an answer, while
                others go on, does not count. None: all that ran.

        Returns:
            [batch] on the CPU.

        Raises:
            RepairError: If nothing has run.
        """
        if not self._passes:
            raise RepairError("watch must have looked on while the model ran, got no pass; give its hooks as fwd_hooks")
        rows = self._early | self._passes[0]
        for step, touched in enumerate(self._passes[1:], start=1):
            if counts is not None:
                touched = touched & (step < torch.tensor(list(counts)))
            rows = rows | touched
        return rows

    def _nobody(self) -> Tensor:
        return torch.zeros(self._inputs.batch_size, dtype=torch.bool)

    def _begin(self, ids: Tensor, hook: Any) -> None:
        """A pass over tokens begins."""
        self._passes.append(self._nobody())

    def _looking(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def look(activation: Tensor, hook: Any) -> None:
            returned = fn(activation, hook=hook)
            if returned is None or returned is activation:
                return
            changed = (returned != activation).flatten(1).any(dim=1).cpu()
            if not bool(changed.any()):
                return
            rows = self._rows(changed)
            if self._passes:
                self._passes[-1] |= rows
            else:
                self._early |= rows

        return look

    def _rows(self, changed: Tensor) -> Tensor:
        """From entries of an activation to rows of the batch; all of them where it is not known whose they are."""
        n = self._inputs.batch_size
        if len(changed) == n and not self._inputs.image_rows:
            return changed
        owners = self._inputs.image_rows
        if len(changed) == n and len(owners) != n:
            return changed
        if len(changed) != len(owners):
            return torch.ones(n, dtype=torch.bool)
        pictured = self._nobody()
        pictured[torch.tensor(owners)[changed]] = True
        # As many pictures as rows: an entry may be either.
        return pictured | changed if len(changed) == n else pictured


@runtime_checkable
class Gated(Protocol):
    """A defence that may leave a request as it is, and can say so from an undefended pass."""

    def watch(self, lvlm: HookedLVLM, inputs: LVLMInputs) -> Watch | None:
        """Its hooks for a batch, looking on.

        Args:
            lvlm: The model, without the defence on it.
            inputs: The batch.

        Returns:
            The watch; None where the defence touches every request, or does not act by hooks alone.
        """
        ...


def opens(
    defence: Gated, lvlm: HookedLVLM, inputs: LVLMInputs, answers: Sequence[Sequence[int]]
) -> Bool[Tensor, "batch"]:
    """For which rows of a batch a defence would touch anything while these, the undefended model's answers, are given.

    Args:
        defence: The defence.
        lvlm: The model, without the defence on it.
        inputs: The prompts, padded on the left.
        answers: The undefended model's tokens for each row, the end of sequence included if it was reached.

    Returns:
        [batch]; all True where the defence cannot say.

    Raises:
        RepairError: If there is not one answer a row.
    """
    (rows,) = which_open([defence], lvlm, inputs, answers)
    return rows


@torch.no_grad()
def which_open(
    defences: Sequence[Gated], lvlm: HookedLVLM, inputs: LVLMInputs, answers: Sequence[Sequence[int]]
) -> list[Bool[Tensor, "batch"]]:
    """:func:`opens` of several defences, in one forward pass for all of them.

    Args:
        defences: The defences.
        lvlm: The model, without any of them on it.
        inputs: The prompts, padded on the left.
        answers: The undefended model's tokens for each row.

    Returns:
        [batch] for each defence.

    Raises:
        RepairError: If there is not one answer a row.
    """
    whole = continued(lvlm, inputs, [list(answer)[:-1] for answer in answers])
    watches = [defence.watch(lvlm, whole) for defence in defences]
    looking = [watch for watch in watches if watch is not None]
    if looking:
        every = any(watch.sees_logits for watch in looking)
        keep = whole.input_ids.shape[1] - inputs.input_ids.shape[1] + 1 if every else 1
        hooks = [pair for watch in looking for pair in watch.hooks]
        lvlm.run_with_hooks(whole, fwd_hooks=hooks, logits_to_keep=keep)
    everyone = torch.ones(inputs.batch_size, dtype=torch.bool)
    return [everyone if watch is None else watch.opened() for watch in watches]


def continued(lvlm: HookedLVLM, inputs: LVLMInputs, tokens: Sequence[Sequence[int]]) -> LVLMInputs:
    """A batch of prompts with tokens of an answer after each, as the model has them in its cache while it generates.

    Args:
        lvlm: The model.
        inputs: The prompts, padded on the left.
        tokens: What follows each prompt; shorter rows are padded on the right.

    Returns:
        The batch; the tokens are of its spans' response.

    Raises:
        RepairError: If there is not one list of tokens a row.
    """
    if len(tokens) != inputs.batch_size:
        raise RepairError(f"answers must be one for each of {inputs.batch_size} rows, got {len(tokens)}")
    width = max(map(len, tokens))
    if not width:
        return inputs
    pad = lvlm.tokenizer.pad_token_id
    pad = (lvlm.tokenizer.eos_token_id or 0) if pad is None else pad
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in tokens], device=inputs.input_ids.device)
    there = torch.arange(width, device=ids.device) < torch.tensor([[len(row)] for row in tokens], device=ids.device)
    spans, none = inputs.spans, torch.zeros_like(there)

    def grown(mask: Tensor, more: Tensor) -> Tensor:
        return torch.cat([mask, more.to(mask.device, mask.dtype)], dim=1)

    values = lvlm.family.token_inputs
    return replace(
        inputs,
        input_ids=torch.cat([inputs.input_ids, ids], dim=1),
        attention_mask=grown(inputs.attention_mask, there),
        token_inputs={
            name: grown(held, there.long() * values.get(name, 0)) for name, held in inputs.token_inputs.items()
        },
        spans=TokenSpans.from_masks(
            image=grown(spans.image, none),
            padding=grown(spans.padding, ~there),
            response=grown(spans.response, there),
            grids=spans.grids,
            prefill=grown(spans.prefill, none),
        ),
    )
