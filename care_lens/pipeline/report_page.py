"""The page of a report: its style, its contents, and figures that fit the width and the light of the screen.

Everything is in the one file: no script, font or picture is fetched. Each figure is there twice, as it is on a wide screen and in
the style of a paper's column for a narrow one; a script of a few lines draws the one that fits, and again when the width or the
colour scheme changes.
"""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from care_lens.plots import paper
from care_lens.plots.theme import DARK

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5a6675; --line: #d5dae2; --back: #ffffff; --key: #eef4fb; --mark: #2b6cb0; --own: #f2f7fd; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #a3adba; --line: #3a434f; --back: #14181f; --key: #1b2633; --mark: #6fb1ee; --own: #1a2430; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1150px; margin: 0 auto; padding: 1.5rem 1rem 4rem; color: var(--ink); background: var(--back); overflow-wrap: break-word; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; } h3 { margin-top: 2rem; }
a { color: var(--mark); } nav ul { list-style: none; padding: 0; columns: 2; } nav li { break-inside: avoid; padding: .1rem 0; }
.key { background: var(--key); border-left: 4px solid var(--mark); padding: .7rem 1rem; }
.key ul { margin: 0; padding-left: 1.1rem; } .soft, .caption { color: var(--soft); } .caption { margin: 1rem 0 .3rem; font-size: 14px; }
.scroll { overflow-x: auto; max-width: 100%; } table { border-collapse: collapse; font-size: 13.5px; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .6rem; text-align: right; vertical-align: top; font-variant-numeric: tabular-nums; white-space: nowrap; }
th { white-space: normal; } td.l, td.w { white-space: normal; text-align: left; } td.w { min-width: 19rem; }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--line); } .l { text-align: left; } .own { background: var(--own); font-weight: 600; }
th[scope=row] { position: sticky; left: 0; background: var(--back); font-weight: 500; min-width: 7.5rem; } thead th:first-child { position: sticky; left: 0; background: var(--back); z-index: 1; }
details { border: 1px solid var(--line); border-radius: 6px; padding: .5rem .9rem; margin: .8rem 0; } summary { cursor: pointer; font-weight: 600; }
.figure { width: 100%; overflow: hidden; margin: .6rem 0 1.4rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: .8rem; margin: 1rem 0; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .7rem .9rem; min-width: 0; } .card h4 { margin: 0 0 .2rem; }
.card img { float: right; width: 72px; height: 72px; object-fit: contain; image-rendering: pixelated; margin: 0 0 .4rem .7rem; border: 1px solid var(--line); }
.card p { margin: .3rem 0; } .card dl { margin: .5rem 0 0; clear: both; } .card dt { color: var(--soft); font-size: 13px; } .card dd { margin: 0 0 .35rem; font-family: ui-monospace, monospace; font-size: 13px; white-space: pre-wrap; }
@media (max-width: 640px) { body { font-size: 15px; padding: 1rem .7rem 3rem; } td { white-space: normal; } td.w { min-width: 9rem; } th[scope=row] { min-width: 4.5rem; } nav ul { columns: 1; } table { font-size: 12.5px; } th, td { padding: .25rem .4rem; }
.wide, .wide tbody, .wide tr { display: block; } .wide thead { position: absolute; left: -9999px; } .wide tr { border-bottom: 2px solid var(--line); padding: .4rem 0; }
.wide th[scope=row] { display: block; position: static; border: 0; text-align: left; font-weight: 600; } .wide td, .wide td.w { display: flex; justify-content: space-between; gap: 1rem; border: 0; min-width: 0; text-align: right; padding: .1rem .4rem; }
.wide td::before { content: attr(data-label); color: var(--soft); text-align: left; font-weight: 400; min-width: 30%; }
.scroll pre { white-space: pre-wrap; overflow-wrap: anywhere; } }
"""

SCRIPT = """
const DARK = %(dark)s;
const FIGURES = JSON.parse(document.getElementById("figures").textContent);
const night = window.matchMedia("(prefers-color-scheme: dark)");
const inDark = (part) => Array.isArray(part) ? part.map(inDark)
  : part && typeof part === "object" ? Object.fromEntries(Object.entries(part).map(([k, v]) => [k, inDark(v)]))
  : typeof part === "string" ? DARK[part.toLowerCase()] ?? part : part;
const drawn = {};
function draw(place) {
  const width = Math.floor(place.getBoundingClientRect().width);
  if (width < 50) return;
  const state = width + (night.matches ? " dark" : " light");
  if (drawn[place.id] === state) return;
  drawn[place.id] = state;
  const spec = FIGURES[place.dataset.figure];
  let figure = structuredClone(width < 600 ? spec.narrow : spec.wide);
  if (night.matches) figure = inDark(figure);
  figure.layout.width = spec.square && width >= 600 ? Math.min(width, spec.square) : width;
  Plotly.newPlot(place, figure.data, figure.layout, {displaylogo: false, displayModeBar: width < 600 ? false : "hover"});
}
const all = () => document.querySelectorAll(".figure").forEach(draw);
all();
window.addEventListener("resize", all);
night.addEventListener("change", all);
document.querySelectorAll("details").forEach((part) => part.addEventListener("toggle", all));
"""


def shown_figure(name: str, label: str) -> str:
    """Where a figure is drawn.

    Args:
        name: Of the figure.
        label: What it shows, for who cannot see it.
    """
    return f'<div class="figure" id="figure-{html.escape(name)}" data-figure="{html.escape(name)}" role="img" aria-label="{html.escape(label)}"></div>'


def _spec(figure: go.Figure) -> dict[str, Any]:
    wide, narrow = (json.loads(str(one.to_json())) for one in (figure, paper(figure, columns=1)))
    square = wide["layout"].pop("width", None)
    for one in (wide, narrow):
        one["layout"]["autosize"] = False
    return {"wide": wide, "narrow": narrow, "square": square}


def _embedded(value: Any) -> str:
    """JSON that may stand in a script element."""
    return (
        json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    )


def page(title: str, opening: str, sections: Sequence[tuple[str, str, str]], figures: Mapping[str, go.Figure]) -> str:
    """The whole page.

    Args:
        title: Of the page, text.
        opening: What stands above the contents, HTML.
        sections: (id, title, HTML) of each.
        figures: By name; each is drawn where :func:`shown_figure` is.

    Returns:
        The page, the same text for the same arguments.
    """
    contents = "".join(f'<li><a href="#{name}">{html.escape(said)}</a></li>' for name, said, _ in sections)
    body = "\n".join(f'<h2 id="{name}">{html.escape(said)}</h2>\n{text}' for name, said, text in sections)
    specs = {name: _spec(figure) for name, figure in figures.items()}
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{opening}
<nav aria-label="Contents"><h2 id="contents">Contents</h2><ul>{contents}</ul></nav>
{body}
<script type="application/json" id="figures">{_embedded(specs)}</script>
<script>{get_plotlyjs()}</script>
<script>{SCRIPT % {"dark": _embedded(DARK)}}</script>
</body></html>"""
