"""Scores of tokens with where they come from: patches of the picture, and the strings of the text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from scipy.stats import spearmanr
from torch import Tensor

from care_lens.capture.attribution import TokenAttribution
from care_lens.core.display import ShortRepr
from care_lens.core.held import not_held
from care_lens.core.site import Site, SiteLike
from care_lens.core.spans import PatchGrid, TokenSpans


@dataclass(frozen=True, eq=False)
class TokenScores(ShortRepr):
    """Scores of the tokens of a batch at some sites.

    Attributes:
        sites: The sites.
        values: [site, batch, pos] float64 on the CPU: scores of image and text tokens, NaN elsewhere.
        kept: [site, batch, pos] which tokens are kept.
        spans: Of the batch, on the CPU.
        strings: For each row the string of each position, or None.
        attribution: How they were scored.
    """

    sites: tuple[Site, ...]
    values: Float[Tensor, "site batch pos"]
    kept: Bool[Tensor, "site batch pos"]
    spans: TokenSpans
    strings: tuple[tuple[str, ...], ...] | None
    attribution: TokenAttribution

    def at(self, site: SiteLike) -> Float[Tensor, "batch pos"]:
        """The scores at one site.

        Raises:
            KeyError: If it was not scored.
        """
        return self.values[self._index(site)]

    def patch_map(self, site: SiteLike, row: int, *, grid: int = 0) -> Float[Tensor, "rows cols"]:
        """Scores of an image's tokens as they lie in the picture.

        Args:
            site: The site.
            row: Row of the batch.
            grid: Which of the row's patch grids; a tiled picture has several.

        Returns:
            [rows, cols] of the grid, float64.

        Raises:
            KeyError: If the site was not scored.
            ValueError: If the row has no such grid.
        """
        return self.at(site)[row][self._grid(row, grid).positions()].reshape(
            self._grid(row, grid).rows, self._grid(row, grid).cols
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row a site and token: site, tower, layer, component, row, position, modality, token, score, kept, image,
        x0, y0, x1, y1 (pixels of the picture; NaN for text and for image tokens outside of every grid)."""
        places = [_rectangles(grids) for grids in self.spans.grids]
        kinds = {"visual": self.spans.image, "textual": self.spans.text}
        records = []
        for index, site in enumerate(self.sites):
            for row, position in (~self.values[index].isnan()).nonzero().tolist():
                image, box = places[row].get(position, (-1, (np.nan,) * 4))
                records.append(
                    {
                        "site": str(site),
                        "tower": site.tower,
                        "layer": -1 if site.layer is None else site.layer,
                        "component": site.component,
                        "row": row,
                        "position": position,
                        "modality": next(name for name, mask in kinds.items() if bool(mask[row, position])),
                        "token": "" if self.strings is None else self.strings[row][position],
                        "score": float(self.values[index, row, position]),
                        "kept": bool(self.kept[index, row, position]),
                        "image": image,
                        **dict(zip(("x0", "y0", "x1", "y1"), box, strict=True)),
                    }
                )
        return pd.DataFrame.from_records(records)

    def agreement(self, other: "TokenScores") -> pd.DataFrame:
        """How far two ways of scoring the same batch agree.

        Args:
            other: Scores of the same batch at the same sites.

        Returns:
            One row a site, row of the batch and modality that has tokens: site, row, modality, n (tokens), jaccard (of
            the kept ones), chance (of two random choices of as many, to first order), spearman (of the scores; NaN
            where one does not vary).

        Raises:
            ValueError: If they are of other sites or another batch.
        """
        if self.sites != other.sites or self.values.shape != other.values.shape:
            raise ValueError("scores must be of the same batch at the same sites to be compared; score both alike")
        records = []
        for index, site in enumerate(self.sites):
            for row in range(self.values.shape[1]):
                for modality, mask in (("visual", self.spans.image[row]), ("textual", self.spans.text[row])):
                    if not bool(mask.any()):
                        continue
                    first, second = self.kept[index, row][mask], other.kept[index, row][mask]
                    n = int(mask.sum())
                    expected = float(first.sum()) * float(second.sum()) / n
                    records.append(
                        {
                            "site": str(site),
                            "row": row,
                            "modality": modality,
                            "n": n,
                            "jaccard": float((first & second).sum() / (first | second).sum()),
                            "chance": expected / (float(first.sum() + second.sum()) - expected),
                            "spearman": _spearman(self.values[index, row][mask], other.values[index, row][mask]),
                        }
                    )
        return pd.DataFrame.from_records(records)

    def _index(self, site: SiteLike) -> int:
        wanted = Site.parse(site)
        if wanted not in self.sites:
            raise not_held("site that was scored", wanted, self.sites)
        return self.sites.index(wanted)

    def _grid(self, row: int, grid: int) -> PatchGrid:
        grids = self.spans.grids[row]
        if not 0 <= grid < len(grids):
            raise ValueError(f"grid must be below {len(grids)}, the number of patch grids of row {row}, got {grid}")
        return grids[grid]


def score_tokens(
    activations: Mapping[SiteLike, Float[Tensor, "batch pos d"]],
    spans: TokenSpans,
    *,
    attribution: TokenAttribution | None = None,
    gradients: Mapping[SiteLike, Float[Tensor, "batch pos d"]] | None = None,
    strings: Sequence[Sequence[str]] | None = None,
) -> TokenScores:
    """Score the tokens of a batch at sites of the language tower, all of one width at once.

    Args:
        activations: [batch, pos, d] by site, such as ``run_with_cache`` gives.
        spans: Of the batch.
        attribution: How; None: the paper's.
        gradients: [batch, pos, d] by site, for method "gradient".
        strings: For each row the string of each position, such as ``tokenizer.convert_ids_to_tokens`` gives.

    Returns:
        The scores.

    Raises:
        ValueError: If there are no sites, widths differ, strings are not of the batch's shape, or the method lacks what
            it needs.
    """
    if not activations:
        raise ValueError("activations must hold at least one site, got none")
    attribution = attribution or TokenAttribution()
    shape = spans.image.shape
    if strings is not None and (len(strings) != shape[0] or any(len(row) != shape[1] for row in strings)):
        raise ValueError(
            f"strings must be {shape[0]} rows of {shape[1]} tokens, padding included; give every position one"
        )
    parsed = {Site.parse(site): tensor for site, tensor in activations.items()}
    if len({tensor.shape for tensor in parsed.values()}) > 1:
        raise ValueError(
            f"activations must be of one shape, got {sorted({tuple(tensor.shape) for tensor in parsed.values()})}; "
            "score sites of other widths by themselves"
        )
    slopes = None
    if gradients is not None:
        given = {Site.parse(site): tensor for site, tensor in gradients.items()}
        if missing := [str(site) for site in parsed if site not in given]:
            raise ValueError(f"gradients must hold every site of the activations, got none for {missing}")
        slopes = torch.stack([given[site] for site in parsed])
    stacked = torch.stack(list(parsed.values()))
    masks = {"image": spans.image, "text": spans.text}
    values = attribution.scores(stacked, **masks, gradient=slopes)
    kept = attribution.keep_scored(values, **masks)
    return TokenScores(
        sites=tuple(parsed),
        values=values.cpu(),
        kept=kept.cpu(),
        spans=spans.to("cpu"),
        strings=None if strings is None else tuple(tuple(row) for row in strings),
        attribution=attribution,
    )


def _rectangles(grids: Sequence[PatchGrid]) -> dict[int, tuple[int, tuple[float, float, float, float]]]:
    """By position: the image it is of, and its rectangle."""
    return {position: (grid.image, grid.rectangle(position)) for grid in grids for position in grid.positions()}


def _spearman(first: Tensor, second: Tensor) -> float:
    if len(first) < 2 or bool((first == first[0]).all()) or bool((second == second[0]).all()):
        return float("nan")
    return float(np.asarray(spearmanr(first.numpy(), second.numpy())[0]))
