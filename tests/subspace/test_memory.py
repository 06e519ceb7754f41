import logging

import pytest
import torch
from moments_rows import filled, rows_of

from care_lens.subspace import Moments, SafetySubspace, SubspaceError, plan_memory


def test_the_figures_of_a_wide_model():
    """One [3584, 3584] float64 is 103 MB; 28 layers, 3 sites a layer, 4 groups of rows: 35 GB."""
    one = plan_memory(3584, {"rows": 5000})
    assert one.forms == {"rows": "sums"}
    assert one.moments == 8 * 3584 * (3584 + 4)
    whole = plan_memory(3584, {str(i): 5000 for i in range(4)}, sites=28 * 3)
    assert whole.moments == pytest.approx(34.6e9, rel=0.01)
    assert "84 sites take 35 GB" in str(whole)
    few = plan_memory(3584, {str(i): 720 for i in range(4)}, sites=28 * 3)
    assert set(few.forms.values()) == {"rows"}
    assert few.moments < whole.moments / 4


@pytest.mark.parametrize("shape", [(20, 6), (6, 20)])
def test_the_plan_is_what_moments_take(shape):
    moments = Moments.from_rows(rows_of(*shape))
    if shape[0] >= shape[1]:
        moments = moments.without_rows()
    assert plan_memory(shape[1], {"rows": shape[0]}).moments == moments.nbytes


def test_the_plan_names_the_solver_and_counts_its_work():
    counts = {"benign": 720, "malicious": 720}
    dual, dense, iterative = (plan_memory(3584, counts, solver=name).fit for name in ("dual", "dense", "iterative"))
    assert 8 * 3584 * 1440 < dual < dense
    assert iterative < dense
    assert plan_memory(3584, counts, solver="auto").solver == "dual"
    assert plan_memory(500, counts, solver="auto").solver == "dense"
    with pytest.raises(SubspaceError, match="fit must name two of"):
        plan_memory(10, {"benign": 5}, solver="dual")


def test_the_plan_is_logged_before_a_fit_starts_and_by_a_table(caplog):
    with caplog.at_level(logging.INFO, logger="care_lens.subspace"):
        with pytest.raises(SubspaceError):
            SafetySubspace.fit(torch.ones(10, 4), rows_of(9, 4).float(), rank=1)
        assert "moments of width 4 at 1 site take" in caplog.text
        assert "a fit with solver 'dense' takes" in caplog.text
        plan = filled().plan({"benign": 40}, sites=2)
    assert str(plan) in caplog.text
    assert len(plan.forms) == 4
