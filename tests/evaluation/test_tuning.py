"""The choice on validation: the public call, the pipeline's and the one made by hand are one; its store resumes; the rule for rivals."""

from dataclasses import replace

import pytest
import torch
from few_channels import few_channels

from care_lens import Site, organism
from care_lens.core.identity import repair_fingerprint
from care_lens.evaluation import GenerationStore, NoCandidateError, evaluate, tune, tune_defence
from care_lens.mediation import Placement
from care_lens.pipeline import RunSettings
from care_lens.pipeline.choose import answer_verdicts, choose
from care_lens.pipeline.learn import capture_fit
from care_lens.repair import Correction, HybridFusion, NoRepair, Writer, learn_repair, study_rows

# Every setting differs from the default of its keyword, so that one that is not passed on shows.
SETTINGS = replace(
    RunSettings(),
    answer_tokens=4,
    reader_ranks=(0, 3),
    reader_depths=(1, 3),
    epsilons=(0.05,),
    alphas=(1.25,),
    candidates=2,
    benign_loss=0.5,
    max_new_tokens=8,
    batch_size=64,
    seed=5,
)
PLACEMENT = Placement((2,), "for the test")


@pytest.fixture(scope="module")
def bundled():
    with organism.load() as lvlm:
        yield lvlm


@pytest.fixture(scope="module")
def study():
    return few_channels(3)


@pytest.fixture(scope="module")
def chosen(bundled, study, tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "search.jsonl"
    # Without its test split, which a choice must not need.
    blind = replace(study, suites={split: suite for split, suite in study.suites.items() if split != "test"})
    rows = capture_fit(bundled, blind, SETTINGS)
    made = choose(bundled, blind, rows, SETTINGS, placement=PLACEMENT, store=GenerationStore(path))
    return made, path


def test_the_pipeline_only_passes_its_settings_on(bundled, study, chosen, caplog):
    caplog.set_level("INFO", logger="care_lens.core.progress")
    theirs, path = chosen
    store = GenerationStore(path)
    held = len(store)
    ours = tune(
        bundled,
        study,
        study_rows(bundled, study, tokens=4, batch_size=64),
        layers=PLACEMENT,
        answer_tokens=4,
        ranks=(0, 3),
        depths=(1, 3),
        epsilons=(0.05,),
        alphas=(1.25,),
        candidates=2,
        benign_loss=0.5,
        max_new_tokens=8,
        batch_size=64,
        seed=5,
        store=store,
    )
    assert repair_fingerprint(ours.repair) == repair_fingerprint(theirs.repair)
    assert (ours.plan, ours.writer_site, ours.alpha) == (theirs.plan, theirs.writer_site, theirs.alpha)
    assert ours.readers.equals(theirs.readers) and ours.runs.equals(theirs.runs)
    assert held and len(store) == held  # a stopped choice goes on: nothing was generated again
    assert list(ours.readers)[:3] == ["plan", "worst", "benign"]
    told = [record.getMessage() for record in caplog.records if record.name == "care_lens.core.progress"]
    for step in ("reading benign rows", "fitting readers", "trying writers", "checking benign answers"):
        assert any(line.startswith(f"{step}: ") for line in told), step


def test_the_choice_is_what_one_call_learns_of_its_plan(bundled, study, chosen):
    choice, _ = chosen
    repair = learn_repair(
        bundled,
        study,
        choice.plan,
        site=choice.writer_site,
        alpha=choice.alpha,
        answer_tokens=4,
        batch_size=64,
        max_new_tokens=8,
        seed=5,
    )
    assert repair_fingerprint(repair) == repair_fingerprint(choice.repair)


def test_the_figures_of_the_winner_are_those_of_an_evaluation(bundled, study, chosen):
    choice, _ = chosen
    checked = choice.runs[choice.runs["benign_after"].notna()].to_dict("records")
    assert len(checked) == 2 and len({run["plan"] for run in checked}) == 2, "two plans, the best run of each"
    won = min(
        checked,
        key=lambda run: (
            round(run["asr"], 2),
            round(run["most_lost_by_a_channel"], 2),
            -run["refused"],
            -run["benign_after"],
        ),
    )
    assert (won["plan"], won["site"], won["alpha"]) == (str(choice.plan), str(choice.writer_site), choice.alpha)
    suites = {c: list(e) for c, e in study.channels("validation", harmful=False).items()}
    table = evaluate(
        bundled, suites, {"none": None, "care_lens": choice.repair}, judge=study.judge, max_new_tokens=8, batch_size=64,
        fidelity=False, n_boot=20, progress=False,
    ).to_dataframe()  # fmt: skip
    both = table[table["metric"] == "accuracy"].pivot(index="channel", columns="defence", values="value")
    assert won["most_lost_by_a_channel"] == pytest.approx((both["none"] - both["care_lens"]).max())
    right = table[(table["metric"] == "accuracy") & (table["defence"] == "care_lens")]
    assert won["benign_after"] == pytest.approx((right["value"] * right["n"]).sum() / right["n"].sum())
    # The frontier is made of the same verdicts: one setting for each run that was checked on benign prompts.
    frontier = choice.frontier.wide()
    assert len(frontier) == choice.runs["benign_after"].notna().sum() and (frontier["role"] == "candidate").all()
    (picked,) = frontier[frontier["chosen"]].to_dict("records")
    assert (picked["plan"], picked["site"], picked["alpha"]) == (won["plan"], won["site"], won["alpha"])
    assert picked["asr"] == pytest.approx(won["asr"]) and picked["utility"] == pytest.approx(won["benign_after"])
    assert picked["utility_n"] == right["n"].sum() and picked["within_budget"]
    assert picked["asr_low"] <= picked["asr"] <= picked["asr_high"]
    assert choice.frontier.settings["split"] == "validation" and frontier["on_frontier"].any()
    # The threshold of the repair is not that of the comparison: its own attack success stands beside.
    attacked = {c: list(study.suites["validation"][c]) for channels in study.seen.values() for c in channels}
    table = evaluate(
        bundled, attacked, {"care_lens": choice.repair}, judge=study.judge, max_new_tokens=8, batch_size=64,
        fidelity=False, n_boot=20, progress=False,
    ).to_dataframe()  # fmt: skip
    asr = table[table["metric"] == "asr"]
    assert won["asr_recalibrated"] == pytest.approx((asr["value"] * asr["n"]).sum() / asr["n"].sum())
    assert choice.runs["asr_recalibrated"].notna().sum() == 1


def _refusing_everything(choice):
    """Writes the refusal state at every prompt's last token, whatever was asked."""
    writer = choice.repair.corrections[0].writer
    d = writer.width
    whole = Writer(site=writer.site, write=torch.eye(d), left=torch.eye(d), target=writer.target, scope="last")
    return HybridFusion(visual=(Correction(writer=whole),), name="refuses")


def test_the_least_attack_success_within_the_budget_wins(bundled, study, chosen):
    choice, path = chosen
    store = GenerationStore(path)
    attacked = [e for m in ("visual", "textual") for e in study.malicious("validation", m)]
    options = {"attacked": attacked, "benign": study.benign("validation"), "judge": study.judge}
    more = {"max_new_tokens": 8, "batch_size": 64, "store": store}
    refusing = _refusing_everything(choice)
    makers = [NoRepair, lambda: refusing, lambda: choice.repair]
    best, reached = tune_defence(bundled, makers, **options, **more, benign_loss=0.5)
    assert best is choice.repair and reached["candidates"] == 3
    assert reached["benign_after"] >= reached["benign_before"] - 0.5
    verdicts = answer_verdicts(bundled, attacked, refusing, SETTINGS, study.judge, store=store)
    assert sum(v.value == "complied" for v in verdicts) / len(verdicts) <= reached["asr"]  # and yet it lost
    with pytest.raises(ValueError, match="candidates must hold"):
        tune_defence(bundled, [], **options)


def test_what_cannot_be_chosen_is_said(bundled, study):
    rows = study_rows(bundled, study, tokens=1, batch_size=64)
    with pytest.raises(
        NoCandidateError,
        match=r"scores must be at least 9999 for a gate at epsilon 0.0001, got \d+: .*; give 19998 of many items",
    ):
        tune(bundled, study, layers=[2], epsilons=[0.0001], progress=False)  # before anything is read
    with pytest.raises(
        NoCandidateError, match=r"plans must be calibrated on \d+ benign prompts, got none: rank must be"
    ):
        tune(bundled, study, rows, layers=[2], answer_tokens=1, ranks=[4000], classifier=False, epsilons=[0.05])
    for options, words in (
        ({"answer_tokens": 2}, "answer_tokens must be from 0 to 1"),
        ({"layers": [9]}, "layers must be"),
        ({"alphas": []}, "alphas must hold"),
        ({"candidates": 0}, "candidates must be 1"),
        ({"benign_loss": 2.0}, "benign_loss must be"),
    ):
        with pytest.raises(ValueError, match=words):
            tune(bundled, study, rows, **options)


def test_a_depth_that_the_rows_do_not_hold_is_left_out(bundled, study, chosen, caplog):
    """Rows of the blocks that are used are enough for readers of one block, also beside a depth that wants more."""
    _, path = chosen
    whole = study_rows(bundled, study, tokens=4, batch_size=64)
    sites = [Site("language", layer, "hook_resid_post") for layer in range(2, 8)]

    def part(rows):
        return replace(rows, rows={site: rows.rows[site] for site in sites})

    few = replace(
        whole, benign=part(whole.benign), refused=part(whole.refused),
        malicious={m: part(rows) for m, rows in whole.malicious.items()},
    )  # fmt: skip
    options = {"layers": PLACEMENT, "answer_tokens": 4, "epsilons": (0.05,), "alphas": (1.25,), "candidates": 1}
    options |= {"benign_loss": 0.5, "max_new_tokens": 8, "batch_size": 64, "seed": 5, "store": GenerationStore(path)}
    caplog.set_level("INFO", logger="care_lens.evaluation.tuning")
    found = tune(bundled, study, few, ranks=(0,), depths=(1, 3), **options)
    assert found.plan.depth == 1 and "no classifier has a depth of [3]" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    with pytest.raises(NoCandidateError, match=r"no classifier of depth \[3\] fits the layers and rows"):
        tune(bundled, study, few, ranks=(), depths=(3,), **options)
    assert [record.levelname for record in caplog.records if "depth" in record.getMessage()][-1] == "WARNING"
    with pytest.raises(ValueError, match="depths must be whole numbers of 1 or more"):
        tune(bundled, study, few, depths=(0,), **options)
