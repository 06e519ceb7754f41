"""The sections of a report on the repair: the subspaces that it reads, and how it was chosen."""

import html
import math
from typing import Any

from care_lens import plots
from care_lens.pipeline.report_figures import own_subspaces
from care_lens.pipeline.report_parts import ReportParts
from care_lens.pipeline.report_words import fold, number, per_cent, table, words
from care_lens.repair import ConformalGate


def subspaces_section(made: ReportParts) -> str:
    """What the repair reads."""
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
        for name, s in own_subspaces(run).items()
    ]
    own = table(
        ["subspace", "site", "rank", "eigenvalues", "benign rows", "malicious rows"],
        rows,
        caption="The repair's own subspaces. Eigenvalue: energy of malicious activations along a direction over that of benign ones.",
        left=2,
    )
    published = made.drawn("published_", "subspace of published CARE,")
    how = "one reader per modality" if run.choice.plan.depth == 1 else "the prompt by one reader for all modalities"
    return f"""<p>The repair reads, {how}: {html.escape(str(run.choice.plan))}.</p>
{own}{made.drawn("subspaces", "eigenvalues of the repair's subspaces")}{made.drawn("angles", "angles between the repair's subspaces")}
{fold("For comparison: the subspaces of published CARE, another method", published) if published else ""}"""


def choice_section(made: ReportParts) -> str:
    """What was tried, and what was chosen."""
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
