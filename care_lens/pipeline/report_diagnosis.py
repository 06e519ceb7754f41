"""The section of a report on diagnosis: where the unsafe answer comes from."""

import html

import pandas as pd

from care_lens import plots
from care_lens.pipeline.report_parts import ReportParts
from care_lens.pipeline.report_words import POSITIONS, fold, interval, place, table


def diagnosis_section(made: ReportParts) -> str:
    """Where the unsafe answer comes from."""
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


def _strongest(made: ReportParts) -> str:
    frame = made.run.diagnosis.effects_frame()
    kept = (frame["effect"] == "NIE") & frame["position"].isin([*POSITIONS])
    frame = pd.DataFrame(frame[kept]).sort_values(by="value", ascending=False).groupby("pairs", sort=False).head(4)
    rows = [[str(row["pairs"]), place(row), interval(row), str(row["n"])] for row in frame.to_dict("records")]
    return table(["pair set", "place", "NIE in nats [95 %]", "pairs"], rows, left=2)


def _places(made: ReportParts) -> str:
    """What carries the unsafe answer of each pair set, and where readers were tried because of it."""
    run = made.run
    placement = run.choice.placement
    reason = plots.short_site(placement.reason)
    blocks = "blocks" if len(placement.layers) > 1 else "block"
    tried = f"<p>Readers were tried after {blocks} {', '.join(map(str, placement.layers))}. {html.escape(reason)}</p>"
    if not run.diagnosis.places:
        return tried
    frame = run.diagnosis.places_frame().groupby("pairs", sort=False).head(3)
    rows = [
        [str(row["pairs"]), place(row), interval(row, value="score"), str(row["reason"]), str(row["n"])]
        for row in frame.to_dict("records")
    ]
    return table(["pair set", "place", "score [95 %]", "why", "pairs"], rows, left=2, prose=3) + tried
