"""Studies: example sets by channel and split, from the bundled world or from the user's own disk."""

from care_lens.data.directory import read_study
from care_lens.data.jsonl import read_examples, write_examples
from care_lens.data.study import SPLITS, Study, split_by_group

__all__ = ["SPLITS", "Study", "read_examples", "read_study", "split_by_group", "write_examples"]
