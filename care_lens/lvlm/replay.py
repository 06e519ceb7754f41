"""Replay: run the language tower again from the layer and the position at which a patch begins to act.

Of a forward pass with a patch in the language tower most is the same as without: the vision tower, the layers
below the patch, with a causal model the positions before it, and the logits of positions that the outcome does
not read. An untouched forward pass is kept (the input of every block, its keys and values, and the keyword
arguments that the Hugging Face model gave to it), and only the rest is run again, through the same blocks, hook
points included. Two more savings follow from what a block is: a patch inside a block changes the block's output
at its own positions only, and of the last block only keys and values are needed at positions that nothing reads.

What is replayed must be what the model computes, so every block is tried on its own first: with the rows in
another order, over all positions and over a part of them, it must give what the forward pass gave. Replay is
allowed from the lowest layer on above which all blocks pass; where a model does something between two blocks
(DeepStack), calls them otherwise, or computes logits otherwise than by norm and unembedding, it is not, and
forward passes are run whole. Positions are cut only where the attention mask that the block was given is causal.

Memory: for a batch of n rows the input of every block, [n, pos, d_model] each, and keys and values of all layers.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from care_lens.core.site import Site
from care_lens.lvlm.hooked import HookedLVLM
from care_lens.lvlm.inputs import LVLMInputs

log = logging.getLogger(__name__)

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
_COARSE = 2e-2
_CACHE = "past_key_values"
BLOCK_INPUT = "hook_resid_pre"


class _KeysAreIn(Exception):
    """Ends a block's run as soon as its keys and values are there."""


class _Keys:
    """Keys and values of one block, in the place of transformers' cache.

    Args:
        before: Those of the positions before, [rows, head, pos, d_head] each, or None.
        stop: Whether to raise once the new ones are there.
    """

    def __init__(self, before: tuple[Tensor, Tensor] | None = None, *, stop: bool = False) -> None:
        self.held, self._stop = before, stop
        self.is_compileable = False

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The held ones and the new ones after them."""
        if self.held is not None and self.held[0].shape[-2]:
            keys, values = torch.cat([self.held[0], keys], dim=-2), torch.cat([self.held[1], values], dim=-2)
        self.held = keys, values
        if self._stop:
            raise _KeysAreIn
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many positions are held."""
        return 0 if self.held is None else self.held[0].shape[-2]


@dataclass(frozen=True, eq=False)
class Edit:
    """A site's activation at some positions of some rows is replaced.

    Attributes:
        site: A site of the language tower.
        first: The first position that changes in any row.
        stop: One past the last.
        apply: ``apply(activation [rows, n, ...], start)`` gives the activation of positions ``start`` to
            ``start + n`` with what replaces it.
    """

    site: Site
    first: int
    stop: int
    apply: Any


class Replay:
    """An untouched forward pass of a batch, from whose middle other passes are run on.

    Make one with :meth:`of`.

    Attributes:
        lowest: The lowest layer from which replay is exact.
        causal: Whether positions before a patch stay as they are.
    """

    def __init__(
        self,
        lvlm: HookedLVLM,
        streams: Sequence[Float[Tensor, "rows pos d_model"]],
        kwargs: Sequence[Mapping[str, Any]],
        n_logits: int,
        padding: Bool[Tensor, "rows pos"],
    ) -> None:
        self._lvlm, self._streams, self._kwargs = lvlm, list(streams), list(kwargs)
        self._blocks = list(lvlm.bridge.blocks)
        self._keys: list[tuple[Tensor, Tensor] | None] = [None] * len(self._blocks)
        self.n_rows, self.n_pos = streams[0].shape[:2]
        self.n_logits = n_logits
        # Padding attends to nothing, and what it then computes depends on how many keys there are; nothing reads it.
        self._tokens = ~padding
        self.lowest = len(self._blocks)
        self.causal = all(_is_causal(given.get("attention_mask"), self.n_pos) for given in kwargs)

    @classmethod
    def of(
        cls, lvlm: HookedLVLM, inputs: LVLMInputs, *, logits_to_keep: int = 0
    ) -> "tuple[Replay | None, Float[Tensor, 'rows kept vocab']]":
        """Run a batch untouched and keep what replay needs.

        Args:
            lvlm: The model.
            inputs: The batch.
            logits_to_keep: As in ``HookedLVLM.__call__``; replays give the logits of the same positions.

        Returns:
            The replay, or None where nothing can be replayed (a repair or a hook is on the model, or its blocks do not
            give alone what they give in the model), and the logits [rows, kept, vocab] of the batch.
        """
        if lvlm.is_hooked:
            with torch.no_grad():
                return None, lvlm(inputs, logits_to_keep=logits_to_keep)
        blocks = list(lvlm.bridge.blocks)
        streams: list[Tensor] = []
        kwargs: list[dict[str, Any]] = []

        def before(module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            streams.append((args[0] if args else given["hidden_states"]).detach().clone())
            kwargs.append({name: value for name, value in given.items() if name != "hidden_states"})

        def after(module: Any, args: tuple[Any, ...], output: Any) -> None:
            streams.append((output[0] if isinstance(output, tuple) else output).detach().clone())

        with ExitStack() as stack, torch.no_grad():
            for block in blocks:
                stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(blocks[-1].register_forward_hook(after).remove)
            logits = lvlm(inputs, logits_to_keep=logits_to_keep)
        usual = len(streams) == len(blocks) + 1 and streams[0].shape[:2] == inputs.input_ids.shape
        if not usual:
            log.info("blocks are not run once each on [batch, pos, d_model]: forward passes are run whole")
            return None, logits
        replay = cls(lvlm, streams, kwargs, logits.shape[1], inputs.spans.padding.cpu())
        with torch.no_grad():
            replay._check(logits)
        if replay.lowest == len(blocks):
            return None, logits
        if replay.lowest:
            log.info("replay is exact from layer %d on; patches below run whole forward passes", replay.lowest)
        return replay, logits

    def start(self, edits: Sequence[Edit]) -> int:
        """The first position that is run again for these edits."""
        return min(edit.first for edit in edits) if self.causal else 0

    def can(self, sites: Sequence[Site]) -> bool:
        """Whether patches at these sites can be replayed."""
        return all(site.tower == "language" and (site.layer or 0) >= self.lowest for site in sites)

    def sees(self, edits: Sequence[Edit]) -> bool:
        """Whether anything that is read depends on the edits: not so inside the last block before the read positions."""
        last, kept = len(self._blocks) - 1, self.n_pos - self.n_logits
        return any(edit.site.layer != last or edit.site.component == BLOCK_INPUT or edit.stop > kept for edit in edits)

    def read(self, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Untouched activations [rows, pos, ...] of the whole batch at sites that can be replayed.

        Args:
            sites: The sites.

        Returns:
            Copies that share memory with nothing.
        """
        held: dict[Site, Tensor] = {}

        def saver(site: Site) -> Any:
            def save(activation: Tensor, hook: Any) -> None:
                held[site] = activation.detach().clone()

            return save

        everyone = list(range(self.n_rows))
        for layer in sorted({site.layer for site in sites if site.layer is not None}):
            here = [site for site in sites if site.layer == layer]
            with self._lvlm.hooks([(site, saver(site)) for site in here]):
                self._run_block(layer, everyone, self._streams[layer], 0, self.n_pos)
        return held

    def logits(self, rows: Sequence[int], edits: Sequence[Edit]) -> Tensor:
        """Logits of some rows under edits, at the positions that the untouched pass kept.

        Args:
            rows: Which rows of the batch, in any order, repeated or not.
            edits: What is replaced, rows in the order of ``rows``.

        Returns:
            [len(rows), kept, vocab].
        """
        rows, first, start = list(rows), min(edit.site.layer or 0 for edit in edits), self.start(edits)
        last, kept = len(self._blocks) - 1, self.n_pos - self.n_logits
        hidden = self._streams[first][rows, start:]
        for layer in range(first, last + 1):
            here = [edit for edit in edits if edit.site.layer == layer]
            outer = [edit for edit in here if edit.site.component == BLOCK_INPUT]
            inner = [edit for edit in here if edit.site.component != BLOCK_INPUT]
            for edit in outer:
                hidden = edit.apply(hidden, start)
            if layer == first and not outer:
                hidden = self._inside(layer, rows, hidden, start, inner)
            elif layer == last and start < kept:
                hidden = self._read_end(layer, rows, hidden, start, kept, inner)
                start = kept
            else:
                hidden = self._block(layer, rows, hidden, start, self.n_pos, inner)
        if start > kept:
            hidden = torch.cat([self._streams[-1][rows, kept:start], hidden], dim=1)
        return self._tail(hidden[:, -self.n_logits :])

    def _inside(self, layer: int, rows: list[int], hidden: Tensor, start: int, edits: Sequence[Edit]) -> Tensor:
        """A block whose input is untouched: only the positions of the edits are run."""
        low, high = min(edit.first for edit in edits), max(edit.stop for edit in edits)
        if not self.causal:
            low, high = 0, self.n_pos
        part = self._block(layer, rows, hidden[:, low - start : high - start], low, high, edits)
        after = self._streams[layer + 1][rows, start:]
        after[:, low - start : high - start] = part
        return after

    def _read_end(
        self, layer: int, rows: list[int], hidden: Tensor, start: int, kept: int, edits: Sequence[Edit]
    ) -> Tensor:
        """The last block at the positions that are read; of those before them, keys and values alone."""
        if not self.causal:
            return self._block(layer, rows, hidden, start, self.n_pos, edits)[:, kept - start :]
        keys = _Keys(self._before(layer, rows, start), stop=True)
        with suppress(_KeysAreIn):
            self._call(layer, rows, hidden[:, : kept - start], start, kept, keys)
        return self._block(layer, rows, hidden[:, kept - start :], kept, self.n_pos, edits, keys.held)

    def _block(
        self,
        layer: int,
        rows: list[int],
        hidden: Tensor,
        start: int,
        stop: int,
        edits: Sequence[Edit] = (),
        before: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        def hook(edit: Edit) -> Any:
            def replace_positions(activation: Tensor, hook: Any) -> Tensor:
                return edit.apply(activation, start)

            return replace_positions

        with self._lvlm.hooks([(edit.site, hook(edit)) for edit in edits]):
            return self._run_block(layer, rows, hidden, start, stop, before)

    def _run_block(
        self,
        layer: int,
        rows: list[int],
        hidden: Tensor,
        start: int,
        stop: int,
        before: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        keys = _Keys(self._before(layer, rows, start) if before is None else before)
        return self._call(layer, rows, hidden, start, stop, keys)

    def _call(self, layer: int, rows: list[int], hidden: Tensor, start: int, stop: int, keys: _Keys) -> Tensor:
        given = {
            name: _part(value, rows, start, stop, self.n_rows, self.n_pos)
            for name, value in self._kwargs[layer].items()
        }
        given |= {_CACHE: keys, "use_cache": False} if "use_cache" in given else {_CACHE: keys}
        with self._lvlm.turn():
            output = self._blocks[layer](hidden, **given)
        return output[0] if isinstance(output, tuple) else output

    def _before(self, layer: int, rows: list[int], start: int) -> tuple[Tensor, Tensor] | None:
        held = self._keys[layer]
        if held is None or start == 0:
            return None
        return held[0][rows, :, :start], held[1][rows, :, :start]

    def _tail(self, hidden: Tensor) -> Tensor:
        return self._lvlm.bridge.unembed(self._lvlm.bridge.ln_final(hidden))

    def _check(self, logits: Tensor) -> None:
        """Find the lowest layer from which everything is exact."""
        if not _close(self._tail(self._streams[-1][:, -self.n_logits :]), logits):
            log.info("logits are not the norm and the unembedding alone: forward passes are run whole")
            return
        for layer in reversed(range(len(self._blocks))):
            try:
                exact = self._is_exact(layer)
            except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
                log.info("block %d cannot be run alone: %s", layer, error)
                exact = False
            if not exact:
                return
            self.lowest = layer

    def _is_exact(self, layer: int) -> bool:
        """Whether a block gives alone what it gave, with rows in another order and over parts of the positions."""
        everyone = list(range(self.n_rows))
        stream, after = self._streams[layer], self._streams[layer + 1]
        keys = _Keys()
        whole = self._call(layer, everyone, stream, 0, self.n_pos, keys)
        if not _close(whole[self._tokens], after[self._tokens]) or keys.held is None:
            return False
        if keys.held[0].shape[-2] != self.n_pos or keys.held[0].shape[0] != self.n_rows:
            return False
        self._keys[layer] = keys.held
        if not self.causal:
            ranges = [(0, self.n_pos)]
        else:
            third = self.n_pos // 3
            ranges = [(third, self.n_pos), (third, max(third + 1, 2 * third)), (self.n_pos - 1, self.n_pos)]
        rows = everyone[::-1]
        for a, b in ranges:
            found, tokens = self._run_block(layer, rows, stream[rows, a:b], a, b), self._tokens[rows, a:b]
            if not _close(found[tokens], after[rows, a:b][tokens]):
                return False
        return True


def _close(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    if not found.numel():
        return True
    expected = expected.to(found.device)
    tolerance = _TOLERANCE.get(found.dtype, _COARSE)
    scale = max(1.0, float(expected.abs().amax()))
    return bool(((found - expected).abs() <= tolerance * scale).all())


def _is_causal(mask: Any, n_pos: int) -> bool:
    """Whether a mask [rows, 1, pos, pos] lets no position look ahead."""
    if not isinstance(mask, Tensor) or mask.ndim != 4 or mask.shape[-2:] != (n_pos, n_pos):
        return False
    ahead = torch.ones(n_pos, n_pos, dtype=torch.bool, device=mask.device).triu(1)
    shown = mask[..., ahead]
    return not bool(shown.any()) if mask.dtype == torch.bool else bool((shown <= torch.finfo(mask.dtype).min / 2).all())


def _part(value: Any, rows: list[int], start: int, stop: int, n_rows: int, n_pos: int) -> Any:
    """What a block is given for some rows and the positions ``start`` to ``stop``, of what it was given for all."""
    if isinstance(value, tuple | list):
        return type(value)(_part(item, rows, start, stop, n_rows, n_pos) for item in value)
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.ndim == 4 and value.shape[-2:] == (n_pos, n_pos):
        value = value[..., start:stop, :stop]
        return value[rows] if value.shape[0] == n_rows else value
    if value.ndim == 1:
        return value[start:stop] if value.shape == (n_pos,) else value
    # Rotary embeddings in several dimensions have an axis of these first.
    for axis in range(min(2, value.ndim - 1)):
        if value.shape[axis] in (n_rows, 1) and value.shape[axis + 1] == n_pos:
            value = value.narrow(axis + 1, start, stop - start)
            return (
                value.index_select(axis, torch.tensor(rows, device=value.device)) if value.shape[axis] != 1 else value
            )
    return value
