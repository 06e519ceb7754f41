"""The tokens of a batch as rows of a table: which example, which text, and which part of which picture each one shows."""

from collections.abc import Sequence
from typing import Any

from care_lens.core import Example
from care_lens.lens.errors import LensError
from care_lens.lvlm import HookedLVLM, LVLMInputs

PLACE = ("token_index", "span", "token", "image", "grid", "row", "col", "x0", "y0", "x1", "y1")
"""Columns of a token: its index in the row (padding not counted), "image" or "text", its text, and of an image token the picture, the
grid, row and column (-1 where it is of no grid), and the rectangle of the picture in pixels."""


def shown_token(text: str) -> str:
    """A token's text in one line."""
    return text.replace("\r", "\\r").replace("\n", "\\n").replace("\t", "\\t")


def word_of(lvlm: HookedLVLM, token_id: int) -> str:
    """The text of a token of the vocabulary."""
    return shown_token(str(lvlm.tokenizer.decode([token_id])))


def token_rows(lvlm: HookedLVLM, inputs: LVLMInputs, row: int, *, first: int = 0) -> dict[int, dict[str, Any]]:
    """The columns of every token of one row of a batch, by its position there.

    Args:
        lvlm: The model.
        inputs: The batch.
        row: The row.
        first: What the row's images are counted from.
    """
    spans = inputs.spans
    ids = inputs.input_ids[row].tolist()
    real = (~spans.padding[row]).tolist()
    image = spans.image[row].tolist()
    nowhere = {"image": -1, "grid": -1, "row": -1, "col": -1} | dict.fromkeys(("x0", "y0", "x1", "y1"), float("nan"))
    found: dict[int, dict[str, Any]] = {}
    index = 0
    for position, token in enumerate(ids):
        if real[position]:
            span = "image" if image[position] else "text"
            found[position] = {"token_index": index, "span": span, "token": word_of(lvlm, token), **nowhere}
            index += 1
    for number, grid in enumerate(spans.grids[row]):
        for at, position in enumerate(grid.positions()):
            box = dict(zip(("x0", "y0", "x1", "y1"), grid.rectangle(position), strict=True))
            place = {"image": grid.image + first, "grid": number, "row": at // grid.cols, "col": at % grid.cols}
            found[position] |= place | box
    return found


def target_ids(lvlm: HookedLVLM, targets: Sequence[Any], examples: Sequence[Example]) -> list[tuple[int, ...]]:
    """The token ids that count as each example's target.

    A word is looked for as a single token with and without a space before it.

    Args:
        lvlm: The model.
        targets: One an example: a word, an id, or several of them.
        examples: The examples.

    Raises:
        LensError: If there are not as many as examples, or a word is no single token.
    """
    if isinstance(targets, str) or len(targets) != len(examples):
        raise LensError(f"targets must be one an example, {len(examples)}, got {targets!r:.60}; give [word, ...]")
    size = int(lvlm.hf_model.get_output_embeddings().weight.shape[0])
    found = []
    for target in targets:
        some = [target] if isinstance(target, (str, int)) else list(target)
        ids: list[int] = []
        for one in some:
            mine = [one] if isinstance(one, int) else _single(lvlm, str(one))
            if not mine or any(not 0 <= token < size for token in mine):
                raise LensError(
                    f"targets must be single tokens of the model, got {one!r}; give the id of the token that stands for it, such as its "
                    "first one"
                )
            ids += mine
        found.append(tuple(sorted(set(ids))))
    return found


def _single(lvlm: HookedLVLM, word: str) -> list[int]:
    unknown = lvlm.tokenizer.unk_token_id
    forms = [lvlm.tokenizer(form, add_special_tokens=False)["input_ids"] for form in (word, f" {word}")]
    return sorted({form[0] for form in forms if len(form) == 1 and form[0] != unknown})
