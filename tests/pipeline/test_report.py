"""The report in a real browser: it asks for nothing, says no error, draws every figure and overflows nowhere; and what it says.

The results are those of a run on the bundled model, as far as docs/gallery keeps them; prompts and pictures are made here.
"""

import html
import json
import re
from dataclasses import replace

import pandas as pd
import pytest
import torch
from in_browser import FAULTS, browsing, gallery_module
from PIL import Image
from scipy.stats import binomtest

from care_lens.core import Example, PairedExamples, Site, UnsafeMargin
from care_lens.core.stats import Interval
from care_lens.data.study import Study
from care_lens.evaluation import Choice, DefenceTable, GenerationStore
from care_lens.evaluation.store import StoredAnswer
from care_lens.mediation import AblationResult, Localisation, MediationResult, PatchMapResult, Placement
from care_lens.pipeline import RunSettings, headline, write_report
from care_lens.pipeline.diagnose import Diagnosis
from care_lens.pipeline.gradient import ADAPTIVE, ANSWER, OPENING
from care_lens.pipeline.headline import Headline, headlines
from care_lens.pipeline.prove import Proof
from care_lens.pipeline.report import figures, summary
from care_lens.pipeline.report_words import interval, number, per_cent, place, plain, tuned_text
from care_lens.pipeline.run import Run
from care_lens.pipeline.saved import UNDEFENDED
from care_lens.repair import ConformalGate, Correction, HybridFusion, LinearReader, ReaderPlan, Writer
from care_lens.subspace import SafetySubspace

SITE = Site.parse("blocks.6.hook_resid_post")
SPITE = '<script>alert("x")</script> & <b>bold</b>'


def judge(examples, texts):
    raise AssertionError("a report judges nothing")


def picture(colour):
    return Image.new("RGB", (16, 16), colour)


def made_study(channels):
    suites = {}
    for split in ("fit", "test"):
        suites[split] = {
            channel: tuple(
                Example(
                    f"{SPITE} what is {channel}", image=picture("red") if "typographic" in channel else None, harmful=harmful,
                    channel=channel, id=f"{channel} {split}", group=f"{channel} {split}", response="sure",
                )
                for _ in range(1)
            )
            for channel, harmful in channels.items()
        }  # fmt: skip

    twin = [
        Example("see", image=picture(colour), response="sure", id=colour, group="a") for colour in ("white", "grey")
    ]
    return Study(
        name="made <study>",
        suites=suites,
        seen={"visual": ("typographic",), "textual": ("wrapper", "spelled")},
        judge=judge,
        outcome=UnsafeMargin(comply=(1,), refuse=(2,)),
        refusal="sorry",
        pairs={"picture": PairedExamples(tuple(twin[:1]), tuple(twin[1:]))},
        about="A study & its <about>.",
        meanings={"wrapper": f"Wrapped {SPITE}"},
    )


def made_repair(d=8):
    reader = LinearReader(site=SITE, positions="last", direction=torch.ones(d), centre=torch.zeros(d))
    writer = Writer.towards(SITE, target=torch.ones(d), source=torch.zeros(d), scope="last")
    gate = ConformalGate(threshold=1.8, epsilon=0.02, n=411)
    part = Correction(writer=writer, reader=reader, gate=gate)
    return HybridFusion(
        visual=(replace(part, modality="visual"),), textual=(replace(part, modality="textual"),), name="care_lens"
    )


@pytest.fixture(scope="module")
def made_run():
    gallery = gallery_module()
    table = gallery.frame("defences")
    gradient = [c for c in dict.fromkeys(table["channel"]) if c.startswith("gradient")]
    harmful = set(table.loc[table["metric"] == "asr", "channel"])
    channels = {c: c in harmful for c in dict.fromkeys(table["channel"]) if c not in gradient}
    study = made_study(channels)
    effects = {name: MediationResult(gallery.frame(f"effects.{name}"), {}) for name in ("wrapper", "picture")}
    patches = gallery.frame("patches.picture")
    patches = PatchMapResult(patches, {"rows": 8, "cols": 8}, patches.assign(pair=0))
    tuned = {
        "refusal direction": {
            "layer": 4,
            "coefficient": 0.25,
            "validation": {"asr": 0.736, "benign_before": 0.9757, "benign_after": 0.9744, "candidates": 3},
        }
    }
    left_out = {"a rival": f"it could not be fitted {SPITE}"}
    settings = {
        "opened": {"value": 0.0304, "ci_low": 0.021, "ci_high": 0.042, "n": 1760},
        "tuned": tuned,
        "left_out": left_out,
    }
    seen = pd.DataFrame(
        table[table["channel"].isin(["typographic", "wrapper"]) & table["defence"].eq("control: random writer")]
    )
    adaptive = pd.DataFrame(
        table[table["channel"].eq(OPENING) & table["defence"].isin([UNDEFENDED, "care_lens"])]
    ).assign(channel=ADAPTIVE)
    rows = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    subspaces = tuple(
        SafetySubspace.fit(rows, rows + 3 * torch.eye(8)[k], rank=1, site=SITE, modality=m)
        for k, m in enumerate(("visual", "textual"))
    )
    printed = [
        SafetySubspace.fit(rows, rows * torch.arange(1, 9), rank=3, site="blocks.3.hook_mlp_out", modality="visual")
    ]
    plan = ReaderPlan(layer=6, epsilon=0.02, classifier=True)
    readers = pd.DataFrame([{"plan": str(plan), "worst": 0.995, "benign": 0.014, "typographic": 1.0}])
    runs = pd.DataFrame(
        [
            {
                "plan": str(plan),
                "site": str(SITE),
                "alpha": 1.0,
                "asr": 0.0,
                "refused": 1.0,
                "benign_before": 0.976,
                "benign_after": float("nan"),
            }
        ]
    )
    placement = Placement((0, 6), "Score of 0.5 or more. wrapper: carried by blocks.6.hook_attn_out.")
    return Run(
        study,
        RunSettings(),
        Diagnosis(
            effects,
            {"wrapper": Localisation(gallery.frame("places.wrapper"), {})},
            AblationResult(gallery.frame("ablation"), {}),
            {"picture": patches},
        ),
        Choice(made_repair(), plan, subspaces[0].site, 1.0, subspaces, placement, readers, runs),
        Proof(DefenceTable(table, settings, gallery.trials()), DefenceTable(seen, {}), DefenceTable(adaptive, {})),
        printed,
        provenance={"model": "bundled", "judge": "organism", "acting": [], "versions": {"torch": "2.14"}},
    )


@pytest.fixture(scope="module")
def written(made_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    store = GenerationStore(out / "frames" / "answers.jsonl")
    example = made_run.study.suites["test"]["wrapper"][0]
    for defence, text in ((UNDEFENDED, f"once for {SPITE}"), ("care_lens", "sorry i cannot")):
        kept = {"settings": "s", "example": "e", "prompt": example.prompt, "missing": "", "tokens": 3, "seed": 0}
        store.add(
            [
                StoredAnswer(
                    defence=defence, channel="wrapper", id=example.id, group=example.group, response=text, **kept
                )
            ]
        )
    return write_report(made_run, out)


def visible(page):
    """What stands on the page for a reader, without scripts and styles."""
    return html.unescape(re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)))


def test_the_page_in_a_browser(written, made_run):
    with browsing() as browser:
        for width in (1300, 400):
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
                page.set_default_timeout(120_000)
                said, asked = [], []
                page.on("console", lambda message, said=said: said.append(message.text))
                page.on("pageerror", lambda error, said=said: said.append(str(error)))
                page.on("request", lambda request, asked=asked: asked.append(request.url))
                page.goto(written.as_uri())
                page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
                names = list(figures(made_run))
                page.wait_for_function(f"document.querySelectorAll('.figure .main-svg').length >= {len(names)}")
                page.wait_for_timeout(100)
                assert said == [] and [url for url in asked if not url.startswith(("file:", "data:"))] == []
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                wide = "[...document.querySelectorAll('body *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll, svg, .figure')).map((e) => e.tagName)"
                assert page.evaluate(wide) == []
                hidden = "[...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth + 1).map((e) => e.textContent.slice(0, 60))"
                assert page.evaluate(hidden) == [], width  # no column must be looked for
                dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
                assert dark == ("rgb(20, 24, 31)" if scheme == "dark" else "rgb(255, 255, 255)")
                for name in names:
                    figure = page.query_selector(f"#figure-{name}")
                    assert figure is not None and figure.bounding_box()["height"] > 80, name
                    assert page.evaluate(FAULTS, figure) == [], (name, width, scheme)
                    paper = page.evaluate("(e) => e._fullLayout.paper_bgcolor", figure)
                    assert paper.lower() == ("#14181f" if scheme == "dark" else "#ffffff")
                page.close()


def test_what_a_study_and_a_model_write_is_text(written):
    page = written.read_text(encoding="utf-8")
    assert "<script>alert" not in page and "<b>bold" not in page and "made <study>" not in page
    text = visible(page)
    assert f"Wrapped {SPITE}" in text or "Wrapped" in text  # tags of the text are taken for tags only by `visible`
    assert html.escape(f"once for {SPITE}") in page and html.escape(f"it could not be fitted {SPITE}") in page


def test_channels_have_their_meaning_and_answers_before_and_after(written, made_run):
    page = written.read_text(encoding="utf-8")
    card = page[page.index("<h4>wrapper</h4>") :].split("</div>")[0]
    assert "Wrapped" in card and "answer, undefended" in card and "sorry i cannot" in card
    assert card.index("once for") < card.index("sorry i cannot")
    assert "data:image/png;base64," in page[page.index("cards") : page.index("<h4>typographic</h4>")]
    for channel in (*made_run.study.suites["test"], OPENING, ANSWER):
        assert f"<h4>{html.escape(channel)}</h4>" in page


def test_the_subspaces_are_the_repairs_own(written, made_run):
    page = written.read_text(encoding="utf-8")
    own = page[page.index('id="learn"') : page.index("For comparison")]
    assert "The repair's own subspaces" in html.unescape(own) and "L6 resid" in own
    for subspace in made_run.choice.subspaces:
        assert number(float(subspace.eigenvalues[0])) in own
    assert "L3 MLP" not in own and "published_visual" in page[page.index("For comparison") :]


def test_over_refusal_is_of_benign_channels_alone(written, made_run):
    page = written.read_text(encoding="utf-8")
    part = page[page.index("<h3>Over-refusal</h3>") : page.index("<h3>Semantic fidelity</h3>")]
    named = re.findall(r"<th scope='row'[^>]*>([^<]*)</th>", part)
    assert named == list(made_run.study.channels("test", harmful=False)) and "typographic" not in named


def test_words_stand_where_keys_and_missing_values_stood(written):
    text = visible(written.read_text(encoding="utf-8"))
    for raw in ("hook_", "ci_low", "NaN", "<NA>", "None", "{'", '{"', "benign_before", "pgd_steps", "Traceback"):
        assert raw not in text, raw
    assert (
        "on validation, attack success 73.6 %, right answers 97.6 % before and 97.4 % after; 3 settings tried" in text
    )
    assert "a rival is not there: it could not be fitted" in text
    assert "3 % [2.1, 4.2] of 1,760 benign prompts" in text and "gradient: PGD, whole answer" in text


def test_the_opening_tells_shares_apart(written, made_run):
    key = summary(made_run)
    page = written.read_text(encoding="utf-8")
    assert json.loads((written.parent / "summary.json").read_text()) == key
    for name, (before, after) in headlines(made_run).items():
        if (
            name == "attacks of seen channels refused"
        ):  # this run has no trials of refusals: a real one is that of test_run
            assert f"<b>{before}</b>" in page
            continue
        assert f"<b>{before} to {after}</b>" in page and f"{100 * key[f'{name} after']:.1f} % [" in str(after), name
    assert '<meta name="viewport"' in page
    assert re.findall(r'<li><a href="#(\w+)">', page) == [
        "channels",
        "diagnose",
        "learn",
        "choose",
        "evaluate",
        "settings",
    ]
    assert all(f'id="{name}"' in page for name in re.findall(r'<li><a href="#(\w+)">', page))


def test_it_is_the_same_bytes_again(written, made_run):
    before = written.read_bytes()
    assert write_report(made_run, written.parent).read_bytes() == before


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.995, "99.5 %"), (0.987, "98.7 %"), (1.0, "100 %"), (0.0, "0 %"), (float("nan"), "none in the study")],
)
def test_per_cent(share, text):
    assert per_cent(share) == text


def test_words():
    assert interval({"value": 0.982, "ci_low": 0.9, "ci_high": 1.0}, shares=True) == "98.2 [90, 100]"
    assert interval({"value": float("nan"), "ci_low": 0, "ci_high": 0}) == "not measured"
    assert number(pd.NA) == number(None) == "not measured" and number(1760) == "1,760" and number(0.98765) == "0.988"
    assert plain({"layers": [2, 3], "alpha": 4.5}) == "layers 2, 3; strength 4.5" and plain(None) == "no limit"
    assert place({"mediator": "blocks.6.hook_attn_out", "position": "last"}) == "L6 attn, last prompt token"
    assert place({"mediator": "vision.blocks.0.hook_mlp_out", "position": "all"}) == "V0 MLP"
    assert tuned_text({"layer": 3}) == "layer 3"


@pytest.mark.parametrize(
    ("before", "after", "told"), [(1.0, 1.0, True), (0.5, 0.6, True), (1.0, 0.9, False), (0.0, 0.0, False)]
)
def test_a_repair_that_stops_nothing_is_told(before, after, told, made_run, monkeypatch):
    figures = {"worst seen ASR": tuple(Headline(Interval(x, 0.0, 1.0), 8, "wrapper") for x in (before, after))}
    monkeypatch.setattr(headline, "headlines", lambda run: figures)
    said = headline.unstopped_said(made_run)
    assert bool(said) == told and (f"in wrapper, which it learned from, {100 * after:.0f} %" in said) == told


def test_trials_without_a_group_are_not_one_item():
    frame = pd.DataFrame({
        "defence": "none", "channel": "a", "metric": "accuracy", "value": [1.0, 1.0, 0.0, 1.0] * 6, "group": "",
        "id": [str(i) for i in range(24)], "missing": "",
    })  # fmt: skip
    found = headline._over_all(frame, "none", "accuracy", ["a"]).share
    exact = binomtest(18, 24).proportion_ci(method="exact")
    assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
