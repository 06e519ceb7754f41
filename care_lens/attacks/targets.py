"""How likely a model is to begin its answer with one of several target texts, as a function of the pixels."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from care_lens.attacks.pixels import PixelMap, require_image, to_pixels
from care_lens.core.examples import Example
from care_lens.lvlm.hooked import HookedLVLM
from care_lens.lvlm.inputs import LVLMInputs


class TargetLoss:
    """Teacher-forced loss of target answers for a batch of examples.

    For the targets t of an example with per-token mean log likelihoods m_t, the loss is -logsumexp_t m_t:
    with one target, the mean negative log likelihood of its tokens; with several, a smooth minimum of theirs.
    For targets of one token it is the negative log of their summed probability.

    Args:
        lvlm: The model.
        examples: Examples with pictures of one size, which the processor must pass on pixel by pixel.
        targets: The acceptable answers, or openings of answers, of each example.
        target_tokens: Count only so many tokens of each target; None: all.

    Attributes:
        pixels: [image, channel, height, width] the examples' own pixels in [0, 255], on the model's device.

    Raises:
        ValueError: If a picture is missing or changed by the processor, or a target is empty.
    """

    def __init__(
        self,
        lvlm: HookedLVLM,
        examples: Sequence[Example],
        targets: Sequence[Sequence[str]],
        *,
        target_tokens: int | None = None,
    ) -> None:
        images = [require_image(example) for example in examples]
        rows = [
            replace(example, image=image, response=target)
            for example, image, texts in zip(examples, images, targets, strict=True)
            for target in texts
        ]
        if earlier := [row.id for row in rows if any(turn.images for turn in row.turns)]:
            raise ValueError(
                f"an attack changes the only picture of a request, got pictures in earlier turns of {earlier[:3]}"
            )
        inputs = lvlm.prepare(rows, responses=True)
        owner = torch.tensor([i for i, texts in enumerate(targets) for _ in texts])
        slot = torch.tensor([i for texts in targets for i in range(len(texts))])
        self.pixels = to_pixels(images).to(lvlm.device)
        self._lvlm, self._inputs, self._owner, self._slot = lvlm, inputs, owner, slot
        self._counted = _counted_tokens(inputs.spans.response & ~inputs.spans.prefill, target_tokens)
        self._map = PixelMap.of(lvlm.processor.image_processor, device=lvlm.device)
        assert inputs.pixel_values is not None
        self._map.require(self.pixels[owner.to(lvlm.device)], inputs.pixel_values)

    def __call__(
        self, pixels: Float[Tensor, "kept channel height width"], index: Int[Tensor, " kept"]
    ) -> Float[Tensor, " kept"]:
        """The loss of some of the examples with other pixels.

        Args:
            pixels: [kept, channel, height, width] pixels in [0, 255] of the examples ``index``.
            index: [kept] which examples, in increasing order.

        Returns:
            [kept] losses in nats, differentiable in the pixels.
        """
        place = torch.full((int(self._owner.max()) + 1,), -1)
        place[index.cpu()] = torch.arange(len(index))
        rows = torch.nonzero(place[self._owner] >= 0).squeeze(1)
        owner, slot = place[self._owner[rows]].to(pixels.device), self._slot[rows].to(pixels.device)
        inputs, counted = self._inputs, self._counted
        if len(rows) < inputs.batch_size:
            inputs, counted = inputs.rows(rows.tolist()), counted[rows.to(counted.device)]
        inputs = replace(inputs, pixel_values=self._map.encode(pixels)[owner])
        means = _mean_log_likelihood(self._lvlm, inputs, counted)
        table = means.new_full((len(index), int(self._slot.max()) + 1), float("-inf"))
        return -table.index_put((owner, slot), means).logsumexp(dim=1)


def _counted_tokens(response: Bool[Tensor, "batch pos"], limit: int | None) -> Bool[Tensor, "batch pos"]:
    """The response tokens that count: the first ``limit`` of them, never the end of sequence."""
    order = response.long().cumsum(dim=1)
    length = response.sum(dim=1, keepdim=True) - 1
    if bool((length < 1).any()):
        raise ValueError("targets must have a token each, got an empty one")
    return response & (order <= (length if limit is None else length.clamp(max=limit)))


def _mean_log_likelihood(
    lvlm: HookedLVLM, inputs: LVLMInputs, counted: Bool[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    first = int(torch.nonzero(counted.any(dim=0))[0])
    keep = inputs.input_ids.shape[1] - first + 1
    log_probs = lvlm(inputs, logits_to_keep=keep)[:, :-1].float().log_softmax(-1)
    taken = log_probs.gather(-1, inputs.input_ids[:, first:, None]).squeeze(-1)
    mask = counted[:, first:]
    return torch.where(mask, taken, 0.0).sum(dim=1) / mask.sum(dim=1)
