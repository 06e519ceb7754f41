"""The section of a report on evaluation: defences by channels on the test split, and the controls."""

import html

from care_lens.pipeline.gradient import ADAPTIVE
from care_lens.pipeline.report_parts import ReportParts
from care_lens.pipeline.report_words import fold, tuned_text


def proof_section(made: ReportParts) -> str:
    """Defences by channels, and the controls."""
    run, frame = made.run, made.run.proof.table.frame
    held = [c for c in made.attacks if c not in made.seen and c != run.study.plain]
    order = [*made.seen, *held, *made.gradient, run.study.plain]
    kinds = ", ".join(sorted({str(kind) for kind in frame["interval"]})) if "interval" in frame.columns else "95 %"
    rivals = "".join(f"<li>{html.escape(k)}: {html.escape(tuned_text(v))}</li>" for k, v in run.proof.tuned.items())
    left_out = "".join(
        f"<li>{html.escape(k)} is not there: {html.escape(v)}</li>" for k, v in run.proof.left_out.items()
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
<h3>How the baselines were chosen</h3><p>On validation: least attack success among the settings that lose no more right answers than the repair may.</p><ul>{rivals}{left_out}</ul>
<h3>Random writers</h3><p>Draws: {run.settings.random_seeds}, of equal rank and edit norm behind the same gates.</p>
{made.by_channel(run.proof.random.frame, "asr", made.seen, caption="Attack success in per cent [95 %].")}
<h3>Gradient attack that sees the repair</h3>{adaptive}
<h3>Over-refusal</h3>
{made.by_channel(frame, "refusal", made.benign, caption="Benign prompts refused, in per cent [95 %].")}
<h3>Semantic fidelity</h3><p>Of at most {run.settings.fidelity} benign prompts per channel that the undefended model answers rightly.</p>
{fold("Table", fidelity) if fidelity else "<p>Not measured: there were no such prompts.</p>"}"""
