"""Token attribution with a Gaussian kernel: which tokens of a sample stand for its modality.

With D the squared Euclidean distances between two sets of tokens, ``K = exp(-D / (2 sigma^2))`` and
``sigma = sqrt(0.5 median(D > 0))``, so that ``2 sigma^2`` is that median. ``H = I - 1 1^T / n`` centres.

- Visual tokens are scored against the text: ``s_i = ||row i of K H||^2``, large for a patch that is near to
  some text tokens and far from others.
- Text tokens are scored among themselves: ``0.7 x mean squared distance to the others + 0.3 x |diag(H K
  H)|``, large for tokens that differ from the others. The two terms are in different units: the first grows
  with the square of the activations' size and the second never exceeds 1, so that the first decides unless
  activations are small. These are the weights of the code published with the paper.

Scores are min-max normalised to [0, 1] within the sample, and the best tokens are kept. Everything is
computed in float64. Memory: ``n_visual x n_text`` or ``n_text^2`` numbers a sample.

Source: Fu et al. 2026 (arXiv:2603.27240), section on token attribution, and its published code.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

_SAME = 1e-10
"""Squared distances below this share of the tokens' squared norms are rounding, and count as 0."""


@dataclass(frozen=True)
class TokenAttribution:
    """How many tokens of a sample are kept.

    Attributes:
        visual: Image tokens kept: a count (int) or a share (float) of the sample's.
        text: Text tokens kept, likewise; the published code keeps half.

    Raises:
        ValueError: If a count is below 1 or a share not in (0, 1].
    """

    visual: int | float = 0.5
    text: int | float = 0.5

    def __post_init__(self) -> None:
        for name, keep in (("visual", self.visual), ("text", self.text)):
            valid = keep >= 1 if isinstance(keep, int) else 0 < keep <= 1
            if not valid:
                raise ValueError(f"{name} must be a count of 1 or more or a share in (0, 1], got {keep!r}")

    def keep_visual(
        self, visual: Float[Tensor, "n_visual d"], text: Float[Tensor, "n_text d"]
    ) -> Bool[Tensor, " n_visual"]:
        """Which image tokens of a sample are kept.

        Args:
            visual: [n_visual, d] its image tokens at one site.
            text: [n_text, d] its text tokens there.

        Returns:
            [n_visual] True where kept.
        """
        return _keep(visual_scores(visual, text), self.visual)

    def keep_text(self, text: Float[Tensor, "n_text d"]) -> Bool[Tensor, " n_text"]:
        """Which text tokens of a sample are kept.

        Args:
            text: [n_text, d] its text tokens at one site.

        Returns:
            [n_text] True where kept.
        """
        return _keep(text_scores(text), self.text)


def visual_scores(visual: Float[Tensor, "n_visual d"], text: Float[Tensor, "n_text d"]) -> Float[Tensor, " n_visual"]:
    """Scores of a sample's image tokens: the squared norms of the rows of the centred kernel with its text.

    Args:
        visual: [n_visual, d] image tokens.
        text: [n_text, d] text tokens of the same sample and site.

    Returns:
        [n_visual] scores in [0, 1], float64; all 0 where the tokens cannot be told apart.

    Raises:
        ValueError: If there are no tokens of either kind.

    Notes:
        ``s_i = sum_j (K_ij - mean_j K_ij)^2``, then min-max normalised.

    Example:
        >>> at_a_word, between = 0.0, 5.0
        >>> visual_scores(torch.tensor([[at_a_word], [between]]), torch.tensor([[0.0], [10.0]])).tolist()
        [1.0, 0.0]
    """
    _require_tokens(visual=visual, text=text)
    kernel = _gaussian(_squared_distances(visual, text))
    centred = kernel - kernel.mean(dim=1, keepdim=True)
    return _min_max(centred.square().sum(dim=1))


def text_scores(text: Float[Tensor, "n_text d"], *, distance_weight: float = 0.7) -> Float[Tensor, " n_text"]:
    """Scores of a sample's text tokens: how much each differs from the others.

    Args:
        text: [n_text, d] text tokens.
        distance_weight: Weight of the mean squared distance; the centred kernel's diagonal has the rest.

    Returns:
        [n_text] scores in [0, 1], float64; all 0 where the tokens cannot be told apart.

    Raises:
        ValueError: If there are no tokens, or the weight is not in [0, 1].

    Notes:
        ``s_i = w mean_j D_ij + (1 - w) |(H K H)_ii|``, the mean over all tokens (itself included), then
        min-max normalised.
    """
    _require_tokens(text=text)
    if not 0 <= distance_weight <= 1:
        raise ValueError(f"distance_weight must be in [0, 1], got {distance_weight}")
    distances = _squared_distances(text, text)
    distances.fill_diagonal_(0)
    kernel = _gaussian(distances)
    row_means = kernel.mean(dim=1)
    diagonal = kernel.diagonal() - 2 * row_means + row_means.mean()
    return _min_max(distance_weight * distances.mean(dim=1) + (1 - distance_weight) * diagonal.abs())


def select_tokens(
    scores: Float[Tensor, " n"], *, k: int | None = None, ratio: float | None = None
) -> Bool[Tensor, " n"]:
    """The tokens with the largest scores.

    Args:
        scores: [n] scores.
        k: How many to keep; all if there are fewer.
        ratio: Which share to keep, rounded down, at least one. Give one of the two.

    Returns:
        [n] True where kept. Of equal scores the earlier token is kept.

    Raises:
        ValueError: If not exactly one of ``k`` and ``ratio`` is given, or it is out of range.

    Example:
        >>> select_tokens(torch.tensor([0.1, 0.9, 0.5, 0.9]), k=2).tolist()
        [False, True, False, True]
    """
    if (k is None) == (ratio is None):
        raise ValueError(f"exactly one of k and ratio must be given, got k={k} and ratio={ratio}")
    if k is not None and k < 1:
        raise ValueError(f"k must be 1 or more, got {k}")
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    count = k if k is not None else max(1, int(len(scores) * (ratio or 0)))
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[:count]] = True
    return kept


def _keep(scores: Tensor, keep: int | float) -> Tensor:
    return select_tokens(scores, k=keep) if isinstance(keep, int) else select_tokens(scores, ratio=keep)


def _require_tokens(**sets: Tensor) -> None:
    for name, tokens in sets.items():
        if len(tokens) == 0:
            raise ValueError(f"{name} must hold at least one token, got none")


def _wide(tokens: Tensor) -> Tensor:
    """In float64, on the CPU where the device has no float64."""
    tokens = tokens.detach()
    return tokens.to("cpu" if tokens.device.type == "mps" else tokens.device, torch.float64)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """[n_a, n_b], with what is rounding set to 0 so that equal tokens are at distance 0."""
    a, b = _wide(a), _wide(b)
    centre = b.mean(dim=0)
    a, b = a - centre, b - centre
    norms = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    distances = norms - 2 * a @ b.T
    return torch.where(distances > _SAME * norms, distances, 0.0)


def _gaussian(distances: Tensor) -> Tensor:
    """The kernel, with the median heuristic; all 1 if no two tokens differ."""
    positive = distances[distances > 0]
    if len(positive) == 0:
        return torch.ones_like(distances)
    return torch.exp(-distances / float(np.median(positive.cpu().numpy())))


def _min_max(scores: Tensor) -> Tensor:
    low, high = scores.aminmax()
    if not bool(high > low):
        return torch.zeros_like(scores)
    return (scores - low) / (high - low)
