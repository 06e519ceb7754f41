"""What a real headless Chromium draws: faults of layout, and whatever a page says, asks for or lets overflow."""

import importlib.util
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
from playwright.sync_api import Browser, sync_playwright
from plotly.offline import get_plotlyjs

SMALLEST = 7 / 72 * 96
"""Pixels of 7 points."""

FAULTS = """
(gd) => {
  const faults = [], frame = gd.getBoundingClientRect(), full = gd._fullLayout;
  const box = (e) => e.getBoundingClientRect();
  const meet = (a, b, by) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > by
    && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > by;
  const inside = (a, by) => a.left >= frame.left - by && a.right <= frame.right + by
    && a.top >= frame.top - by && a.bottom <= frame.bottom + by;
  const texts = [...gd.querySelectorAll("text")].filter(
    (t) => t.textContent.trim() && box(t).width > 0 && !t.closest(".hoverlayer") && getComputedStyle(t).display !== "none");
  const cells = (t) => t.closest(".heatmap-label, .heatmaplayer") || t.classList.contains("heatmap-label");
  const words = texts.filter((t) => !cells(t));
  const boxes = words.map(box);  // once: they are compared pair by pair
  for (const t of texts) {
    const size = parseFloat(getComputedStyle(t).fontSize);
    if (size < SMALLEST - 0.01 && t.textContent !== "●") faults.push(`text of ${size} px: ${t.textContent}`);
    if (!inside(box(t), 1)) faults.push(`clipped: ${t.textContent}`);
  }
  for (let i = 0; i < words.length; i++) for (let j = 0; j < i; j++)
    if (meet(boxes[i], boxes[j], 3)) faults.push(`on each other: ${words[j].textContent} | ${words[i].textContent}`);
  const panels = Object.values(full._plots).map(({xaxis: x, yaxis: y}) => ({
    left: frame.left + x._offset, right: frame.left + x._offset + x._length,
    top: frame.top + y._offset, bottom: frame.top + y._offset + y._length}));
  for (const p of panels) {
    if (p.right - p.left < 60 || p.bottom - p.top < 9) faults.push(`panel of ${p.right - p.left} x ${p.bottom - p.top} px`);
  }
  const outside = [...gd.querySelectorAll(".colorbar"), ...gd.querySelectorAll("g.legend")];
  for (const e of outside) {
    const drawn = [...e.querySelectorAll("text, .cbfill, .cbfills, .legendpoints")].map(box).filter((b) => b.width > 0);
    for (const d of drawn) {
      if (!inside(d, 1)) faults.push(`clipped: a part of ${e.getAttribute("class")}`);
      for (const p of panels) if (meet(d, p, 1)) faults.push(`${e.getAttribute("class")} covers a panel`);
    }
  }
  if (!panels.length && !gd.querySelector(".main-svg *")) faults.push("nothing drawn");
  return [...new Set(faults)];
}
""".replace("SMALLEST", str(SMALLEST))
"""JavaScript: what is wrong with the layout of a drawn figure, in words."""


DOCS = Path(__file__).parents[2] / "docs"


@cache
def gallery_module() -> Any:
    """docs/gallery_figures.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("gallery_figures", DOCS / "gallery_figures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chromium() -> str:
    """The browser; skips the test where there is none, unless this is the CI, which must have one."""
    found = os.environ.get("BROWSER_PATH") or next(
        (path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(name))),
        None,
    )
    if found is None and not os.environ.get("CI"):
        pytest.skip("no Chromium on this machine: install one (apt-get install chromium) or set BROWSER_PATH")
    assert found is not None, "the CI must have a Chromium: .ci/run installs it"
    return found


@contextmanager
def browsing() -> Iterator[Browser]:
    """A headless Chromium."""
    path = chromium()
    with sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def layout_faults(
    browser: Browser, figures: Mapping[str, go.Figure], *, pictures: Any = None, background: str = "white"
) -> dict[str, list[str]]:
    """What is wrong with the layout of figures as they are drawn; of those with faults alone.

    Args:
        browser: Draws them.
        figures: By name, each with a width and a height.
        pictures: A folder for a picture of each, to be looked at.
        background: Of the page.
    """
    page = browser.new_page(viewport={"width": 800, "height": 900}, device_scale_factor=2)
    page.set_default_timeout(120_000)
    said: list[str] = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.set_content(
        f"<body style='background:{background};margin:0'><div id='here' style='display:inline-block'></div></body>"
    )
    page.add_script_tag(content=get_plotlyjs())
    faults = {}
    for name, figure in figures.items():
        page.evaluate(
            """async (json) => { const made = JSON.parse(json), old = document.getElementById("here");
            Plotly.purge(old); old.style.width = made.layout.width + "px"; old.style.height = made.layout.height + "px"; await Plotly.newPlot(old, made.data, made.layout, {staticPlot: true});
            await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))); }""",
            figure.to_json(),
        )
        here = page.query_selector("#here")
        assert here is not None
        if found := [*page.evaluate(FAULTS, here), *said]:
            faults[name] = found
        said.clear()
        if pictures is not None:
            here.screenshot(path=str(pictures / f"{name}.png"))
    page.close()
    return faults
