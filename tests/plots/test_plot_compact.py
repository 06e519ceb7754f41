import pandas as pd
import pytest

from care_lens.plots import plot_asr_column, save_figure


@pytest.fixture
def frame():
    rows = [
        (defence, channel, metric, value, value - 0.05, value + 0.05)
        for defence, by in (("none", 0.9), ("care", 0.1), ("astra", 0.4))
        for channel, metric, value in (
            ("typographic", "asr", by),
            ("wrapper", "asr", by - 0.04),
            ("read", "accuracy", 0.8),
        )
    ]
    made = pd.DataFrame(rows, columns=["defence", "channel", "metric", "value", "ci_low", "ci_high"])
    return made.assign(n=20, missing=0, judge="words", seed=0)


def test_one_column_shows_the_numbers_and_fits(frame, tmp_path):
    figure = plot_asr_column(frame, names={"care": "CARE"})
    assert [trace.name for trace in figure.data] == ["none", "CARE", "astra"]
    care = figure.data[1]
    assert dict(zip(care.y, care.x, strict=True)) == {"typographic": 0.1, "wrapper": pytest.approx(0.06)}
    assert list(care.error_x.array) == pytest.approx([0.05, 0.05])
    assert len({(trace.marker.color, trace.marker.symbol) for trace in figure.data}) == 3
    assert figure.layout.width == 320 and figure.layout.height < 200
    assert figure.layout.font.size * 240 / 320 >= 7  # points on paper, where 320 pixels are 3.33 inches
    assert list(figure.layout.yaxis.categoryarray) == ["typographic", "wrapper"]
    assert save_figure(figure, tmp_path / "asr.html")[0].exists()


def test_channels_are_chosen_ordered_and_named(frame):
    figure = plot_asr_column(frame, channels={"wrapper": "Wrapped", "typographic": "Typographic"})
    assert list(figure.layout.yaxis.categoryarray) == ["Wrapped", "Typographic"]
    assert set(figure.data[0].y) == {"Wrapped", "Typographic"}
    taller = plot_asr_column(pd.concat([frame, frame.assign(channel=frame["channel"] + " 2")]))
    assert taller.layout.height > figure.layout.height
    for options, message in (
        ({"channels": ["x"]}, r"\['x'\] are not there"),
        ({"channels": "wrapper"}, "got 'wrapper'"),
        ({"metric": "kl"}, "got 'kl'"),
        ({"metric": "refusal"}, "metric must be one of"),
        ({"width": 10}, "100 pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            plot_asr_column(frame, **options)
