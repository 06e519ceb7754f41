"""Token attribution: which tokens of a sample stand for its modality.

The paper's scores (method "kernel" with the Gaussian kernel). With D the squared Euclidean distances between two sets
of tokens, ``K = exp(-D / (2 sigma^2))`` and ``sigma = sqrt(0.5 median(D > 0))``, so that ``2 sigma^2`` is that median.
``H = I - 1 1^T / n`` centres.

- Visual tokens are scored against the text: ``s_i = ||row i of K H||^2``, large for a patch that is near to
  some text tokens and far from others.
- Text tokens are scored among themselves: ``0.7 x mean squared distance to the others + 0.3 x |diag(H K
  H)|``, large for tokens that differ from the others. The two terms are in different units: the first grows
  with the square of the activations' size and the second never exceeds 1, so that the first decides unless
  activations are small. These are the weights of the code published with the paper.

So that the choice can be compared, K may be another kernel (``Kernel``), and the method another: "gradient",
``|sum_d gradient x activation|`` of an outcome, to first order what the outcome would change by without the token;
"last", the last token of each kind; "all", every token.

Scores are min-max normalised to [0, 1] within the sample and kind, and the best tokens are kept. Everything is
computed in float64 on the tokens' device, for many samples and layers at once. Memory: ``n_visual x n_text`` or
``n_text^2`` numbers a sample, for as many samples at a time as fit in about 1 GB.

Source: Fu et al. 2026 (arXiv:2603.27240), section on token attribution, and its published code.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from care_lens.capture.kernel_scores import Kernel, min_max, padded_text_scores, padded_visual_scores

Method = Literal["kernel", "gradient", "last", "all"]


_PAIRS = 2**24
"""Pairs of tokens that are looked at together."""


@dataclass(frozen=True)
class TokenAttribution:
    """How the tokens of a sample are scored, and how many are kept.

    Attributes:
        visual: Image tokens kept: a count (int) or a share (float) of the sample's.
        text: Text tokens kept, likewise; the published code keeps half.
        method: How tokens are scored; "all" and "last" keep those, whatever the numbers above.
        kernel: Of method "kernel"; the paper's is "gaussian".
        distance_weight: Weight of the mean squared distance in the text score of method "kernel".

    Raises:
        ValueError: If a count is below 1 or a share not in (0, 1], or an option is not known.
    """

    visual: int | float = 0.5
    text: int | float = 0.5
    method: Method = "kernel"
    kernel: Kernel = "gaussian"
    distance_weight: float = 0.7

    def __post_init__(self) -> None:
        for name, keep in (("visual", self.visual), ("text", self.text)):
            valid = keep >= 1 if isinstance(keep, int) else 0 < keep <= 1
            if not valid:
                raise ValueError(f"{name} must be a count of 1 or more or a share in (0, 1], got {keep!r}")
        for name, value, options in (("method", self.method, Method), ("kernel", self.kernel, Kernel)):
            if value not in get_args(options):
                raise ValueError(f"{name} must be one of {get_args(options)}, got {value!r}")
        _check_weight(self.distance_weight)

    def scores(
        self,
        tokens: Float[Tensor, "*layers batch pos d"],
        *,
        image: Bool[Tensor, "batch pos"],
        text: Bool[Tensor, "batch pos"],
        gradient: Float[Tensor, "*layers batch pos d"] | None = None,
    ) -> Float[Tensor, "*layers batch pos"]:
        """Scores of all tokens of a batch, at one site or at several of one width.

        Args:
            tokens: [..., batch, pos, d] activations; leading axes are layers.
            image: [batch, pos] image tokens.
            text: [batch, pos] text tokens.
            gradient: [..., batch, pos, d] of an outcome in the tokens, for method "gradient"
                (``care_lens.capture.token_gradients``).

        Returns:
            [..., batch, pos] float64: scores in [0, 1] of image and of text tokens, each kind normalised by itself;
            NaN at all other positions.

        Raises:
            ValueError: If a row has image tokens to score and no text, or the method needs a gradient and has none.
        """
        flat = tokens.detach().reshape(-1, *tokens.shape[-2:])
        repeats = len(flat) // len(image) if len(image) else 0
        kinds = {"image": image.to(flat.device), "text": text.to(flat.device)}
        masks = {name: mask.repeat(repeats, 1) for name, mask in kinds.items()}
        found = torch.full(flat.shape[:2], torch.nan, dtype=torch.float64, device=_device(flat))
        if self.method == "kernel":
            self._kernel_scores(flat, masks, found)
        else:
            for mask in masks.values():
                raw = self._plain_scores(flat, mask, gradient)
                where = mask.to(found.device)
                found = torch.where(where, min_max(raw, where) if self.method == "gradient" else raw, found)
        return found.reshape(tokens.shape[:-1])

    def keep(
        self,
        tokens: Float[Tensor, "*layers batch pos d"],
        *,
        image: Bool[Tensor, "batch pos"],
        text: Bool[Tensor, "batch pos"],
        gradient: Float[Tensor, "*layers batch pos d"] | None = None,
    ) -> Bool[Tensor, "*layers batch pos"]:
        """Which tokens of a batch are kept; arguments and errors as for :meth:`scores`.

        Returns:
            [..., batch, pos] True where kept, of both kinds; ``& image`` are the visual ones.
        """
        scores = self.scores(tokens, image=image, text=text, gradient=gradient)
        return self.keep_scored(scores, image=image, text=text)

    def keep_scored(
        self,
        scores: Float[Tensor, "*layers batch pos"],
        *,
        image: Bool[Tensor, "batch pos"],
        text: Bool[Tensor, "batch pos"],
    ) -> Bool[Tensor, "*layers batch pos"]:
        """Which tokens scores that :meth:`scores` gave would keep."""
        kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        for mask, amount in ((image, self.visual), (text, self.text)):
            where = mask.to(scores.device).expand(scores.shape)
            if self.method in ("all", "last"):
                kept |= where & (scores > 0)
            else:
                kept |= _best(scores, where, amount)
        return kept

    def keep_visual(
        self, visual: Float[Tensor, "n_visual d"], text: Float[Tensor, "n_text d"]
    ) -> Bool[Tensor, " n_visual"]:
        """Which image tokens of a sample are kept.

        Args:
            visual: [n_visual, d] its image tokens at one site.
            text: [n_text, d] its text tokens there.

        Returns:
            [n_visual] True where kept.

        Raises:
            ValueError: If there are no tokens of either kind, or the method needs a gradient.
        """
        _require_tokens(visual=visual, text=text)

        image = torch.arange(len(visual) + len(text), device=visual.device)[None] < len(visual)
        return self.keep(torch.cat([visual, text])[None], image=image, text=~image)[0, : len(visual)]

    def keep_text(self, text: Float[Tensor, "n_text d"]) -> Bool[Tensor, " n_text"]:
        """Which text tokens of a sample are kept.

        Args:
            text: [n_text, d] its text tokens at one site.

        Returns:
            [n_text] True where kept.

        Raises:
            ValueError: If there are no tokens, or the method needs a gradient.
        """
        _require_tokens(text=text)
        everything = torch.ones(1, len(text), dtype=torch.bool, device=text.device)
        return self.keep(text[None], image=~everything, text=everything)[0]

    def _kernel_scores(self, tokens: Tensor, masks: dict[str, Tensor], found: Tensor) -> None:
        """Into ``found``, for as many rows at a time as memory allows."""
        bare = (masks["image"].any(dim=1) & ~masks["text"].any(dim=1)).nonzero()[:, 0].tolist()
        if bare:
            raise ValueError(
                f"every row with image tokens must have text tokens to score them against, got none in row {bare[0]} "
                f"({len(bare)} such rows)"
            )
        n_text = int(masks["text"].sum(dim=1).max()) if len(tokens) else 0
        n_image = int(masks["image"].sum(dim=1).max()) if len(tokens) else 0
        if n_text == 0:
            return
        step = max(1, _PAIRS // (n_text * max(n_text, n_image)))
        for start in range(0, len(tokens), step):
            rows = slice(start, start + step)
            words, word, word_at = _packed(tokens[rows], masks["text"][rows])
            _put(found[rows], word_at, word, padded_text_scores(words, word, self.kernel, self.distance_weight))
            if bool(masks["image"][rows].any()):
                patches, patch, patch_at = _packed(tokens[rows], masks["image"][rows])
                _put(found[rows], patch_at, patch, padded_visual_scores(patches, patch, words, word, self.kernel))

    def _plain_scores(self, tokens: Tensor, mask: Tensor, gradient: Tensor | None) -> Tensor:
        """[rows, pos], meaningful where the mask is True."""
        if self.method == "gradient":
            if gradient is None:
                raise ValueError(
                    "gradient must be given for method 'gradient', got none; take it with capture.token_gradients and "
                    "pass it to scores or keep (capture takes an outcome=, and takes the gradient itself)"
                )
            slopes = _wide(gradient).reshape(tokens.shape)
            return (_wide(tokens) * slopes).sum(dim=-1).abs()
        ones = mask.to(_device(tokens), torch.float64)
        if self.method == "all":
            return ones
        return (ones.cumsum(dim=1) == ones.sum(dim=1, keepdim=True)).double() * ones


def visual_scores(
    visual: Float[Tensor, "n_visual d"], text: Float[Tensor, "n_text d"], *, kernel: Kernel = "gaussian"
) -> Float[Tensor, " n_visual"]:
    """Scores of a sample's image tokens: the squared norms of the rows of the centred kernel with its text.

    Args:
        visual: [n_visual, d] image tokens.
        text: [n_text, d] text tokens of the same sample and site.
        kernel: Which kernel; the paper's is "gaussian".

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
    if visual.shape[1] != text.shape[1]:
        raise ValueError(f"visual and text must be of one width, got {visual.shape[1]} and {text.shape[1]}")
    if not bool(visual.isfinite().all() and text.isfinite().all()):
        raise ValueError("visual and text must hold finite numbers, got NaN or infinity")
    every = [torch.ones(1, len(part), dtype=torch.bool, device=_device(part)) for part in (visual, text)]
    return padded_visual_scores(_wide(visual)[None], every[0], _wide(text)[None], every[1], kernel)[0]


def text_scores(
    text: Float[Tensor, "n_text d"], *, distance_weight: float = 0.7, kernel: Kernel = "gaussian"
) -> Float[Tensor, " n_text"]:
    """Scores of a sample's text tokens: how much each differs from the others.

    Args:
        text: [n_text, d] text tokens.
        distance_weight: Weight of the mean squared distance; the centred kernel's diagonal has the rest.
        kernel: Which kernel; the paper's is "gaussian".

    Returns:
        [n_text] scores in [0, 1], float64; all 0 where the tokens cannot be told apart.

    Raises:
        ValueError: If there are no tokens, or the weight is not in [0, 1].

    Notes:
        ``s_i = w mean_j D_ij + (1 - w) |(H K H)_ii|``, the mean over all tokens (itself included), then
        min-max normalised.
    """
    _require_tokens(text=text)
    _check_weight(distance_weight)
    every = torch.ones(1, len(text), dtype=torch.bool, device=_device(text))
    return padded_text_scores(_wide(text)[None], every, kernel, distance_weight)[0]


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
    if bool(scores.isnan().any()):
        raise ValueError("scores must be numbers, got NaN")
    amount = k if k is not None else float(ratio or 0)
    return _best(scores, torch.ones_like(scores, dtype=torch.bool), amount)


def _best(scores: Tensor, where: Tensor, amount: int | float) -> Tensor:
    """[..., n] the best of the positions of each row, of equal ones the earlier."""
    counts = where.sum(dim=-1, keepdim=True)
    wanted = torch.full_like(counts, amount) if isinstance(amount, int) else (counts * amount).long().clamp(min=1)
    order = scores.masked_fill(~where, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(scores.shape[-1], device=scores.device).expand(scores.shape)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    return where & (rank < wanted)


def _packed(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The masked tokens of each row moved to the front: [rows, n, d] float64, [rows, n] which are there, positions."""
    count = max(int(mask.sum(dim=1).max()), 1)
    positions = (~mask).long().argsort(dim=1, stable=True)[:, :count]
    there = mask.gather(1, positions)
    taken = _wide(tokens.gather(1, positions[..., None].expand(-1, -1, tokens.shape[2])))
    there = there.to(taken.device)
    # A padded place may hold NaN, which 0 x NaN would spread.
    return taken.masked_fill(~there[..., None], 0.0), there, positions.to(taken.device)


def _put(found: Tensor, positions: Tensor, there: Tensor, scores: Tensor) -> None:
    """Scores back to their positions, in place; places that hold no token keep what they have."""
    found.scatter_(1, positions, torch.where(there, scores, found.gather(1, positions)))


def _require_tokens(**sets: Tensor) -> None:
    for name, tokens in sets.items():
        if len(tokens) == 0:
            raise ValueError(f"{name} must hold at least one token, got none")


def _check_weight(weight: float) -> None:
    if not 0 <= weight <= 1:
        raise ValueError(f"distance_weight must be in [0, 1], got {weight}")


def _device(tokens: Tensor) -> torch.device:
    """The tokens' device, or the CPU where that has no float64."""
    return torch.device("cpu") if tokens.device.type == "mps" else tokens.device


def _wide(tokens: Tensor) -> Tensor:
    return tokens.detach().to(_device(tokens), torch.float64)
