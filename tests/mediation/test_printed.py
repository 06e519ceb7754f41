"""Every result of the package introduces itself in a few lines, in a terminal and in a notebook; none prints its numbers."""

import inspect
import math

import pandas as pd
import pytest

import care_lens.evaluation
import care_lens.mediation
import care_lens.subspace.uncertainty  # noqa: F401
from care_lens.core import FrameResult
from care_lens.core.details import DetailedResult
from care_lens.core.display import WIDEST


def every(kind):
    for one in kind.__subclasses__():
        yield from every(one)
        if not inspect.isabstract(one) and one.__module__.startswith("care_lens."):
            yield one


RESULTS = {kind.__name__: kind for kind in every(FrameResult)}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_prints_what_it_is(name):
    kind = RESULTS[name]
    frame = pd.DataFrame(
        {
            "tower": "language",
            "layer": pd.array([*range(30), None], dtype="Int64"),
            "component": ["hook_mlp_out<b>"] * 30 + ["hook_attn_out"],
            "position": [f"token {i}" for i in range(31)],
            "effect": "TE",
            "value": [math.pi + i for i in range(31)],
        }
    )
    details = (frame,) if issubclass(kind, DetailedResult) else ()
    made = kind(frame, {"n": 24, "groups": 6, "seed": 3, "outcome": "UnsafeMargin(...)" + "x" * 500}, *details)
    text = repr(made)
    assert text == str(made) and text.startswith(f"{name}: 31 rows\n")
    assert len(text.splitlines()) <= 12 and max(map(len, text.splitlines())) <= WIDEST
    assert "3.14" not in text and "0 to 29" in text and "n 24, 6 groups, seed 3" in text
    assert "token 0, token 1, token 2, token 3, token 4, token 5 and 25 more" in text
    assert (".details: 31 rows" in text) == bool(details)
    html = made._repr_html_()
    assert html.startswith("<table>") and "<b>care" not in html and "hook_mlp_out&lt;b&gt;" in html
    assert html.count("3.14") == 1, "the first rows alone"


def test_results_of_all_sweeps_are_among_them():
    wanted = ("Mediation", "Ablation", "PatchMap", "Path", "Knockout", "Attribution", "Verified", "Separability")
    assert {f"{name}Result" for name in wanted} | {"Localisation", "Writing"} <= {*RESULTS}


def test_an_empty_result_prints(tmp_path):
    kind = RESULTS["MediationResult"]
    assert repr(kind(pd.DataFrame({"tower": []}), {})).startswith("MediationResult: 0 rows")
