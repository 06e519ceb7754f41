"""The test split is for reporting: nothing is chosen on it."""

from collections.abc import Sequence

from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example
from care_lens.data.study import Study


class TestSplitError(CareLensError, ValueError):
    """Something is to be chosen on the test split, which is for reporting alone."""

    __test__ = False  # not a test, whatever pytest makes of its name


def refuse_test(study: Study, *sets: Sequence[Example]) -> None:
    """Refuse examples of a study's test split.

    Args:
        study: The study.
        *sets: What something is to be chosen on.

    Raises:
        TestSplitError: Naming the first of them; an example is of the split if its item is (its group, else its id and channel).
    """
    held = {item_of(e) for some in study.suites.get("test", {}).values() for e in some}
    for examples in sets:
        for example in examples:
            if item_of(example) in held:
                raise TestSplitError(
                    f"settings must be chosen on validation, got example {example.id!r} of channel {example.channel!r}, which is of the "
                    f"test split of {study.name!r}; give examples of study.suites['validation']"
                )


def item_of(example: Example) -> tuple[str, str]:
    """What an example is about: its group, else itself."""
    return ("group", example.group) if example.group else (example.channel, example.id)
