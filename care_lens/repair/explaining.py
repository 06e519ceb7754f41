"""The plan of a repair, for a reader: where it acts, on which tokens, on what condition, how strongly, and what it costs.

    plan = repair.explain()
    print(plan)                            # at most 25 lines
    plan.frame                             # one row for each edit
    repair.explain(lvlm, inputs).readings  # and what its gates read on a batch

Every repair is explained by the one function :func:`explain`. What is particular to a class is its ``plan_parts()``, a list of
:class:`PlanPart`; a class without one is explained from its ``widths()`` or its description.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from torch import Tensor

from care_lens.core.display import ShortRepr, as_text, listed
from care_lens.core.site import Site
from care_lens.lvlm import HookedLVLM, LVLMInputs
from care_lens.repair.correction import Correction
from care_lens.repair.errors import RepairError
from care_lens.repair.gate import AlwaysOpen, ConformalGate, SoftGate, openness
from care_lens.repair.plan import PlanPart, RepairPlan, short, told
from care_lens.repair.positions import BatchView, Positions
from care_lens.repair.reader import CombinedReader, EnergyReader, LinearReader, Reader, SiteReader
from care_lens.repair.reading import Readings
from care_lens.repair.schedule import schedule_words


@runtime_checkable
class Explained(Protocol):
    """What can be explained: it has a name."""

    @property
    def name(self) -> str: ...


def explain(repair: Explained, lvlm: HookedLVLM | None = None, inputs: LVLMInputs | None = None) -> RepairPlan:
    """The plan of a repair.

    Args:
        repair: Any repair or defence.
        lvlm: A model, together with ``inputs``: what the gates read on that batch is added.
        inputs: The batch. It is run once, without this repair.

    Returns:
        The plan.

    Raises:
        RepairError: If it is no repair (of hook functions alone nothing can be said), one of model and batch is given without the other, or
            the repair has no corrections whose gates could read.

    Example:
        >>> import torch
        >>> from care_lens.repair import Correction, HybridFusion, Writer, explain
        >>> writer = Writer.towards("blocks.2.hook_resid_post", target=torch.ones(8), source=torch.zeros(8), scope="last")
        >>> print(explain(HybridFusion(textual=(Correction(writer=writer),), name="push")))
        push (HybridFusion)
          textual[0] at blocks.2.hook_resid_post, tokens: last (prompt)
            always open
            Writer, rank 1 of 8 (rule not recorded), alpha 1; adaptive, weights per token
          cost: 32 multiply-adds per token; extra forward passes: none
    """
    _require_explained(repair)
    for value, wanted, what in ((lvlm, HookedLVLM, "lvlm"), (inputs, LVLMInputs, "inputs")):
        if value is not None and not isinstance(value, wanted):
            raise RepairError(
                f"{what} must be a {wanted.__name__}, got a {type(value).__name__}; write explain(repair, lvlm, lvlm.prepare(examples))"
            )
    own = getattr(repair, "plan_parts", None)
    parts = tuple(default_parts(repair) if own is None else own())
    model, match = getattr(repair, "model", None), getattr(repair, "match", "")
    made_for = "" if model is None else f"{model.label} ({match})"
    readings = None
    if lvlm is not None or inputs is not None:
        readings = _read(repair, lvlm, inputs)
    return RepairPlan(repair.name, type(repair).__name__, parts, made_for, readings)


def _require_explained(repair: Any) -> None:
    """Refuse what is no repair, above all hooks: functions into which nobody can look."""
    if isinstance(repair, HookedLVLM):
        raise RepairError(
            "repair must come first and the model after it, got the model first; write explain(repair), or explain(repair, lvlm, inputs) "
            "for what its gates read on a batch"
        )
    if isinstance(repair, (list, tuple, dict)) or callable(repair) or not hasattr(repair, "name"):
        raise RepairError(
            f"repair must be a repair or a defence, got a {type(repair).__name__}; of hooks that are functions nothing can be told: make "
            "them a defence (a HookDefence whose edits(batch) returns them, docs/howto/add_a_defence.md), and explain that"
        )


class Explainable(ShortRepr):
    """Mix-in: a repair that explains itself, and whose ``repr`` is a few lines."""

    name: str

    def plan_parts(self) -> list[PlanPart]:
        """Its edits for :meth:`explain`, one by one; here as far as its fields and its description say them."""
        return default_parts(self)

    def explain(self, lvlm: HookedLVLM | None = None, inputs: LVLMInputs | None = None) -> RepairPlan:
        """What it does, for a reader: where, which tokens, rank, gate, strength, fusion and cost.

        Args:
            lvlm: A model, together with ``inputs``: what the gates read on that batch is added.
            inputs: The batch. It is run once, without this repair.

        Returns:
            The plan: ``print`` it, or take its ``frame``.

        Raises:
            RepairError: If one of the two is given without the other, or the repair has no corrections.
        """
        return explain(self, lvlm, inputs)

    def shown(self) -> tuple[str, dict[str, str]]:
        """Its name, and its edits by place; the fields of a class that does not say its parts."""
        return short(self, self.plan_parts()) if self._says_parts else super().shown()

    @property
    def _says_parts(self) -> bool:
        return type(self).plan_parts is not Explainable.plan_parts

    def __repr__(self) -> str:
        return as_text(*self.shown()) if self._says_parts else super().__repr__()


def default_parts(repair: Any) -> list[PlanPart]:
    """The parts of a repair that does not say them: its ``widths()`` by site with the fields ``scope`` and ``alpha``, else whatever
    its description has a site for.

    Args:
        repair: The repair.
    """
    widths = getattr(repair, "widths", dict)()
    kind = type(repair).__name__
    note = "this class does not say more; define plan_parts()"
    if widths:
        scope, alpha = getattr(repair, "scope", None), getattr(repair, "alpha", None)
        return [
            PlanPart(name=str(site), site=site, positions=scope, writer=kind, width=width, alpha=alpha, note=note)
            for site, width in widths.items()
        ]
    found = [
        PlanPart(
            name=name,
            site=str(part["site"]),
            positions=_positions(part.get("scope", part.get("positions"))),
            writer=str(part.get("kind", kind)),
            alpha=_number(part.get("alpha")),
            note=note,
        )
        for name, part in _sited(repair.describe() if hasattr(repair, "describe") else {}, kind)
    ]
    return found or [
        PlanPart(name=kind, site=None, writer=kind, note="this class does not say where it acts; define plan_parts()")
    ]


def fusion_plan(
    visual: Sequence[Correction],
    textual: Sequence[Correction],
    *,
    rule: str,
    weights: tuple[float, float],
    weighting: str,
    scope: Positions,
    provenance: Mapping[str, Any],
) -> list[PlanPart]:
    """The parts of a fusion, one for each correction.

    Args:
        visual: Visual corrections.
        textual: Textual ones.
        rule: How they are combined.
        weights: Of the two under "parallel".
        weighting: Of "adaptive".
        scope: Which tokens are edited.
        provenance: May say in "rank_rule" how ranks were chosen; the plan of ``learn_repair`` says it by itself.
    """
    chosen = str(provenance.get("rank_rule", "given by the plan" if "plan" in provenance else "not recorded"))
    counted: set[SiteReader] = set()
    made: list[PlanPart] = []
    for side, corrections in (("visual", visual), ("textual", textual)):
        for i, correction in enumerate(corrections):
            writer, reader, gate = correction.writer, correction.reader, correction.gate
            others = {c.writer.site for c in (textual if side == "visual" else visual)}
            # The adaptive rule computes each edit a second time at alpha = 1; a joint one computes it together and alone.
            times = 2 if rule == "adaptive" or (rule == "joint" and writer.site in others) else 1
            cost = times * 2 * writer.width * writer.rank
            leaves = [leaf for leaf in correction.leaves if leaf not in counted]
            counted.update(leaves)
            within = (("image",) if side == "visual" else ("text",)) if rule == "modality" else ()
            note = "acts once, where the gate opens (pulse)" if correction.pulse else ""
            spared = (
                "" if correction.unless is None else f"spares what {type(correction.unless).__name__} reads as refusal"
            )
            made.append(
                PlanPart(
                    name=f"{side}[{i}]",
                    site=writer.site,
                    positions=writer.scope,
                    within=(*(() if scope == "all" else (scope,)), *within),
                    writer=type(writer).__name__,
                    rank=writer.rank,
                    width=writer.width,
                    rank_rule=chosen,
                    alpha=float(writer.alpha),
                    modality=side,
                    reader="" if reader is None else _reader_words(reader),
                    reader_site=", ".join(dict.fromkeys(str(leaf.site) for leaf in correction.leaves)),
                    gate="" if isinstance(gate, AlwaysOpen) else type(gate).__name__,
                    threshold=_number(getattr(gate, "threshold", None)),
                    epsilon=gate.epsilon if isinstance(gate, (ConformalGate, SoftGate)) else None,
                    n_calibration=gate.n if isinstance(gate, (ConformalGate, SoftGate)) else None,
                    schedule=schedule_words(correction.schedule),
                    fusion=f"parallel, weight {weights[side == 'textual']:g}" if rule == "parallel" else rule,
                    weighting=weighting if rule == "adaptive" else "",
                    multiply_adds=cost + sum(map(_reading_cost, leaves)),
                    note="; ".join(filter(None, (note, spared, _steps(gate), correction.name))),
                )
            )
    return made


def _positions(value: Any) -> Positions | None:
    if isinstance(value, str):
        return value
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) and value else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _sited(value: Any, name: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Whatever in a description has a site, with its path."""
    if isinstance(value, Mapping):
        if isinstance(value.get("site"), (str, Site)):
            yield name, value
        for key, part in value.items():
            yield from _sited(part, str(key) if name == "" else f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _sited(part, f"{name}[{i}]")


def _reader_words(reader: Reader) -> str:
    """Kind, tokens and pooling of a reader; of several, of each kind once."""
    if isinstance(reader, SiteReader):
        pooled = "" if reader.positions == "last" else f", {reader.pooling}"
        return f"{type(reader).__name__} ({told(reader.positions)}{pooled})"
    parts = reader.readers if isinstance(reader, CombinedReader) else reader.leaves
    inside = dict.fromkeys(_reader_words(part) for part in parts)
    return f"{type(reader).__name__} of {listed(inside, most=3)}"


def _reading_cost(leaf: SiteReader) -> int:
    """Multiply-adds per token; of a foreign reader, of its [d, ...] tensors."""
    if isinstance(leaf, EnergyReader):
        return leaf.read.numel() + leaf.read.shape[1]
    if isinstance(leaf, LinearReader):
        return leaf.width
    return sum(value.numel() for value in vars(leaf).values() if isinstance(value, Tensor))


def _steps(gate: Any) -> str:
    """How a gate opens, where it is not at once."""
    if isinstance(gate, SoftGate):
        shut = "" if gate.closed_to is None else f", shut up to {gate.closed_to:.4g}"
        return f"half open at its threshold, temperature {gate.temperature:g}{shut}"
    width = getattr(gate, "width", 0)
    return f"opens over {width:g} above its threshold" if isinstance(width, (int, float)) and width else ""


def _read(repair: Any, lvlm: HookedLVLM | None, inputs: LVLMInputs | None) -> pd.DataFrame:
    """What the gates of a fusion read on a batch that runs without it."""
    if lvlm is None or inputs is None:
        raise RepairError("lvlm and inputs must both be given, or neither, got one; write explain(lvlm, inputs)")
    sides = [(side, getattr(repair, side, None)) for side in ("visual", "textual")]
    if not all(isinstance(held, tuple) and all(isinstance(c, Correction) for c in held) for _, held in sides):
        raise RepairError(
            f"a {type(repair).__name__} must have corrections for their readings to be told, got none; leave lvlm and inputs out"
        )
    repair.check(lvlm)
    readings = Readings(BatchView(inputs))
    held: list[tuple[str, tuple[Correction, ...]]] = [(side, corrections or ()) for side, corrections in sides]
    leaves = dict.fromkeys(leaf for _, corrections in held for c in corrections for leaf in c.leaves)

    def seeing(leaf: SiteReader) -> Any:
        def see(activation: Tensor, hook: Any) -> None:
            readings.update(leaf, activation)

        return see

    with torch.no_grad():
        lvlm.run_with_hooks(inputs, fwd_hooks=[(leaf.site, seeing(leaf)) for leaf in leaves], logits_to_keep=1)
    rows: list[dict[str, object]] = []
    for side, corrections in held:
        for i, correction in enumerate(corrections):
            if correction.reader is None:
                continue
            score = readings.score(correction.reader).float().cpu().amax(dim=1)
            opened = openness(correction.gate, score)
            for row in range(len(score)):
                rows.append(
                    {
                        "part": f"{side}[{i}]",
                        "row": row,
                        "id": inputs.examples[row].id if inputs.examples else None,
                        "score": float(score[row]),
                        "threshold": _number(getattr(correction.gate, "threshold", None)),
                        "gate": float(opened[row]),
                    }
                )
    return pd.DataFrame(rows, columns=["part", "row", "id", "score", "threshold", "gate"])
