"""Gradient attacks on the picture: one engine, and the ball that pictures stay in.

The ball is L-infinity around the ORIGINAL 8-bit picture, in pixels of its own size, before any resizing: ``|x - x0| <= floor(epsilon)``.
Every iterate is evaluated as the 8-bit picture it would be saved as, through the model's own processor, so that the losses reported are those
of the pictures returned; the best iterate over all steps and restarts is kept.

With a defence the attack is adaptive: requests are what the defence makes of them, gradients flow through its hooks, gates that are
steps get a gradient (:mod:`care_lens.core.gates`), and how far they are open is added to what the gradient goes down on (``gate_weight``).
An attack that did not see the defence says nothing about what the defence withstands.

Pictures and restarts share batches. Memory: activations of ``batch_size`` times the number of targets rows for one backward pass; no
gradient of a weight is ever computed.
"""

import base64
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from care_lens.attacks.common import described, frozen, identity, on_model, require_requests, run_settings
from care_lens.attacks.losses import TARGET_LIKELIHOOD, AttackLoss, wants_responses
from care_lens.attacks.objective import PictureObjective
from care_lens.attacks.pixels import require_image, to_images, to_pixels
from care_lens.attacks.rules import StepRule
from care_lens.attacks.targets import targets_of
from care_lens.core.attack import AttackResult, picture_of, png_bytes
from care_lens.core.draws import example_generator
from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example
from care_lens.core.gates import gates_with_gradient
from care_lens.core.journal import Journal
from care_lens.core.progress import Steps
from care_lens.lvlm.hooked import HookedLVLM

logger = logging.getLogger(__name__)

Item = tuple[int, int]
"""An example and a restart."""


class HiddenGradientError(CareLensError, RuntimeError):
    """A loss does not depend on the pixels differentiably: something between them detaches it."""


class RoundTripError(CareLensError, RuntimeError):
    """A picture found is not within the ball, or is not what the model is given when it is read back."""


@dataclass(frozen=True, kw_only=True)
class GradientAttack(ABC):
    """Base of attacks that follow a gradient in the picture; a subclass says how they step.

    Attributes:
        epsilon: Most that a pixel may change, of 255, rounded down to whole 8-bit steps; None: no bound.
        steps: Gradient steps of a restart.
        restarts: How often to start anew.
        random_start: Start from a uniform draw in the ball rather than from the picture itself.
        targets: Acceptable answers or openings of answers: texts for all examples, or one collection of texts for each example.
            None: each example's own response. Losses that need no response are given none.
        loss: What is made small: any function ``(lvlm, inputs) -> [batch]``.
        gates: "straight-through": with a defence, gates that are steps get a gradient. "own": they keep the one they have.
        gate_weight: Weight of how far gates are open in what the gradient goes down on; the loss that is reported, and by which the best
            picture is kept, is without it.
        stop_loss: Leave an example alone once its loss is below this; None: never.
        batch_size: Pictures at a time, restarts of one picture included.
        channel: Channel of the examples made; None: as it was.
    """

    epsilon: float | int | None = 16
    steps: int = 40
    restarts: int = 1
    random_start: bool = True
    targets: Sequence[str] | Sequence[Sequence[str]] | None = None
    loss: AttackLoss = TARGET_LIKELIHOOD
    gates: Literal["straight-through", "own"] = "straight-through"
    gate_weight: float | int = 1.0
    stop_loss: float | int | None = None
    batch_size: int = 24
    channel: str | None = None
    name: str = "gradient"

    def __post_init__(self) -> None:
        _ = self.radius
        for name in ("steps", "restarts", "batch_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        if self.restarts > 1 and not self.random_start:
            raise ValueError(
                f"restarts must be 1 without a random start, got {self.restarts}: all of them would be the same"
            )
        if self.gates not in ("straight-through", "own"):
            raise ValueError(f"gates must be 'straight-through' or 'own', got {self.gates!r}")
        if not 0 <= self.gate_weight < math.inf:
            raise ValueError(f"gate_weight must be a number of 0 or more, got {self.gate_weight}")

    @property
    def radius(self) -> int:
        """Whole 8-bit steps in epsilon; 8 / 255 * 255 counts as 8."""
        if self.epsilon is None:
            return 255
        if not 1 <= self.epsilon <= 255:
            raise ValueError(f"epsilon must be in [1, 255] (it is of 255), got {self.epsilon}")
        return math.floor(self.epsilon + 1e-6)

    @abstractmethod
    def rule(self, start: Tensor, low: Tensor, high: Tensor) -> StepRule:
        """How a batch of pictures steps.

        Args:
            start: [image, channel, height, width] where they start.
            low: Least pixels.
            high: Largest pixels.
        """

    def describe(self) -> dict[str, Any]:
        """Its settings, JSON-able."""
        return described(self)

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
        """Change each example's picture, within the bound.

        Args:
            lvlm: The model; its weights are left alone.
            examples: Examples with pictures, of any sizes.
            defence: A defence to attack through.
            seed: Seed of the random starts; those of an example depend on it and the example alone.
            checkpoint: A file in which finished batches are kept; a stopped attack goes on from it.
            progress: Whether to show a progress bar.

        Returns:
            The best pictures found, checked to be within the bound and to reach the model as they are. In the history, one row a
            picture, restart and step.

        Raises:
            ValueError: If an example has no picture, or targets and examples differ in number.
            PreprocessingError: If what the processor makes of the pictures has no gradient.
            HiddenGradientError: If the defence cuts the gradient off.
            RoundTripError: If a picture found does not survive the round trip through the processor.
            ArtifactError: If the checkpoint is of another attack or damaged.
        """
        require_requests(examples)
        wanted = self._targets(examples)
        settings = run_settings(self, examples, defence, seed)
        kept = _Kept(checkpoint, {**settings, **identity(lvlm, examples, defence), "wanted": wanted})
        best: list[Image.Image] = [require_image(example) for example in examples]
        losses, clean = [math.inf] * len(examples), [math.inf] * len(examples)
        history: list[dict[str, Any]] = []
        chunks = self._chunks(examples)
        total = sum(len(chunk) for chunk in chunks) * self.steps
        with ExitStack() as stack:
            stack.enter_context(frozen(lvlm.hf_model))
            stack.enter_context(on_model(defence, lvlm))
            seen = None
            if defence is not None and self.gates == "straight-through":
                seen = stack.enter_context(gates_with_gradient())
            bar = stack.enter_context(Steps(total=total, desc=self.name, disable=not progress))
            for number, chunk in enumerate(chunks):
                chunk = [item for item in chunk if not self._done(losses[item[0]])]
                found = kept.get(number)
                if found is None and chunk:
                    objective = PictureObjective(
                        lvlm,
                        [examples[i] for i, _ in chunk],
                        self.loss,
                        targets=None if wanted is None else [wanted[i] for i, _ in chunk],
                        defence=defence,
                        seen=seen,
                    )
                    found = self._search(objective, examples, chunk, seed, bar)
                    self._check(lvlm, [examples[i] for i, _ in chunk], found["pictures"], objective)
                    kept.add(number, found)
                else:
                    bar.update(len(chunk) * self.steps)
                if found is None:
                    continue
                history += found["history"]
                rows = zip(found["items"], found["pictures"], found["losses"], found["clean"], strict=True)
                for (i, _), picture, loss, clean_loss in rows:
                    clean[i] = clean_loss if clean[i] == math.inf else clean[i]
                    if loss < losses[i]:
                        best[i], losses[i] = picture, loss
        made = [
            replace(e, image=picture, channel=e.channel if self.channel is None else self.channel)
            for e, picture in zip(examples, best, strict=True)
        ]
        return AttackResult.of(
            made,
            settings=settings,
            loss=losses,
            clean_loss=clean,
            tries=self.restarts * (self.steps + 1),
            history=history,
        )

    def _targets(self, examples: Sequence[Example]) -> list[list[str]] | None:
        """What is teacher-forced for each example; None where the loss needs no response and none is given."""
        if self.targets is None and not wants_responses(self.loss):
            return None
        return targets_of(examples, self.targets)

    def _chunks(self, examples: Sequence[Example]) -> list[list[Item]]:
        """Examples and restarts, those with pictures of one size together, first restarts first."""
        sizes: dict[tuple[int, int], list[int]] = {}
        for i, example in enumerate(examples):
            sizes.setdefault(require_image(example).size, []).append(i)
        chunks = []
        for same in sizes.values():
            items = [(i, restart) for restart in range(self.restarts) for i in same]
            chunks += [items[start : start + self.batch_size] for start in range(0, len(items), self.batch_size)]
        return chunks

    def _done(self, loss: float) -> bool:
        return self.stop_loss is not None and loss < self.stop_loss

    def _start(self, pixels: Tensor, examples: Sequence[Example], items: Sequence[Item], seed: int) -> Tensor:
        """Where each picture starts, before it is put into the box."""
        if not self.random_start:
            return pixels.clone()
        shape = (self.restarts, *pixels.shape[1:])
        drawn = {i: torch.rand(shape, generator=example_generator(seed, examples[i])) * 2 - 1 for i, _ in items}
        return pixels + torch.stack([drawn[i][restart] for i, restart in items]).to(pixels) * self.radius

    def _search(
        self, objective: PictureObjective, examples: Sequence[Example], items: Sequence[Item], seed: int, bar: Any
    ) -> dict[str, Any]:
        """All steps of a batch: the best 8-bit pictures, their losses and those of the pictures as they were, and the history."""
        original = objective.pixels
        everyone = torch.arange(len(original), device=original.device)
        with torch.no_grad():
            clean = objective(original, everyone)
        low, high = (original - self.radius).clamp(min=0), (original + self.radius).clamp(max=255)
        rule = self.rule(self._start(original, examples, items, seed).clamp(low, high), low, high)
        best, best_loss = original.clone(), torch.full_like(everyone, math.inf, dtype=torch.float32)
        history: list[dict[str, Any]] = []
        for step in range(self.steps + 1):
            active = torch.nonzero(best_loss >= (-math.inf if self.stop_loss is None else self.stop_loss)).squeeze(1)
            if not len(active):
                bar.update(len(everyone) * (self.steps - step))
                break
            quantised = rule.pixels[active].round().requires_grad_(step < self.steps)
            with torch.set_grad_enabled(step < self.steps):
                values, opened = objective.parts(quantised, active)
                total = values + self.gate_weight * opened
            keep_better(best, best_loss, quantised.detach(), values.detach(), active)
            places = [items[i] for i in active.tolist()]
            history += [
                {"row": i, "restart": restart, "step": step, "loss": value}
                for (i, restart), value in zip(places, values.detach().tolist(), strict=True)
            ]
            if step < self.steps:
                rule.step(active, total.detach(), pixel_gradient(total, quantised, first=step == 0))
                bar.update(len(everyone))
        return {
            "items": list(items),
            "pictures": to_images(best),
            "losses": best_loss.tolist(),
            "clean": clean.tolist(),
            "history": history,
        }

    def _check(
        self, lvlm: HookedLVLM, examples: Sequence[Example], images: Sequence[Image.Image], objective: PictureObjective
    ) -> None:
        check_round_trip(lvlm, examples, images, objective, self.radius)


def pixel_gradient(total: Float[Tensor, " kept"], pixels: Tensor, *, first: bool) -> Tensor:
    """The gradient of each row's loss in its pixels.

    Raises:
        HiddenGradientError: If there is none.
    """
    if not total.requires_grad:
        raise HiddenGradientError(
            "the loss must depend on the pixels differentiably, got one without a gradient; a hook of the defence detaches "
            "what it returns"
        )
    with torch.enable_grad():
        summed = total.sum()
    (gradient,) = torch.autograd.grad(summed, pixels, allow_unused=True)
    if gradient is None:
        gradient = torch.zeros_like(pixels)
    if first and (hidden := int((gradient.flatten(1).abs().amax(dim=1) == 0).sum())):
        logger.warning("the gradient vanishes for %d of %d pictures: the attack cannot see them", hidden, len(gradient))
    return gradient


def keep_better(
    best: Tensor, best_loss: Tensor, pixels: Tensor, values: Float[Tensor, " kept"], active: Tensor
) -> None:
    """Put pictures with smaller losses in the place of the best so far."""
    better = values < best_loss[active]
    best[active[better]] = pixels[better]
    best_loss[active[better]] = values[better]


def check_round_trip(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    images: Sequence[Image.Image],
    objective: PictureObjective,
    radius: int,
) -> None:
    """What is saved is within the ball, and is what the model will be given.

    Raises:
        RoundTripError: If it is not.
    """
    read = [picture_of(png_bytes(image)) for image in images]
    pixels = to_pixels(read).to(objective.pixels.device)
    if (largest := float((pixels - objective.pixels).abs().max())) > radius:
        raise RoundTripError(f"pictures must be within {radius} of 255 of the original, got {largest:g}")
    inputs = lvlm.prepare([replace(e, image=image) for e, image in zip(examples, read, strict=True)])
    if not objective.gives(pixels, inputs):
        raise RoundTripError("pictures found must survive the processor, got others back")


class _Kept:
    """What was found of each batch, in a journal; nothing where there is no path."""

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self._journal = None if path is None else Journal(path, kind="gradient attack", about=settings)
        self._rows: dict[int, dict[str, Any]] = {}
        if self._journal is not None:
            self._take(self._journal.append([]))

    def get(self, number: int) -> dict[str, Any] | None:
        """What was found of a batch, if it is finished."""
        if (row := self._rows.get(number)) is None:
            return None
        pictures = [picture_of(base64.b64decode(one)) for one in row["pictures"]]
        return {**row, "pictures": pictures, "items": [tuple(item) for item in row["items"]]}

    def add(self, number: int, found: dict[str, Any]) -> None:
        """Record a finished batch."""
        if self._journal is None:
            return
        pictures = [base64.b64encode(png_bytes(image)).decode() for image in found["pictures"]]
        self._take(self._journal.append([{"batch": number, **found, "pictures": pictures}]))

    def _take(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            self._rows[row["batch"]] = row
