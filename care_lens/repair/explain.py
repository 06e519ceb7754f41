"""The plan of a repair, for a reader: where it acts, on which tokens, on what condition, how strongly, and what it costs.

    plan = repair.explain()
    print(plan)                            # at most 25 lines
    plan.frame                             # one row for each edit
    repair.explain(lvlm, inputs).readings  # and what its gates read on a batch

Every repair is explained by the one function :func:`explain`. What is particular to a class is its ``plan_parts()``, a list of
:class:`PlanPart`; a class without one is explained from its ``widths()`` or its description.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from torch import Tensor

from care_lens.core.display import ShortRepr, as_html, as_text, cut, listed, one_line
from care_lens.core.site import Site
from care_lens.lvlm import HookedLVLM, LVLMInputs
from care_lens.repair.correction import Correction
from care_lens.repair.errors import RepairError
from care_lens.repair.gate import AlwaysOpen, ConformalGate, openness
from care_lens.repair.positions import BatchView, Positions, includes_generated
from care_lens.repair.reader import EnergyReader, LinearReader, Reader, SiteReader
from care_lens.repair.reading import Readings

_PROMPT = frozenset({"all", "image", "text", "prompt", "last"})
_MOST_GROUPS, _MOST_LINES = 6, 25


@dataclass(frozen=True, kw_only=True)
class PlanPart:
    """One edit of a repair.

    Attributes:
        name: What it is called, such as "visual[0]".
        site: Where it edits: a site, the name of another hook point, or None where the request is rewritten instead.
        positions: Which tokens it edits; None: not known.
        within: Further positions to which these are confined, such as the scope of the whole repair.
        writer: What it does, in words or by its class.
        rank: Number of directions along which it edits; None: not known, or all.
        width: d of the activations.
        rank_rule: How the rank was chosen.
        alpha: Strength.
        modality: "visual", "textual" or "".
        reader: What decides, in words; empty: nothing is read.
        reader_site: Where it reads.
        gate: Kind of the gate; empty: always open.
        threshold: Of the reader's score, above which the gate opens.
        epsilon: The bound on the share of benign prompts that open it.
        n_calibration: Number of benign prompts that the threshold was set on.
        fusion: How it is combined with other edits at the site.
        weighting: Over what the weights of a fusion are taken.
        multiply_adds: Per token of a forward pass, of writer and reader; None: not known. A reader that several edits share
            counts once, in the first.
        extra_per_request: Forward passes besides the model's own, at most, per request.
        extra_per_token: The same per forward pass of the model: the prompt, and every generated token.
        note: What else there is to know.
    """

    name: str
    site: Site | str | None
    positions: Positions | None = None
    within: tuple[Positions, ...] = ()
    writer: str = ""
    rank: int | None = None
    width: int | None = None
    rank_rule: str = ""
    alpha: float | None = None
    modality: str = ""
    reader: str = ""
    reader_site: str = ""
    gate: str = ""
    threshold: float | None = None
    epsilon: float | None = None
    n_calibration: int | None = None
    fusion: str = ""
    weighting: str = ""
    multiply_adds: int | None = None
    extra_per_request: int = 0
    extra_per_token: int = 0
    note: str = ""

    @property
    def acts_on(self) -> str:
        """ "prompt", "answer", "both", "nothing", or "" where it is not known."""
        if self.positions is None:
            return ""
        named = (self.positions, *self.within)
        prompt = all(not _PROMPT.isdisjoint(_names(one)) for one in named)
        answer = all(includes_generated(one) or "prefill" in _names(one) for one in named)
        return {(True, True): "both", (True, False): "prompt", (False, True): "answer"}.get((prompt, answer), "nothing")

    def to_dict(self) -> dict[str, Any]:
        """A row of the plan's frame."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        where = "" if self.positions is None else " within ".join(map(_told, (self.positions, *self.within)))
        site = None if self.site is None else str(self.site)
        layer = self.site.layer if isinstance(self.site, Site) else None
        del own["within"]
        first = {"part": own.pop("name"), "modality": own.pop("modality"), "site": site, "layer": layer}
        return {
            **first,
            "positions": where,
            "acts_on": self.acts_on,
            **{k: v for k, v in own.items() if k not in ("site", "positions")},
        }


@runtime_checkable
class Explained(Protocol):
    """What can be explained: it has a name."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True, eq=False, repr=False)
class RepairPlan:
    """What a repair does.

    Attributes:
        name: Of the repair.
        kind: Its class.
        parts: Its edits.
        made_for: The model it was made for, in words; empty: any of the widths.
        readings: What the gates read on a batch, one row for each part and row of the batch: part, row, id (of the example), score
            (the largest over prompt and answer), threshold, gate (its value there); None: no batch was given.
    """

    name: str
    kind: str
    parts: tuple[PlanPart, ...]
    made_for: str = ""
    readings: pd.DataFrame | None = None

    @property
    def frame(self) -> pd.DataFrame:
        """One row for each part: part, modality, site, layer, positions, acts_on ("prompt", "answer" or "both") and the other
        attributes of :class:`PlanPart`; what is not known is NA."""
        frame = pd.DataFrame([part.to_dict() for part in self.parts], columns=list(_COLUMNS))
        whole = ["layer", "rank", "width", "n_calibration", "multiply_adds", "extra_per_request", "extra_per_token"]
        return frame.astype(
            {name: "Int64" for name in whole} | {name: "Float64" for name in ("alpha", "threshold", "epsilon")}
        )

    def to_dataframe(self) -> pd.DataFrame:
        """``frame``, by the name that results have."""
        return self.frame

    @property
    def cost(self) -> str:
        """What it costs beside the model's own forward pass, in words."""
        known = [part.multiply_adds for part in self.parts if part.multiply_adds is not None]
        unknown = len(self.parts) - len(known)
        adds = f"{sum(known):,} multiply-adds per token" if known else ""
        adds += (" and " if known else "") + f"those of {unknown} parts that do not say" if unknown else ""
        request, token = sum(p.extra_per_request for p in self.parts), sum(p.extra_per_token for p in self.parts)
        extra = [f"{request} per request at most"] * bool(request) + [f"{token} per forward pass of the model"] * bool(
            token
        )
        return f"{adds or 'nothing is added'}; extra forward passes: {', '.join(extra) or 'none'}"

    def __str__(self) -> str:
        lines = [one_line(f"{self.name} ({self.kind})" + (f", made for {self.made_for}" if self.made_for else ""))]
        groups = grouped(self.parts)
        for group in groups[:_MOST_GROUPS]:
            lines += [_indent(one_line(line), i) for i, line in enumerate(_lines(group))]
        if more := len(groups) - _MOST_GROUPS:
            lines += [f"  and {more} more: see .frame"] * (more > 0)
        lines.append(f"  cost: {self.cost}")
        if self.readings is not None:
            opened = self.readings.groupby("part", sort=False)["gate"].agg(lambda gate: int((gate > 0).sum()))
            rows = self.readings["row"].nunique()
            lines.append("  on this batch open: " + listed([f"{part} in {n} of {rows}" for part, n in opened.items()]))
        return "\n".join(cut(line, 140) for line in lines[:_MOST_LINES])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = as_html(f"{self.name} ({self.kind})", {"made for": self.made_for, "cost": self.cost})
        shown = self.frame.dropna(axis="columns", how="all")
        kept = [name for name in shown.columns if bool((shown[name].astype(str) != "").any())]
        tables = [pd.DataFrame(shown[kept])] + ([] if self.readings is None else [self.readings])
        return head + "".join(table.to_html(index=False, escape=True, na_rep="", max_rows=40) for table in tables)


_COLUMNS = PlanPart(name="", site=None).to_dict().keys()


def explain(repair: Explained, lvlm: HookedLVLM | None = None, inputs: LVLMInputs | None = None) -> RepairPlan:
    """The plan of a repair.

    Args:
        repair: Any repair or defence.
        lvlm: A model, together with ``inputs``: what the gates read on that batch is added.
        inputs: The batch. It is run once, without this repair.

    Returns:
        The plan.

    Raises:
        RepairError: If one of model and batch is given without the other, or the repair has no corrections whose gates could read.

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
    own = getattr(repair, "plan_parts", None)
    parts = tuple(default_parts(repair) if own is None else own())
    model, match = getattr(repair, "model", None), getattr(repair, "match", "")
    made_for = "" if model is None else f"{model.name} ({match})"
    readings = None
    if lvlm is not None or inputs is not None:
        readings = _read(repair, lvlm, inputs)
    return RepairPlan(repair.name, type(repair).__name__, parts, made_for, readings)


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
                    epsilon=gate.epsilon if isinstance(gate, ConformalGate) else None,
                    n_calibration=gate.n if isinstance(gate, ConformalGate) else None,
                    fusion=f"parallel, weight {weights[side == 'textual']:g}" if rule == "parallel" else rule,
                    weighting=weighting if rule == "adaptive" else "",
                    multiply_adds=cost + sum(map(_reading_cost, leaves)),
                    note="; ".join(filter(None, (note, _steps(gate), correction.name))),
                )
            )
    return made


def grouped(parts: Sequence[PlanPart]) -> list[list[PlanPart]]:
    """Parts that differ in nothing but name, site and cost of reading, together; in the order of the first of each."""
    groups: dict[Any, list[PlanPart]] = {}
    for part in parts:
        component = part.site.component if isinstance(part.site, Site) else part.site
        key = dataclasses.replace(part, name="", site=component, reader_site="", multiply_adds=None, note=part.note)
        groups.setdefault(key, []).append(part)
    return list(groups.values())


def short(repair: Explained, parts: Sequence[PlanPart]) -> tuple[str, dict[str, str]]:
    """A repair in a few lines: its name, and where which of its parts act.

    Args:
        repair: The repair.
        parts: Its parts.
    """
    groups = grouped(parts)
    rows = {listed([one.name for one in group], most=2): where(group) for group in groups[:5]}
    if len(groups) > 5:
        rows["more"] = f"{len(groups) - 5} others, see explain()"
    return f"{type(repair).__name__}: {repair.name}", rows


def where(group: Sequence[PlanPart]) -> str:
    """The sites of a group, and which tokens."""
    part = group[0]
    sites = list(dict.fromkeys(str(one.site) for one in group if one.site is not None))
    tokens = "" if part.positions is None else f", tokens: {part.to_dict()['positions']} ({part.acts_on})"
    return (f"at {listed(sites, most=2)}" if sites else "in the request") + tokens


def condition(part: PlanPart) -> str:
    """What must be read for it to act."""
    if not part.reader and not part.gate:
        return "always open"
    level = "" if part.threshold is None else f" above {part.threshold:.4g}"
    proof = "" if part.epsilon is None else f" (epsilon {part.epsilon:g}, {part.n_calibration} benign prompts)"
    where = f" at {part.reader_site}" if part.reader_site else ""
    return f"{part.reader}{where} -> {part.gate or 'always open'}{level}{proof}"


def deed(part: PlanPart) -> str:
    """What it does, how strongly."""
    said = [part.writer]
    if part.rank is not None:
        of = "" if part.width is None else f" of {part.width}"
        said.append(f"rank {part.rank}{of}" + (f" (rule {part.rank_rule})" if part.rank_rule else ""))
    if part.alpha is not None:
        said.append(f"alpha {part.alpha:g}")
    fused = part.fusion + (f", weights per {part.weighting}" if part.weighting else "")
    return ", ".join(filter(None, said)) + (f"; {fused}" if fused else "")


def _lines(group: Sequence[PlanPart]) -> list[str]:
    part = group[0]
    last = deed(part) + (f"; {part.note}" if part.note else "")
    return [f"{listed([one.name for one in group], most=3)} {where(group)}", condition(part), last]


def _indent(line: str, i: int) -> str:
    return ("  " if i == 0 else "    ") + line


def _names(positions: Positions) -> tuple[str, ...]:
    return (positions,) if isinstance(positions, str) else positions


def _told(positions: Positions) -> str:
    return " and ".join(_names(positions))


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
        return f"{type(reader).__name__} ({_told(reader.positions)}{pooled})"
    inside = dict.fromkeys(_reader_words(leaf) for leaf in reader.leaves)
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
