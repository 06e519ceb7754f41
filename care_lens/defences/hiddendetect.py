"""HiddenDetect as a gate: requests at which the model's middle layers lean towards a refusal are refused.

Detector: at the last prompt token of each block, the logits that the final norm and the unembedding would give (the logit lens) and
their cosine with a vector that is 1 at the tokens that refusals begin with and 0 elsewhere; the score of a request is the integral of
the cosine over the chosen blocks (trapezoid rule). Above the threshold the answer is the given refusal, token by token; below it
nothing is changed.

    defence = HiddenDetect.fit(lvlm, benign=harmless, malicious=attacks, refusal_tokens=[id], refusal="sorry i cannot help")
    scores = defence.scores(lvlm, requests)

Of the published method this is the detector; what to do on detection is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.examples import Example
from care_lens.core.gates import gradient_wanted, stepped
from care_lens.core.site import Site
from care_lens.defences.base import Batch, HookDefence, block_output
from care_lens.defences.lens_reader import IntegralReader, LensReader, RefusalLens
from care_lens.defences.stored import FitError, WrongModelError, require_examples
from care_lens.lvlm import HookedLVLM
from care_lens.repair.base import HookPair
from care_lens.repair.gate import ThresholdGate
from care_lens.repair.plan import PlanPart
from care_lens.repair.schedule import AnswerSteps

LOGITS = "unembed.hook_out"
_FORCED = -1e4


class NoSafetyLayersError(FitError):
    """No block tells malicious from benign requests better than the last one does."""


def require_logits(lvlm: HookedLVLM, name: str) -> None:
    """Refuse a model whose logits cannot be edited.

    Raises:
        WrongModelError: Naming the hook point that is missing.
    """
    if LOGITS not in lvlm.bridge.hook_dict:
        raise WrongModelError(
            f"{name} must be able to edit the logits, but this model's bridge has no hook point {LOGITS}"
        )


def refusal_cosines(
    lvlm: HookedLVLM, states: Float[Tensor, "layer batch d"], tokens: Sequence[int]
) -> Float[Tensor, "layer batch"]:
    """The cosine of the lens logits with the refusal tokens' vector.

    Args:
        lvlm: The model.
        states: [layer, batch, d] of the residual stream.
        tokens: Ids of the tokens that refusals begin with.
    """
    with lvlm.bare(), torch.set_grad_enabled(torch.is_grad_enabled() and gradient_wanted()):
        logits = lvlm.bridge.unembed(lvlm.bridge.ln_final(states.to(lvlm.dtype))).float()
    return logits[..., list(tokens)].sum(dim=-1) / (logits.norm(dim=-1) * len(tokens) ** 0.5)


@dataclass(frozen=True, eq=False, kw_only=True)
class HiddenDetect(HookDefence):
    """Refuses what its detector flags.

    Attributes:
        layers: First and last block of the integral.
        refusal_tokens: Ids of the tokens that refusals begin with.
        refusal_ids: Ids of the refusal that is given, with its end of sequence.
        threshold: Of the score; infinity switches it off.
        width: d of the model.
        name: Row of a defence table.
    """

    gated: ClassVar[bool] = True

    layers: tuple[int, int]
    refusal_tokens: tuple[int, ...]
    refusal_ids: tuple[int, ...]
    threshold: float
    width: int
    name: str = "HiddenDetect"

    @classmethod
    def fit(
        cls,
        lvlm: HookedLVLM,
        *,
        benign: Sequence[Example],
        malicious: Sequence[Example],
        refusal_tokens: Sequence[int],
        refusal: str,
        false_positives: float = 0.02,
        batch_size: int = 32,
    ) -> "HiddenDetect":
        """Choose the blocks and the threshold.

        The integral goes over the blocks from the first to the last at which the mean cosine of malicious requests is above that of
        benign ones by more than at the last block.

        Args:
            lvlm: The model, without a defence on it.
            benign: Harmless requests; the threshold is their (1 - false_positives) quantile.
            malicious: Harmful requests.
            refusal_tokens: Ids of the tokens that refusals begin with.
            refusal: The answer that flagged requests get.
            false_positives: Share of the benign requests that may be flagged.
            batch_size: Examples a forward pass.

        Raises:
            FitError: If a set is empty.
            NoSafetyLayersError: If there are no such blocks.
        """
        require_examples(benign=benign, malicious=malicious)
        if not refusal_tokens:
            raise FitError("refusal_tokens must hold at least one token id, got none")
        n = lvlm.n_layers("language")
        held = [_cosines(lvlm, e, range(n), refusal_tokens, batch_size) for e in (benign, malicious)]
        gap = held[1].mean(dim=1) - held[0].mean(dim=1)
        better = (gap[:-1] > gap[-1]).nonzero()[:, 0].tolist()
        if len(better) < 2:
            raise NoSafetyLayersError(
                "two blocks or more must tell malicious from benign requests better than the last one, got "
                f"{len(better)} of {n - 1}; the model's middle layers do not lean towards a refusal before it answers"
            )
        first, last = better[0], better[-1]
        scores = torch.trapezoid(held[0][first : last + 1], dim=0)
        ids = lvlm.tokenizer(refusal, add_special_tokens=False)["input_ids"]
        return cls(
            layers=(first, last),
            refusal_tokens=tuple(int(t) for t in refusal_tokens),
            refusal_ids=(*ids, lvlm.tokenizer.eos_token_id),
            threshold=float(scores.quantile(1 - false_positives, interpolation="higher")),
            width=lvlm.width(block_output(0)),
        )

    @classmethod
    def always(cls, lvlm: HookedLVLM, *, refusal: str) -> "HiddenDetect":
        """A control: it refuses everything, whatever its detector reads.

        Args:
            lvlm: The model.
            refusal: The answer that every request gets.
        """
        ids = tuple(lvlm.tokenizer(refusal, add_special_tokens=False)["input_ids"])
        if not ids:
            raise FitError(f"refusal must have a token, got {refusal!r}; give it words that the model knows")
        return cls(
            layers=(0, 0),
            refusal_tokens=ids[:1],
            refusal_ids=(*ids, lvlm.tokenizer.eos_token_id),
            threshold=-float("inf"),
            width=lvlm.width(block_output(0)),
            name="refuses everything",
        )

    def widths(self) -> dict[Site, int]:
        """Outputs of the blocks of the integral."""
        return {block_output(layer): self.width for layer in range(self.layers[0], self.layers[1] + 1)}

    @property
    def off(self) -> bool:
        """Whether the threshold is infinite."""
        return self.threshold == float("inf")

    def check(self, lvlm: HookedLVLM) -> None:
        """Refuse a model of another width, or whose logits cannot be edited.

        Raises:
            WrongModelError: Saying why.
        """
        super().check(lvlm)
        require_logits(lvlm, self.name)

    def scores(self, lvlm: HookedLVLM, examples: Sequence[Example], *, batch_size: int = 32) -> Float[Tensor, "n"]:
        """The detector's score of requests.

        Args:
            lvlm: The model.
            examples: The requests.
            batch_size: Examples a forward pass.
        """
        layers = range(self.layers[0], self.layers[1] + 1)
        return torch.trapezoid(_cosines(lvlm, examples, layers, self.refusal_tokens, batch_size), dim=0)

    def reader(self, lvlm: HookedLVLM) -> IntegralReader:
        """The detector as a reader of a :class:`~care_lens.repair.Correction`, which must write at its last block or above.

        Args:
            lvlm: The model, whose final norm and unembedding it takes along: d x d numbers.

        Returns:
            The reader; its score of a request is that of :meth:`scores`.

        Raises:
            WrongModelError: If the model is of another width, its final norm is no RMS norm, or its unembedding has a bias.

        Example:
            >>> Correction(writer=writer, reader=detector.reader(lvlm), gate=detector.gate())  # doctest: +SKIP
        """
        self.check(lvlm)
        lens = RefusalLens.of(lvlm, self.refusal_tokens)
        return IntegralReader(readers=tuple(LensReader(site=site, lens=lens) for site in self.widths()))

    def gate(self) -> ThresholdGate:
        """A gate that opens where the detector flags a request.

        Raises:
            RepairError: If the threshold is infinite: the detector then decides nothing.
        """
        return ThresholdGate(threshold=self.threshold)

    def plan_parts(self) -> list[PlanPart]:
        """What it does, for ``explain``."""
        return [
            PlanPart(
                name="refusal",
                site=LOGITS,
                positions=("last", "generated"),
                writer="gives a fixed refusal, token by token",
                width=self.width,
                reader="refusal tokens under the logit lens (last)",
                reader_site=f"{block_output(self.layers[0])} to {block_output(self.layers[1])}",
                gate="opens above the threshold",
                threshold=self.threshold,
                note="cost: one unembedding for each of these blocks per request",
            )
        ]

    def edits(self, batch: Batch) -> list[HookPair]:
        """Hooks that read the blocks, and one that gives the refusal."""
        states: dict[int, Tensor] = {}
        flagged: dict[str, Tensor] = {}
        spans, counter = batch.inputs.spans, AnswerSteps(batch)
        # The refusal stands after what is given of the answer (a prefill), whole: its tokens are counted from there.
        begun = spans.prefill.sum(dim=1, keepdim=True)
        answered = spans.context_end | (spans.response & ~spans.prefill)
        now: dict[str, Tensor] = {}

        def see(h: Tensor, prefill: bool, layer: int) -> None:
            if layer == self.layers[0]:
                steps = counter.next(h)
                steps = steps - begun.to(steps.device)
                now["step"] = steps.masked_fill(~answered.to(steps.device), -1) if prefill else steps
            if prefill:
                states[layer] = batch.at_last(h)

        def answer(logits: Tensor, hook: Any) -> Tensor:
            here = now["step"][:, -logits.shape[1] :].to(logits.device)
            if states:
                cosines = refusal_cosines(
                    batch.lvlm, torch.stack([states[n] for n in sorted(states)]), self.refusal_tokens
                )
                scores = torch.trapezoid(cosines, dim=0)
                # What is flagged gets fixed logits, without a gradient: an attack learns of the detector from its score alone.
                flagged["rows"] = stepped(scores > self.threshold, scores, self.threshold) != 0
                states.clear()
            ids = torch.tensor(self.refusal_ids, device=logits.device)[here.clamp(0, len(self.refusal_ids) - 1)]
            forced = torch.full_like(logits, _FORCED).scatter(2, ids[..., None], 0.0)
            where = flagged["rows"].to(logits.device)[:, None] & (here >= 0)
            return torch.where(where[..., None], forced, logits)

        layers = range(self.layers[0], self.layers[1] + 1)
        reads = [batch.read(block_output(n), lambda h, prefill, n=n: see(h, prefill, n)) for n in layers]
        return [*reads, (LOGITS, answer)]


def _cosines(
    lvlm: HookedLVLM, examples: Sequence[Example], layers: Sequence[int], tokens: Sequence[int], batch_size: int
) -> Float[Tensor, "layer n"]:
    sites = [block_output(layer) for layer in layers]
    parts = []
    for start in range(0, len(examples), batch_size):
        inputs = lvlm.prepare(examples[start : start + batch_size])
        with torch.no_grad():
            _, cache = lvlm.run_with_cache(inputs, sites=sites, logits_to_keep=1)
        view = Batch(inputs)
        states = torch.stack([view.at_last(cache[str(site)]) for site in sites])
        parts.append(refusal_cosines(lvlm, states, tokens).cpu())
    return torch.cat(parts, dim=1)
