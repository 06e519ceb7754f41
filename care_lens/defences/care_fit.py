"""The numerics of the published CARE code, from tokens to the columns of a subspace; float64, no model.

Token scores of one sample at one layer, with image tokens X_v, text tokens X_t and squared distances D clipped at 1e6:
``K = exp(-D / (2 sigma^2))``, ``2 sigma^2 = median(D > 0)``.

- "cross_hsic": image tokens by ``||row i of K H||^2``, K between image and text and H centring over the text.
- "variance": image tokens by the variance of their own entries.
- text tokens by ``0.7 mean_j D_ij + 0.3 |diag(H K H)|`` among themselves.

Both are min-max normalised. n_v / 8 image tokens and a fifth of the text tokens are kept (rounded down, at least one; of
equal scores the earlier one), and their mean is the sample's row. Subspace of benign rows A_b and malicious rows A_m:
``W = (C_b + 1e-6 I)^(-1/2)`` by scipy's sqrtm, the top k eigenvectors Q of ``W C_m W``, and ``U = W Q`` with each column
divided by its norm.

Source: Fu et al., CVPR 2026 (arXiv:2603.27240) and its published code.
"""

import warnings
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.linalg import sqrtm
from sklearn.covariance import ledoit_wolf
from torch import Tensor

from care_lens.core.spans import TokenSpans
from care_lens.defences.stored import FitError, StoredPart

VisualScore = Literal["cross_hsic", "variance"]
DISTANCE_CLIP, RIDGE = 1e6, 1e-6
VISUAL_SHARE, TEXT_SHARE = 8, 0.2


@dataclass(frozen=True)
class CAREFaults(StoredPart):
    """Which faults of the published code are kept; all by default. Each can be turned off by itself, to see what it costs.

    Attributes:
        foreign_site: Fitted on block outputs and applied at MLP outputs, whose means and directions are others. Off: fitted
            where it is applied.
        ridge_only: 1e-6 I on the benign covariance and nothing on the malicious one, so that with fewer rows than dimensions
            nearly all of the subspace lies where no benign row does. Off: both are shrunk after Ledoit and Wolf.
        class_centring: Each class is centred about its own mean, so that a shift between the means is not seen. Off: the
            malicious second moment is taken about the benign mean.
        unit_columns: Columns of U have norm 1 and are not orthogonal, so that U U^T is no projector. Off: orthonormalised.
        actual_weights: Adaptive weights from the edits at their actual strengths, so that a larger strength also weighs more. Off:
            from the edits at strength 1.
        clipped_distances: Squared distances above 1e6 count as 1e6, so that in wide models tokens cannot be told apart. Off: as
            they are.
    """

    foreign_site: bool = True
    ridge_only: bool = True
    class_centring: bool = True
    unit_columns: bool = True
    actual_weights: bool = True
    clipped_distances: bool = True

    @classmethod
    def none(cls) -> "CAREFaults":
        """Every fault off: the sound variant."""
        return cls(**{f.name: False for f in fields(cls)})

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of the faults."""
        return tuple(f.name for f in fields(cls))

    def without(self, *names: str) -> "CAREFaults":
        """The same with these faults off.

        Raises:
            ValueError: If a name is not that of a fault.
        """
        if unknown := [name for name in names if name not in self.names()]:
            raise ValueError(f"names must be of {self.names()}, got {unknown}")
        return replace(self, **dict.fromkeys(names, False))


def text_span(spans: TokenSpans) -> Bool[Tensor, "batch pos"]:
    """[batch, pos] the text of a sample as the published code takes it: what comes after the picture, responses included; all
    text of rows without a picture."""
    positions = torch.arange(spans.image.shape[1], device=spans.image.device)
    last_image = torch.where(spans.image, positions, -1).amax(dim=1, keepdim=True)
    return spans.text & (positions > last_image)


def image_row(
    image: Float[Tensor, "n_image d"], text: Float[Tensor, "n_text d"], *, score: VisualScore, clip: bool
) -> Float[Tensor, "d"]:
    """The mean of the image tokens that are kept, n_image / 8 of them.

    Args:
        image: [n_image, d] image tokens of a sample, in float64.
        text: [n_text, d] text tokens after the picture.
        score: How image tokens are scored.
        clip: Whether squared distances are clipped.
    """
    if score == "variance":
        scores = image.var(dim=1, correction=0)
    else:
        kernel, _ = _kernel(image, text, clip)
        scores = (kernel - kernel.mean(dim=1, keepdim=True)).square().sum(dim=1)
    return _mean_of_best(image, scores, len(image) // VISUAL_SHARE)


def text_row(text: Float[Tensor, "n_text d"], *, clip: bool) -> Float[Tensor, "d"]:
    """The mean of the text tokens that are kept, a fifth of them.

    Args:
        text: [n_text, d] text tokens after the picture, in float64.
        clip: Whether squared distances are clipped.
    """
    kernel, distances = _kernel(text, text, clip)
    diagonal = kernel.diagonal() - 2 * kernel.mean(dim=1) + kernel.mean()
    scores = 0.7 * distances.mean(dim=1) + 0.3 * diagonal.abs()
    return _mean_of_best(text, scores, int(TEXT_SHARE * len(text)))


def _kernel(a: Tensor, b: Tensor, clip: bool) -> tuple[Tensor, Tensor]:
    distances = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist").square()
    if clip:
        distances = distances.clamp(max=DISTANCE_CLIP)
    positive = distances[distances > 0]
    median = float(np.median(positive.cpu().numpy())) if len(positive) else 1.0
    return torch.exp(-distances / median), distances


def _mean_of_best(tokens: Tensor, scores: Tensor, amount: int) -> Tensor:
    low, high = scores.min(), scores.max()
    scores = (scores - low) / (high - low) if high > low else torch.zeros_like(scores)
    return tokens[scores.argsort(descending=True, stable=True)[: max(amount, 1)]].mean(dim=0)


def care_columns(
    benign: Float[Tensor, "n_benign d"], malicious: Float[Tensor, "n_malicious d"], *, rank: int, faults: CAREFaults
) -> tuple[Float[Tensor, "d k"], Float[Tensor, "k"], Float[Tensor, "d"]]:
    """The columns of U, their eigenvalues, largest first, and the benign mean.

    Args:
        benign: [n_benign, d] rows in float64.
        malicious: [n_malicious, d] rows.
        rank: k.
        faults: Which faults are kept.

    Raises:
        FitError: If there are fewer than two rows of a class, the rank is out of range, or a row is not finite.

    Warns:
        UserWarning: If the rank goes past what the malicious rows span, so that the rest is arbitrary; in the sound variant
            this is an error.
    """
    b, m = benign.double().cpu().numpy(), malicious.double().cpu().numpy()
    if min(len(b), len(m)) < 2:
        raise FitError(f"each class must have two rows or more, got {len(b)} benign and {len(m)} malicious")
    if not (np.isfinite(b).all() and np.isfinite(m).all()):
        raise FitError(
            "rows must be finite, got NaN or infinity; are the model's activations finite on these examples?"
        )
    if not 1 <= rank <= b.shape[1]:
        raise FitError(f"rank must be from 1 to the width {b.shape[1]}, got {rank}")
    spanned = min(b.shape[1], len(m) - (1 if faults.class_centring else 0))
    if rank > spanned:
        message = (
            f"rank is {rank}, but {len(m)} malicious rows span {spanned} directions; the others are arbitrary ones to "
            "which no row points. Give more rows or a smaller rank"
        )
        if not faults.ridge_only:
            raise FitError(message)
        warnings.warn(message, stacklevel=4)
    mean_b, mean_m = b.mean(axis=0), m.mean(axis=0)
    if faults.ridge_only:
        c_b = np.cov(b.T, bias=True) + RIDGE * np.eye(b.shape[1])
        c_m = np.cov(m.T, bias=True)
        whiten = np.linalg.inv(np.real(sqrtm(c_b)))
    else:
        c_b, c_m = ledoit_wolf(b)[0], ledoit_wolf(m)[0]
        values, vectors = np.linalg.eigh(c_b)
        if not values[0] > 1e-12 * values[-1]:
            raise FitError(
                "benign rows must vary in every direction once shrunk, got a singular covariance; add examples"
            )
        whiten = (vectors / np.sqrt(values)) @ vectors.T
    if not faults.class_centring:
        c_m = c_m + np.outer(mean_m - mean_b, mean_m - mean_b)
    whitened = whiten @ c_m @ whiten
    values, vectors = np.linalg.eigh((whitened + whitened.T) / 2)
    columns = whiten @ vectors[:, ::-1][:, :rank]
    if faults.unit_columns:
        columns = columns / np.linalg.norm(columns, axis=0, keepdims=True)
    else:
        columns = np.linalg.qr(columns)[0]
    return tuple(torch.from_numpy(np.ascontiguousarray(x)) for x in (columns, values[::-1][:rank], mean_b))  # type: ignore[return-value]
