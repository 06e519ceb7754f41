"""The report of a run that ended without a repair: why, and what was found until then.

A study may hold nothing that can be repaired: a model that refuses nothing, attacks that no reader can tell from harmless requests, or
repairs that all cost too many right answers. That is a finding, and is reported as one.
"""

import html
import json
from pathlib import Path

from care_lens.core.errors import CareLensError
from care_lens.core.files import write_whole
from care_lens.data.study import Study
from care_lens.defences.stored import FitError
from care_lens.evaluation.tuning import NoCandidateError
from care_lens.lvlm import HookedLVLM
from care_lens.mediation.placement import reader_layers
from care_lens.pipeline.diagnose import diagnose
from care_lens.pipeline.generating import generating
from care_lens.pipeline.needs import require_feasible
from care_lens.pipeline.report import STYLE
from care_lens.pipeline.run import open_stage
from care_lens.pipeline.settings import RunSettings
from care_lens.plots.theme import figure_html
from care_lens.repair.errors import RepairError
from care_lens.subspace import SubspaceError

STOPS: tuple[type[CareLensError], ...] = (NoCandidateError, FitError, RepairError, SubspaceError)
"""Errors that say that a study gives no repair; others are faults of files, settings or the program."""


def write_stopped_report(
    lvlm: HookedLVLM,
    study: Study,
    out: str | Path,
    *,
    model: str,
    settings: RunSettings,
    error: Exception,
) -> Path:
    """Write report.html and summary.json of a run that ended without a repair; what it has found is taken from its folder.

    Args:
        lvlm: The model.
        study: As given to the run.
        out: Folder of the run.
        model: As given to the run.
        settings: As given to the run.
        error: Why it ended.

    Returns:
        The page.
    """
    out = Path(out)
    study = settings.asked(study.limited(settings.limit) if settings.limit else study)
    settings = require_feasible(study, settings)
    with open_stage(lvlm, out, study, settings, model=model) as stage, generating(lvlm, settings.generation):
        found = diagnose(lvlm, study, settings, stage)
    placement = reader_layers(found.places, lvlm.n_layers(), score=settings.carrier_score)
    drawn = {f"effects_{name}": result.plot() for name, result in found.effects.items()}
    drawn["ablation"] = found.ablation.plot()
    figures = "".join(
        f"<h3>{html.escape(name.replace('_', ' '))}</h3>"
        + figure_html(figure, name=name, full_html=False, include_plotlyjs="inline" if i == 0 else False)
        for i, (name, figure) in enumerate(drawn.items())
    )
    places = found.places_frame()
    columns = ["pairs", "rank", "mediator", "position", "score", "ci_low", "ci_high", "reason", "n"]
    ranked = (
        places.groupby("pairs", sort=False).head(3).filter(columns).to_html(index=False, border=0, na_rep="-")
        if len(places)
        else "<p>No place was ranked: the study has no pairs, or their total effects are not above zero.</p>"
    )
    page = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>care_lens report: {html.escape(study.name)}</title>
<style>{STYLE}</style></head><body>
<h1>care_lens: {html.escape(study.name)}</h1>
<p>{html.escape(study.about)}</p>
<p class="key"><b>No repair was made.</b> {html.escape(str(error))}</p>
<p>What follows was found before that. Nothing was evaluated on the test split.</p>
<h2>Diagnose: where the unsafe answer comes from</h2>
{ranked}<p>{html.escape(placement.reason)}</p>
{figures}
<h2>Settings</h2>
<pre>{html.escape(json.dumps({"model": model, "settings": settings.to_dict()}, indent=1))}</pre></body></html>"""
    summary = {"repair": None, "why": str(error)}
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return write_whole(out / "report.html", page)
