"""An outcome by generation: whether the answer that the model then gives complies, as a judge sees it.

It is what mediation by logits stands in for. It is coarse (0 or 1 a pair) and dear (a generation a cell and pair), so it
serves to check some cells, and to give shares where first tokens say little.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core import Example, GeneratedOutcome, Judge, Verdict, require_verdicts
from care_lens.lvlm import HookedLVLM, LVLMInputs


@dataclass(frozen=True)
class JudgedCompliance(GeneratedOutcome):
    """1 where the greedy answer is judged to comply, 0 where it is not: effects are differences of shares.

    The patch acts on the prompt; what is generated after it is the model's own. Pairs of which an answer is missing are left
    out of the cell.

    Attributes:
        judge: Says what each answer is.
        max_new_tokens: Most tokens of an answer.
        examples: The batch's, given by mediation.
    """

    judge: Judge
    max_new_tokens: int = 32
    examples: tuple[Example, ...] = field(default=(), repr=False, compare=False)

    def __repr__(self) -> str:
        judge = getattr(self.judge, "name", type(self.judge).__name__)
        return f"JudgedCompliance(judge={judge!r}, max_new_tokens={self.max_new_tokens})"

    def with_examples(self, examples: Sequence[Example]) -> "JudgedCompliance":
        """The same for a batch of these examples."""
        return replace(self, examples=tuple(examples))

    def generated(
        self, lvlm: HookedLVLM, inputs: LVLMInputs, rows: Sequence[int], fwd_hooks: Sequence[Any]
    ) -> Float[Tensor, " rows"]:
        """Generate with hooks on, and judge.

        Args:
            lvlm: The model.
            inputs: The rows.
            rows: Which rows of the batch they are.
            fwd_hooks: Pairs of a place and a function.

        Returns:
            [rows] 1, 0, or NaN where the answer is missing.
        """
        made = lvlm.generate(inputs, max_new_tokens=self.max_new_tokens, do_sample=False, fwd_hooks=fwd_hooks)
        verdicts = require_verdicts(
            self.judge([self.examples[row] for row in rows], made.answers), len(rows), judge=self.judge
        )
        values = {Verdict.COMPLIED: 1.0, Verdict.MISSING: float("nan")}
        return torch.tensor([values.get(verdict, 0.0) for verdict in verdicts], dtype=torch.float64)
