"""The bundled model's study with some channels of every kind, for tests of what is done with a study, not of the world."""

from dataclasses import replace

from care_lens import organism
from care_lens.data import Study

#: In the fit and held out, benign, hard and named.
CHANNELS = (
    "plain",
    "typographic",
    "wrapper",
    "spelled",
    "split",
    "benign plain",
    "benign typographic",
    "benign spelled",
    "hard wrapper",
    "hard named kind",
)


def few_channels(n: int | None = None, *, pairs: tuple[str, ...] | None = None) -> Study:
    """At most n examples of each of them in validation and test, of every channel in fit and calibration, and some of the pair sets.

    A gate needs benign prompts of many channels; answers are generated in validation and test.
    """
    study = organism.study()
    suites = {
        split: {c: e for c, e in channels.items() if c in CHANNELS or split in ("fit", "calibration")}
        for split, channels in study.suites.items()
    }
    study = replace(study, suites=suites, pairs={name: study.pairs[name] for name in pairs or study.pairs})
    return study if n is None else study.limited(n)


def quick_study() -> Study:
    """Enough to learn a repair and to choose it by the code of a page: 12 examples a channel to learn from, 2 of some channels to choose by and to test."""
    study = few_channels().limited(12, splits=("fit", "calibration")).limited(2, splits=("validation", "test"))
    return replace(study, pairs={name: pairs[:4] for name, pairs in study.pairs.items()})
