"""The plan of a repair as an object: its parts, their frame, and how they are put in words. :func:`care_lens.repair.explain` makes it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from care_lens.core.display import as_html, broken, cut, listed, one_line
from care_lens.core.site import Site
from care_lens.repair.positions import Positions, includes_generated

_PROMPT = frozenset({"all", "image", "text", "prompt", "last", "context_end"})
_MOST_GROUPS, _MOST_LINES, _WIDEST = 6, 25, 560


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
        schedule: How the strength changes over the answer, in words; empty: it does not.
        fusion: How it is combined with other edits at the site.
        weighting: Over what the weights of a fusion are taken.
        multiply_adds: Per token of a forward pass, of writer and reader, the writer's at tokens at which a gate is open; None: not known. A reader that several edits share
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
    schedule: str = ""
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
        where = "" if self.positions is None else " within ".join(map(told, (self.positions, *self.within)))
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
        if self.readings is not None and len(self.readings):
            opened = self.readings.groupby("part", sort=False)["gate"].agg(lambda gate: int((gate > 0).sum()))
            rows = self.readings["row"].nunique()
            lines.append("  on this batch open: " + listed([f"{part} in {n} of {rows}" for part, n in opened.items()]))
        return "\n".join(part for line in lines[:_MOST_LINES] for part in broken(cut(line, _WIDEST)))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        head = as_html(f"{self.name} ({self.kind})", {"made for": self.made_for, "cost": self.cost})
        shown = self.frame.dropna(axis="columns", how="all")
        kept = [name for name in shown.columns if bool((shown[name].astype(str) != "").any())]
        tables = [pd.DataFrame(shown[kept])] + ([] if self.readings is None else [self.readings])
        return head + "".join(table.to_html(index=False, escape=True, na_rep="", max_rows=40) for table in tables)


_COLUMNS = PlanPart(name="", site=None).to_dict().keys()


def grouped(parts: Sequence[PlanPart]) -> list[list[PlanPart]]:
    """Parts that differ in nothing but name, site and cost of reading, together; in the order of the first of each."""
    groups: dict[Any, list[PlanPart]] = {}
    for part in parts:
        component = part.site.component if isinstance(part.site, Site) else part.site
        key = dataclasses.replace(part, name="", site=component, reader_site="", multiply_adds=None, note=part.note)
        groups.setdefault(key, []).append(part)
    return list(groups.values())


def short(repair: Any, parts: Sequence[PlanPart]) -> tuple[str, dict[str, str]]:
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
    said.append(part.schedule)
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


def told(positions: Positions) -> str:
    return " and ".join(_names(positions))
