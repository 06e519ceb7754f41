"""The four steps on the bundled model, few examples: files, resuming, honest splits."""

import json
import re
from dataclasses import replace

import pytest
from few_channels import few_channels

from care_lens import organism
from care_lens.core import Verdict
from care_lens.evaluation import GenerationStore, generate_all
from care_lens.mediation import Localisation
from care_lens.mediation.placement import reader_layers
from care_lens.pipeline import RunSettings, run, write_report
from care_lens.pipeline.headline import headlines
from care_lens.pipeline.prove import opening_rate
from care_lens.pipeline.report import summary
from care_lens.pipeline.saved import UNDEFENDED
from care_lens.pipeline.settings import RIVALS
from care_lens.repair import HybridFusion, read_scores

SETTINGS = replace(
    RunSettings().short(),
    limit=5,
    learn_limit=None,
    rivals=RIVALS[1:],  # the refusal direction of a run is that of test_rivals
    pairs=3,
    ablated=2,
    printed_rank=4,
    reader_ranks=(0,),
    candidates=1,
    epsilons=(0.02,),
    benign_loss=1.0,
    pgd_steps=2,
    pgd_examples=3,
    printed_layers=8,
    printed_alphas=(1.0,),
)


def make_study():
    return few_channels(pairs=("wrapper", "picture"))


@pytest.fixture(scope="module")
def bundled():
    with organism.load() as lvlm:
        yield lvlm


@pytest.fixture(scope="module")
def finished(bundled, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    result = run(bundled, make_study(), out, model="bundled", settings=SETTINGS, progress=False)
    return result, out, write_report(result, out)


def test_everything_is_written(finished):
    result, out, page = finished
    text = page.read_text()
    assert "Plotly.newPlot" in text and "src=" not in text.replace("src=''", "")[:2000]
    assert {"asr.html", "ablation.html", "tradeoff.html", "patches_picture_0.html"} <= {
        p.name for p in (out / "figures").iterdir()
    }
    told = json.loads((out / "summary.json").read_text())
    assert "at most 5 examples per channel" in told.pop("part") and told == summary(result)
    assert all(text.count(str(figures[1])) for figures in headlines(result).values())
    saved = HybridFusion.load(out / "repair")
    assert saved.describe() == result.choice.repair.describe()


def test_headlines_are_the_figures_of_the_summary_with_intervals(finished):
    result, *_ = finished
    figures, table = summary(result), result.proof.table.to_dataframe()
    for name, both in headlines(result).items():
        for when, one in zip(("before", "after"), both, strict=True):
            assert one.share.estimate == pytest.approx(figures[f"{name} {when}"])
            assert 0 <= one.share.low <= one.share.estimate <= one.share.high <= 1
            assert one.share.high - one.share.low > 0.01 and f"n {one.n})" in str(one)
    before, after = headlines(result)["worst seen ASR"]
    cell = table[(table.defence == UNDEFENDED) & (table.metric == "asr") & (table.channel == before.channel)].iloc[0]
    assert (before.share.low, before.share.high, before.n) == (cell.ci_low, cell.ci_high, cell.n)
    benign = table[(table.defence == result.choice.repair.name) & (table.metric == "accuracy")]
    assert headlines(result)["benign accuracy"][1].n == benign.n.sum() and after.channel


def test_readers_were_tried_only_where_the_diagnosis_said(finished):
    result, out, page = finished
    placement = reader_layers(result.diagnosis.places, 8, score=SETTINGS.carrier_score)
    assert result.choice.placement == placement and len(placement.layers) < 4
    read = [re.search(r"after blocks? (?:\d+ to )?(\d+)", plan) for plan in result.choice.readers["plan"]]
    assert all(read)
    tried = {int(found[1]) for found in read if found}
    assert tried == set(placement.layers) and result.choice.plan.layer in tried
    blocks = "blocks" if len(placement.layers) > 1 else "block"
    assert f"Readers were tried after {blocks} {', '.join(map(str, placement.layers))}." in page.read_text()
    for name, ranking in result.diagnosis.places.items():
        saved = Localisation.load(out / "frames", f"places.{name}")
        assert saved.frame["mediator"].tolist() == ranking.frame["mediator"].tolist()


def test_table_holds_every_defence_and_channel_with_controls(finished):
    result, *_ = finished
    frame = result.proof.table.to_dataframe()
    assert {
        UNDEFENDED,
        "published CARE",
        "care_lens",
        "control: random writer",
        "control: shuffled labels",
    } <= set(frame.defence)
    assert set(result.study.suites["test"]) <= set(frame.channel)
    assert (frame.ci_low <= frame.value + 1e-9).all() and (frame.value <= frame.ci_high + 1e-9).all()


def test_nothing_of_the_test_split_was_seen_before_the_proof(finished):
    result, *_ = finished
    items = {example.group for rows in result.study.suites["test"].values() for example in rows}
    details = result.diagnosis.ablation.details
    assert not items & set(details["group"])


def test_a_second_run_resumes_without_generating(finished, bundled, monkeypatch):
    result, out, _ = finished
    before = len(GenerationStore(out / "frames" / "answers.jsonl"))
    again = run(bundled, make_study(), out, model="bundled", settings=SETTINGS, progress=False)
    assert len(GenerationStore(out / "frames" / "answers.jsonl")) == before
    assert again.proof.table.frame.equals(result.proof.table.frame) or (
        again.proof.table.frame.value.round(9).tolist() == result.proof.table.frame.value.round(9).tolist()
    )


def test_the_rate_of_opening_is_the_same_of_a_run_that_was_stopped_before_it(finished, bundled):
    """Gates are read while the undefended model answers, or later from the answers: never at a token that no edit can follow."""
    result, out, _ = finished
    study, repair = result.study, result.choice.repair
    benign = [replace(e, channel=c) for c, some in study.channels("test", harmful=False).items() for e in some]
    scores = read_scores(bundled, benign, repair.readers, max_new_tokens=14, progress=False).amax(1)
    gates = [replace(repair.corrections[0].gate, threshold=float(scores.quantile(q))) for q in (0.2, 0.5, 0.8)]
    repairs = [repair.with_gate(gate) for gate in gates]
    beside = GenerationStore()
    generate_all(bundled, benign, store=beside, max_new_tokens=14, progress=False, watched=repairs)
    rates = []
    for one in repairs:
        later = GenerationStore(out / "frames" / "answers.jsonl")  # knows the answers and nothing of gates
        assert None in later.opened_for(one, benign) and None not in beside.opened_for(one, benign)
        options = (bundled, study, one, result.settings)
        rates.append(opening_rate(*options, store=later))
        assert rates[-1] == opening_rate(*options, store=beside) and rates[-1]["n"] == len(benign)
        assert len(later) == len(GenerationStore(out / "frames" / "answers.jsonl"))  # nothing was generated
    assert rates[0]["value"] > rates[2]["value"]


def test_other_settings_are_refused_in_the_same_folder(finished, bundled):
    _, out, _ = finished
    with pytest.raises(ValueError, match="same settings"):
        run(
            bundled,
            make_study(),
            out,
            model="bundled",
            settings=replace(SETTINGS, seed=1),
            progress=False,
        )


def test_the_model_is_left_as_it_was(finished, bundled):
    rows = organism.examples("plain", "test", n=8)
    texts = bundled.generate(bundled.prepare(rows), max_new_tokens=14).texts
    verdicts = organism.OrganismJudge()(rows, texts)
    assert verdicts.count(Verdict.REFUSED) >= 7
