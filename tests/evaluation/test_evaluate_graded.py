"""Utility and safety in one evaluation: graders by channel, ordinary requests, one set of generation settings, drift of the language."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from care_lens.core import Example, Verdict
from care_lens.evaluation import GenerationSettings, GenerationStore, evaluate, language_drift
from care_lens.evaluation.drift import response_losses
from care_lens.lvlm.errors import GenerationOptionError

OPTIONS = {"max_new_tokens": 3, "progress": False, "n_boot": 50}


class ByLength:
    """Half right where an answer has an even number of letters."""

    name, metric = "by-length", "score"

    def scores(self, examples, texts):
        return [float("nan") if text is None else (1.0, 0.5)[len(text) % 2] for text in texts]


def test_graded_channels_have_their_graders_metric_and_ordinary_ones_sarr(small, suites, scaled, judge):
    defences = {"none": None, "scaled": scaled(-2.0)}
    store = GenerationStore()
    graders = {"benign": ByLength()}
    more = suites | {"other": [replace(e, id=f"o{e.id}") for e in suites["benign"][:4]]}
    table = evaluate(
        small, more, defences, judge=judge, graders=graders, ordinary=["other"], store=store, fidelity=True, **OPTIONS
    )
    metrics = table.frame.groupby("channel")["metric"].agg(set).to_dict()
    assert metrics["plain"] == {"asr", "refusal"}
    assert {"score", "refusal"} <= metrics["benign"] and "accuracy" not in metrics["benign"]
    assert {"accuracy", "refusal", "sarr"} <= metrics["other"] and "sarr" not in metrics["benign"]
    for name in defences:
        texts = [a.response for a in store.answers() if (a.defence, a.channel) == (name, "benign")]
        row = table.frame.query("defence == @name and channel == 'benign' and metric == 'score'").iloc[0]
        assert row["value"] == pytest.approx(np.mean(ByLength().scores([], texts))) and row["judge"] == "by-length"
        others = [a for a in store.answers() if (a.defence, a.channel) == (name, "other")]
        refused = [v is Verdict.REFUSED for v in judge([a.to_example() for a in others], [a.response for a in others])]
        sarr = table.frame.query("defence == @name and channel == 'other' and metric == 'sarr'").iloc[0]
        assert sarr["value"] >= np.mean(refused)
    # Fidelity is measured where the grader says 1, and says so.
    right = sum(len(a.response) % 2 == 0 for a in store.answers() if (a.defence, a.channel) == ("none", "benign"))
    kept = table.frame.query("channel == 'benign' and metric == 'retained'")
    assert (kept["n"] == right).all() and (kept["judge"] == "by-length").all()
    assert table.settings["graders"] == {"benign": "by-length"} and table.settings["ordinary"] == ["other"]
    with pytest.raises(ValueError, match=r"must name benign suites, some of \['benign'\], got \['plain'\]"):
        evaluate(small, suites, defences, judge=judge, graders={"plain": ByLength()}, **OPTIONS)


def test_a_grader_is_asked_once_and_only_shares_say_what_is_right(small, suites, scaled, judge):
    class Counted(ByLength):
        asked = 0

        def scores(self, examples, texts):
            self.asked += 1
            return [4.0 for _ in texts] if self.metric == "cider" else super().scores(examples, texts)

    share, number = Counted(), Counted()
    number.metric, number.name = "cider", "captions"
    few = {"benign": suites["benign"][:6], "captions": [replace(e, id=f"c{e.id}") for e in suites["benign"][:4]]}
    table = evaluate(
        small, few, {"none": None, "scaled": scaled(-2.0)}, judge=judge, graders={"benign": share, "captions": number}, **OPTIONS
    )  # fmt: skip
    assert share.asked == number.asked == 2  # once for each defence
    frame = table.frame.set_index(["channel", "metric", "defence"])["value"]
    assert frame["captions", "cider", "scaled"] == 4.0
    metrics = table.frame.groupby("channel")["metric"].agg(set).to_dict()
    assert metrics["captions"] == {"cider", "refusal"}, "4 of 10 is not right"


def test_one_set_of_settings_holds_for_all_suites(small, suites, judge):
    store = GenerationStore()
    options = {"min_new_tokens": 3, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 5, **OPTIONS}
    few = {name: suite[:2] for name, suite in suites.items() if name != "shown"}
    table = evaluate(small, few, {"none": None}, judge=judge, store=store, fidelity=False, **options)
    (digest,) = table.settings["generation"]
    held = store.settings[digest]["generation"]
    assert {held[name] for name in ("max_new_tokens", "min_new_tokens")} == {3}
    assert (held["do_sample"], held["temperature"], held["top_p"], held["top_k"]) == (True, 0.7, 0.9, 5)
    assert {answer.channel for answer in store.answers(settings=[digest])} == set(few)
    assert all(answer.tokens == 3 for answer in store.answers())
    with pytest.raises(GenerationOptionError, match="temperature must be given once"):
        evaluate(small, few, {"none": None}, judge=judge, generation={"temperature": 1.0}, fidelity=False, **options)


def test_settings_that_make_no_sense_are_named():
    for options, message in (
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"max_new_tokens": 2, "min_new_tokens": 3}, "min_new_tokens or more, got 2 and 3"),
        ({"temperature": 0.0}, "above 0"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ):
        with pytest.raises(GenerationOptionError, match=message):
            GenerationSettings(**options)


def test_the_system_prompt_is_that_of_examples_without_one():
    own = Example("x", system="mine")
    made = GenerationSettings(system="be brief").examples([own, Example("y")])
    assert [example.system for example in made] == ["mine", "be brief"]
    assert GenerationSettings().examples([own]) == [own]


def test_drift_by_hand(small, suites, scaled):
    examples = [replace(e, response="sure red") for e in suites["benign"][::2]]
    examples += [replace(e, response="no red") for e in suites["benign"][1::2]]
    found = language_drift(
        small,
        examples,
        {"none": None, "same": scaled(1.0), "scaled": scaled(-2.0)},
        n_boot=50,
        batch_size=4,
        progress=False,
    )
    losses, tokens = [], []
    for example in examples:
        inputs = small.prepare([example], responses=True)
        with torch.no_grad():
            log_probs = small(inputs).double().log_softmax(-1)[0]
        places = torch.nonzero(inputs.spans.response[0])[:, 0]
        losses.append(-sum(float(log_probs[p - 1, inputs.input_ids[0, p]]) for p in places))
        tokens.append(len(places))
    assert response_losses(small, examples, batch_size=5, progress=False)[:, 0].tolist() == pytest.approx(
        losses, rel=1e-4
    )
    rows = found.set_index(["defence", "metric"])
    row = rows.loc[("none", "perplexity")]
    assert row["value"] == pytest.approx(math.exp(sum(losses) / sum(tokens)), rel=1e-4)
    assert row["ci_low"] < row["value"] < row["ci_high"] and (row["n"], row["tokens"], row["groups"]) == (
        12,
        sum(tokens),
        6,
    )
    assert rows.loc[("same", "perplexity_ratio"), "value"] == pytest.approx(1, abs=1e-5)
    assert rows.loc[("same", "kl_answer"), "value"] == pytest.approx(0, abs=1e-5)
    ratio = rows.loc[("scaled", "perplexity"), "value"] / row["value"]
    assert rows.loc[("scaled", "perplexity_ratio"), "value"] == pytest.approx(ratio, rel=1e-4)
    assert rows.loc[("scaled", "kl"), "value"] > 0.01
    with pytest.raises(ValueError, match="must each have a response"):
        language_drift(small, suites["benign"], {"none": None}, progress=False)
    with pytest.raises(ValueError, match="undefended"):
        language_drift(small, examples, {"same": scaled(1.0)}, progress=False)
