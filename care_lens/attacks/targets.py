"""How likely a model is to begin its answer with one of several target texts, as a function of the pixels."""

from collections.abc import Sequence
from typing import Any

from care_lens.attacks.losses import TargetLikelihood
from care_lens.attacks.objective import PictureObjective
from care_lens.core.examples import Example
from care_lens.core.gates import GatesSeen
from care_lens.lvlm.hooked import HookedLVLM


class TargetLoss(PictureObjective):
    """Teacher-forced loss of target answers for a batch of examples.

    For the targets t of an example with per-token mean log likelihoods m_t, the loss is -logsumexp_t m_t:
    with one target, the mean negative log likelihood of its tokens; with several, a smooth minimum of theirs.
    For targets of one token it is the negative log of their summed probability.

    Args:
        lvlm: The model.
        examples: Examples with pictures of one size.
        targets: The acceptable answers, or openings of answers, of each example.
        target_tokens: Count only so many tokens of each target; None: all.
        defence: What is on the model, which may rewrite the requests.
        seen: Where gates note their scores.

    Attributes:
        pixels: [image, channel, height, width] the examples' own pixels in [0, 255], on the model's device.

    Raises:
        ValueError: If a picture is missing, or a target is empty.
        PreprocessingError: If what the processor makes of the pictures has no gradient.
    """

    def __init__(
        self,
        lvlm: HookedLVLM,
        examples: Sequence[Example],
        targets: Sequence[Sequence[str]],
        *,
        target_tokens: int | None = None,
        defence: Any = None,
        seen: GatesSeen | None = None,
    ) -> None:
        if any(not text.strip() for texts in targets for text in texts):
            raise ValueError("targets must have a token each, got an empty one")
        loss = TargetLikelihood(tokens=target_tokens)
        super().__init__(lvlm, examples, loss, targets=targets, defence=defence, seen=seen)
        lengths = self._inputs.spans.response.sum(dim=1) - self._inputs.spans.prefill.sum(dim=1) - 1
        if bool((lengths < 1).any()):
            raise ValueError("targets must have a token each, got an empty one")


def targets_of(examples: Sequence[Example], targets: Sequence[str] | Sequence[Sequence[str]] | None) -> list[list[str]]:
    """The target answers of each example: texts for all, a collection for each, or (None) each one's own response.

    Raises:
        ValueError: If there are no examples or no targets, or targets are of another shape.
    """
    if not examples:
        raise ValueError("examples must hold at least one example, got none")
    if targets is None:
        if without := [example.id for example in examples if not example.response]:
            raise ValueError(f"examples must have a response to aim at, got none for {without[:5]}; pass targets")
        return [[example.response or ""] for example in examples]
    if isinstance(targets, str) or not targets or any(not target for target in targets):
        raise ValueError(f"targets must be texts, or a collection of texts for each example, got {targets!r}")
    if all(isinstance(target, str) for target in targets):
        return [[str(target) for target in targets] for _ in examples]
    if len(targets) != len(examples):
        raise ValueError(f"targets must have a collection for each of {len(examples)} examples, got {len(targets)}")
    if any(isinstance(target, str) for target in targets):
        raise ValueError("targets must all be texts, or all be collections of texts, got both")
    return [list(texts) for texts in targets]
