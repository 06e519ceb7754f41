"""Hybrid fusion of visual and textual corrections: the paper's repair, and ours where corrections are gated.

At a site, the visual corrections, each after the other, make the edit D_v of an activation, and the textual
ones D_t, both from the same activation and with their gates applied (a closed gate makes 0). They are
combined per token:

- "adaptive" (the paper's): ``h + w D_v + (1 - w) D_t`` with ``w = ||D_v|| / (||D_v|| + ||D_t||)`` of the
  gated edits at alpha = 1, so that strength and weight stay apart. The weights are a convex average: of two
  equal, orthogonal edits each is half applied. A modality whose gate is closed has weight 0, and the other
  acts in full. With ``weighting="sample"`` the norms are taken over all of the row's prompt at the site, and the one weight holds for its prompt and its
  answer; where nothing of the prompt is edited, the answer's tokens have weights of their own.
- "sequential": visual, then textual on the result.
- "parallel": ``h + weights[0] D_v + weights[1] D_t``; the weights are fixed, whatever the gates do.
- "modality": D_v at image tokens, D_t at all others.
- "joint": one projection onto the span of both modalities' directions, towards the target of the token's own modality
  (:func:`care_lens.repair.fuse.joint_edit`).

Tokens outside the scope, padding, and tokens whose edit is zero keep their activation bit for bit. Edits are
computed in float32 (float64 in a float64 model) and cast back; they are differentiable, except through a hard
gate.

Source: Fu et al., CVPR 2026, arXiv:2603.27240 (fusion); gates are ours. Cost: O(d k) a token and correction.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from care_lens.core.blocks import with_block
from care_lens.core.gates import gradient_wanted
from care_lens.core.identity import held_fingerprint
from care_lens.core.site import Site
from care_lens.lvlm import HookedLVLM, LVLMInputs
from care_lens.repair import store
from care_lens.repair.base import HookPair, HookRepair
from care_lens.repair.checks import require_mapping, require_number, require_text
from care_lens.repair.correction import Correction
from care_lens.repair.errors import RepairError, RepairMismatchError
from care_lens.repair.explaining import fusion_plan
from care_lens.repair.fuse import GatedWriter, fused_edit
from care_lens.repair.gate import Gate, can_close, openness
from care_lens.repair.kinds import register_kind
from care_lens.repair.linear import LinearPart, fusion_parts
from care_lens.repair.opening import Watch
from care_lens.repair.placed import compute_dtype
from care_lens.repair.plan import PlanPart
from care_lens.repair.positions import BatchView, Positions, check_positions
from care_lens.repair.reader import Reader
from care_lens.repair.reading import Readings, end_tokens
from care_lens.repair.recording import Keep, Recording
from care_lens.repair.schedule import AnswerSteps, schedule_words, strength_at
from care_lens.repair.weighting import SampleShare
from care_lens.subspace import Match, ModelIdentity, SubspaceMismatchError

Rule = Literal["adaptive", "sequential", "parallel", "modality", "joint"]
RULES: tuple[str, ...] = get_args(Rule)
Weighting = Literal["token", "sample"]


@register_kind
@dataclass(frozen=True, eq=False, kw_only=True)
class HybridFusion(HookRepair):
    """Visual and textual corrections, and how they are combined.

    Attributes:
        visual: Corrections of the visual modality; those of one site act in this order.
        textual: Corrections of the textual modality.
        rule: "adaptive", "sequential", "parallel", "modality" or "joint".
        weights: Of visual and textual edits under "parallel".
        weighting: Whether "adaptive" weighs the modalities for each token or once for each row (and site).
        scope: Which tokens are edited; a writer's own scope narrows it.
        name: Row of a defence table.
        provenance: What it came from, JSON-able: data, fit.
        model: The model it was made for; None: any that is as wide at its sites.
        match: How much of that model must agree when it is put on one: "exact" (the weights), "architecture", or "width" (what
            is checked without a model, too).

    Raises:
        RepairError: If there is no correction, one is of the other modality, or an option is not known or makes no sense.
    """

    visual: tuple[Correction, ...] = ()
    textual: tuple[Correction, ...] = ()
    rule: Rule = "adaptive"
    weights: tuple[float, float] = (0.5, 0.5)
    weighting: Weighting = "token"
    scope: Positions = "all"
    name: str = "care"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    model: ModelIdentity | None = None
    match: Match = "exact"

    def __post_init__(self) -> None:
        for side in ("visual", "textual"):
            given = getattr(self, side)
            if not isinstance(given, (tuple, list)) or not all(isinstance(one, Correction) for one in given):
                raise RepairError(f"{side} must be a tuple of corrections, got {given!r}")
            object.__setattr__(self, side, tuple(given))
        if not self.corrections:
            raise RepairError("visual or textual must hold a correction, got none; for the model as it is use NoRepair")
        if self.rule not in RULES:
            raise RepairError(f"rule must be one of {RULES}, got {self.rule!r}")
        if self.weighting not in get_args(Weighting):
            raise RepairError(f"weighting must be one of {get_args(Weighting)}, got {self.weighting!r}")
        if self.weighting != "token" and self.rule != "adaptive":
            raise RepairError(f'weighting="sample" is of rule="adaptive", got rule={self.rule!r}; leave it out')
        check_positions(self.scope, name="scope")
        if not isinstance(self.weights, (tuple, list)) or len(self.weights) != 2:
            raise RepairError(f"weights must be two numbers, of visual and of textual edits, got {self.weights!r}")
        object.__setattr__(self, "weights", tuple(self.weights))
        for weight in self.weights:
            require_number(weight, name="weights", least=0)
        require_text(self.name, name="name")
        require_mapping(self.provenance, name="provenance")
        if self.model is not None and not isinstance(self.model, ModelIdentity):
            raise RepairError(
                f"model must be a ModelIdentity or None, got {self.model!r}; use ModelIdentity.from_model"
            )
        if self.match not in get_args(Match):
            raise RepairError(f"match must be one of {get_args(Match)}, got {self.match!r}")
        for modality, corrections in (("visual", self.visual), ("textual", self.textual)):
            wrong = [c.modality for c in corrections if c.modality not in (None, modality)]
            if wrong:
                raise RepairError(f"corrections given as {modality} must be fitted for that, got {wrong}; swap them")
        if self.rule == "joint":
            self._check_joint()

    def _check_joint(self) -> None:
        """Refuse what one projection at each site cannot be made of."""
        for site in {c.writer.site for c in self.corrections}:
            here = [[c.writer for c in side if c.writer.site == site] for side in (self.visual, self.textual)]
            if any(len(side) > 1 for side in here):
                raise RepairError(
                    f'rule="joint" takes one correction per modality at a site, got {len(here[0])} visual and {len(here[1])} textual at {site}; '
                    "fit one subspace of the rank you want"
                )
            if all(here) and here[0][0].alpha != here[1][0].alpha:
                raise RepairError(
                    f'rule="joint" is one projection and needs one alpha at {site}, got {here[0][0].alpha} (visual) and '
                    f"{here[1][0].alpha} (textual)"
                )

    @property
    def corrections(self) -> tuple[Correction, ...]:
        """All corrections, visual first."""
        return (*self.visual, *self.textual)

    @property
    def readers(self) -> tuple[Reader, ...]:
        """The corrections' readers, each once."""
        return tuple(dict.fromkeys(c.reader for c in self.corrections if c.reader is not None))

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites it reads and writes, in the order of the forward pass."""
        return tuple(sorted({site for correction in self.corrections for site in correction.sites}))

    def with_gate(self, gate: Gate) -> "HybridFusion":
        """The same repair with this gate on every correction that has a reader."""

        def gated(corrections: Sequence[Correction]) -> tuple[Correction, ...]:
            return tuple(c if c.reader is None else dataclasses.replace(c, gate=gate) for c in corrections)

        return dataclasses.replace(self, visual=gated(self.visual), textual=gated(self.textual))

    def check(self, lvlm: HookedLVLM) -> None:
        """Refuse a model that this repair was not made for.

        Args:
            lvlm: The model.

        Raises:
            ValueError: If a site is not there.
            RepairMismatchError: If a site is of another width than what is read or written there, or the model is not the
                one it was made for, as far as ``match`` asks.
        """
        if self.model is not None and self.match != "width":
            try:
                found = ModelIdentity.from_model(lvlm.hf_model)
                if self.model.fingerprint not in (None, found.fingerprint):
                    # A repair of an earlier version may hold the digest of the model as a bridge had it.
                    held = held_fingerprint(lvlm.hf_model)
                    found = dataclasses.replace(found, fingerprint=held) if self.model.fingerprint == held else found
                self.model.require(found, self.match)
            except SubspaceMismatchError as error:
                raise RepairMismatchError(f"this repair was made for another model: {error}") from None
        for correction in self.corrections:
            for part in (correction.writer, *correction.leaves):
                if (width := lvlm.width(part.site)) != part.width:
                    raise RepairMismatchError(
                        f"{type(part).__name__} at {part.site} must be as wide as the model there ({width}), "
                        f"got {part.width}; it was fitted on another model or site"
                    )

    def fwd_hooks(self, inputs: LVLMInputs) -> list[HookPair]:
        """Hooks for one batch: its forward passes, and generation from it with a key-value cache.

        Every whole-batch pass starts afresh, so the same hooks may be used again on the same batch. On
        another batch they raise ValueError.

        Args:
            inputs: The batch.

        Returns:
            TransformerLens ``(name, fn)`` pairs, one a site and one that checks the tokens.
        """
        return self._hooks(inputs, None)

    @property
    def gated(self) -> bool:
        """Whether there may be requests that it leaves as they are: no correction is open whatever is read."""
        return all(can_close(correction.gate) for correction in self.corrections)

    def watch(self, lvlm: HookedLVLM, inputs: LVLMInputs) -> Watch | None:
        """Its hooks for a batch, looking on beside the undefended model: which rows it would touch (:mod:`care_lens.repair.opening`).

        Args:
            lvlm: The model, without the repair on it.
            inputs: The batch.

        Returns:
            The watch; None where a correction is open whatever is read, so that every request is touched.

        Raises:
            ValueError: If the model does not fit.
        """
        if type(self).on is not HookRepair.on or not self.gated:
            return None
        self.check(lvlm)
        return Watch(self.fwd_hooks(inputs), inputs)

    @with_block("repair.recording(lvlm)")
    def recording(self, lvlm: HookedLVLM) -> Iterator[Recording]:
        """Put the repair on a model, as :meth:`on` does, and keep what it does to every token.

        Args:
            lvlm: The model.

        Yields:
            The record, filled while the model runs: gate value, weights of the two modalities and norm of the edit for each token
            and site (:class:`~care_lens.repair.recording.Recording`).

        Raises:
            ValueError: If the model does not fit.

        Example:
            >>> from care_lens import organism
            >>> from care_lens.repair import Correction, HybridFusion, Writer
            >>> import torch
            >>> lvlm = organism.load()
            >>> writer = Writer.towards("blocks.2.hook_resid_post", target=torch.ones(160), source=torch.zeros(160), scope="last")
            >>> with HybridFusion(textual=(Correction(writer=writer),)).recording(lvlm) as seen:
            ...     answer = lvlm.generate(lvlm.prepare(organism.examples("plain", "test", n=1)), max_new_tokens=2)
            >>> int((seen.to_dataframe().edit_norm > 0).sum())
            1
        """
        self.check(lvlm)
        record = Recording()
        with lvlm.hooks_for_each_batch(lambda inputs: self._hooks(inputs, record, end_tokens(lvlm))):
            yield record

    def _hooks(self, inputs: LVLMInputs, record: Recording | None, ends: Sequence[int] = ()) -> list[HookPair]:
        view = BatchView(inputs)
        readings = Readings(view)
        first, keep = [view.guard()], None
        if record is not None:
            keep, tokens = record.batch(inputs, ends=ends)
            first.append((first[0][0], lambda ids, hook: tokens(ids, view.is_prefill(ids.shape))))
        return [*first, *((str(site), self._hook(site, view, readings, keep)) for site in self.sites)]

    def _hook(self, site: Site, view: BatchView, readings: Readings, keep: Keep | None) -> Any:
        leaves = tuple(dict.fromkeys(leaf for c in self.corrections for leaf in c.leaves if leaf.site == site))
        visual = tuple(c for c in self.visual if c.writer.site == site)
        textual = tuple(c for c in self.textual if c.writer.site == site)
        own = ("image", "text") if self.rule == "modality" else ("all", "all")
        share = SampleShare(view) if self.weighting == "sample" else None
        steps = AnswerSteps(view) if any(c.schedule is not None for c in (*visual, *textual)) else None

        def repair(activation: Tensor, hook: Any) -> Tensor:
            for leaf in leaves:
                readings.update(leaf, activation)
            prefill = view.is_prefill(activation.shape)
            step = None if steps is None else steps.next(activation)
            seen = [self._gated(correction, own[0], activation, view, readings, step) for correction in visual]
            said = [self._gated(correction, own[1], activation, view, readings, step) for correction in textual]
            fused = fused_edit(
                activation.to(compute_dtype(activation.dtype)),
                seen,
                said,
                rule=self.rule,
                weights=self.weights,
                image=view.mask("image", prefill=prefill).to(activation.device) if self.rule == "joint" else None,
                share=share,
            )
            if keep is not None and (visual or textual):
                keep(site, fused, seen, said, prefill)
            if gradient_wanted():  # an attack that sees the repair: edits of zero stay in the graph
                return (activation + fused.edit).to(activation.dtype)
            touched = (fused.edit != 0).any(dim=-1, keepdim=True)
            if not bool(touched.any()):
                return activation
            return torch.where(touched, (activation + fused.edit).to(activation.dtype), activation)

        return repair

    def _gated(
        self,
        correction: Correction,
        own: str,
        activation: Tensor,
        view: BatchView,
        readings: Readings,
        step: Tensor | None,
    ) -> GatedWriter:
        prefill = view.is_prefill(activation.shape)
        mask = view.mask(own, prefill=prefill)
        for scope in (self.scope, correction.writer.scope):
            mask = mask & view.mask(scope, prefill=prefill)
        acting = mask.to(activation.device, compute_dtype(activation.dtype))
        if correction.reader is not None:
            opened = openness(correction.gate, readings.score(correction.reader))
            if correction.pulse:
                opened = opened - openness(correction.gate, readings.score_before(correction.reader))
            acting = acting * opened.to(acting)
        if correction.unless is not None:
            spared = readings.own(correction.unless).to(acting.device) > 0
            answer = view.mask("response", prefill=prefill).to(acting.device)
            acting = acting.masked_fill(spared & answer, 0.0)
        if correction.schedule is None or step is None:
            return GatedWriter(correction.writer, acting)
        strength = strength_at(correction.schedule, step).to(acting)
        return GatedWriter(correction.writer, acting * strength, gate=acting)

    def plan_parts(self) -> list[PlanPart]:
        """One part for each correction, for :meth:`explain`."""
        return fusion_plan(
            self.visual,
            self.textual,
            rule=self.rule,
            weights=self.weights,
            weighting=self.weighting,
            scope=self.scope,
            provenance=self.provenance,
        )

    def linear_parts(self) -> list[LinearPart]:
        """What of it is one affine map of every token, by site; and each correction that is not, with the reason."""
        scheduled: list[LinearPart] = []
        for side in ("visual", "textual"):
            for i, one in enumerate(getattr(self, side)):
                if one.schedule is not None and one.writer.alpha != 0:
                    reason = (
                        f"its strength changes over the answer ({schedule_words(one.schedule)}), and weights do not count tokens; leave the "
                        "schedule out, and give a constant strength as alpha"
                    )
                    scheduled.append(LinearPart(name=f"{side}[{i}]", site=one.writer.site, reason=reason))
        others = fusion_parts(self.visual, self.textual, rule=self.rule, weights=self.weights, scope=self.scope)
        named = {part.name for part in scheduled}
        return [*scheduled, *(part for part in others if part.name not in named)]

    def describe(self) -> dict[str, Any]:
        """Its settings as JSON-able values; tensors by shape and norm."""
        return store.describe(self)

    def save(self, directory: str | Path) -> None:
        """Write ``repair.json`` and ``repair.safetensors`` into a directory, made if it does not exist."""
        store.save_repair(self, directory)

    @classmethod
    def load(cls, directory: str | Path, *, match: Match | None = None) -> "HybridFusion":
        """Read what :meth:`save` wrote, in this version or an older one.

        Args:
            directory: Where from.
            match: Another level at which the model must agree; None: the one it was saved with.

        Raises:
            FileNotFoundError: If a file is not there.
            RepairFileError: If the files are damaged, hold something else, or come from a newer version.
        """
        loaded = store.load_repair(cls, directory)
        return loaded if match is None else dataclasses.replace(loaded, match=match)
