"""Studies: example sets by channel and split, from the bundled world or from the user's own disk."""

from care_lens.core.arguments import checked
from care_lens.core.pictures import PictureError, PictureNotFoundError, open_picture, shown_picture
from care_lens.data.directory import StudyNotFoundError, read_study
from care_lens.data.jsonl import DataFileError, read_examples, write_examples
from care_lens.data.study import SPLITS, Study, StudyError, split_by_group

__all__ = [
    "SPLITS",
    "DataFileError",
    "PictureError",
    "PictureNotFoundError",
    "Study",
    "StudyError",
    "StudyNotFoundError",
    "open_picture",
    "read_examples",
    "read_study",
    "shown_picture",
    "split_by_group",
    "write_examples",
]

checked(globals(), __all__)
