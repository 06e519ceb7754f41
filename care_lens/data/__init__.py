"""Studies: example sets by channel and split, from the bundled world, from the user's own disk, or from published benchmarks.

The readers of published benchmarks are in :mod:`care_lens.data.benchmarks`.
"""

from care_lens.core.arguments import checked
from care_lens.core.pictures import PictureError, PictureNotFoundError, open_picture, shown_picture
from care_lens.data import benchmarks
from care_lens.data.answers import COMPLIANT_ANSWERS, REFUSAL_ANSWERS, target_of
from care_lens.data.directory import StudyNotFoundError, read_study, write_study
from care_lens.data.joining import HeldOutError, limited
from care_lens.data.jsonl import DataFileError, read_examples, write_examples
from care_lens.data.preflight import PreflightReport, preflight
from care_lens.data.study import SPLITS, Study, StudyError, split_by_group
from care_lens.data.templates import held_templates, template_of
from care_lens.data.twins import attack_pairs, plain_twins

__all__ = [
    "COMPLIANT_ANSWERS",
    "REFUSAL_ANSWERS",
    "SPLITS",
    "DataFileError",
    "HeldOutError",
    "PictureError",
    "PictureNotFoundError",
    "PreflightReport",
    "Study",
    "StudyError",
    "StudyNotFoundError",
    "attack_pairs",
    "benchmarks",
    "held_templates",
    "limited",
    "open_picture",
    "plain_twins",
    "preflight",
    "read_examples",
    "read_study",
    "shown_picture",
    "split_by_group",
    "target_of",
    "template_of",
    "write_examples",
    "write_study",
]

checked(globals(), __all__)
