"""HiddenDetect's detector as a reader of a repair: how far the model's middle blocks lean towards a refusal.

The logit lens of a state h is z = U (g * h / rms(h)) with the final norm's weight g and the unembedding U. Its cosine with the vector
that is 1 at the n tokens that refusals begin with does not depend on rms(h):

    cos = a . h / sqrt(n h^T G h),   a = g * (sum of U's rows of those tokens),   G = diag(g) U^T U diag(g)

so that a [d, d] matrix stands for the vocabulary. The integral of the cosine over blocks (trapezoid rule) is the score.

    reader, gate = detector.reader(lvlm), detector.gate()  # of a HiddenDetect
    Correction(writer=writer, reader=reader, gate=gate)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.defences.stored import WrongModelError
from care_lens.lvlm import HookedLVLM
from care_lens.repair import register_kind
from care_lens.repair.checks import require_tensor
from care_lens.repair.placed import PlacedTensors
from care_lens.repair.reader import CombinedReader, SiteReader


@register_kind
@dataclass(frozen=True, eq=False, kw_only=True)
class RefusalLens(PlacedTensors):
    """The cosine of lens logits with refusal tokens, for states of the residual stream.

    Attributes:
        towards: [d] a / sqrt(n).
        gram: [d, d] G.

    Raises:
        RepairError: If a tensor is not finite, or not of that shape.
    """

    towards: Float[Tensor, "d"]
    gram: Float[Tensor, "d d"]

    def __post_init__(self) -> None:
        require_tensor(self.towards, name="towards", shape=(None,), where="the lens")
        require_tensor(self.gram, name="gram", shape=(len(self.towards),) * 2, where="the lens")

    def cosines(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """The cosine of each state; NaN for one that is 0.

        Args:
            h: [..., d] states.
        """
        towards, gram = self.placed("towards", "gram", like=h)
        return h @ towards / ((h @ gram) * h).sum(dim=-1).clamp(min=0).sqrt()

    @classmethod
    def of(cls, lvlm: HookedLVLM, tokens: Sequence[int]) -> "RefusalLens":
        """The lens of a model.

        Args:
            lvlm: The model.
            tokens: Ids of the tokens that refusals begin with.

        Raises:
            WrongModelError: If its final norm is no RMS norm or its unembedding has a bias: the cosine then is no function of this form.
        """
        with torch.no_grad(), lvlm.bare():
            unembed = lvlm.hf_model.get_output_embeddings()
            weight = unembed.weight.detach().double()
            d = weight.shape[1]
            states = torch.randn(8, d, generator=torch.Generator().manual_seed(0)).to(unembed.weight)
            ones = torch.ones(1, d).to(unembed.weight)
            normed, scaled = (lvlm.bridge.ln_final(h[None])[0].double() for h in (states, ones))
        scale = scaled[0]
        expected = states.double() * scale
        expected = expected / expected.norm(dim=-1, keepdim=True)
        bias = getattr(unembed, "bias", None)  # the bridge gives zeros to a model without one
        turned = float((normed / normed.norm(dim=-1, keepdim=True) - expected).abs().max()) > 1e-2
        if turned or (bias is not None and bool(bias.any())):
            raise WrongModelError(
                "the final norm must be an RMS norm and the unembedding have no bias for the detector to be a reader, got another model; "
                "use HiddenDetect itself"
            )
        read = weight * scale
        towards = read[list(tokens)].sum(0) / len(tokens) ** 0.5
        return cls(towards=towards.float().cpu(), gram=(read.T @ read).float().cpu())


@register_kind
@dataclass(frozen=True, eq=False, kw_only=True)
class LensReader(SiteReader):
    """The cosine of one block's lens logits with the refusal tokens.

    Attributes:
        lens: The lens; blocks share one.
    """

    lens: RefusalLens

    @property
    def width(self) -> int:
        """d of the model."""
        return len(self.lens.towards)

    def raw(self, activation: Float[Tensor, "batch pos d"]) -> Float[Tensor, "batch pos"]:
        """The cosine of each token."""
        return self.lens.cosines(activation)


@register_kind
@dataclass(frozen=True, eq=False, kw_only=True)
class IntegralReader(CombinedReader):
    """The integral of several readers' scores in their order (trapezoid rule, unit steps).

    Attributes:
        readers: The readers, two or more to have an integral that is not 0.
    """

    def joined(self, scores: Float[Tensor, "reader *shape"]) -> Float[Tensor, "*shape"]:
        """The integral; NaN where one score is, -inf where one reader had nothing to read."""
        return torch.trapezoid(scores, dim=0)
