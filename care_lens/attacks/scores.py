"""What a search without gradients goes by: a number for each candidate, smaller where the attacker is nearer to what it wants.

Any function ``score(lvlm, examples) -> [example]`` will do. It is called while the defence is on the model, with requests as the defence has
them; it may run the model in any way, answers included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from care_lens.attacks.common import answers
from care_lens.attacks.losses import TARGET_LIKELIHOOD, AttackLoss, row_losses, wants_responses
from care_lens.core.examples import Example
from care_lens.core.outcome import Judge, Verdict
from care_lens.core.verdicts import named, require_verdicts
from care_lens.lvlm.hooked import HookedLVLM


@runtime_checkable
class Score(Protocol):
    """A number for each candidate, smaller where the attacker is nearer to what it wants.

    Args:
        lvlm: The model, with the defence on it.
        examples: The candidates.

    Returns:
        One number each.
    """

    def __call__(self, lvlm: HookedLVLM, examples: Sequence[Example]) -> Sequence[float]: ...


@dataclass(frozen=True)
class LossScore:
    """An attack's loss, without a gradient.

    Attributes:
        loss: Any :class:`~care_lens.attacks.AttackLoss`.
    """

    loss: AttackLoss = TARGET_LIKELIHOOD

    @property
    def name(self) -> str:
        """The loss's."""
        return named(self.loss)

    @torch.no_grad()
    def __call__(self, lvlm: HookedLVLM, examples: Sequence[Example]) -> list[float]:
        """The loss of each candidate."""
        inputs = lvlm.prepare(examples, responses=wants_responses(self.loss))
        return row_losses(self.loss, lvlm, inputs).tolist()


@dataclass(frozen=True)
class JudgeScore:
    """A judge's verdict on each candidate's answer: 0 where it complied, 1 where it did neither, 2 where it refused, 3 without an answer.

    Attributes:
        judge: Any :class:`~care_lens.core.Judge`.
        max_new_tokens: Most tokens of an answer.
    """

    judge: Judge
    max_new_tokens: int = 32

    @property
    def name(self) -> str:
        """The judge's."""
        return named(self.judge)

    def __call__(self, lvlm: HookedLVLM, examples: Sequence[Example]) -> list[float]:
        """The verdicts as numbers."""
        texts = answers(lvlm, examples, max_new_tokens=self.max_new_tokens, batch_size=max(len(examples), 1))
        order = (Verdict.COMPLIED, Verdict.OTHER, Verdict.REFUSED, Verdict.MISSING)
        verdicts = require_verdicts(self.judge(list(examples), texts), len(texts), judge=self.judge)
        return [float(order.index(verdict)) for verdict in verdicts]
