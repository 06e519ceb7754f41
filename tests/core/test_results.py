"""Results are saved and loaded as they are."""

import json
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from care_lens.core import FrameResult, package_versions
from care_lens.core.errors import ArtifactError
from care_lens.core.results import column_types


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


def first_version(directory, result, **changes):
    """Files as the version of schema 1 wrote them: no sums, no list of files."""
    manifest = {"schema": 1, "kind": "Effects", "columns": column_types(result.frame), "settings": result.settings}
    result.frame.to_csv(directory / "effects.csv", index=False)
    (directory / "effects.json").write_text(json.dumps({**manifest, **changes}, indent=2) + "\n")


def test_files_of_schema_1_are_loaded_and_saved_as_the_present_one(tmp_path, result):
    first_version(tmp_path, result)
    loaded = Effects.load(tmp_path, "effects")
    pd.testing.assert_frame_equal(loaded.frame, result.frame, check_exact=True)
    assert loaded.settings == result.settings
    loaded.save(tmp_path, "effects")
    assert json.loads((tmp_path / "effects.json").read_text())["schema"] == 2
    pd.testing.assert_frame_equal(Effects.load(tmp_path, "effects").frame, result.frame, check_exact=True)


def test_files_of_schema_1_that_are_not_whole_or_of_another_kind_are_refused(tmp_path, result):
    first_version(tmp_path, result, kind="Others")
    with pytest.raises(ArtifactError, match="must hold a Effects, got a Others"):
        Effects.load(tmp_path, "effects")
    first_version(tmp_path, result)
    with pytest.raises(ArtifactError, match="must be of this run, got a file of an older version; remove it"):
        Effects.load(tmp_path, "effects", context={"run": "1"})
    (tmp_path / "effects.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"effects\.csv must be there"):
        Effects.load(tmp_path, "effects")


@pytest.mark.parametrize("damage", [
    lambda text: text[: len(text) // 2],
    lambda text: text.replace('"columns"', '"colums"'),
    lambda text: text.replace('"schema": 1', '"schema": 0'),
    lambda text: text.replace('"value": "float64"', '"velue": "float64"'),
])  # fmt: skip
def test_a_damaged_manifest_of_schema_1_is_refused(tmp_path, result, damage):
    first_version(tmp_path, result)
    path = tmp_path / "effects.json"
    assert damage(path.read_text()) != path.read_text()
    path.write_text(damage(path.read_text()))
    with pytest.raises(ArtifactError, match=r"effects\.(json|csv)"):
        Effects.load(tmp_path, "effects")


def test_a_frame_of_schema_1_that_was_cut_off_is_refused(tmp_path, result):
    first_version(tmp_path, result)
    path = tmp_path / "effects.csv"
    path.write_text(path.read_text()[:-3])
    with pytest.raises(ArtifactError, match=r"effects\.csv"):
        Effects.load(tmp_path, "effects")


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
