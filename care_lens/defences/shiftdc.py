"""ShiftDC: takes out of a prompt's state what the picture shifts along the direction from unsafe to safe requests in words.

``m = h(question, picture) - h(question, caption)`` at the last prompt token: what the picture does that its description in
words does not. ``h - alpha (m . s) s`` at the last prompt token only, s the unit difference of means of unsafe and safe requests in
words alone. The caption is the model's own.

    defence = ShiftDC.fit(lvlm, unsafe=plain, safe=harmless, layers=[2, 3], caption_prompt="describe the picture")

It runs the model three times a batch (caption, question with picture, question with caption) before the answer. m is taken from the
undefended model. Rows without a picture are left alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.examples import Example
from care_lens.core.site import Site
from care_lens.defences.base import Batch, HookDefence, block_output, last_states
from care_lens.defences.stored import FitError, require_examples
from care_lens.lvlm import HookedLVLM, LVLMInputs
from care_lens.repair.base import HookPair
from care_lens.repair.plan import PlanPart


def captions(batch: Batch, prompt: str, max_new_tokens: int) -> list[str]:
    """The model's own description of each row's pictures, from the pixels of the batch; "" for rows without."""
    rows = [i for i, example in enumerate(batch.examples()) if example.images]
    if not rows:
        return [""] * batch.inputs.batch_size
    asked = [replace(example, prompt=prompt, response=None) for example in batch.examples()]
    made = batch.lvlm.prepare(asked)
    made = replace(made, pixel_values=batch.inputs.pixel_values, extra=batch.inputs.extra)
    texts = batch.lvlm.generate(made, max_new_tokens=max_new_tokens).texts
    return [text if i in rows else "" for i, text in enumerate(texts)]


@dataclass(frozen=True, eq=False, kw_only=True)
class ShiftDC(HookDefence):
    """Removes the picture's shift along the safety direction.

    Attributes:
        directions: By block [d] s, of norm 1.
        caption_prompt: What asks for the caption.
        template: How caption and question are put together: a text with {caption} and {prompt}.
        caption_tokens: Most tokens of a caption.
        alpha: Strength.
        name: Row of a defence table.
    """

    directions: Mapping[int, Float[Tensor, "d"]]
    caption_prompt: str = "Describe the image."
    template: str = "{caption} {prompt}"
    caption_tokens: int = 32
    alpha: float = 1.0
    name: str = "ShiftDC"

    @classmethod
    def fit(
        cls,
        lvlm: HookedLVLM,
        *,
        unsafe: Sequence[Example],
        safe: Sequence[Example],
        layers: Sequence[int],
        caption_prompt: str = "Describe the image.",
        template: str = "{caption} {prompt}",
        caption_tokens: int = 32,
        alpha: float = 1.0,
        batch_size: int = 32,
    ) -> "ShiftDC":
        """Take the directions from requests in words; pictures that they have are left out.

        Args:
            lvlm: The model, without a defence on it.
            unsafe: Harmful requests whose words say so.
            safe: Harmless requests.
            layers: Blocks of the language tower, at whose outputs it acts.
            caption_prompt: What asks for the caption.
            template: How caption and question are put together.
            caption_tokens: Most tokens of a caption.
            alpha: Strength.
            batch_size: Examples a forward pass.

        Raises:
            FitError: If a set is empty, or the means of a block are the same.
        """
        require_examples(unsafe=unsafe, safe=safe)
        if not layers:
            raise FitError("layers must hold at least one block, got none")
        sites = [block_output(layer) for layer in layers]
        held = [
            last_states(lvlm, [replace(x, image=None, more_images=()) for x in e], sites, batch_size=batch_size)
            for e in (unsafe, safe)
        ]
        directions = {}
        for layer, site in zip(layers, sites, strict=True):
            s = held[0][site].mean(dim=0) - held[1][site].mean(dim=0)
            if not float(s.norm()) > 0:
                raise FitError(f"unsafe and safe requests must differ at block {layer}, got the same mean")
            directions[layer] = (s / s.norm()).float()
        return cls(
            directions=directions,
            caption_prompt=caption_prompt,
            template=template,
            caption_tokens=caption_tokens,
            alpha=alpha,
        )

    def widths(self) -> dict[Site, int]:
        """Outputs of its blocks."""
        return {block_output(layer): len(s) for layer, s in self.directions.items()}

    def plan_parts(self) -> list[PlanPart]:
        """What it does, for ``explain``."""
        return [
            PlanPart(
                name=str(block_output(layer)),
                site=block_output(layer),
                positions="last",
                writer="takes the picture's shift along the safety direction back",
                rank=1,
                width=len(direction),
                rank_rule="one direction",
                alpha=self.alpha,
                multiply_adds=len(direction),
                extra_per_request=self.caption_tokens + 2 if i == 0 else 0,
                note="a caption of each picture is generated, then the request is run with the picture and with the caption",
            )
            for i, (layer, direction) in enumerate(self.directions.items())
        ]

    def edits(self, batch: Batch) -> list[HookPair]:
        """A hook a block, which acts on the last prompt token."""
        shifts = self.shifts(batch)
        pairs = []
        for layer, s in self.directions.items():
            moved = (shifts[layer] @ s.to(shifts[layer]))[:, None, None] * s.to(shifts[layer])
            pairs.append(batch.edit(block_output(layer), lambda h, m=moved: h - self.alpha * m.to(h), positions="last"))
        return pairs

    def shifts(self, batch: Batch) -> dict[int, Float[Tensor, "batch d"]]:
        """By block [batch, d] m; 0 for rows without a picture."""
        pictured = torch.tensor([bool(example.images) for example in batch.examples()])
        with batch.lvlm.bare(), torch.no_grad():
            said = captions(batch, self.caption_prompt, self.caption_tokens)
            in_words = [
                replace(e, prompt=self.template.format(caption=text, prompt=e.prompt), image=None, more_images=())
                for e, text in zip(batch.examples(), said, strict=True)
            ]
            seen, told = self._last(batch, batch.inputs), self._last(batch, batch.prepare(in_words))
        return {n: torch.where(pictured.to(seen[n].device)[:, None], seen[n] - told[n], 0.0) for n in self.directions}

    def _last(self, batch: Batch, inputs: LVLMInputs) -> dict[int, Tensor]:
        sites = {layer: block_output(layer) for layer in self.directions}
        _, cache = batch.lvlm.run_with_cache(inputs, sites=list(sites.values()), logits_to_keep=1)
        view = Batch(inputs)
        return {layer: view.at_last(cache[str(site)]) for layer, site in sites.items()}
