"""Projected gradient descent on the picture: the strongest small change that makes a target answer likely.
 Madry et al. 2018 (arXiv:1706.06083), with a target answer instead of a class, as in Carlini et al. 2023
(arXiv:2306.15447) and Qi et al. 2024 (arXiv:2306.13213). The ball is L-infinity around the ORIGINAL 8-bit
picture, in
pixels: ``|x - x0| <= floor(epsilon)``. Every iterate is evaluated as the 8-bit picture it would be saved as,
    so the losses
reported are those of the pictures returned; the best iterate over all steps and restarts is kept.
 An adaptive attack passes the defence as ``repair``: the gradient then flows through its hooks. An attack
that did not see the defence says nothing about what the defence withstands, and neither does one whose
gradient the defence hides (a warning is logged where a gradient vanishes).
 Memory: activations of ``batch_size`` times the number of targets rows for one backward pass; no gradient of
a weight is ever computed.
"""

import base64
import io
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from care_lens.attacks.pixels import PixelMap, to_images, to_pixels
from care_lens.attacks.targets import TargetLoss
from care_lens.core.draws import example_generator
from care_lens.core.errors import ArtifactError
from care_lens.core.examples import Example
from care_lens.core.files import load_artifact, read_object, save_artifact
from care_lens.core.identity import examples_digest, model_fingerprint, repair_fingerprint
from care_lens.core.journal import Journal
from care_lens.core.outcome import Repair
from care_lens.core.results import package_versions
from care_lens.lvlm.hooked import HookedLVLM

logger = logging.getLogger(__name__)

_SCHEMA = 2


@dataclass(frozen=True)
class PGDResult:
    """Pictures found by :func:`pgd`.

    Attributes:
        images: One 8-bit RGB picture an example.
        losses: [example] loss of each of them, in nats; smaller is a likelier target.
        clean_losses: [example] loss of the original pictures, under the same defence.
        settings: The options of the attack.
    """

    images: list[Image.Image]
    losses: Float[np.ndarray, " example"]
    clean_losses: Float[np.ndarray, " example"]
    settings: dict[str, Any]

    def apply(self, examples: Sequence[Example], *, channel: str | None = None) -> list[Example]:
        """The examples that were attacked, with the pictures found.

        Args:
            examples: The same examples, in the same order.
            channel: Their new channel; None: as it was.

        Raises:
            ValueError: If their number differs.
        """
        if len(examples) != len(self.images):
            raise ValueError(f"examples must be the {len(self.images)} that were attacked, got {len(examples)}")
        return [
            replace(example, image=image, channel=example.channel if channel is None else channel)
            for example, image in zip(examples, self.images, strict=True)
        ]

    def save(self, directory: str | Path) -> Path:
        """Write the pictures (``pgd.00000.png``, lossless) and ``pgd.json``, which holds the sums of all, into a directory.

        Returns:
            The path of ``pgd.json``.

        Raises:
            ArtifactError: If files of those names are there that care_lens did not write.
        """
        return save_artifact(
            directory,
            "pgd",
            kind=type(self).__name__,
            schema=_SCHEMA,
            data={f"{i:05d}.png": _png(image) for i, image in enumerate(self.images)},
            content={
                "losses": self.losses.tolist(),
                "clean_losses": self.clean_losses.tolist(),
                "settings": json.dumps(self.settings),
            },
        )

    @classmethod
    def load(cls, directory: str | Path) -> "PGDResult":
        """Read what :meth:`save` wrote; folders of earlier versions, which have no sums, are read too.

        Raises:
            FileNotFoundError: If a file is not there.
            ArtifactError: If a file is damaged or of another kind.
        """
        path = Path(directory) / "pgd.json"
        content = read_object(path, kind=cls.__name__)
        if {*content} == {"losses", "clean_losses", "settings"}:
            pictures = [(path.parent / f"{i:05d}.png").read_bytes() for i in range(len(content["losses"]))]
            settings = content["settings"]
        else:
            data, content = load_artifact(directory, "pgd", kind=cls.__name__, schema=_SCHEMA)
            pictures, settings = [data[name] for name in sorted(data)], json.loads(content["settings"])
        losses, clean = np.array(content["losses"]), np.array(content["clean_losses"])
        if not len(losses) == len(clean) == len(pictures):
            raise ArtifactError(
                f"{path} must have two losses for each picture, got {len(losses)} and {len(clean)} for {len(pictures)}; copy all files again"
            )
        try:
            images = [_of_png(one) for one in pictures]
        except (OSError, SyntaxError, ValueError) as error:
            raise ArtifactError(
                f"the pictures beside {path} must be png files, got {error}; copy all files again"
            ) from error
        return cls(images, losses, clean, settings)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="png")
    return file.getvalue()


def _of_png(content: bytes) -> Image.Image:
    with Image.open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def pgd(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    *,
    targets: Sequence[str] | Sequence[Sequence[str]] | None = None,
    epsilon: int | float,
    steps: int = 40,
    step_size: int | float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    target_tokens: int | None = None,
    stop_loss: int | float | None = None,
    seed: int = 0,
    batch_size: int = 24,
    repair: Repair | None = None,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> PGDResult:
    """Change each example's picture, within a bound, so that the model answers with a target.

    Args:
        lvlm: The model; its weights are left alone.
        examples: Examples with pictures of one size that the processor neither resizes nor crops.
        targets: Acceptable answers or openings of answers: texts for all examples, or one collection of texts
            for each example. None: each example's own response. The loss is that of
            :class:`~care_lens.attacks.targets.TargetLoss`.
        epsilon: Most that a pixel may change, of 255; rounded down to whole 8-bit steps.
        steps: Gradient steps of a restart.
        step_size: Change of a pixel a step, of 255; None: 2.5 epsilon / steps, which can cross the ball
            (Madry et al.).
        restarts: How often to start anew.
        random_start: Start from a uniform draw in the ball rather than from the picture itself.
        target_tokens: Count only the first so many tokens of each target.
        stop_loss: Leave an example alone once its loss is below this; None: never.
        seed: Seed of the random starts; those of an example depend on it and the example alone.
        batch_size: Examples at a time.
        repair: A defence to attack through.
        progress: Whether to show a progress bar.
        checkpoint: A file in which finished restarts of finished batches are kept; a stopped attack goes on from it.

    Returns:
        The best pictures found, checked to be within the bound and to reach the model as they are.

    Raises:
        ValueError: If an option is out of range, an example has no picture, targets and examples differ in
            number, the processor changes the pictures, or the checkpoint is of another attack or damaged.
        RuntimeError: If a picture found does not survive the round trip through the processor, or the defence
            cuts the gradient off.

    Example:
        >>> result = pgd(lvlm, examples, targets=["sure"], epsilon=16, steps=40)  # doctest: +SKIP
        >>> attacked = result.apply(examples, channel="pgd-16")  # doctest: +SKIP
    """
    radius = _radius(epsilon)
    for name, value in (("steps", steps), ("restarts", restarts), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be 1 or more, got {value}")
    size = 2.5 * radius / steps if step_size is None else float(step_size)
    if not 0 < size < math.inf:
        raise ValueError(f"step_size must be above 0, got {step_size}")
    if target_tokens is not None and target_tokens < 1:
        raise ValueError(f"target_tokens must be 1 or more, or None for all of them, got {target_tokens}")
    wanted = _targets_of(examples, targets)
    if restarts > 1 and not random_start:
        raise ValueError(f"restarts must be 1 without a random start, got {restarts}: all of them would be the same")
    settings = {
        "attack": "pgd",
        "epsilon": epsilon,
        "steps": steps,
        "step_size": size,
        "restarts": restarts,
        "random_start": random_start,
        "target_tokens": target_tokens,
        "stop_loss": stop_loss,
        "seed": seed,
        "repair": None if repair is None else {"name": repair.name, **repair.describe()},
        "n": len(examples),
        "versions": package_versions(),
    }
    taken = {
        "examples": examples_digest(examples),
        "targets": wanted,
        "batch_size": batch_size,
        "weights": model_fingerprint(lvlm.hf_model),
        "acting": lvlm.acting(),
        "repair_fingerprint": None if repair is None else repair_fingerprint(repair),
    }
    kept = _Kept(checkpoint, {**settings, **taken})
    images: list[Image.Image] = []
    losses: list[Tensor] = []
    clean: list[Tensor] = []
    batches = math.ceil(len(examples) / batch_size)
    with (
        _frozen(lvlm.hf_model),
        repair.on(lvlm) if repair is not None else nullcontext(),
        tqdm(total=batches * restarts * steps, desc=f"PGD {epsilon:g}/255", disable=not progress) as bar,
    ):
        for start in range(0, len(examples), batch_size):
            chunk = examples[start : start + batch_size]
            loss = TargetLoss(lvlm, chunk, wanted[start : start + batch_size], target_tokens=target_tokens)
            everyone = torch.arange(len(chunk), device=loss.pixels.device)
            with torch.no_grad():
                clean.append(loss(loss.pixels, everyone).cpu())
            best, best_loss = loss.pixels, torch.full_like(everyone, math.inf, dtype=torch.float32)
            shape = (restarts, *loss.pixels.shape[1:])
            draws = torch.stack([torch.rand(shape, generator=example_generator(seed, e)) for e in chunk]) * 2 - 1
            for restart in range(restarts):
                if (found := kept.get(start, restart, best)) is not None:
                    best, best_loss = found
                    bar.update(steps)
                    continue
                offset = draws[:, restart].to(best.device) * radius if random_start else torch.zeros_like(best)
                best, best_loss = _descend(loss, offset, best, best_loss, radius, steps, size, stop_loss, bar)
                kept.add(start, restart, best, best_loss)
            pictures = to_images(best)
            _check_round_trip(lvlm, chunk, pictures, loss.pixels, radius)
            images += pictures
            losses.append(best_loss.cpu())
    return PGDResult(images, torch.cat(losses).double().numpy(), torch.cat(clean).double().numpy(), settings)


class _Kept:
    """The best pictures after each restart of each batch, in a journal; nothing where there is no path."""

    def __init__(self, path: str | Path | None, settings: dict[str, Any]) -> None:
        self._journal = None if path is None else Journal(path, kind="PGD", about=settings)
        self._rows: dict[tuple[int, int], dict[str, Any]] = {}
        if self._journal is not None:
            self._take(self._journal.append([]))

    def get(self, start: int, restart: int, like: Tensor) -> tuple[Tensor, Tensor] | None:
        """[image, channel, height, width] pictures and [image] losses, on the device of a tensor."""
        row = self._rows.get((start, restart))
        if row is None:
            return None
        pictures = [_of_png(base64.b64decode(one)) for one in row["pictures"]]
        return to_pixels(pictures).to(like), torch.tensor(row["losses"], dtype=torch.float32, device=like.device)

    def add(self, start: int, restart: int, best: Tensor, losses: Tensor) -> None:
        """Record a finished restart."""
        if self._journal is None:
            return
        pictures = [base64.b64encode(_png(image)).decode() for image in to_images(best)]
        row = {"start": start, "restart": restart, "losses": losses.tolist(), "pictures": pictures}
        self._take(self._journal.append([row]))

    def _take(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            self._rows[row["start"], row["restart"]] = row


def _descend(
    loss: TargetLoss,
    offset: Float[Tensor, "image channel height width"],
    best: Float[Tensor, "image channel height width"],
    best_loss: Float[Tensor, " image"],
    radius: int,
    steps: int,
    size: float,
    stop_loss: int | float | None,
    bar: Any,
) -> tuple[Float[Tensor, "image channel height width"], Float[Tensor, " image"]]:
    """One restart: the best 8-bit pictures so far and their losses."""
    low, high = (loss.pixels - radius).clamp(min=0), (loss.pixels + radius).clamp(max=255)
    pixels, best, best_loss = (loss.pixels + offset).clamp(low, high), best.clone(), best_loss.clone()
    for step in range(steps + 1):
        active = torch.nonzero(best_loss >= (-math.inf if stop_loss is None else stop_loss)).squeeze(1)
        if not len(active):
            bar.update(steps - step)
            break
        quantised = pixels[active].round().requires_grad_(step < steps)
        with torch.set_grad_enabled(step < steps):
            values = loss(quantised, active)
            total = values.sum()
        _keep_better(best, best_loss, quantised.detach(), values.detach(), active)
        if step < steps:
            if not total.requires_grad:
                raise RuntimeError(
                    "the loss must depend on the pixels differentiably, got one without a gradient; a "
                    "hook of the defence detaches what it returns"
                )
            (gradient,) = torch.autograd.grad(total, quantised)
            if step == 0:
                _warn_if_hidden(gradient)
            moved = pixels[active] - size * gradient.sign()
            pixels[active] = moved.clamp(low[active], high[active])
            bar.update(1)
    return best, best_loss


def _keep_better(
    best: Tensor,
    best_loss: Tensor,
    pixels: Tensor,
    values: Float[Tensor, " kept"],
    active: Int[Tensor, " kept"],
) -> None:
    better = values < best_loss[active]
    best[active[better]] = pixels[better]
    best_loss[active[better]] = values[better]


def _warn_if_hidden(gradient: Float[Tensor, "image channel height width"]) -> None:
    if hidden := int((gradient.flatten(1).abs().amax(dim=1) == 0).sum()):
        logger.warning("the gradient vanishes for %d of %d pictures: the attack cannot see them", hidden, len(gradient))


def _radius(epsilon: int | float) -> int:
    """Whole 8-bit steps in epsilon; 8 / 255 * 255 counts as 8."""
    if not 1 <= epsilon <= 255:
        raise ValueError(f"epsilon must be in [1, 255] (it is of 255), got {epsilon}")
    return math.floor(epsilon + 1e-6)


def _targets_of(
    examples: Sequence[Example], targets: Sequence[str] | Sequence[Sequence[str]] | None
) -> list[list[str]]:
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


def _check_round_trip(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    images: Sequence[Image.Image],
    original: Float[Tensor, "image channel height width"],
    radius: int,
) -> None:
    """What is saved is within the ball, and is what the model will be given."""
    pixels = to_pixels(images).to(original.device)
    if (largest := float((pixels - original).abs().max())) > radius:
        raise RuntimeError(f"pictures must be within {radius} of 255 of the original, got {largest:g}")
    inputs = lvlm.prepare([replace(example, image=image) for example, image in zip(examples, images, strict=True)])
    assert inputs.pixel_values is not None
    try:
        PixelMap.of(lvlm.processor.image_processor, device=original.device).require(pixels, inputs.pixel_values)
    except ValueError as error:
        raise RuntimeError("pictures found must survive the processor, got others back") from error


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradient of any weight for the duration of a ``with`` block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
