"""The section of a report that says what each channel is, with example answers before and after."""

import base64
import html
import io

from care_lens.core.examples import Example
from care_lens.core.pictures import shown_picture
from care_lens.pipeline.report_parts import GRADIENT, ReportParts
from care_lens.pipeline.report_words import fold
from care_lens.pipeline.saved import UNDEFENDED


def channels_section(made: ReportParts) -> str:
    """What each channel is, with the first of its test prompts and what was answered to it."""
    run = made.run
    tests = run.study.suites["test"]
    groups = {
        "Attack channels seen in the fit": made.seen,
        "Plain requests": [c for c in made.attacks if c == run.study.plain],
        "Attack channels held out of the fit": [c for c in made.attacks if c not in (*made.seen, run.study.plain)],
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


def _card(made: ReportParts, channel: str, example: Example | None) -> str:
    meaning = (
        made.run.study.meanings.get(channel)
        or GRADIENT.get(channel)
        or "The study does not describe it; see the example."
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
