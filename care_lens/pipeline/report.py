"""The report of a run: one self-contained HTML page, the figures as files beside it.

The page needs no network, fits wide and narrow screens and follows the light or dark scheme of the reader. What is particular to a
study (what it is, what its channels are) is told by the study; what each table and figure shows is told here.
"""

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from care_lens import plots
from care_lens.core.examples import Example
from care_lens.core.files import write_whole
from care_lens.core.pictures import shown_picture
from care_lens.evaluation import GenerationStore
from care_lens.pipeline.gradient import ADAPTIVE, ANSWER, CLEAN, NOISE, OPENING
from care_lens.pipeline.report_page import page, shown_figure
from care_lens.pipeline.report_words import (
    DEFENCES,
    NOTHING,
    POSITIONS,
    fold,
    interval,
    number,
    per_cent,
    place,
    plain,
    table,
    tuned_text,
    words,
)
from care_lens.pipeline.run import Run
from care_lens.pipeline.saved import UNDEFENDED
from care_lens.repair import ConformalGate

#: Pictures shown with their patch effects.
PICTURES = 3
#: Places shown of each pair set.
PLACES = 10
#: What the channels of the run itself are, whatever the study.
GRADIENT = {
    CLEAN: "Plain requests that the undefended model refuses, over clean pictures: the starting points of the gradient attack.",
    NOISE: "The same under random noise of the attack's size: a control.",
    OPENING: "The same under PGD on the picture, made against the undefended model for the first word of a compliant answer.",
    ANSWER: "The same under PGD made for the whole compliant answer.",
    ADAPTIVE: "PGD through a copy of the repair whose gates have gradients; the worst picture found for each request.",
}


def share_text(share: float, digits: int = 1) -> str:
    """A share in per cent; a dash where there is nothing to take a share of, as without held-out channels."""
    return f"{100 * share:.{digits}f} %" if math.isfinite(share) else f"- ({NOTHING})"


def rates(run: Run, defence: str, metric: str, channels: Sequence[str]) -> pd.DataFrame:
    """Rows of the test table for a defence and metric, channels in the order given."""
    frame = run.proof.table.to_dataframe()
    frame = frame[(frame.defence == defence) & (frame.metric == metric)].set_index("channel")
    return frame.loc[[c for c in channels if c in frame.index]]


def summary(run: Run) -> dict[str, float]:
    """The figures that the page opens with, before and after: worst ASR on seen and held-out channels (gradient attacks, those that see
    the repair among them, are held out), the share of stopped attacks that is refused, benign accuracy, benign prompts touched."""
    seen = [c for channels in run.study.seen.values() for c in channels]
    attacks = [c for c in run.study.channels("test", harmful=True) if c not in (run.study.plain, *seen)]
    attacks += [OPENING, ANSWER]
    benign = list(run.study.channels("test", harmful=False))
    out: dict[str, float] = {}
    for label, defence in (("before", UNDEFENDED), ("after", run.choice.repair.name)):
        out[f"worst seen ASR {label}"] = float(rates(run, defence, "asr", seen)["value"].max())
        held = list(rates(run, defence, "asr", attacks)["value"])
        if run.proof.adaptive is not None:
            frame = run.proof.adaptive.to_dataframe()
            held += list(frame[(frame["metric"] == "asr") & (frame["defence"] == defence)]["value"])
        out[f"worst held-out ASR {label}"] = float(max(held)) if held else float("nan")
        refused = rates(run, defence, "refusal", seen)
        out[f"attacks of seen channels refused {label}"] = float(
            (refused["value"] * refused["n"]).sum() / refused["n"].sum()
        )
        accuracy = rates(run, defence, "accuracy", benign)
        out[f"benign accuracy {label}"] = float((accuracy["value"] * accuracy["n"]).sum() / accuracy["n"].sum())
        out[f"lowest benign accuracy {label}"] = float(accuracy["value"].min())
    return out


def figures(run: Run) -> dict[str, go.Figure]:
    """Every figure of the report, by file name."""
    out = {f"effects_{name}": result.plot() for name, result in run.diagnosis.effects.items()}
    out |= {
        f"places_{name}": plots.plot_localisation(result, shown=PLACES) for name, result in run.diagnosis.places.items()
    }
    out["ablation"] = run.diagnosis.ablation.plot()
    for name, result in run.diagnosis.patches.items():
        for pair in range(PICTURES):
            rows = result.details.query("pair == @pair")
            if len(rows):
                picture = run.study.pairs[name].unsafe[pair].image
                out[f"patches_{name}_{pair}"] = plots.plot_patch_effects(rows, image=picture)
    out["asr"] = run.proof.table.plot()
    out["tradeoff"] = plots.plot_tradeoff(run.proof.table)
    own = _own_subspaces(run)
    if own:
        out["subspaces"] = plots.plot_spectra(own)
    if len(own) > 1:
        out["angles"] = plots.plot_principal_angles(own)
    for subspace in run.printed_subspaces:
        if subspace.basis.shape[1] > 1 and f"published_{subspace.modality}" not in out:
            out[f"published_{subspace.modality}"] = subspace.plot()
    return out


def _own_subspaces(run: Run) -> dict[str, Any]:
    """The subspaces that the repair reads, by what they are called."""
    return {
        f"{s.modality}, {s.provenance.get('rows') or plots.short_site(str(s.site))}": s for s in run.choice.subspaces
    }


class _Report:
    """What the sections of the page are made of."""

    def __init__(self, run: Run, store: GenerationStore | None) -> None:
        self.run = run
        self.attacks = list(run.study.channels("test", harmful=True))
        self.benign = list(run.study.channels("test", harmful=False))
        self.seen = [c for channels in run.study.seen.values() for c in channels]
        frame = run.proof.table.frame
        self.gradient = [c for c in dict.fromkeys(frame["channel"]) if c in GRADIENT]
        self.defences = [str(name) for name in dict.fromkeys(frame["defence"])]
        self.repair = run.choice.repair.name
        self.answers = {(a.defence, a.channel, a.id): a for a in store.answers()} if store is not None else {}
        self.images = figures(run)

    def drawn(self, prefix: str, label: str) -> str:
        """The figures whose name begins so, each under a title where there are several."""
        names = [name for name in self.images if name.startswith(prefix)]
        told = {name: name.removeprefix(prefix).strip("_").replace("_", " ") for name in names}
        return "\n".join(
            (f"<h4>{html.escape(told[name])}</h4>" if len(names) > 1 and told[name] else "")
            + shown_figure(name, f"{label} {told[name]}")
            for name in names
        )

    def by_channel(
        self, frame: pd.DataFrame, metric: str, channels: Sequence[str], *, caption: str, shares: bool = True
    ) -> str:
        """A table of channels by defences."""
        kept = pd.DataFrame(frame[frame["metric"] == metric])
        names = sorted(dict.fromkeys(kept["defence"]), key=lambda name: (name != UNDEFENDED, name != self.repair))
        cells = {(row["defence"], row["channel"]): row for row in kept.to_dict("records")}
        rows = []
        for channel in channels:
            here = [cells.get((name, channel)) for name in names]
            counts = sorted({int(row["n"]) for row in here if row is not None})
            if counts:
                n = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
                rows.append([channel, n, *("not run" if row is None else interval(row, shares=shares) for row in here)])
        if not rows:
            return f"<p>{html.escape(caption)}: {NOTHING}.</p>"
        own = names.index(self.repair) + 2 if self.repair in names else None
        missing = int(kept["missing"].sum()) if "missing" in kept.columns else 0
        caption += f" Answers that could not be had: {missing}." if missing else ""
        head = ["channel", "n", *(DEFENCES.get(str(name), str(name)) for name in names)]
        return table(head, rows, caption=caption, strong=own)


def _opening(made: _Report, key: Mapping[str, float]) -> str:
    run = made.run

    def change(name: str) -> str:
        before, after = (per_cent(key[f"{name} {when}"]) for when in ("before", "after"))
        return before if before == after == NOTHING else f"{before} to {after}"

    quick = (
        ""
        if run.settings.limit is None
        else f"<p><b>A quick look with at most {run.settings.limit} examples per channel: not figures to quote.</b></p>"
    )
    return f"""<p>{html.escape(run.study.about)}</p>{quick}
<div class="key"><p style="margin-top:0">Without the repair, to with it (test split; settings were chosen on validation; intervals are in section 5;
judge: {html.escape(str(run.provenance.get("judge", "not named")))}):</p><ul>
<li>worst attack success on channels seen in the fit: <b>{change("worst seen ASR")}</b></li>
<li>worst on channels held out of the fit, gradient attacks among them: <b>{change("worst held-out ASR")}</b></li>
<li>attacks of seen channels answered with a refusal: <b>{change("attacks of seen channels refused")}</b>; other stopped ones are broken off or miss the point</li>
<li>right answers on benign and hard benign prompts: <b>{change("benign accuracy")}</b>; lowest channel <b>{change("lowest benign accuracy")}</b></li>
</ul></div>"""


def _channels(made: _Report) -> str:
    """What each channel is, with the first of its test prompts and what was answered to it."""
    run = made.run
    tests = run.study.suites["test"]
    groups = {
        "Attack channels seen in the fit": made.seen,
        "Attack channels held out of the fit": [c for c in made.attacks if c not in made.seen],
        "Gradient attacks": made.gradient,
        "Benign channels": made.benign,
    }
    parts = [
        "<p>A channel is a way of asking. Of each, the first prompt of the test split, chosen by its place alone, with the answers to it.</p>"
    ]
    for title, channels in groups.items():
        known = [c for c in channels if c in tests or c in made.gradient]
        if known:
            cards = "".join(_card(made, c, tests[c][0] if c in tests else None) for c in known)
            parts.append(
                fold(f"{title} ({len(known)})", f"<div class='cards'>{cards}</div>", opened=title.startswith("Attack"))
            )
    return "\n".join(parts)


def _card(made: _Report, channel: str, example: Example | None) -> str:
    meaning = (
        made.run.study.meanings.get(channel) or GRADIENT.get(channel) or "The study says no more; the example shows it."
    )
    told: list[tuple[str, str]] = []
    ids = [example.id] if example is not None else sorted({i for _, c, i in made.answers if c == channel})[:1]
    for id_ in ids:
        found = {name: made.answers.get((name, channel, id_)) for name in (UNDEFENDED, made.repair)}
        prompt = (
            example.prompt if example is not None else next((a.prompt for a in found.values() if a is not None), "")
        )
        turns = [f"{turn.role}: {turn.text}" for turn in example.turns] if example is not None else []
        told.append(("prompt", "\n".join([*turns, prompt])))
        for name, answer in found.items():
            label = "answer, undefended" if name == UNDEFENDED else "answer, repaired"
            if answer is not None:
                told.append(
                    (label, answer.response if answer.response is not None else f"none could be had ({answer.missing})")
                )
    picture = _thumbnail(example) if example is not None else ""
    lines = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in told)
    return (
        f"<div class='card'>{picture}<h4>{html.escape(channel)}</h4><p>{html.escape(meaning)}</p><dl>{lines}</dl></div>"
    )


def _thumbnail(example: Example) -> str:
    """The example's picture, small; empty where it has none."""
    if example.image is None:
        return ""
    image = shown_picture(example.image).convert("RGB")
    image.thumbnail((96, 96))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="picture of the prompt" src="data:image/png;base64,{data}">'


def _diagnosis(made: _Report) -> str:
    found = made.run.diagnosis
    if not found.effects:
        effects = "<p>The study has no counterfactual pairs: no mediation was run.</p>"
    else:
        effects = fold("The largest effects, as a table", _strongest(made)) + made.drawn("effects_", "effects of")
    patches = made.drawn("patches_", "patch effects")
    pictured = f"<h3>Which patches carry the item</h3>{patches}" if patches else ""
    places = made.drawn("places_", "places ranked for")
    return f"""<p>Natural indirect effects (NIE): what changes in the safe run when one place takes its value from the unsafe twin, in nats of the
outcome; blue is less safe, red is safer. The safe twin is the request that the model refuses, or what the study says of a pair set. A dot marks
cells whose 95 % bootstrap interval over items excludes 0 (not corrected for their number); tokens at which the twins do not differ are left out.</p>
{effects}
<h3>Which attention and MLP outputs carry it</h3>
<p>Exchanged at all positions (of twins that are not aligned: at the image or the last token). Score: mean of the share of the total effect that the
place brings into the safe run and of the share that its removal takes from the unsafe one. What differs between the twins is what is traced, and
nothing else.</p>
{_places(made)}{places}
<h3>MLP against attention</h3><p>Share of attacks complied with when the output of one block's attention or MLP is replaced by its benign mean.</p>
{made.drawn("ablation", "ablation")}{pictured}"""


def _strongest(made: _Report) -> str:
    frame = made.run.diagnosis.effects_frame()
    kept = (frame["effect"] == "NIE") & frame["position"].isin([*POSITIONS])
    frame = pd.DataFrame(frame[kept]).sort_values(by="value", ascending=False).groupby("pairs", sort=False).head(4)
    rows = [[str(row["pairs"]), place(row), interval(row), str(row["n"])] for row in frame.to_dict("records")]
    return table(["pair set", "place", "NIE in nats [95 %]", "pairs"], rows, left=2)


def _places(made: _Report) -> str:
    """What carries the unsafe answer of each pair set, and where readers were tried because of it."""
    run = made.run
    placement = run.choice.placement
    reason = plots.short_site(placement.reason)
    tried = f"<p>Readers were tried after blocks {', '.join(map(str, placement.layers))}. {html.escape(reason)}</p>"
    if not run.diagnosis.places:
        return tried
    frame = run.diagnosis.places_frame().groupby("pairs", sort=False).head(3)
    rows = [
        [str(row["pairs"]), place(row), interval(row, value="score"), str(row["reason"]), str(row["n"])]
        for row in frame.to_dict("records")
    ]
    return table(["pair set", "place", "score [95 %]", "why", "pairs"], rows, left=2, prose=3) + tried


def _subspaces(made: _Report) -> str:
    run = made.run
    rows = [
        [
            name,
            plots.short_site(str(s.site)),
            number(s.rank),
            ", ".join(number(float(value)) for value in s.eigenvalues[:8]),
            number(s.diagnostics.get("n_benign")),
            number(s.diagnostics.get("n_malicious")),
        ]
        for name, s in _own_subspaces(run).items()
    ]
    own = table(
        ["subspace", "site", "rank", "eigenvalues", "benign rows", "malicious rows"],
        rows,
        caption="The repair's own subspaces. Eigenvalue: energy of malicious activations along a direction over that of benign ones.",
        left=2,
    )
    published = made.drawn("published_", "subspace of published CARE,")
    return f"""<p>The repair reads, one reader per modality: {html.escape(str(run.choice.plan))}.</p>
{own}{made.drawn("subspaces", "eigenvalues of the repair's subspaces")}{made.drawn("angles", "angles between the repair's subspaces")}
{fold("For comparison: the subspaces of published CARE, another method", published) if published else ""}"""


def _choice(made: _Report) -> str:
    run, choice = made.run, made.run.choice
    gate = choice.repair.corrections[0].gate
    calibrated = f"calibrated on {gate.n} prompts" if isinstance(gate, ConformalGate) else "no gate"
    opened = run.proof.opened
    runs = choice.runs.head(20)
    numbers = [c for c in runs.columns if c not in ("plan", "site")]
    tried = table(
        ["readers", "writer at", *(words(c) for c in numbers)],
        [
            [
                r["plan"],
                plots.short_site(str(r["site"])),
                *(number(float(r[c])) if c == "alpha" else _run_share(r[c]) for c in numbers),
            ]
            for r in runs.to_dict("records")
        ],
        left=2,
    )
    readers = choice.readers.head(30)
    shares = [str(c) for c in readers.columns if c != "plan"]
    names = {"worst": "worst channel", "benign": "benign prompts opened"}
    detected = table(
        ["readers", *(names.get(c, c) for c in shares)],
        [[r["plan"], *(per_cent(float(r[c])) for c in shares)] for r in readers.to_dict("records")],
    )
    plan = html.escape(plots.short_site(str(choice.repair.explain())))
    return f"""<p>Gate: split conformal, nominally at most {per_cent(choice.plan.epsilon)} of benign prompts touched ({calibrated}). Writer: towards the refusal
mean at {plots.short_site(str(choice.writer_site))}, strength {choice.alpha:g}. Fusion: {html.escape(str(choice.repair.rule))}. Observed on the test split: a gate opened for
{per_cent(opened["value"])} [{100 * opened["ci_low"]:.1f}, {100 * opened["ci_high"]:.1f}] of {opened["n"]:,.0f} benign prompts.</p>
{fold("The repair, edit by edit", f"<div class='scroll'><pre>{plan}</pre></div>")}
{fold("Candidates that were run with their writers", tried)}
{fold("Readers: share of attacks detected by channel, and of benign prompts opened", detected)}"""


def _run_share(value: Any) -> str:
    """A share of the candidates' table; later figures of a candidate are not measured once it is beaten."""
    return per_cent(float(value)) if math.isfinite(float(value)) else "not run"


def _proof(made: _Report) -> str:
    run, frame = made.run, made.run.proof.table.frame
    held = [c for c in made.attacks if c not in made.seen and c != run.study.plain]
    order = [*made.seen, *held, *made.gradient, run.study.plain]
    kinds = ", ".join(sorted({str(kind) for kind in frame["interval"]})) if "interval" in frame.columns else "95 %"
    rivals = "".join(f"<li>{html.escape(k)}: {html.escape(tuned_text(v))}</li>" for k, v in run.proof.tuned.items())
    left_out = "".join(
        f"<li>{html.escape(k)} could not be made: {html.escape(v)}</li>" for k, v in run.proof.left_out.items()
    )
    adaptive = "<p>No gradient attack was run.</p>"
    if run.proof.adaptive is not None:
        seen_by = run.proof.adaptive.frame
        adaptive = (
            f"<p>{run.settings.restarts} restart{'s' * (run.settings.restarts != 1)} of each loss (opening word, whole answer), through a copy of the repair "
            "whose gates rise over the whole range of scores; the worst picture found for each request. A lower bound on what an attacker reaches.</p>"
            + made.by_channel(seen_by, "asr", [ADAPTIVE], caption="Attack success in per cent [95 %].")
            + made.by_channel(seen_by, "refusal", [ADAPTIVE], caption="Refused, in per cent [95 %].")
        )
    fidelity = "".join(
        made.by_channel(frame, metric, made.benign, caption=caption, shares=shares)
        for metric, caption, shares in (
            ("agreement", "Same answer as the undefended model, in per cent [95 %].", True),
            ("kl", "Divergence from the undefended model's next-token distribution, in nats [95 %].", False),
        )
        if metric in set(frame["metric"])
    )
    return f"""<p>Seen in the fit: {html.escape(", ".join(made.seen))}. All other attack channels are held out; "{html.escape(run.study.plain)}" is what the undefended model
refuses. In per cent, with 95 % intervals ({html.escape(kinds)}).</p>
{made.by_channel(frame, "asr", order, caption="Attack success by channel: lower is better.")}
{made.by_channel(frame, "accuracy", made.benign, caption="Right answers by benign channel: higher is better.")}
{fold("Attack success and right answers, as a figure", made.drawn("asr", "defences by channels"))}
{made.drawn("tradeoff", "safety against utility")}
<h3>How the baselines were chosen</h3><p>On validation, by the repair's own rule.</p><ul>{rivals}{left_out}</ul>
<h3>Random writers</h3><p>{run.settings.random_seeds} draws of equal rank and edit norm behind the same gates.</p>
{made.by_channel(run.proof.random.frame, "asr", made.seen, caption="Attack success in per cent [95 %].")}
<h3>Gradient attack that sees the repair</h3>{adaptive}
<h3>Over-refusal</h3>
{made.by_channel(frame, "refusal", made.benign, caption="Benign prompts refused, in per cent [95 %].")}
<h3>Semantic fidelity</h3><p>Of at most {run.settings.fidelity} benign prompts per channel that the undefended model answers rightly.</p>
{fold("Table", fidelity) if fidelity else "<p>Not measured: there were no such prompts.</p>"}"""


def _settings(made: _Report) -> str:
    run = made.run
    settings = [[words(key), plain(value)] for key, value in run.settings.to_dict().items()]
    made_of = [[words(key), plain(value)] for key, value in run.provenance.items()]
    return (
        table(["setting", "value"], settings, left=2)
        + "<h3>What it was made of</h3>"
        + table(["what", "value"], made_of, left=2)
    )


def write_report(run: Run, out: str | Path) -> Path:
    """Write report.html, summary.json and figures/ into the folder of the run.

    Each file is whole or not written. What they hold is made of the results alone: a run that was stopped and went on ends in the same
    bytes as one that was not. When it was written and how long it took stands in ``times.jsonl`` (see `care_lens.pipeline.run`).

    Args:
        run: the results.
        out: folder of the run; example answers are taken from its ``frames/answers.jsonl``, and left out where there is none.

    Returns:
        The page.
    """
    out = Path(out)
    answers = out / "frames" / "answers.jsonl"
    made = _Report(run, GenerationStore(answers) if answers.exists() else None)
    for name, figure in made.images.items():
        plots.save_figure(figure, out / "figures" / f"{name}.html")
    key = summary(run)
    known = {name: value if math.isfinite(value) else None for name, value in key.items()}
    write_whole(out / "summary.json", json.dumps(known, indent=1) + "\n")
    sections = [
        ("channels", "1. Channels, and example answers before and after", _channels(made)),
        ("diagnose", "2. Diagnose: where the unsafe answer comes from", _diagnosis(made)),
        ("learn", "3. Learn: safety subspaces", _subspaces(made)),
        ("choose", "4. Choose: on validation only", _choice(made)),
        ("evaluate", "5. Evaluate: defences by channels, test split", _proof(made)),
        ("settings", "6. Settings and provenance", _settings(made)),
    ]
    text = page(f"care_lens: {run.study.name}", _opening(made, key), sections, made.images)
    return write_whole(out / "report.html", text)
