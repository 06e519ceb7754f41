"""ASTRA (Wang et al., CVPR 2025, arXiv:2411.16721): steers away from what an adversarial picture's decisive patches bring.

Attribution: pictures with random patches blackened (each kept with probability 0.5), teacher-forced with a target such as "Sure, ".
A target token scores ``s = z_y - logsumexp(z of all others)``; ``L = sum log sigmoid(s)``; the outcome ``(L - log(1 - e^L)) / tokens``
is standardised and regressed on the masks by the lasso (0.01). The 15 patches with the largest weights above 1e-4 are decisive.

Steering vector: the mean over adversarial pictures, with an empty prompt, of the state at the last token with the picture as it is minus
that with its decisive patches black. Reference h0: the mean over clean pictures of the mean state of the answer's tokens to "What is the
image about?". At the output of one block, at the last prompt token and every token after it:
``c = clamp(cos(h - h0, v), 0, 1)`` and ``h - alpha c |h| v / |v|``.

    defence = ASTRA.fit(lvlm, attacked=adversarial, clean=harmless, layer=3, patch=8, alpha=5)

In the published code |h| is the norm over the whole batch and the layer index is one less, so that it is right at batch 1 only; here
each row has its own norm, and ``layer`` is the block at whose output it acts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from sklearn.linear_model import Lasso
from torch import Tensor

from care_lens.core.examples import Example
from care_lens.core.site import Site
from care_lens.core.spans import TokenSpans
from care_lens.defences.base import Batch, HookDefence, block_output, last_states
from care_lens.defences.stored import FitError, require_examples, require_finite
from care_lens.lvlm import HookedLVLM
from care_lens.repair.base import HookPair
from care_lens.repair.plan import PlanPart

_LASSO, _LEAST, _TOP, _KEPT = 0.01, 1e-4, 15, 0.5


def blackened(picture: Image.Image, kept: Bool[Tensor, "rows cols"], patch: int) -> Image.Image:
    """The picture with the patches that are not kept black.

    Args:
        picture: In its own size.
        kept: [rows, cols] of the grid of patches; the last ones may be cut off by the picture's edge.
        patch: Side of a patch in the picture's pixels.
    """
    pixels = np.array(picture.convert("RGB"))
    for row, col in (~kept).nonzero().tolist():
        pixels[row * patch : (row + 1) * patch, col * patch : (col + 1) * patch] = 0
    return Image.fromarray(pixels)


def grid_of(picture: Image.Image, patch: int) -> tuple[int, int]:
    """Rows and columns of patches that cover a picture."""
    return -(-picture.height // patch), -(-picture.width // patch)


def target_outcomes(
    logits: Float[Tensor, "batch pos vocab"], spans: TokenSpans, tokens: Tensor
) -> Float[Tensor, "batch"]:
    """``(L - log(1 - e^L)) / tokens`` of each row's teacher-forced target, its end of sequence left out.

    Args:
        logits: [batch, pos, vocab] of all positions.
        spans: Of the batch.
        tokens: [batch, pos] token ids.

    Raises:
        FitError: If a target has no token.
    """
    made = []
    for row in range(len(logits)):
        at = spans.response[row].nonzero()[:, 0][:-1]
        if not len(at):
            raise FitError("target must have a token for this model's tokenizer, got none; give another text")
        z, y = logits[row, at - 1].double(), tokens[row, at]
        own = z.gather(1, y[:, None])[:, 0]
        others = z.scatter(1, y[:, None], -torch.inf).logsumexp(dim=1)
        total = torch.nn.functional.logsigmoid(own - others).sum().clamp(max=-1e-12)
        made.append((total - torch.log(-torch.expm1(total))) / len(at))
    return torch.stack(made)


def decisive_patches(
    masks: Float[Tensor, "n patch"], outcomes: Float[Tensor, "n"], *, top: int = _TOP
) -> Bool[Tensor, "patch"]:
    """The patches with the largest lasso weights above 1e-4, at most ``top``.

    Args:
        masks: [n, patch] 1 where a patch was kept.
        outcomes: [n], standardised here.
    """
    spread = outcomes.std(correction=0)
    if not float(spread) > 0:
        return torch.zeros(masks.shape[1], dtype=torch.bool)
    weights = torch.from_numpy(
        Lasso(alpha=_LASSO).fit(masks.numpy(), ((outcomes - outcomes.mean()) / spread).numpy()).coef_
    )
    chosen = torch.zeros_like(weights, dtype=torch.bool)
    chosen[weights.argsort(descending=True, stable=True)[:top]] = True
    return chosen & (weights > _LEAST)


@dataclass(frozen=True, eq=False, kw_only=True)
class ASTRA(HookDefence):
    """Steers away from adversarial pictures' decisive patches.

    Attributes:
        vector: [d] v.
        reference: [d] h0.
        layer: The block at whose output it acts.
        alpha: Strength; 5 to 10 in the method's paper.
        name: Row of a defence table.
    """

    vector: Float[Tensor, "d"]
    reference: Float[Tensor, "d"]
    layer: int
    alpha: float = 5.0
    name: str = "ASTRA"

    @classmethod
    def fit(
        cls,
        lvlm: HookedLVLM,
        *,
        attacked: Sequence[Example],
        clean: Sequence[Example],
        layer: int,
        patch: int = 16,
        n_masks: int = 64,
        target: str = "Sure, ",
        question: str = "What is the image about?",
        prompt: str = "",
        answer_tokens: int = 32,
        alpha: float = 5.0,
        batch_size: int = 32,
        seed: int = 0,
    ) -> "ASTRA":
        """Attribute, then take vector and reference.

        Args:
            lvlm: The model, without a defence on it.
            attacked: Requests with adversarial pictures.
            clean: Requests with ordinary ones.
            layer: Block of the language tower.
            patch: Side of a masked patch, in the pictures' pixels.
            n_masks: Random masks a picture; 64, or 32 for toxic content, in the paper.
            target: The beginning of a compliant answer.
            question: What is asked about clean pictures.
            prompt: The words beside adversarial pictures when the vector is taken.
            answer_tokens: Most tokens of the answers about clean pictures.
            alpha: Strength.
            batch_size: Examples a forward pass.
            seed: Of the masks.

        Raises:
            FitError: If a set is empty or has no pictures, no picture has a decisive patch, or clean pictures get no answers.
        """
        require_examples(attacked=attacked, clean=clean)
        if bare := [name for name, e in (("attacked", attacked), ("clean", clean)) if not all(x.images for x in e)]:
            raise FitError(f"{' and '.join(bare)} examples must all have a picture; ASTRA works on pictures alone")
        generator = torch.Generator().manual_seed(seed)
        seen, without = [], []
        for example in attacked:
            assert example.image is not None
            masks, outcomes = _masked_outcomes(lvlm, example, patch, n_masks, target, batch_size, generator)
            chosen = decisive_patches(masks, outcomes)
            if bool(chosen.any()):
                shape = grid_of(example.image, patch)
                seen.append(replace(example, prompt=prompt, response=None))
                image = blackened(example.image, ~chosen.reshape(shape), patch)
                without.append(replace(example, prompt=prompt, response=None, image=image))
        if not seen:
            raise FitError(
                "attacked pictures must have patches that raise the target's probability, got none; are they attacks by picture?"
            )
        site = block_output(layer)
        both = [last_states(lvlm, e, [site], batch_size=batch_size)[site].mean(dim=0) for e in (seen, without)]
        vector = both[0] - both[1]
        if not float(vector.norm()) > 0:
            raise FitError("decisive patches must change the model's state, got no difference; take a later layer")
        reference = _answer_mean(
            lvlm, [replace(e, prompt=question, response=None) for e in clean], site, answer_tokens, batch_size
        )
        require_finite(vector=vector, reference=reference)
        return cls(vector=vector.float(), reference=reference.float(), layer=layer, alpha=alpha)

    def widths(self) -> dict[Site, int]:
        """Output of its block."""
        return {block_output(self.layer): len(self.vector)}

    def plan_parts(self) -> list[PlanPart]:
        """What it does, for ``explain``."""
        return [
            PlanPart(
                name=str(block_output(self.layer)),
                site=block_output(self.layer),
                positions=("last", "generated"),
                writer="takes the token away from the attack vector by cosine times its norm",
                rank=1,
                width=len(self.vector),
                rank_rule="one direction",
                alpha=self.alpha,
                multiply_adds=5 * len(self.vector),
                note="the cosine with the attack vector sets the strength, none where it is negative",
            )
        ]

    def edits(self, batch: Batch) -> list[HookPair]:
        """One hook."""

        def steer(h: Tensor) -> Tensor:
            v = self.vector.to(h)
            c = torch.cosine_similarity(h - self.reference.to(h), v, dim=-1).clamp(0, 1)
            return h - self.alpha * (c * h.norm(dim=-1))[..., None] * v / v.norm()

        return [batch.edit(block_output(self.layer), steer, positions=("last", "generated"))]


def _masked_outcomes(
    lvlm: HookedLVLM,
    example: Example,
    patch: int,
    n_masks: int,
    target: str,
    batch_size: int,
    generator: torch.Generator,
) -> tuple[Float[Tensor, "n patch"], Float[Tensor, "n"]]:
    """Random masks of a picture, and the target's outcome under each."""
    assert example.image is not None
    rows, cols = grid_of(example.image, patch)
    kept = torch.rand(n_masks, rows, cols, generator=generator) < _KEPT
    asked = [replace(example, image=blackened(example.image, mask, patch), response=target) for mask in kept]
    parts = []
    for start in range(0, n_masks, batch_size):
        inputs = lvlm.prepare(asked[start : start + batch_size], responses=True)
        with torch.no_grad():
            parts.append(target_outcomes(lvlm(inputs), inputs.spans, inputs.input_ids).cpu())
    return kept.reshape(n_masks, -1).double(), torch.cat(parts)


def _answer_mean(
    lvlm: HookedLVLM, examples: Sequence[Example], site: Site, tokens: int, batch_size: int
) -> Float[Tensor, "d"]:
    """The mean over examples of the mean state of the answer's tokens that the model was given, before the answer's end."""
    end = lvlm.hf_model.generation_config.eos_token_id
    ends = torch.tensor([] if end is None else [end] if isinstance(end, int) else list(end)).long()
    rows = []
    for start in range(0, len(examples), batch_size):
        inputs = lvlm.prepare(examples[start : start + batch_size])
        made = lvlm.generate(inputs, max_new_tokens=tokens, sites=[site])
        states = made.activations[str(site)][:, inputs.input_ids.shape[1] :].double().cpu()
        said = torch.isin(made.new_tokens.cpu(), ends).long().cumsum(dim=1)[:, : states.shape[1]] == 0
        rows += [state[where].mean(dim=0) for state, where in zip(states, said, strict=True) if bool(where.any())]
    if not rows:
        raise FitError("clean pictures must get answers of two tokens or more, got none; ask another question")
    return torch.stack(rows).mean(dim=0)
