"""The pages on attacks and judges of one's own, and the method in fifteen lines, run as they stand."""

import re
from pathlib import Path

import pytest
from few_channels import quick_study
from transformers import AutoModelForImageTextToText

from care_lens import Verdict, organism
from care_lens.core import Attack
from care_lens.repair import BakeCertificate

PAGES = Path(__file__).parents[2] / "docs" / "howto"


def blocks_of(page):
    return re.findall(r"```python\n(.*?)```", (PAGES / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def run(page, blocks):
    names: dict[str, object] = {"__name__": page.removesuffix(".md")}
    for block in blocks:
        exec(compile(block, str(PAGES / page), "exec"), names)
    return names


def test_the_code_of_the_page_on_attacks_runs():
    names = run("add_an_attack.md", blocks_of("add_an_attack.md"))
    assert len(blocks_of("add_an_attack.md")) == 4
    assert isinstance(names["Openings"](None), Attack)
    assert [e.prompt for e in names["result"].examples] == [e.prompt for e in names["searched"]]
    for made, channel in ((names["attacked"], "story"), (names["searched"], "openings")):
        for one, plain in zip(made, names["requests"], strict=True):
            assert (one.id, one.group, one.channel, one.harmful) == (plain.id, plain.group, channel, True)
            assert one.prompt.endswith(plain.prompt) and one.behaviour == (plain.behaviour or plain.prompt)
    again = names["openings"](names["lvlm"], names["requests"], outcome=names["study"].outcome)
    assert [e.prompt for e in again] == [e.prompt for e in names["searched"]]
    frame = names["table"].to_dataframe()
    assert {*frame.channel} == {"plain", "story", "openings", "openings, adaptive", "benign"} and {*frame.defence} == {
        "none",
        "steered",
    }
    names["lvlm"].close()


def test_the_code_of_the_page_on_judges_runs(capsys):
    names = run("add_a_judge.md", blocks_of("add_a_judge.md"))
    assert names["steps"](names["requests"], ["sorry", "sure first mix then bake", "a red dax"]) == [
        Verdict.REFUSED,
        Verdict.COMPLIED,
        Verdict.OTHER,
    ]
    frame = names["table"].to_dataframe()
    assert "says the item, 3 words or more" in {*frame.judge}
    assert [list(f.judge.unique()) for f in names["verdicts"].values()][:2] == [
        ["says the item, 3 words or more"],
        ["steps"],
    ]
    assert all(len(f) == 12 for f in names["verdicts"].values())
    assert "must return a verdict for each of 12 answers, got 1" in capsys.readouterr().out
    names["lvlm"].close()


@pytest.fixture
def few(monkeypatch, tmp_path):
    study = quick_study()
    monkeypatch.setattr(organism, "study", lambda: study)
    monkeypatch.chdir(tmp_path)


def test_a_repair_is_built_tuned_explained_attached_and_baked_in_fifteen_lines(few, capsys, tmp_path):
    first, second = blocks_of("notebook.md")
    lines = [line for line in first.splitlines() if line.strip()]
    assert len(lines) <= 15 and not re.search(r"pipeline|\b_\w", first)
    names = run("notebook.md", [first, second])
    told = capsys.readouterr().out
    assert "care_lens (HybridFusion)" in told and "ConformalGate" in told and "weights do not know positions" in told
    baked, model = AutoModelForImageTextToText.from_pretrained(tmp_path / "baked").eval(), names["model"]
    certificate = BakeCertificate.load(tmp_path / "baked")
    assert 0 < certificate.largest_logit_difference < 1e-3 * certificate.largest_logit_change
    options = {**names["batch"], "max_new_tokens": 14, "do_sample": False}
    with names["linear"].attach(model, names["processor"]):
        assert baked.generate(**options).equal(model.generate(**options))
    plain = model.generate(**options)
    with names["choice"].repair.attach(model, names["processor"]):
        assert not model.generate(**options).equal(plain)
    assert not (tmp_path / "refused").exists()
