"""What a rival was fitted against is said where it is not what was asked for first."""

import logging

import pandas as pd
import torch

from care_lens import organism
from care_lens.defences import NoRefusalDirectionError, RefusalDirection, load_defence
from care_lens.pipeline import rivals
from care_lens.pipeline.settings import RunSettings


def test_a_direction_that_is_fitted_against_the_counterpart_alone_says_so(monkeypatch, caplog, tmp_path):
    """The fit and the tuning have tests of their own: here the first fit fails, or none does."""
    lvlm, study, fails, seen = organism.load(), organism.study(), [True], []

    def fit(model, *, harmless, **options):
        seen.append({example.channel for example in harmless})
        if fails.pop():
            raise NoRefusalDirectionError("none of 8 candidates passes")
        table = pd.DataFrame([{"position": -1, "layer": 2, "kept": True}])
        return RefusalDirection(direction=torch.ones(4), layer=2, position=-1, candidates=table)

    monkeypatch.setattr(rivals.RefusalDirection, "fit", staticmethod(fit))
    monkeypatch.setattr(rivals, "tuned", lambda lvlm, study, makers, *rest, **options: (makers[0](), {"asr": 0.5}))
    settings = RunSettings()
    fails[:] = [False, True]
    with caplog.at_level(logging.WARNING):
        found = rivals.refusal_direction(lvlm, study, settings)
    assert seen[1] == {"benign plain"} and len(seen[0]) > 1
    assert "none of 8 candidates passes; it is fitted against 'benign plain' alone" in caplog.text
    found.save(tmp_path)
    again = load_defence(tmp_path)  # a run that goes on loads it
    _, note = rivals.best_direction(lvlm, study, again, settings, ["visual"])
    assert note["harmless"] == "benign plain"
    caplog.clear()
    fails[:] = [False]
    _, note = rivals.best_direction(lvlm, study, rivals.refusal_direction(lvlm, study, settings), settings, ["visual"])
    assert note["harmless"] == "all benign channels" and not caplog.text
