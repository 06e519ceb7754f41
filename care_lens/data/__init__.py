"""Studies: example sets by channel and split, from the bundled world, from the user's own disk, or from published benchmarks.

The readers of published benchmarks are in :mod:`care_lens.data.benchmarks`.
"""

from care_lens.core.arguments import checked
from care_lens.core.pictures import PictureError, PictureNotFoundError, open_picture, shown_picture
from care_lens.data import benchmarks
from care_lens.data.directory import StudyNotFoundError, read_study
from care_lens.data.jsonl import DataFileError, read_examples, write_examples
from care_lens.data.preflight import PreflightReport, preflight
from care_lens.data.study import SPLITS, Study, StudyError, split_by_group

__all__ = [
    "SPLITS",
    "DataFileError",
    "PictureError",
    "PictureNotFoundError",
    "PreflightReport",
    "Study",
    "StudyError",
    "StudyNotFoundError",
    "benchmarks",
    "open_picture",
    "preflight",
    "read_examples",
    "read_study",
    "shown_picture",
    "split_by_group",
    "write_examples",
]

checked(globals(), __all__)
