"""Saved figures are the same bytes whenever they are saved."""

import plotly.graph_objects as go
import pytest

from care_lens.core.errors import ArtifactError
from care_lens.core.files import save_artifact
from care_lens.plots import save_figure
from care_lens.plots.saving import figure_html


def bars(height: float) -> go.Figure:
    return go.Figure(go.Bar(x=["a"], y=[height]))


def test_a_figure_is_the_same_bytes_again_and_another_is_not(tmp_path):
    for folder in ("one", "two"):
        assert [path.name for path in save_figure(bars(1.0), tmp_path / folder / "f")] == ["f.html", "f.json"]
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / folder).iterdir()} for folder in ("one", "two"))
    assert one == two and [*sorted(one)] == ["f.html", "f.json", "plotly.min.js"] and b"Plotly" in one["plotly.min.js"]
    save_figure(bars(2.0), tmp_path / "two" / "f")
    assert (tmp_path / "two" / "f.html").read_bytes() != one["f.html"]


@pytest.mark.parametrize("name", ["f", "f.html", "f.png"])
def test_a_saved_result_of_the_same_name_is_left_as_it_is(tmp_path, name):
    """`result.save(folder, "f")` and then `save_figure(result.plot(), folder / "f")`: both write f.json."""
    save_artifact(tmp_path, "f", kind="Result", schema=1, data={"csv": b"a"}, content={})
    held = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ArtifactError, match=r"f\.json must be a figure's data"):
        save_figure(bars(1.0), tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == held
    (tmp_path / "notes.json").write_text("cut off")
    with pytest.raises(ArtifactError, match="left as it is"):
        save_figure(bars(1.0), tmp_path / "notes")


def test_equal_figures_of_one_page_have_elements_of_their_own():
    parts = [figure_html(bars(1.0), include_plotlyjs=False, full_html=False, name=name) for name in ("a", "b", "a")]
    assert parts[0] == parts[2] != parts[1]


def test_a_script_that_was_cut_off_is_written_again(tmp_path):
    save_figure(bars(1.0), tmp_path / "f")
    script = tmp_path / "plotly.min.js"
    whole = script.read_bytes()
    script.write_bytes(whole[:100])
    save_figure(bars(1.0), tmp_path / "f")
    assert script.read_bytes() == whole
