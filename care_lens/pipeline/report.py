"""The report of a run: one self-contained HTML page, the figures as files beside it."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from care_lens import plots
from care_lens.core.files import write_whole
from care_lens.pipeline.gradient import ADAPTIVE, ANSWER, OPENING
from care_lens.pipeline.prove import NONE
from care_lens.pipeline.run import Run
from care_lens.plots.saving import figure_html
from care_lens.repair import ConformalGate

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 2rem auto; padding: 0 1rem; color: #1c2430; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d5dae2; padding-bottom: .3rem; }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto; }
th, td { border: 1px solid #d5dae2; padding: .25rem .5rem; text-align: right; } th[scope=row], td:first-child { text-align: left; }
caption { text-align: left; color: #5a6675; padding: .3rem 0; } pre { background: #f4f6f9; padding: 1rem; overflow-x: auto; font-size: 12px; }
.key { background: #eef4fb; border-left: 4px solid #2b6cb0; padding: .6rem 1rem; }
"""

#: Pictures shown with their patch effects.
PICTURES = 3


def share_text(share: float, digits: int = 1) -> str:
    """A share in per cent; a dash where there is nothing to take a share of, as without held-out channels."""
    return f"{100 * share:.{digits}f} %" if math.isfinite(share) else "- (none in the study)"


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
    for label, defence in (("before", NONE), ("after", run.choice.repair.name)):
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
    out |= {f"places_{name}": result.plot() for name, result in run.diagnosis.places.items()}
    out["ablation"] = run.diagnosis.ablation.plot()
    for name, result in run.diagnosis.patches.items():
        for pair in range(PICTURES):
            rows = result.details.query("pair == @pair")
            if len(rows):
                picture = run.study.pairs[name].unsafe[pair].image
                out[f"patches_{name}_{pair}"] = plots.plot_patch_effects(rows, image=picture)
    out["asr"] = run.proof.table.plot()
    out["tradeoff"] = plots.plot_tradeoff(run.proof.table)
    for subspace in (*run.choice.subspaces, *run.printed_subspaces):
        if subspace.basis.shape[1] > 1 and f"spectrum_{subspace.modality}" not in out:
            out[f"spectrum_{subspace.modality}"] = subspace.plot()
    return out


def _table(frame: pd.DataFrame, *, digits: int = 3) -> str:
    return frame.to_html(index=False, border=0, float_format=lambda x: f"{x:.{digits}f}", na_rep="-")


def _interval(figure: Mapping[str, float]) -> str:
    return f"{100 * figure['value']:.1f} % [{100 * figure['ci_low']:.1f}, {100 * figure['ci_high']:.1f}]"


def _strongest(run: Run) -> pd.DataFrame:
    frame = run.diagnosis.effects_frame()
    kept = (frame["effect"] == "NIE") & frame["position"].isin(["image", "text", "last", "all"])
    frame = pd.DataFrame(frame[kept]).sort_values(by="value", ascending=False).groupby("pairs", sort=False).head(4)
    return frame.filter(["pairs", "tower", "layer", "component", "position", "value", "ci_low", "ci_high", "n"])


def _places(run: Run) -> str:
    """What carries the unsafe answer of each pair set, in words, and where readers were tried because of it."""
    placement = run.choice.placement
    tried = f"<p>Readers were tried after blocks {', '.join(map(str, placement.layers))}. {html.escape(placement.reason)}</p>"
    if not run.diagnosis.places:
        return tried
    frame = run.diagnosis.places_frame().groupby("pairs", sort=False).head(3)
    columns = ["pairs", "rank", "mediator", "position", "acts_through", "score", "ci_low", "ci_high", "reason", "n"]
    return _table(frame.filter(columns)) + tried


def write_report(run: Run, out: str | Path) -> Path:
    """Write report.html, summary.json and figures/ into the folder of the run.

    Each file is whole or not written. What they hold is made of the results alone: a run that was stopped and went on ends in the same
    bytes as one that was not. When it was written and how long it took stands in ``times.jsonl`` (see `care_lens.pipeline.run`).

    Args:
        run: the results.
        out: folder of the run.

    Returns:
        The page.
    """
    out = Path(out)
    made = figures(run)
    for name, figure in made.items():
        plots.save_figure(figure, out / "figures" / f"{name}.html")
    made_html = {
        name: figure_html(figure, name=name, full_html=False, include_plotlyjs="inline" if i == 0 else False)
        for i, (name, figure) in enumerate(made.items())
    }
    key = summary(run)
    known = {name: value if math.isfinite(value) else None for name, value in key.items()}
    write_whole(out / "summary.json", json.dumps(known, indent=1) + "\n")
    table = run.proof.table
    plan = run.choice.plan
    gate = run.choice.repair.corrections[0].gate
    calibrated = f"n = {gate.n} calibration prompts" if isinstance(gate, ConformalGate) else "no gate"
    seen = ", ".join(c for channels in run.study.seen.values() for c in channels)

    def percent(name: str) -> str:
        return f"{share_text(key[f'{name} before'], 0)} to {share_text(key[f'{name} after'], 0)}"

    def draw(prefix: str) -> str:
        chosen = {name: body for name, body in made_html.items() if name.startswith(prefix)}
        title = "<h3>{}</h3>" if len(chosen) > 1 else ""
        return "\n".join(title.format(html.escape(name.replace("_", " "))) + body for name, body in chosen.items())

    adaptive = "<p>No gradient attack was run.</p>"
    if run.proof.adaptive is not None:
        adaptive = (
            f"<p>{html.escape(ADAPTIVE)}: {run.settings.restarts} restarts of each loss (opening word, whole answer), through a copy of the repair "
            "whose gates rise over the whole range of scores; the worst picture found for each request. A lower bound on what an "
            f"attacker reaches.</p>{run.proof.adaptive.to_html(metrics=('asr', 'refusal'))}"
        )
    rivals = "".join(
        f"<p>{html.escape(k)}, as chosen on validation by the repair's own rule: {html.escape(json.dumps(v))}</p>"
        for k, v in run.proof.tuned.items()
    )
    left_out = "".join(f"<p>Left out: {html.escape(k)}: {html.escape(v)}</p>" for k, v in run.proof.left_out.items())
    measured = [metric for metric in ("agreement", "kl") if metric in set(table.frame["metric"])]
    fidelity = table.to_html(metrics=measured) if measured else "<p>Not measured: there were no such prompts.</p>"
    quick = (
        ""
        if run.settings.limit is None
        else (f"<p><b>A quick look with at most {run.settings.limit} examples a channel: not figures to quote.</b></p>")
    )
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>care_lens report: {html.escape(run.study.name)}</title>
<style>{STYLE}</style></head><body>
<h1>care_lens: {html.escape(run.study.name)}</h1>
<p>{html.escape(run.study.about)}</p>{quick}
<p class="key">Worst attack success on channels seen in the fit: <b>{percent("worst seen ASR")}</b>. Worst on channels held out of the
fit: <b>{percent("worst held-out ASR")}</b>. Right answers on benign and hard benign prompts: <b>{percent("benign accuracy")}</b>
(lowest channel {percent("lowest benign accuracy")}). Attacks of seen channels answered with a refusal:
<b>{percent("attacks of seen channels refused")}</b>; the other stopped ones are broken off or miss the point. Test split; settings
chosen on validation; intervals below; judge: {html.escape(str(run.provenance.get("judge", "")))}.</p>
<h2>1. Diagnose: where the unsafe answer comes from</h2>
<p>Natural indirect effects (NIE): what changes in the safe run when one place takes its value from the unsafe twin. Unit:
nats of the outcome. The safe twin is the request that the model refuses (for "picture": the same picture with a benign word,
outcome = log probability a token of the steps for the forbidden item). Intervals: 95 % bootstrap over items.</p>
{_table(_strongest(run)) if run.diagnosis.effects else "<p>The study has no counterfactual pairs: no mediation was run.</p>"}
{draw("effects_")}
<h3>Which attention and MLP outputs carry it</h3>
<p>Exchanged at all positions (of twins that are not aligned: at the image or the last token). Score: mean of the share of the total effect that the place
brings into the safe run and of the share that its removal takes from the unsafe one; "first": in so many resamples of the pairs it leads.
What differs between the twins is what is traced, and nothing else.</p>
{_places(run)}
{draw("places_")}
<h3>MLP against attention: share complied when one block's output is replaced by its benign mean</h3>
{draw("ablation")}
<h3>Which patches carry the item</h3>
{draw("patches_")}
<h2>2. Learn: safety subspaces</h2>
<p>Generalised eigenvalues of malicious against benign activations. The repair reads, one reader a modality: {html.escape(str(plan))}.</p>
{draw("spectrum_")}
<h2>3. Choose: on validation only</h2>
<p>Gate: split conformal, nominally at most {run.choice.plan.epsilon:.1%} of benign prompts touched
({calibrated}). Writer: towards the refusal mean at
{run.choice.writer_site}, alpha {run.choice.alpha:g}. Fusion: {run.choice.repair.rule}. Observed on the test
split: a gate opened for {_interval(run.proof.opened)} of {run.proof.opened["n"]:.0f} benign prompts.</p>
<h3>Candidates run with their writers</h3>{_table(run.choice.runs.head(20))}
<h3>Readers: share of attacks detected, by channel, and of benign prompts opened</h3>{_table(run.choice.readers.head(30))}
<h2>4. Prove: defences by channels, test split</h2>
<p>Seen in the fit: {html.escape(seen)}. All other attack channels are held out. ASR in per cent (lower is better) on
attack channels; right answers in per cent on the others.</p>
{table.to_html(metrics=("asr",))}{table.to_html(metrics=("accuracy",))}
{draw("asr")}{draw("tradeoff")}{rivals}
<h3>Random writers: {run.settings.random_seeds} draws of equal rank and edit norm behind the same gates</h3>
{run.proof.random.to_html(metrics=("asr",))}
<h3>Gradient attack that sees the repair</h3>{adaptive}
<h3>Semantic fidelity: at most {run.settings.fidelity} benign prompts a channel that the undefended model answers rightly</h3>{fidelity}
<h3>Over-refusal: benign prompts refused</h3>{table.to_html(metrics=("refusal",))}{left_out}
<h2>Settings and provenance</h2>
<pre>{html.escape(json.dumps({"settings": run.settings.to_dict(), **run.provenance}, indent=1))}</pre></body></html>"""
    return write_whole(out / "report.html", page)
