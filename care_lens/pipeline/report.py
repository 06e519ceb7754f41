"""The report of a run: one self-contained HTML page, the figures as files beside it.

The page needs no network, fits wide and narrow screens and follows the light or dark scheme of the reader. What is particular to a
study (what it is, what its channels are) is told by the study; what each table and figure shows is told here.
"""

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from care_lens import plots
from care_lens.core.files import write_whole
from care_lens.evaluation import GenerationStore, SubstringRefusalJudge
from care_lens.pipeline.gradient import ANSWER, OPENING
from care_lens.pipeline.headline import headlines, unstopped_said
from care_lens.pipeline.report_channels import channels_section
from care_lens.pipeline.report_diagnosis import diagnosis_section
from care_lens.pipeline.report_figures import figures
from care_lens.pipeline.report_page import page
from care_lens.pipeline.report_parts import ReportParts
from care_lens.pipeline.report_proof import proof_section
from care_lens.pipeline.report_repair import choice_section, subspaces_section
from care_lens.pipeline.report_words import NOTHING, part_said, part_text, plain, table, words
from care_lens.pipeline.run import Run
from care_lens.pipeline.saved import UNDEFENDED


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


def _opening(made: ReportParts) -> str:
    run = made.run
    figures = headlines(run)

    def change(name: str) -> str:
        before, after = (str(one) for one in figures[name])
        return html.escape(before if before == after else f"{before} to {after}")

    quick = part_text(run.settings)
    if said := unstopped_said(run):
        quick += f"<p><b>{html.escape(said)}</b></p>"
    if run.provenance.get("judge") == SubstringRefusalJudge().name:
        quick += "<p>The judge looks for phrases of refusal alone: any other answer counts as compliance, and as a right answer, nonsense too.</p>"
    return f"""<p>{html.escape(run.study.about)}</p>{quick}
<div class="key"><p style="margin-top:0">Without the repair, to with it (test split; settings were chosen on validation; 95 % intervals, of the channel that is named or by item over several channels;
judge: {html.escape(str(run.provenance.get("judge", "not named")))}):</p><ul>
<li>worst attack success on channels seen in the fit: <b>{change("worst seen ASR")}</b></li>
<li>worst on channels held out of the fit, gradient attacks among them: <b>{change("worst held-out ASR")}</b></li>
<li>attacks of seen channels answered with a refusal: <b>{change("attacks of seen channels refused")}</b>; other stopped ones are broken off or miss the point</li>
<li>right answers on benign and hard benign prompts: <b>{change("benign accuracy")}</b>; lowest channel <b>{change("lowest benign accuracy")}</b></li>
</ul></div>"""


def _settings(made: ReportParts) -> str:
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
        out: folder of the run; example answers are taken from the answers in its ``frames``, and left out where there are none.

    Returns:
        The page.
    """
    out = Path(out)
    answers = GenerationStore.in_folder(out / "frames")
    made = ReportParts(run, figures(run), answers if len(answers) else None)
    for name, figure in made.images.items():
        plots.save_figure(figure, out / "figures" / f"{name}.html")
    key = summary(run)
    known = {name: value if math.isfinite(value) else None for name, value in key.items()}
    if said := part_said(run.settings):
        known = {"part": said, **known}
    write_whole(out / "summary.json", json.dumps(known, indent=1) + "\n")
    sections = [
        ("channels", "1. Channels, and example answers before and after", channels_section(made)),
        ("diagnose", "2. Diagnose: where the unsafe answer comes from", diagnosis_section(made)),
        ("learn", "3. Learn: safety subspaces", subspaces_section(made)),
        ("choose", "4. Choose: on validation only", choice_section(made)),
        ("evaluate", "5. Evaluate: defences by channels, test split", proof_section(made)),
        ("settings", "6. Settings and provenance", _settings(made)),
    ]
    text = page(f"care_lens: {run.study.name}", _opening(made), sections, made.images)
    return write_whole(out / "report.html", text)
