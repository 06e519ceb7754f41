"""Reading: the scores of a batch while it goes through the model, and of many examples offline.

At prefill every read position has its token score; those of the prompt are pooled to one number, which holds
for all of the row's prompt, and from each response or generated token on the row's score is the largest so
far. So a teacher-forced run and generation with a cache give the same scores.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.examples import Example
from care_lens.core.progress import Steps
from care_lens.lvlm import HookedLVLM, LVLMInputs
from care_lens.repair.checks import require_flag
from care_lens.repair.positions import BatchView, includes_generated
from care_lens.repair.reader import Reader, SiteReader, pool
from care_lens.repair.trace import RowTrace, ScoreTrace


class Readings:
    """The scores of one batch, kept up to date by hooks.

    Args:
        view: The batch.
    """

    def __init__(self, view: BatchView) -> None:
        self._view = view
        self._now: dict[SiteReader, Tensor] = {}
        self._latest: dict[SiteReader, Tensor] = {}
        self._before: dict[SiteReader, Tensor] = {}
        self._own: dict[SiteReader, Tensor] = {}

    def update(self, leaf: SiteReader, activation: Float[Tensor, "batch pos d"]) -> None:
        """Read an activation: the whole batch, which starts afresh, or one generated token a row.

        Args:
            leaf: The reader.
            activation: [batch, pos, d] at its site.

        Raises:
            ValueError: If the activation is of another batch.
        """
        prefill = self._view.is_prefill(activation.shape)
        tokens = leaf.tokens(activation)
        mask = self._view.mask(leaf.positions, prefill=prefill).to(tokens.device)
        if prefill:
            answered = self._view.mask("response", prefill=True).to(tokens.device)
            prompt = pool(tokens, mask & ~answered, leaf.pooling)
            running = tokens.masked_fill(~(mask & answered), -torch.inf).cummax(dim=1).values
            now = torch.maximum(prompt[:, None], running)
            # At the last token that was given nothing counts as having been open before: what is given cannot spend a pulse.
            fresh = ~answered | self._view.mask("context_end", prefill=True).to(tokens.device)
            before = now.roll(1, dims=1).masked_fill(fresh, -torch.inf)
        else:
            before = self._latest[leaf][:, None]
            now = torch.maximum(before, tokens.masked_fill(~mask, -torch.inf))
        self._now[leaf], self._latest[leaf], self._before[leaf], self._own[leaf] = now, now[:, -1], before, tokens

    def latest(self, leaf: SiteReader) -> Float[Tensor, "batch pos"]:
        """The score of one leaf as it stands at each position of the forward pass under way."""
        return self._now[leaf]

    def score(self, reader: Reader) -> Float[Tensor, "batch pos"]:
        """The reader's score as it stands at each position of the forward pass under way."""
        return reader.combine(_together(self._now))

    def score_before(self, reader: Reader) -> Float[Tensor, "batch pos"]:
        """The score as it stood one token earlier; -inf in the prompt, which is read as a whole, and at the last token given."""
        return reader.combine(_together(self._before))

    def own(self, leaf: SiteReader) -> Float[Tensor, "batch pos"]:
        """The score of each token by itself, wherever the leaf looks."""
        return self._own[leaf]


@overload
def read_scores(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    readers: Sequence[Reader],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 0,
    trace: Literal[False] = False,
    progress: bool = True,
) -> Float[Tensor, "example reader"]: ...
@overload
def read_scores(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    readers: Sequence[Reader],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 0,
    trace: Literal[True],
    progress: bool = True,
) -> ScoreTrace: ...
def read_scores(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    readers: Sequence[Reader],
    *,
    batch_size: int = 32,
    max_new_tokens: int = 0,
    trace: bool = False,
    progress: bool = True,
) -> Float[Tensor, "example reader"] | ScoreTrace:
    """Each reader's largest score on each example, in a run without corrections.

    To calibrate a gate, give the ``max_new_tokens`` that the repaired model will generate: readers of
    generated tokens then read the model's own answers, up to their end. The last token of an answer is never
    read, since the model never is given it.

    Args:
        lvlm: The model, without a repair on it.
        examples: The examples; their responses are not used.
        readers: The readers.
        batch_size: Examples a forward pass.
        max_new_tokens: Longest answer to read; matters to readers of generated tokens only.
        trace: Whether to keep the scores of every token.
        progress: Whether to show a progress bar.

    Returns:
        [example, reader] scores in float32 on the CPU; -inf where an example has nothing to read (no image). With a trace, a
        :class:`~care_lens.repair.ScoreTrace`, whose ``scores`` are these.

    Raises:
        ValueError: If this model has no such site.
    """
    require_flag(trace, name="trace")
    if not readers:
        raise ValueError("readers must hold at least one reader, got none")
    leaves = tuple(dict.fromkeys(leaf for reader in readers for leaf in reader.leaves))
    answers = max_new_tokens > 1 and any(includes_generated(leaf.positions) for leaf in leaves)
    rows: list[Tensor] = []
    traced: list[RowTrace] = []
    for start in Steps(range(0, len(examples), batch_size), desc="reading", disable=not progress):
        inputs = lvlm.prepare(examples[start : start + batch_size])
        view = BatchView(inputs)
        seen = _Tracer(view, leaves) if trace else _Recorder(view, leaves)
        with torch.no_grad():
            if answers:
                tokens = lvlm.generate(
                    inputs, max_new_tokens=max_new_tokens, do_sample=False, fwd_hooks=seen.hooks()
                ).new_tokens
                counted = _before_end(tokens, end_tokens(lvlm))
            else:
                lvlm.run_with_hooks(inputs, fwd_hooks=seen.hooks(), logits_to_keep=1)
                tokens = counted = None
        if isinstance(seen, _Tracer):
            traced += _row_traces(lvlm, inputs, seen, readers, tokens, counted, first=start)
        else:
            scores = _together(seen.scores(counted))
            rows.append(torch.stack([reader.combine(scores) for reader in readers], dim=1).float().cpu())
    if trace:
        return ScoreTrace(tuple(traced), tuple(_names(readers)))
    return torch.cat(rows) if rows else torch.zeros(0, len(readers))


def _together(scores: dict[SiteReader, Tensor]) -> dict[SiteReader, Tensor]:
    """The scores on one device: where a model lies on several, each was read where its site is."""
    devices = [score.device for score in scores.values()]
    if all(device == devices[0] for device in devices):
        return scores
    return {leaf: score.to(devices[0]) for leaf, score in scores.items()}


class _Recorder:
    """Keeps the prompt's score and the score of every generated token."""

    def __init__(self, view: BatchView, leaves: Iterable[SiteReader]) -> None:
        self._view = view
        self._prompt: dict[SiteReader, Tensor] = {}
        self._steps: dict[SiteReader, list[Tensor]] = {leaf: [] for leaf in leaves}

    def hooks(self) -> list[tuple[str, Any]]:
        return [(str(leaf.site), self._hook(leaf)) for leaf in self._steps]

    def _hook(self, leaf: SiteReader) -> Any:
        def read(activation: Tensor, hook: Any) -> None:
            if self._view.is_prefill(activation.shape):
                # As Readings has it: the prompt is pooled, and of the tokens of a begun answer the largest counts.
                mask, answered = (
                    self._view.mask(where, prefill=True).to(activation.device) for where in (leaf.positions, "response")
                )
                tokens = leaf.tokens(activation)
                prompt = pool(tokens, mask & ~answered, leaf.pooling)
                self._prompt[leaf] = torch.maximum(prompt, pool(tokens, mask & answered, "max"))
            elif includes_generated(leaf.positions):
                self._steps[leaf].append(leaf.tokens(activation)[:, 0])

        return read

    def scores(self, counted: Tensor | None) -> dict[SiteReader, Tensor]:
        """[batch] scores of each leaf; ``counted`` [batch, new] is True at the tokens of the answer."""
        scores = dict(self._prompt)
        for leaf, steps in self._steps.items():
            if counted is not None and steps:
                answer = torch.stack(steps, dim=1)
                mask = counted[:, : len(steps)].to(answer.device)
                scores[leaf] = torch.maximum(scores[leaf], pool(answer, mask, "max"))
        return scores


class _Tracer:
    """Keeps what the scores of every token are, and how they stand there."""

    def __init__(self, view: BatchView, leaves: Iterable[SiteReader]) -> None:
        self._view = view
        self._readings = Readings(view)
        self._own: dict[SiteReader, list[Tensor]] = {leaf: [] for leaf in leaves}
        self._stands: dict[SiteReader, list[Tensor]] = {leaf: [] for leaf in self._own}

    def hooks(self) -> list[tuple[str, Any]]:
        return [(str(leaf.site), self._hook(leaf)) for leaf in self._own]

    def _hook(self, leaf: SiteReader) -> Any:
        def read(activation: Tensor, hook: Any) -> None:
            self._readings.update(leaf, activation)
            mask = self._view.mask(leaf.positions, prefill=self._view.is_prefill(activation.shape))
            tokens = leaf.tokens(activation)
            self._own[leaf].append(tokens.masked_fill(~mask.to(tokens.device), -torch.inf).cpu())
            self._stands[leaf].append(self._readings.latest(leaf).expand_as(tokens).cpu())

        return read

    def of(self, reader: Reader) -> tuple[Tensor, Tensor]:
        """[batch, pos + new] own scores and scores as they stand."""
        own, stands = (
            {leaf: torch.cat(passes, dim=1) for leaf, passes in held.items()} for held in (self._own, self._stands)
        )
        return reader.combine(own).float(), reader.combine(stands).float()


def _row_traces(
    lvlm: HookedLVLM,
    inputs: LVLMInputs,
    seen: _Tracer,
    readers: Sequence[Reader],
    tokens: Tensor | None,
    counted: Tensor | None,
    *,
    first: int,
) -> list[RowTrace]:
    """What was traced of a batch, row by row, without padding and without what comes after an answer's end."""
    own, stands = (torch.stack(scores) for scores in zip(*(seen.of(reader) for reader in readers), strict=True))
    spans, read = inputs.spans.to("cpu"), own.shape[-1] - inputs.input_ids.shape[1]
    kept, ids = ~spans.padding, inputs.input_ids.cpu()
    if tokens is not None and counted is not None:
        kept = torch.cat([kept, counted[:, :read].cpu()], dim=1)
        ids = torch.cat([ids, tokens[:, :read].cpu()], dim=1)
    made: list[RowTrace] = []
    for row in range(len(ids)):
        columns = kept[row].nonzero()[:, 0].tolist()
        words = lvlm.tokenizer.convert_ids_to_tokens(ids[row, columns].tolist())
        named = [
            "generated"
            if column >= spans.image.shape[1] or bool(spans.response[row, column])
            else "image"
            if bool(spans.image[row, column])
            else "text"
            for column in columns
        ]
        made.append(
            RowTrace(
                example=first + row,
                id=inputs.examples[row].id if inputs.examples else None,
                tokens=tuple(map(str, words)),
                spans=tuple(named),
                own=own[:, row, columns],
                score=stands[:, row, columns],
            )
        )
    return made


def _names(readers: Sequence[Reader]) -> list[str]:
    """A name for each reader: its place, kind and positions."""
    return [
        f"{i}: {type(reader).__name__}" + (f" at {reader.site}" if isinstance(reader, SiteReader) else "")
        for i, reader in enumerate(readers)
    ]


def end_tokens(lvlm: HookedLVLM) -> list[int]:
    """Ids of the tokens that end an answer."""
    end = lvlm.hf_model.generation_config.eos_token_id
    return [] if end is None else [end] if isinstance(end, int) else list(end)


def _before_end(tokens: Tensor, end: list[int]) -> Tensor:
    """[batch, new] True before a row's first end token."""
    ended = torch.isin(tokens, torch.tensor(end, dtype=tokens.dtype, device=tokens.device))
    return ended.long().cumsum(dim=1) == 0
