"""Projected gradient descent on the picture: the strongest small change that makes a target answer likely.

Madry et al. 2018 (arXiv:1706.06083), with a target answer instead of a class, as in Carlini et al. 2023
(arXiv:2306.15447) and Qi et al. 2024 (arXiv:2306.13213). What all gradient attacks share (the ball, 8-bit pictures, adaptive attacks,
memory) stands in :mod:`care_lens.attacks.gradient`.

    result = PGD(epsilon=16, steps=40).run(lvlm, examples, defence=repair)
    result.examples

:func:`pgd` is the function that :class:`PGD` came from; its result holds the pictures alone.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from care_lens.attacks.gradient import GradientAttack
from care_lens.attacks.kinds import register_attack
from care_lens.attacks.losses import TargetLikelihood
from care_lens.attacks.rules import AutoRule, MomentumRule, SignRule, StepRule
from care_lens.core.attack import picture_of, png_bytes
from care_lens.core.display import ShortRepr
from care_lens.core.errors import ArtifactError
from care_lens.core.examples import Example
from care_lens.core.files import load_artifact, read_object, save_artifact
from care_lens.core.outcome import Repair
from care_lens.core.results import package_versions
from care_lens.lvlm.hooked import HookedLVLM

_SCHEMA = 2


@register_attack
@dataclass(frozen=True, kw_only=True)
class PGD(GradientAttack):
    """Steps of one size along the sign of the gradient.

    Attributes:
        step_size: Change of a pixel a step, of 255; None: 2.5 epsilon / steps, which can cross the ball (Madry et al.), and at least 1
            without a bound.

    Example:
        >>> from care_lens import organism
        >>> lvlm, requests = organism.load(), organism.study().gradient[:1]
        >>> result = PGD(epsilon=16, steps=2).run(lvlm, requests)
        >>> len(result.to_dataframe(history=True))
        3
    """

    step_size: float | int | None = None
    name: str = "PGD"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_size(self.step_size)

    @property
    def size(self) -> float:
        """The step that is taken."""
        if self.step_size is not None:
            return float(self.step_size)
        size = 2.5 * self.radius / self.steps
        return max(size, 1.0) if self.epsilon is None else size

    def rule(self, start: Tensor, low: Tensor, high: Tensor) -> StepRule:
        """Signs of the gradient."""
        return SignRule(start, low, high, size=self.size)


@register_attack
@dataclass(frozen=True, kw_only=True)
class Unconstrained(PGD):
    """PGD without a bound: any picture is allowed, and the request's own is only where it starts (Qi et al. 2024)."""

    epsilon: float | int | None = None
    steps: int = 200
    random_start: bool = False
    name: str = "unconstrained"


@register_attack
@dataclass(frozen=True, kw_only=True)
class MIFGSM(GradientAttack):
    """Momentum iterative fast gradient sign method (Dong et al. 2018, arXiv:1710.06081).

    Attributes:
        step_size: Change of a pixel a step, of 255; None: epsilon / steps, as published.
        decay: How much of the accumulated gradient is kept at each step (mu).
    """

    step_size: float | int | None = None
    decay: float | int = 1.0
    random_start: bool = False
    name: str = "MI-FGSM"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_size(self.step_size)
        if not 0 <= self.decay < math.inf:
            raise ValueError(f"decay must be a number of 0 or more, got {self.decay}")

    def rule(self, start: Tensor, low: Tensor, high: Tensor) -> StepRule:
        """Signs of the accumulated gradient."""
        size = self.radius / self.steps if self.step_size is None else float(self.step_size)
        return MomentumRule(start, low, high, size=size, decay=float(self.decay))


@register_attack
@dataclass(frozen=True, kw_only=True)
class AutoPGD(GradientAttack):
    """Auto-PGD (Croce and Hein 2020, arXiv:2003.01690): no step size to choose.

    Attributes:
        momentum: alpha, the share of the new step; 0.75 as published.
        rho: Share of the steps since the last checkpoint that must have gone down; 0.75 as published.
    """

    momentum: float | int = 0.75
    rho: float | int = 0.75
    name: str = "auto-PGD"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("momentum", "rho"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {getattr(self, name)}")

    def rule(self, start: Tensor, low: Tensor, high: Tensor) -> StepRule:
        """Auto-PGD's."""
        return AutoRule(
            start,
            low,
            high,
            steps=self.steps,
            radius=float(self.radius),
            momentum=float(self.momentum),
            rho=float(self.rho),
        )


def require_size(step_size: float | int | None) -> None:
    """Refuse a step that goes nowhere.

    Raises:
        ValueError: If it is not above 0.
    """
    if step_size is not None and not 0 < step_size < math.inf:
        raise ValueError(f"step_size must be above 0, got {step_size}")


@dataclass(frozen=True)
class PGDResult(ShortRepr):
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
            data={f"{i:05d}.png": png_bytes(image) for i, image in enumerate(self.images)},
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
            images = [picture_of(one) for one in pictures]
        except (OSError, SyntaxError, ValueError) as error:
            raise ArtifactError(
                f"the pictures beside {path} must be png files, got {error}; copy all files again"
            ) from error
        return cls(images, losses, clean, settings)


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
    """Change each example's picture, within a bound, so that the model answers with a target: :class:`PGD` as a function.

    Unlike ``PGD(...).run(..., defence=...)`` it leaves the gradient of a defence's gates as it is: a gate that is a step has none.

    Args:
        lvlm: The model; its weights are left alone.
        examples: Examples with pictures.
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
        batch_size: Pictures at a time.
        repair: A defence to attack through.
        progress: Whether to show a progress bar.
        checkpoint: A file in which finished batches are kept; a stopped attack goes on from it.

    Returns:
        The best pictures found, checked to be within the bound and to reach the model as they are.

    Raises:
        ValueError: If an option is out of range, an example has no picture, targets and examples differ in
            number, or the checkpoint is of another attack or damaged.
        PreprocessingError: If what the processor makes of the pictures has no gradient.
        RuntimeError: If a picture found does not survive the round trip through the processor, or the defence
            cuts the gradient off.

    Example:
        >>> result = pgd(lvlm, examples, targets=["sure"], epsilon=16, steps=40)  # doctest: +SKIP
        >>> attacked = result.apply(examples, channel="pgd-16")  # doctest: +SKIP
    """
    if targets is not None and (isinstance(targets, str) or not targets):
        raise ValueError(f"targets must be texts, or a collection of texts for each example, got {targets!r}")
    attack = PGD(
        epsilon=epsilon,
        steps=steps,
        step_size=step_size,
        restarts=restarts,
        random_start=random_start,
        targets=targets,
        loss=TargetLikelihood(tokens=target_tokens),
        gates="own",
        stop_loss=stop_loss,
        batch_size=batch_size,
    )
    made = attack.run(lvlm, examples, repair, seed, checkpoint=checkpoint, progress=progress)
    settings = {
        "attack": "pgd",
        "epsilon": epsilon,
        "steps": steps,
        "step_size": attack.size,
        "restarts": restarts,
        "random_start": random_start,
        "target_tokens": target_tokens,
        "stop_loss": stop_loss,
        "seed": seed,
        "repair": made.settings["defence"],
        "n": len(examples),
        "versions": package_versions(),
    }
    images = [example.image for example in made.examples if example.image is not None]
    return PGDResult(images, made.frame["loss"].to_numpy(), made.frame["clean_loss"].to_numpy(), settings)
