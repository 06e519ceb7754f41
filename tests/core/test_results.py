"""Results are saved and loaded as they are."""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from care_lens.core import FrameResult, package_versions


@dataclass(frozen=True)
class Effects(FrameResult):
    def plot(self) -> go.Figure:
        return go.Figure()


@dataclass(frozen=True)
class Others(Effects):
    pass


def test_floats_come_back_to_the_bit(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.normal(size=2000) * 10.0 ** rng.integers(-12, 12, 2000)
    Effects(pd.DataFrame({"value": values}), {}).save(tmp_path, "floats")
    assert (Effects.load(tmp_path, "floats").frame["value"].to_numpy() == values).all()


@pytest.fixture
def result():
    frame = pd.DataFrame(
        {
            "tower": ["language", "vision"],
            "layer": pd.array([3, None], dtype="Int64"),
            "component": ["NA", ""],
            "value": [0.1 + 0.2, np.nan],
            "n": [4, 5],
            "on": [True, False],
        }
    )
    return Effects(frame, {"seed": 3, "versions": package_versions()})


def test_what_is_saved_is_loaded(tmp_path, result):
    path = result.save(tmp_path / "deep" / "er", "effects")
    assert path.name == "effects.csv" and path.exists()
    loaded = Effects.load(path.parent, "effects")
    pd.testing.assert_frame_equal(loaded.frame, result.frame, check_exact=True)
    assert loaded.settings == result.settings and type(loaded) is Effects
    assert set(result.settings["versions"]) == {"care_lens", "torch", "transformers", "transformer_lens"}


def test_frames_are_handed_out_as_copies(result):
    copy = result.to_dataframe()
    copy.loc[0, "value"] = 7.0
    assert result.frame["value"][0] == 0.1 + 0.2


def test_another_kind_or_schema_is_refused(tmp_path, result):
    result.save(tmp_path, "effects")
    with pytest.raises(ValueError, match="must hold a Others, got a Effects"):
        Others.load(tmp_path, "effects")
    manifest = json.loads((tmp_path / "effects.json").read_text())
    (tmp_path / "effects.json").write_text(json.dumps({**manifest, "schema": 99}))
    with pytest.raises(ValueError, match="update care_lens"):
        Effects.load(tmp_path, "effects")


def test_the_base_has_no_figure_of_its_own(result):
    with pytest.raises(TypeError, match="abstract"):
        FrameResult(result.frame, {})  # type: ignore[abstract]
