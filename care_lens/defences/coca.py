"""CoCA (constitutional calibration): the model's answer, pushed further in the direction of what a safety sentence changes.

``logits = z_safe + alpha (z_safe - z)`` at the last prompt token and every token of the answer, z_safe being the logits of the same
request with a safety sentence before it, the answer so far in both. No training, no fit; alpha = 4 in the method's paper.

    defence = CoCA(prefix="be safe")

Every step runs the model twice: the second branch has a key-value cache of its own and no hooks. It cannot work on models that count
positions themselves (the Qwen-VL families), whose counter the second branch would overwrite; there :meth:`CoCA.check` says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from care_lens.core.examples import Example
from care_lens.defences.base import Batch, HookDefence
from care_lens.defences.hiddendetect import LOGITS, require_logits
from care_lens.defences.stored import WrongModelError
from care_lens.lvlm import HookedLVLM, LVLMInputs
from care_lens.repair.base import HookPair
from care_lens.repair.plan import PlanPart

_TOKENS = "embed.hook_in"


@dataclass(frozen=True, eq=False, kw_only=True)
class CoCA(HookDefence):
    """Amplifies the effect of a safety sentence on the logits.

    Attributes:
        prefix: The safety sentence; "" switches the defence off.
        alpha: 0 gives the logits with the sentence, -1 those without.
        name: Row of a defence table.
    """

    prefix: str = "As an AI assistant, you must not give harmful answers."
    alpha: float = 4.0
    name: str = "CoCA"

    @classmethod
    def fit(
        cls, lvlm: HookedLVLM, *, benign: Sequence[Example] = (), malicious: Sequence[Example] = (), **options: Any
    ) -> "CoCA":
        """There is nothing to fit: the model is checked and the examples are not used.

        Args:
            lvlm: The model.
            benign: Not used.
            malicious: Not used.
            **options: prefix, alpha, name.

        Raises:
            WrongModelError: If it cannot work on the model.
        """
        made = cls(**options)
        made.check(lvlm)
        return made

    @property
    def off(self) -> bool:
        """Whether there is no sentence."""
        return not self.prefix

    def check(self, lvlm: HookedLVLM) -> None:
        """Refuse a model that counts positions itself or whose logits cannot be edited.

        Raises:
            WrongModelError: Saying why.
        """
        if lvlm.family.own_positions:
            raise WrongModelError(
                f"{self.name} must run a second branch beside the answer, but this model counts positions itself and the branch would "
                "overwrite its counter; use SelfReminder, which needs one branch"
            )
        require_logits(lvlm, self.name)

    def plan_parts(self) -> list[PlanPart]:
        """What it does, for ``explain``."""
        return [
            PlanPart(
                name="logits",
                site=LOGITS,
                positions=("last", "generated"),
                writer="moves the logits on to those under a safety sentence",
                alpha=self.alpha,
                extra_per_token=1,
                note=f"a second branch runs with: {self.prefix}",
            )
        ]

    def edits(self, batch: Batch) -> list[HookPair]:
        """A hook that sees the tokens, and one at the logits."""
        warned = [replace(e, prompt=f"{self.prefix} {e.prompt}") for e in batch.examples()]
        safe = batch.prepare(warned)
        branch = _Branch(batch.lvlm, safe)
        tokens: dict[str, Tensor] = {}

        def see(ids: Tensor, hook: Any) -> None:
            tokens["ids"] = ids

        def calibrate(z: Tensor, hook: Any) -> Tensor:
            ids = tokens["ids"]
            if not batch.is_prefill(ids.shape):
                z_safe, where = branch.step(ids), None
            else:
                z_safe, where = _aligned(branch.start(), safe, batch.inputs, z.shape[1])
            made = z_safe + self.alpha * (z_safe - z)
            return made if where is None else torch.where(where.to(z.device)[..., None], made, z)

        return [(_TOKENS, see), (LOGITS, calibrate)]


class _Branch:
    """The request with the safety sentence, as far as the answer has come."""

    def __init__(self, lvlm: HookedLVLM, inputs: LVLMInputs) -> None:
        self._lvlm, self._inputs = lvlm, inputs
        self._cache, self._mask, self._position = DynamicCache(), inputs.attention_mask, inputs.position_ids[:, -1:]

    def start(self) -> Tensor:
        """[batch, pos, vocab] logits of the whole batch; afresh."""
        self._cache, self._mask = DynamicCache(), self._inputs.attention_mask
        self._position = self._inputs.position_ids[:, -1:]
        return self._run(**self._inputs.model_kwargs())

    def step(self, ids: Tensor) -> Tensor:
        """[batch, 1, vocab] logits after one more token a row."""
        self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        self._position = self._position + 1
        return self._run(input_ids=ids, attention_mask=self._mask, position_ids=self._position)

    def _run(self, **kwargs: Tensor) -> Tensor:
        with self._lvlm.bare():
            return self._lvlm.hf_model(**kwargs, past_key_values=self._cache, use_cache=True).logits


def _aligned(z_safe: Tensor, safe: LVLMInputs, plain: LVLMInputs, kept: int) -> tuple[Tensor, Tensor]:
    """The safe branch's logits at the kept positions of the plain one, and where they mean the same: from the last prompt token on."""
    width = plain.input_ids.shape[1]
    positions = torch.arange(width - kept, width)[None]
    last_plain, last_safe = (torch.tensor(i.spans.last_index())[:, None] for i in (plain, safe))
    index = (positions - last_plain + last_safe).clamp(0, z_safe.shape[1] - 1).to(z_safe.device)
    where = (plain.spans.last | plain.spans.response)[:, -kept:]
    return z_safe.gather(1, index[..., None].expand(-1, -1, z_safe.shape[2])), where
