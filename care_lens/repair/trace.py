"""The trace of readers: their scores token by token, over prompt and answer.

trace = read_scores(lvlm, examples, readers, max_new_tokens=32, trace=True)
trace.to_dataframe()  # one row for each token and reader
trace.plot(example=0)
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.display import ShortRepr
from care_lens.repair.errors import RepairError

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True, eq=False)
class RowTrace:
    """The scores of one example.

    Attributes:
        example: Its place among the examples that were read.
        id: Of the example, or None.
        tokens: The tokens as text, padding left out; those of the answer up to its end, less the last one, which the model never is given.
        spans: "image", "text" or "generated" for each.
        own: [reader, token] the score of each token by itself; -inf where the reader does not read it (of a combined reader: see :class:`ScoreTrace`).
        score: [reader, token] the score as it stands at each token, on which a gate decides.
    """

    example: int
    id: str | None
    tokens: tuple[str, ...]
    spans: tuple[str, ...]
    own: Float[Tensor, "reader token"]
    score: Float[Tensor, "reader token"]


@dataclass(frozen=True, eq=False)
class ScoreTrace(ShortRepr):
    """The scores of several readers on several examples, token by token.

    The score as it stands at a token of the prompt is that of the whole prompt, which is read at once; from each token of the answer on it is the
    largest so far. The own score of a combined reader at a token is what its combination makes of the readers' own scores there; of one whose
    readers look at different tokens that is often -inf, while the score that stands combines what each has seen.

    Attributes:
        rows: One for each example.
        readers: Names of the readers, in order.
    """

    rows: tuple[RowTrace, ...]
    readers: tuple[str, ...]

    @property
    def scores(self) -> Float[Tensor, "example reader"]:
        """[example, reader] the largest scores, as :func:`~care_lens.repair.read_scores` gives them without a trace."""
        if not self.rows:
            return torch.zeros(0, len(self.readers))
        return torch.stack([row.score[:, -1] for row in self.rows])

    def shown(self) -> tuple[str, dict[str, str]]:
        """How much it holds."""
        tokens = sum(len(row.tokens) for row in self.rows)
        return "ScoreTrace", {
            "examples": str(len(self.rows)),
            "tokens": str(tokens),
            "readers": ", ".join(self.readers),
        }

    def to_dataframe(self) -> pd.DataFrame:
        """One row for each token and reader.

        Returns:
            Columns example, id, position (0 is the row's first token that is no padding), token (as text), span ("image", "text" or "generated"),
            reader, own_score and score.
        """
        made = [
            {
                "example": row.example,
                "id": row.id,
                "position": position,
                "token": row.tokens[position],
                "span": row.spans[position],
                "reader": name,
                "own_score": float(row.own[i, position]),
                "score": float(row.score[i, position]),
            }
            for row in self.rows
            for i, name in enumerate(self.readers)
            for position in range(len(row.tokens))
        ]
        return pd.DataFrame(
            made, columns=["example", "id", "position", "token", "span", "reader", "own_score", "score"]
        )

    def plot(self, *, example: int = 0, threshold: float | int | None = None) -> "go.Figure":
        """The scores over the tokens of one example.

        Args:
            example: Which one.
            threshold: Of a gate, drawn as a line; None: no line.

        Raises:
            RepairError: If there is no such example.
        """
        from care_lens.plots.recording import plot_trace

        frame = self.to_dataframe()
        frame = frame.loc[frame.example == example]
        if frame.empty:
            raise RepairError(f"example must be one of the {len(self.rows)} that were read, got {example}")
        return plot_trace(pd.DataFrame(frame), threshold=threshold)
