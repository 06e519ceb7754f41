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
from care_lens.pipeline.report_page import page, shown_figure
from care_lens.pipeline.report_words import number, table, words
from care_lens.pipeline.run import open_stage
from care_lens.pipeline.settings import RunSettings
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
    study = settings.asked(settings.part(study))
    settings = require_feasible(study, settings)
    with open_stage(lvlm, out, study, settings, model=model) as stage, generating(lvlm, settings.generation):
        found = diagnose(lvlm, study, settings, stage)
    placement = reader_layers(found.places, lvlm.n_layers(), score=settings.carrier_score)
    drawn = {f"effects_{name}": result.plot() for name, result in found.effects.items()}
    drawn["ablation"] = found.ablation.plot()
    places = found.places_frame()
    columns = ["pairs", "rank", "mediator", "position", "score", "ci_low", "ci_high", "reason", "n"]
    first = places.groupby("pairs", sort=False).head(3).filter(columns) if len(places) else places
    cells = [[number(v) for v in row] for row in first.itertuples(index=False)]
    ranked = (
        table([words(name) for name in first.columns], cells)
        if len(places)
        else "<p>No place was ranked: the study has no pairs, or their total effects are not above zero.</p>"
    )
    settled = html.escape(json.dumps({"model": model, "settings": settings.to_dict()}, indent=1))
    text = page(
        title=f"care_lens: {study.name}",
        opening=f"""<p>{html.escape(study.about)}</p>
<p class="key"><b>No repair was made.</b> {html.escape(str(error))}</p>
<p>What follows was found before that. Nothing was evaluated on the test split.</p>""",
        sections=[
            (
                "diagnose",
                "Diagnose: where the unsafe answer comes from",
                f"{ranked}<p>{html.escape(placement.reason)}</p>"
                + "".join(shown_figure(name, words(name)) for name in drawn),
            ),
            ("settings", "Settings", f"<pre>{settled}</pre>"),
        ],
        figures=drawn,
    )
    summary = {"repair": None, "why": str(error)}
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return write_whole(out / "report.html", text)
