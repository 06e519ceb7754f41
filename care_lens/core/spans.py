"""Which position of a batch is what: image, text, prompt, response, last, padding.

The masks come from the token ids (image placeholders, attention mask, lengths of prompt and response), never
from boundary markers. Each image also has its patch grid, so that a position maps to a rectangle of the
picture and back.
"""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from care_lens.core.display import ShortRepr

SPAN_NAMES: tuple[str, ...] = (
    "all",
    "image",
    "text",
    "prompt",
    "response",
    "prefill",
    "generated",
    "last",
    "context_end",
)
"""The names :meth:`TokenSpans.mask` answers to."""


@dataclass(frozen=True)
class PatchGrid:
    """A rectangle of image tokens: where they are in their row, and what part of the picture each one covers.

    An image that the model sees as a whole has one grid; one that is cut in tiles has one a tile, and one for the
    overview. Newline tokens belong to the image and to no grid.

    Attributes:
        start: Position of the first token in the (padded) row.
        rows: Number of patch rows.
        cols: Number of patch columns.
        width: Width in pixels of the picture's own region that the grid covers.
        height: Height in pixels of that region.
        left: Left edge of the region in the picture's pixels; above 0 where the processor crops, below 0
            where it pads.
        top: Upper edge of the region.
        stride: Positions from the start of a row of patches to the start of the next; None: ``cols``.
        image: Which of the row's images it belongs to.

    Raises:
        ValueError: If a size makes no sense.
    """

    start: int
    rows: int
    cols: int
    width: float | int
    height: float | int
    left: float | int = 0.0
    top: float | int = 0.0
    stride: int | None = None
    image: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1 or self.start < 0:
            raise ValueError(
                f"a grid must have rows and cols of 1 or more and a start of 0 or more, got {self.rows} x {self.cols} at {self.start}"
            )
        if not (0 < self.width < math.inf and 0 < self.height < math.inf):
            raise ValueError(f"width and height must be above 0 and finite, got {self.width} and {self.height}")
        if not (math.isfinite(self.left) and math.isfinite(self.top)):
            raise ValueError(f"left and top must be finite, got {self.left} and {self.top}")
        if self.step < self.cols:
            raise ValueError(f"stride must be cols ({self.cols}) or more, got {self.stride}")

    @property
    def step(self) -> int:
        """Positions from one row of patches to the next."""
        return self.cols if self.stride is None else self.stride

    @property
    def stop(self) -> int:
        """One past the position of the grid's last token."""
        return self.start + (self.rows - 1) * self.step + self.cols

    def positions(self) -> list[int]:
        """Positions of the tokens, in raster order."""
        return [self.start + row * self.step + col for row in range(self.rows) for col in range(self.cols)]

    def rectangle(self, position: int) -> tuple[float, float, float, float]:
        """Pixels ``(x0, y0, x1, y1)`` of the picture that the token at ``position`` covers.

        It covers ``x0 <= x < x1`` and ``y0 <= y < y1``. Neighbours share an edge to the bit, so that each point of the region
        is of one token.

        Raises:
            ValueError: If the position is not one of this grid's tokens.
        """
        row, col = divmod(position - self.start, self.step)
        if not (self.start <= position < self.stop and col < self.cols):
            raise ValueError(f"position must be a token of the grid in [{self.start}, {self.stop}), got {position}")
        x, y = _edges(self.left, self.width, self.cols), _edges(self.top, self.height, self.rows)
        return x[col], y[row], x[col + 1], y[row + 1]

    def position(self, x: float | int, y: float | int) -> int:
        """Position of the token that covers the pixel ``(x, y)`` of the picture.

        It is the inverse of :meth:`rectangle`: for the upper left corner of a token's rectangle it is that token.

        Raises:
            ValueError: If the model does not see that pixel.

        Example:
            >>> grid = PatchGrid(start=5, rows=27, cols=27, width=760, height=760)
            >>> all(grid.position(*grid.rectangle(p)[:2]) == p for p in grid.positions())
            True
        """
        across, down = _edges(self.left, self.width, self.cols), _edges(self.top, self.height, self.rows)
        if not (across[0] <= x < across[-1] and down[0] <= y < down[-1]):
            raise ValueError(
                f"pixel must be in [{across[0]}, {across[-1]}) x [{down[0]}, {down[-1]}), got ({x}, {y}): the model does not "
                "see the rest of the picture"
            )
        col, row = bisect.bisect_right(across, x) - 1, bisect.bisect_right(down, y) - 1
        return self.start + row * self.step + col


def _edges(first: float | int, extent: float | int, n: int) -> list[float]:
    """The n + 1 edges of n equal parts of a side."""
    return [float(first + extent * i / n) for i in range(n)] + [float(first + extent)]


@dataclass(frozen=True)
class TokenSpans(ShortRepr):
    """Boolean masks over the positions of a batch.

    Attributes:
        image: [batch, pos] image tokens.
        text: [batch, pos] every other token that is not padding, the chat template included.
        prompt: [batch, pos] everything up to and including the prompt that asks for an answer.
        response: [batch, pos] tokens of the answer: a prefill, then a teacher-forced response with its end-of-sequence token.
        last: [batch, pos] the last token of the prompt, one a row: its logits predict the first token of the
            answer.
        padding: [batch, pos] padding.
        grids: For each row its patch grids, in order of position.
        prefill: [batch, pos] the beginning of the answer that the model is given, part of ``response``; None: no row has one,
            which becomes a mask of nothing.

    Raises:
        ValueError: If a row has not exactly one last position, or if the masks overlap where they must not.
    """

    image: Bool[Tensor, "batch pos"]
    text: Bool[Tensor, "batch pos"]
    prompt: Bool[Tensor, "batch pos"]
    response: Bool[Tensor, "batch pos"]
    last: Bool[Tensor, "batch pos"]
    padding: Bool[Tensor, "batch pos"]
    grids: tuple[tuple[PatchGrid, ...], ...]
    prefill: Bool[Tensor, "batch pos"] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.prefill is None:
            object.__setattr__(self, "prefill", torch.zeros_like(self.response))
        if bool((self.prefill & ~self.response).any()):
            raise ValueError("prefill must be part of the response: it is the beginning of the answer")
        if not bool((self.image.int() + self.text.int() + self.padding.int() == 1).all()):
            raise ValueError("each position must be exactly one of image, text and padding")
        if not bool((self.prompt.int() + self.response.int() + self.padding.int() == 1).all()):
            raise ValueError("each position must be exactly one of prompt, response and padding")
        if not bool((self.last.sum(1) == 1).all()) or bool((self.last & ~self.prompt).any()):
            raise ValueError("last must be one position of the prompt in every row")
        if len(self.grids) != self.image.shape[0]:
            raise ValueError(f"grids must have one tuple a row ({self.image.shape[0]}), got {len(self.grids)}")

    @classmethod
    def from_masks(
        cls,
        *,
        image: Bool[Tensor, "batch pos"],
        padding: Bool[Tensor, "batch pos"],
        response: Bool[Tensor, "batch pos"],
        grids: Sequence[Sequence[PatchGrid]],
        prefill: Bool[Tensor, "batch pos"] | None = None,
    ) -> "TokenSpans":
        """Derive all masks from those that are independent.

        Args:
            image: [batch, pos] image tokens.
            padding: [batch, pos] padding.
            response: [batch, pos] tokens of the answer, a prefill included.
            grids: For each row its patch grids.
            prefill: [batch, pos] tokens of the answer's given beginning; None: there are none.

        Returns:
            The spans, on the masks' device.

        Raises:
            ValueError: If the masks overlap, or a row has no prompt.
        """
        prompt = ~padding & ~response
        positions = torch.arange(prompt.shape[1], device=prompt.device)
        last = torch.where(prompt, positions, -1).amax(dim=1, keepdim=True)
        return cls(
            image=image,
            text=~padding & ~image,
            prompt=prompt,
            response=response,
            last=positions == last,
            padding=padding,
            grids=tuple(tuple(row) for row in grids),
            **({} if prefill is None else {"prefill": prefill}),
        )

    def mask(self, name: str) -> Bool[Tensor, "batch pos"]:
        """The mask of that name.

        Args:
            name: "all" (everything but padding), "image", "text", "prompt", "response", "generated" (the same
                as "response": what the model answers), "prefill" (the part of it that the model is given), "last" (of the
                prompt) or "context_end" (the last token that the model is given: of the prefill, else of the prompt).

        Returns:
            [batch, pos] mask.

        Raises:
            ValueError: If there is no such span.
        """
        if name == "all":
            return ~self.padding
        if name == "generated":
            return self.response
        if name not in SPAN_NAMES:
            raise ValueError(f"span must be one of {SPAN_NAMES}, got {name!r}")
        return getattr(self, name)

    @property
    def context_end(self) -> Bool[Tensor, "batch pos"]:
        """[batch, pos] the last token before what the model writes itself, one a row: the last one of a prefill, else ``last``."""
        given = self.prompt | self.prefill
        positions = torch.arange(given.shape[1], device=given.device)
        return positions == torch.where(given, positions, -1).amax(dim=1, keepdim=True)

    def last_index(self) -> tuple[int, ...]:
        """Position of the last prompt token of each row."""
        return tuple(self.last.int().argmax(dim=1).tolist())

    def rows(self, index: Sequence[int]) -> "TokenSpans":
        """The spans of the rows ``index``, in that order."""
        rows = list(index)
        masks = {name: getattr(self, name)[rows] for name in _MASKS}
        return TokenSpans(**masks, grids=tuple(self.grids[i] for i in rows))

    def to(self, device: torch.device | str) -> "TokenSpans":
        """The same spans with their masks on ``device``."""
        return TokenSpans(**{name: getattr(self, name).to(device) for name in _MASKS}, grids=self.grids)


_MASKS = ("image", "text", "prompt", "response", "last", "padding", "prefill")
