"""The kernels of token attribution and the scores they give, for padded batches of tokens; :mod:`care_lens.capture.attribution` says what they mean."""

from typing import Literal

import torch
from torch import Tensor

Kernel = Literal["gaussian", "laplace", "cosine", "linear"]
"""``exp(-D / median)``, ``exp(-sqrt(D) / median)``, the cosine of the tokens about the text's mean, and their scalar
product about it. With the linear kernel ``diag(H K H)`` is the squared distance from the mean."""

_SAME = 1e-10
"""Squared distances below this share of the tokens' squared norms are rounding, and count as 0."""


def padded_visual_scores(visual: Tensor, patch: Tensor, text: Tensor, word: Tensor, kernel: Kernel) -> Tensor:
    """[rows, n] from padded [rows, n, d] and [rows, m, d] with their masks."""
    values = _kernel_matrix(visual, patch, text, word, kernel)[0]
    centred = (values - _mean(values, word)[..., None]).masked_fill(~word[:, None], 0.0)
    return min_max(centred.square().sum(dim=-1), patch)


def padded_text_scores(text: Tensor, word: Tensor, kernel: Kernel, distance_weight: float) -> Tensor:
    """[rows, n] from padded [rows, n, d] with its mask."""
    values, distances = _kernel_matrix(text, word, text, word, kernel)
    row_means = _mean(values, word)
    diagonal = values.diagonal(dim1=1, dim2=2) - 2 * row_means + _mean(row_means[:, None], word)
    return min_max(distance_weight * _mean(distances, word) + (1 - distance_weight) * diagonal.abs(), word)


def _kernel_matrix(a: Tensor, a_there: Tensor, b: Tensor, b_there: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """[rows, n, m] kernel and squared distances of padded tokens, about the mean of b."""
    centre = (b * b_there[..., None]).sum(dim=1, keepdim=True) / b_there.sum(dim=1)[:, None, None].clamp(min=1)
    same = a is b
    a, b = a - centre, b - centre
    squares = a.square().sum(dim=2)[..., None] + b.square().sum(dim=2)[:, None]
    products = a @ b.mT
    distances = squares - 2 * products
    distances = torch.where(distances > _SAME * squares, distances, 0.0)
    if same:
        distances.diagonal(dim1=1, dim2=2).zero_()
    pairs = a_there[..., None] & b_there[:, None]
    if kernel == "gaussian":
        return torch.exp(-distances / _median_of_positive(distances, pairs)), distances
    if kernel == "laplace":
        lengths = distances.sqrt()
        return torch.exp(-lengths / _median_of_positive(lengths, pairs)), distances
    if kernel == "linear":
        return products, distances
    norms = a.norm(dim=2)[..., None] * b.norm(dim=2)[:, None]
    return torch.where(norms > 0, products / norms.clamp(min=1e-300), 0.0), distances


def _median_of_positive(values: Tensor, pairs: Tensor) -> Tensor:
    """[rows, 1, 1] median of what is above 0 (the mean of the two in the middle); 1 where nothing is."""
    taken = pairs & (values > 0)
    ordered = values.masked_fill(~taken, torch.inf).flatten(1).sort(dim=1).values
    counts = taken.flatten(1).sum(dim=1, keepdim=True)
    middle = [ordered.gather(1, index) for index in (((counts - 1) // 2).clamp(min=0), counts // 2)]
    median = (middle[0] + middle[1]) / 2
    return torch.where(counts > 0, median, 1.0)[..., None]


def _mean(values: Tensor, there: Tensor) -> Tensor:
    """Mean over the last axis of [rows, n, m], where [rows, m] is True."""
    total = values.masked_fill(~there[:, None], 0.0).sum(dim=-1)
    return total / there.sum(dim=1)[:, None].clamp(min=1)


def min_max(scores: Tensor, there: Tensor) -> Tensor:
    """Each row to [0, 1] over the places that count; 0 where they do not differ."""
    low = scores.masked_fill(~there, torch.inf).amin(dim=1, keepdim=True)
    high = scores.masked_fill(~there, -torch.inf).amax(dim=1, keepdim=True)
    return torch.where(high > low, (scores - low) / (high - low), 0.0)
