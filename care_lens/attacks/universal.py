"""One perturbation for many pictures (Moosavi-Dezfooli et al. 2017, arXiv:1610.08401), found by gradient steps on the mean loss.

result = UniversalPGD(epsilon=32, steps=60).run(lvlm, fit_examples, defence=repair)
perturbation = universal_perturbation(result, fit_examples)
perturbed(other_examples, perturbation)  # what carries over to pictures that it was not made on
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.attacks.common import frozen, identity, on_model, require_requests, run_settings
from care_lens.attacks.gradient import check_round_trip, pixel_gradient
from care_lens.attacks.kinds import register_attack
from care_lens.attacks.objective import PictureObjective
from care_lens.attacks.pgd import PGD
from care_lens.attacks.pixels import require_image, to_images, to_pixels
from care_lens.core.attack import AttackResult
from care_lens.core.draws import example_generator
from care_lens.core.examples import Example
from care_lens.core.gates import gates_with_gradient
from care_lens.core.journal import Journal
from care_lens.core.progress import Steps
from care_lens.lvlm.hooked import HookedLVLM

_EVERY = 5
"""Steps between two lines of a checkpoint."""


@register_attack
@dataclass(frozen=True, kw_only=True)
class UniversalPGD(PGD):
    """One perturbation for all pictures, which must be of one size. Batches are put together for each step.

    Attributes:
        restarts: Must be 1.
    """

    name: str = "universal"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restarts != 1:
            raise ValueError(f"restarts of a universal attack must be 1, got {self.restarts}; run it with other seeds")

    def run(
        self,
        lvlm: HookedLVLM,
        examples: Sequence[Example],
        defence: Any = None,
        seed: int = 0,
        *,
        checkpoint: str | Path | None = None,
        progress: bool = False,
    ) -> AttackResult:
        """Find it.

        Args:
            lvlm: The model; its weights are left alone.
            examples: Examples with pictures of one size.
            defence: A defence to attack through.
            seed: Seed of the random start.
            checkpoint: A file in which every few steps are kept; a stopped attack goes on from it.
            progress: Whether to show a progress bar.

        Returns:
            All examples with the perturbation of the least mean loss; in the history each example's loss at each step.

        Raises:
            ValueError: If a picture is missing, or they differ in size.
            HiddenGradientError: If the defence cuts the gradient off.
        """
        require_requests(examples)
        original = to_pixels([require_image(example) for example in examples])
        wanted = self._targets(examples)
        settings = run_settings(self, examples, defence, seed)
        about = {**settings, **identity(lvlm, examples, defence), "wanted": wanted}
        kept = None if checkpoint is None else Journal(checkpoint, kind="universal attack", about=about)
        rows = [] if kept is None else kept.append([])
        history: list[dict[str, Any]] = [one for row in rows for one in row["history"]]
        delta = torch.zeros(original.shape[1:])
        if self.random_start:
            drawn = torch.rand(delta.shape, generator=example_generator(seed, examples[0], "universal"))
            delta = (2 * drawn - 1) * self.radius
        best, least, first, clean = torch.zeros_like(delta), float("inf"), 0, list[float]()
        if rows:
            delta, best = (torch.tensor(rows[-1][name]).view(original.shape[1:]) for name in ("delta", "best"))
            least, first, clean = rows[-1]["least"], rows[-1]["step"], rows[-1]["clean"]
        losses: list[float] = rows[-1]["losses"] if rows else []
        with ExitStack() as stack:
            stack.enter_context(frozen(lvlm.hf_model))
            stack.enter_context(on_model(defence, lvlm))
            adaptive = defence is not None and self.gates == "straight-through"
            seen = stack.enter_context(gates_with_gradient()) if adaptive else None
            bar = stack.enter_context(Steps(total=self.steps, initial=first, desc=self.name, disable=not progress))
            parts = []
            for start in range(0, len(examples), self.batch_size):
                here = slice(start, start + self.batch_size)
                targets = None if wanted is None else wanted[here]
                parts.append(
                    PictureObjective(lvlm, examples[here], self.loss, targets=targets, defence=defence, seen=seen)
                )
            if not clean:
                with torch.no_grad():
                    clean = [v for part in parts for v in part(part.pixels, _all(part.pixels)).tolist()]
            fresh: list[dict[str, Any]] = []
            for step in range(first, self.steps + 1):
                values, gradient = self._measured(parts, delta, last=step == self.steps, first=step == 0)
                fresh += [{"row": i, "step": step, "loss": value} for i, value in enumerate(values)]
                if (mean := sum(values) / len(values)) < least:
                    least, best, losses = mean, delta.clone(), values
                if gradient is not None:
                    delta = (delta - self.size * gradient.sign()).clamp(-self.radius, self.radius)
                    bar.update()
                if kept is not None and (step + 1) % _EVERY == 0:
                    held = {"step": step + 1, "least": least, "losses": losses, "clean": clean, "history": fresh}
                    kept.append([{**held, "delta": delta.flatten().tolist(), "best": best.flatten().tolist()}])
                    history, fresh = history + fresh, []
            history += fresh
            made = perturbed(examples, best, channel=self.channel)
            for start, part in zip(range(0, len(examples), self.batch_size), parts, strict=True):
                some = made[start : start + self.batch_size]
                check_round_trip(lvlm, some, [require_image(e) for e in some], part, self.radius)
        return AttackResult.of(
            made, settings=settings, loss=losses, clean_loss=clean, tries=self.steps + 1, history=history
        )

    def _measured(
        self, parts: Sequence[PictureObjective], delta: Tensor, *, last: bool, first: bool
    ) -> tuple[list[float], Tensor | None]:
        """The loss of each example under a perturbation, and the gradient of their mean in it."""
        values: list[float] = []
        total = torch.zeros_like(delta)
        for part in parts:
            moved = (part.pixels + delta.to(part.pixels)).clamp(0, 255).round().requires_grad_(not last)
            with torch.set_grad_enabled(not last):
                losses, opened = part.parts(moved, _all(moved))
                shaped = losses + self.gate_weight * opened
            values += losses.detach().tolist()
            if not last:
                total += pixel_gradient(shaped, moved, first=first).sum(dim=0).cpu()
        return values, None if last else total


def _all(pixels: Tensor) -> Tensor:
    return torch.arange(len(pixels), device=pixels.device)


def perturbed(
    examples: Sequence[Example], perturbation: Float[Tensor, "channel height width"], *, channel: str | None = None
) -> list[Example]:
    """Examples with a perturbation added to each picture, as 8-bit pictures.

    Args:
        examples: Examples with pictures of its size.
        perturbation: [channel, height, width] in 8-bit steps.
        channel: Their new channel; None: as it was.

    Raises:
        ValueError: If a picture is missing or of another size.
    """
    pixels = to_pixels([require_image(example) for example in examples])
    if pixels.shape[1:] != perturbation.shape:
        raise ValueError(
            f"pictures must be of the perturbation's size {tuple(perturbation.shape[1:])}, got {tuple(pixels.shape[2:])}; resize them"
        )
    images = to_images((pixels + perturbation.cpu()).clamp(0, 255))
    return [
        replace(e, image=image, channel=e.channel if channel is None else channel)
        for e, image in zip(examples, images, strict=True)
    ]


def universal_perturbation(result: AttackResult, examples: Sequence[Example]) -> Float[Tensor, "channel height width"]:
    """The perturbation of a universal attack: at each pixel the largest change that it made to any of the pictures.

    Args:
        result: What :class:`UniversalPGD` made.
        examples: What it was made of.

    Returns:
        [channel, height, width] whole 8-bit steps. A pixel at which every picture was clipped at 0 or 255 shows less than was asked for.
    """
    before, after = (to_pixels([require_image(e) for e in some]) for some in (examples, result.examples))
    change = after - before
    largest = change.abs().argmax(dim=0, keepdim=True)
    return change.gather(0, largest)[0]
