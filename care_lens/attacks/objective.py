"""The loss of examples as a function of their pixels, through the processor, the model and the defence that is on it."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from care_lens.attacks.losses import AttackLoss, row_losses, wants_responses
from care_lens.attacks.pixels import require_image
from care_lens.attacks.preprocessing import PicturePath, joined_parts, parts_of
from care_lens.core.defence import defended
from care_lens.core.digests import picture_bytes
from care_lens.core.examples import Example
from care_lens.core.gates import GatesSeen
from care_lens.lvlm.hooked import HookedLVLM
from care_lens.lvlm.inputs import LVLMInputs

logger = logging.getLogger(__name__)


class PictureObjective:
    """A loss of a batch of examples whose pictures change.

    With several targets of an example, of losses m_t, its loss is ``-logsumexp_t(-m_t)``, a smooth minimum of theirs.

    Args:
        lvlm: The model; a defence is on it already.
        examples: Examples with pictures of one size.
        loss: The loss of a batch (:mod:`care_lens.attacks.losses`).
        targets: Responses of each example to teacher-force; None: its own.
        defence: What is on the model: requests are what it makes of them. Where it takes the picture away or changes it (after a look
            at the model's answer), the request is attacked as it was.
        seen: Where gates note their scores, in a block of :func:`~care_lens.core.gates.gates_with_gradient`.

    Attributes:
        pixels: [image, channel, height, width] the examples' own pixels in [0, 255], on the model's device.

    Raises:
        ValueError: If a picture is missing, or they differ in size.
        PreprocessingError: If what the processor makes of them has no gradient.
    """

    def __init__(
        self,
        lvlm: HookedLVLM,
        examples: Sequence[Example],
        loss: AttackLoss,
        *,
        targets: Sequence[Sequence[str]] | None = None,
        defence: Any = None,
        seen: GatesSeen | None = None,
    ) -> None:
        for example in examples:
            require_image(example)
        answers = [[e.response] for e in examples] if targets is None else [list(texts) for texts in targets]
        rows = [replace(e, response=t) for e, texts in zip(examples, answers, strict=True) for t in texts]
        inputs = lvlm.prepare(_rewritten(rows, defence), responses=targets is not None or wants_responses(loss))
        self._lvlm, self._inputs, self._loss, self._seen = lvlm, inputs, loss, seen
        self._owner = torch.tensor([i for i, texts in enumerate(answers) for _ in texts])
        self._slot = torch.tensor([i for texts in answers for i in range(len(texts))])
        self._path = PicturePath(lvlm, examples)
        self.pixels = self._path.pixels

    def __call__(
        self, pixels: Float[Tensor, "kept channel height width"], index: Int[Tensor, " kept"]
    ) -> Float[Tensor, " kept"]:
        """The loss of some of the examples with other pixels.

        Args:
            pixels: [kept, channel, height, width] pixels in [0, 255] of the examples ``index``.
            index: [kept] which examples, in increasing order.

        Returns:
            [kept] losses, differentiable in the pixels.
        """
        return self.parts(pixels, index)[0]

    def parts(
        self, pixels: Float[Tensor, "kept channel height width"], index: Int[Tensor, " kept"]
    ) -> tuple[Float[Tensor, " kept"], Float[Tensor, " kept"]]:
        """The losses, and how far the gates of the defence are open (0 where none is, or none is looked at).

        Args:
            pixels: As for a call.
            index: As for a call.
        """
        place = torch.full((int(self._owner.max()) + 1,), -1)
        place[index.cpu()] = torch.arange(len(index))
        rows = torch.nonzero(place[self._owner] >= 0).squeeze(1)
        owner, slot = place[self._owner[rows]], self._slot[rows].to(pixels.device)
        inputs = self._inputs
        if len(rows) < inputs.batch_size:
            inputs = inputs.rows(rows.tolist())
        made = self._path(pixels, index.cpu())
        assert inputs.pixel_values is not None
        values = joined_parts([made[i] for i in owner.tolist()], inputs.pixel_values)
        if self._seen is not None:
            self._seen.clear()
        losses = row_losses(self._loss, self._lvlm, replace(inputs, pixel_values=values))
        opened = torch.zeros_like(losses) if self._seen is None else self._seen.excess(len(rows), device=losses.device)
        owner = owner.to(pixels.device)
        table = losses.new_full((len(index), int(self._slot.max()) + 1), float("-inf"))
        joined = -table.index_put((owner, slot), -losses).logsumexp(dim=1)
        return joined, torch.zeros_like(joined).index_add(0, owner, opened)

    def gives(self, pixels: Float[Tensor, "image channel height width"], inputs: LVLMInputs) -> bool:
        """Whether a batch prepared from pictures has what these pixels of all examples give, to a hundredth of an 8-bit step."""
        with torch.no_grad():
            made = self._path(pixels, torch.arange(len(pixels)))
        held = parts_of(inputs)
        return all(self._path.same(a, b) for a, b in zip(made, held, strict=True))


def _rewritten(rows: Sequence[Example], defence: Any) -> list[Example]:
    """The requests as the defence has them, where it leaves the picture that is attacked as it is."""
    made = defended(defence, rows)
    kept = []
    for row, new in zip(rows, made, strict=True):
        same = len(row.images) == len(new.images) and all(
            a is b or picture_bytes(a) == picture_bytes(b) for a, b in zip(row.images, new.images, strict=True)
        )
        kept.append(new if same else row)
    if changed := sum(a is not b for a, b in zip(kept, made, strict=True)):
        logger.warning(
            "%s changes the picture of %d of %d requests, which has no gradient: those are attacked as they were",
            defence.name,
            changed,
            len(rows),
        )
    return kept
