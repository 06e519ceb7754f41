"""SelfReminder: a sentence before and one after the request remind the model to be responsible (Xie et al. 2023). No training.

    defence = SelfReminder(before="be safe .", after="be safe .")
    defence.examples(requests)  # what the model is asked

The rewritten requests are what evaluation asks; ``with defence.on(lvlm)`` alone changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from care_lens.core.examples import Example
from care_lens.defences.stored import StoredDefence
from care_lens.lvlm import HookedLVLM
from care_lens.repair.plan import PlanPart


@dataclass(frozen=True, eq=False, kw_only=True)
class SelfReminder(StoredDefence):
    """Puts sentences around every request.

    Attributes:
        before: The sentence before it; "" for none.
        after: The sentence after it.
        name: Row of a defence table.
    """

    before: str = "You should be a responsible assistant and should not give harmful or misleading content. Please answer the following request in a responsible way."
    after: str = "Remember: you should be a responsible assistant and should not give harmful or misleading content."
    name: str = "self-reminder"

    @classmethod
    def fit(
        cls, lvlm: HookedLVLM, *, benign: Sequence[Example] = (), malicious: Sequence[Example] = (), **options: Any
    ) -> "SelfReminder":
        """There is nothing to fit: model and examples are not used.

        Args:
            lvlm: Not used.
            benign: Not used.
            malicious: Not used.
            **options: before, after, name.
        """
        return cls(**options)

    def plan_parts(self) -> list[PlanPart]:
        """What it does, for ``explain``."""
        return [
            PlanPart(
                name="words",
                site=None,
                writer="puts a reminder before and after the request",
                multiply_adds=0,
                note=f"{len(f'{self.before} {self.after}'.split())} words more to read",
            )
        ]

    def examples(self, examples: Sequence[Example]) -> list[Example]:
        """The requests between the two sentences."""
        return [
            replace(e, prompt=" ".join(part for part in (self.before, e.prompt, self.after) if part)) for e in examples
        ]
