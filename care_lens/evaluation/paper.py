"""Tables in the layout of the paper: methods by attacks, a block a model, ready for LaTeX or markdown.

A cell is the rate in per cent with its interval. Bold is what no other defence of the block is significantly better than, by paired tests with Holm's correction over all pairs of the column; so several may be bold.
A dagger stands where a defence differs from the one it is compared with, with Holm's correction over the defences and columns of the block that have the metric. Published figures that were not measured here
stand below, marked as quoted: they have neither intervals nor marks, since other examples, judges and settings made them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from care_lens.core.renames import renamed
from care_lens.evaluation.comparison import compare, rank
from care_lens.evaluation.metrics import LABELS, LOWER_IS_BETTER, RATES, records, rows_where, trials_of, unit_of

Form = Literal["latex", "markdown"]
Column = tuple[str, str]

_ESCAPES = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


@renamed(alpha="significance")
def paper_table(
    tables: Any,
    *,
    form: Form = "latex",
    metrics: Sequence[str] = ("asr",),
    channels: Sequence[str] | Mapping[str, str] | None = None,
    names: Mapping[str, str] | None = None,
    against: str | None = None,
    quoted: Mapping[str, Mapping[str, Mapping[str, float | int]]] | None = None,
    intervals: bool = True,
    digits: int = 1,
    significance: float = 0.05,
    max_missing: int | float = 0.04,
    label: str = "tab:defences",
) -> str:
    """A table of one model or several.

    Args:
        tables: A :class:`~care_lens.evaluation.table.DefenceTable`, or several by the model's name; each of one judge and one seed a metric.
        form: "latex" (with the package booktabs) or "markdown".
        metrics: Which metrics.
        channels: Which channels, in this order; a mapping gives the names they are printed by. None: all that have a metric.
        names: What defences are printed as.
        against: A defence that the others are compared with, such as the undefended model; None: no daggers.
        quoted: Published figures, as printed there: by the model's name ("" for a single table), then by method, then by channel.
        intervals: Whether intervals are printed.
        digits: Decimals.
        significance: Of the tests: the probability of a mark where there is no difference.
        max_missing: Largest share of trials that a comparison may leave out: those that either defence misses.
        label: Of the LaTeX table.

    Returns:
        The text; its caption says units, intervals, numbers, judges and what the marks mean.

    Raises:
        ValueError: If a table has none of the metrics, or several judges or seeds in a column, or a quoted figure is of a model or channel that is not
            there, or the significance is not between 0 and 1.
    """
    if form not in get_args(Form):
        raise ValueError(f"form must be one of {get_args(Form)}, got {form!r}")
    if isinstance(metrics, str) or isinstance(channels, str):
        raise ValueError(
            f"metrics and channels must be lists of names, got {metrics!r} and {channels!r}; write ('asr',)"
        )
    if not 0 < significance < 1:
        raise ValueError(f"significance must be between 0 and 1, got {significance}")
    blocks = dict(tables) if isinstance(tables, Mapping) else {"": tables}
    if not blocks:
        raise ValueError("tables must hold one table or more, got none")
    rows = {model: _rows(table, metrics, channels) for model, table in blocks.items()}
    columns = _columns(rows, metrics, channels)
    if unknown := sorted({*(quoted or {})} - {*blocks}):
        raise ValueError(f"quoted must be of models in the table, some of {[*blocks]}, got {unknown}")
    style = _Style(form, names or {}, dict(channels) if isinstance(channels, Mapping) else {}, intervals, digits)
    options = {"significance": significance, "max_missing": max_missing}
    body: list[tuple[str, list[list[str]]]] = []
    for model, table in blocks.items():
        best = _best(table, columns, **options)
        marked = _marked(table, columns, against, **options)
        by_defence: dict[str, dict[Column, dict[str, Any]]] = {}
        for row in rows[model]:
            by_defence.setdefault(row["defence"], {})[row["channel"], row["metric"]] = row
        lines = [
            [
                style.text(style.names.get(name, name)),
                *(
                    style.cell(held.get(column), best=(name, column) in best, marked=(name, column) in marked)
                    for column in columns
                ),
            ]
            for name, held in by_defence.items()
        ]
        lines += _quoted(style, (quoted or {}).get(model, {}), columns)
        body.append((style.text(model), lines))
    head = [style.text("Method"), *(style.heading(column, several=len({*metrics}) > 1) for column in columns)]
    every = [row for part in rows.values() for row in part]
    caption = _caption(
        every,
        columns,
        intervals=intervals,
        against=against,
        names=names or {},
        significance=significance,
        quoted=bool(quoted),
    )
    return (_latex if form == "latex" else _markdown)(head, body, style.text(caption), label)


class _Style:
    """How cells are written."""

    def __init__(
        self, form: str, names: Mapping[str, str], channels: Mapping[str, str], intervals: bool, digits: int
    ) -> None:
        self.latex, self.names, self._channels = form == "latex", names, channels
        self._intervals, self._digits = intervals, digits

    def text(self, text: str) -> str:
        if self.latex:
            return "".join(_ESCAPES.get(letter, letter) for letter in text)
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")

    def heading(self, column: Column, *, several: bool) -> str:
        channel, metric = column
        name = self.text(self._channels.get(channel, channel))
        arrow = {True: (" $\\downarrow$", " \u2193"), False: (" $\\uparrow$", " \u2191"), None: ("", "")}[
            LOWER_IS_BETTER.get(metric)
        ]
        return name + (f" ({self.text(LABELS.get(metric, metric))})" if several else "") + arrow[0 if self.latex else 1]

    def number(self, value: float, metric: str) -> str:
        return f"{100 * value:.{self._digits}f}" if metric in RATES else f"{value:.{max(self._digits, 3)}f}"

    def cell(self, row: Mapping[str, Any] | None, *, best: bool, marked: bool) -> str:
        if row is None:
            return "--" if self.latex else "\u2013"
        value = self.number(row["value"], row["metric"])
        value = (f"\\textbf{{{value}}}" if self.latex else f"**{value}**") if best else value
        value += ("$^\\dagger$" if self.latex else "\u2020") if marked else ""
        if not self._intervals:
            return value
        ends = f"[{self.number(row['ci_low'], row['metric'])}, {self.number(row['ci_high'], row['metric'])}]"
        return f"{value} {{\\scriptsize {ends}}}" if self.latex else f"{value} {ends}"


def _rows(
    table: Any, metrics: Sequence[str], channels: Sequence[str] | Mapping[str, str] | None
) -> list[dict[str, Any]]:
    trials_of(table)
    found = [
        row
        for row in records(table.frame)
        if row["metric"] in metrics and (channels is None or row["channel"] in channels)
    ]
    if not found:
        raise ValueError(
            f"metrics must be some of {sorted(set(table.frame['metric']))} in these channels, got {list(metrics)}"
        )
    for channel, metric in {(row["channel"], row["metric"]) for row in found}:
        here = [row for row in found if (row["channel"], row["metric"]) == (channel, metric)]
        if several := sorted({(str(row["judge"]), row["seed"]) for row in here})[1:]:
            raise ValueError(
                f"a column must be of one judge and one seed, got {len(several) + 1} for {channel!r} ({metric}); make a table of each, or pool the seeds' trials"
            )
    return found


def _columns(
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    metrics: Sequence[str],
    channels: Sequence[str] | Mapping[str, str] | None,
) -> list[Column]:
    seen = dict.fromkeys((row["channel"], row["metric"]) for part in rows.values() for row in part)
    order = list(dict.fromkeys(channel for channel, _ in seen)) if channels is None else list(channels)
    if lacking := [channel for channel in order if not any(channel == one for one, _ in seen)]:
        raise ValueError(f"channels must be in a table, some of {sorted({one for one, _ in seen})}, got {lacking}")
    return [(channel, metric) for metric in metrics for channel in order if (channel, metric) in seen]


def _best(
    table: Any, columns: Sequence[Column], *, significance: float, max_missing: int | float
) -> set[tuple[str, Column]]:
    """Which defences no other is significantly better than; nothing where there is one defence, or no better side."""
    found: set[tuple[str, Column]] = set()
    trials = trials_of(table)
    for metric in dict.fromkeys(metric for _, metric in columns):
        if metric not in LOWER_IS_BETTER:
            continue
        for channel in [channel for channel, of in columns if of == metric]:
            part = rows_where(trials, (trials["metric"] == metric) & (trials["channel"] == channel))
            if len(set(part["defence"])) > 1:
                ranks = rank(part, metric=metric, significance=significance, max_missing=max_missing)
                found |= {(row["defence"], (channel, metric)) for row in records(ranks) if row["rank_best"] == 1}
    return found


def _marked(
    table: Any, columns: Sequence[Column], against: str | None, *, significance: float, max_missing: int | float
) -> set[tuple[str, Column]]:
    """Which cells differ from the defence that they are compared with."""
    if against is None:
        return set()
    found: set[tuple[str, Column]] = set()
    if against not in (names := sorted(set(trials_of(table)["defence"]))):
        raise ValueError(f"against must be a defence of the table, one of {names}, got {against!r}")
    known = set(trials_of(table)["metric"])
    for metric in dict.fromkeys(metric for _, metric in columns if metric in known):
        trials = trials_of(table)
        here = rows_where(trials, (trials["metric"] == metric) & (trials["defence"] == against))
        others = rows_where(trials, (trials["metric"] == metric) & (trials["defence"] != against))
        both = {*here["channel"]} & {*others["channel"]}
        chosen = [channel for channel, of in columns if of == metric and channel in both]
        if not chosen:  # fidelity, say, which the undefended model has none of
            continue
        tests = compare(table, against=against, metric=metric, channels=chosen, max_missing=max_missing)
        found |= {(row["first"], (row["channel"], metric)) for row in records(tests) if row["p_holm"] <= significance}
    return found


def _quoted(
    style: _Style, figures: Mapping[str, Mapping[str, float | int]], columns: Sequence[Column]
) -> list[list[str]]:
    lines = []
    for method, held in figures.items():
        if unknown := sorted({*held} - {channel for channel, _ in columns}):
            raise ValueError(f"quoted must be of channels in the table, got {unknown} for {method!r}")
        first: dict[str, str] = {}
        for channel, metric in columns:  # a figure is quoted once, in the channel's first column
            first.setdefault(channel, metric)
        cells = [
            f"{float(held[channel]):g}"
            if channel in held and first[channel] == metric
            else ("--" if style.latex else "\u2013")
            for channel, metric in columns
        ]
        lines.append([style.text(f"{method} (quoted)"), *cells])
    return lines


def _caption(
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[Column],
    *,
    intervals: bool,
    against: str | None,
    names: Mapping[str, str],
    significance: float,
    quoted: bool,
) -> str:
    units = " and ".join(dict.fromkeys(unit_of(metric) for _, metric in columns))
    counts = sorted({row["n"] for row in rows})
    n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    missing, judges = sum(row["missing"] for row in rows), ", ".join(sorted({str(row["judge"]) for row in rows}))
    kinds = ", ".join(sorted({row["interval"] for row in rows}))
    parts = [f"In {units}" + (f", with 95 % intervals ({kinds})" if intervals else "")]
    parts.append(f"n = {n} a cell; missing: {missing}. Judge: {judges}")
    parts.append(f"Bold: no other defence is significantly better (paired tests, Holm, {100 * significance:g} %)")
    if against is not None:
        parts.append(
            f"\u2020: differs from {names.get(against, against)} (paired tests, Holm, {100 * significance:g} %)"
        )
    if quoted:
        parts.append("Quoted: published figures, on other examples, judges or settings")
    return ". ".join(parts) + "."


def _latex(head: list[str], body: list[tuple[str, list[list[str]]]], caption: str, label: str) -> str:
    lines = ["% needs \\usepackage{booktabs}", "\\begin{table}[t]", "\\centering", "\\small"]
    lines.append("\\caption{" + caption.replace("\u2020", "$^\\dagger$") + "}")
    lines += [f"\\label{{{label}}}", f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", "\\toprule"]
    lines.append(" & ".join(head) + " \\\\")
    for model, rows in body:
        lines.append("\\midrule")
        if model:
            lines.append(f"\\multicolumn{{{len(head)}}}{{l}}{{\\textit{{{model}}}}} \\\\")
        lines += [" & ".join(row) + " \\\\" for row in rows]
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"]) + "\n"


def _markdown(head: list[str], body: list[tuple[str, list[list[str]]]], caption: str, label: str) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for model, rows in body:
        if model:
            lines.append([f"*{model}*", *[""] * (len(head) - 1)])
        lines += rows
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{caption}\n"
