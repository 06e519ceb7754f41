"""Regions of the picture as positions: boxes, masks and polygons, in pixels of the original picture, on any tiling.

A region stands wherever positions are asked for (``mediate``, ``patch_map``, ``knockout``, ``attribute``), beside spans such as "image"
and "last". It means the image tokens whose rectangles of the picture it overlaps: of a picture that is cut in tiles those of the overview
and of every tile, of merged patches (Qwen) the merged token. In the vision tower it means the patches there, which may be finer.

    sign = Region.box(40, 12, 90, 50, name="sign")
    mediate(lvlm, pairs, outcome=outcome, positions=(sign, sign.outside(), "image"))

Each pair can have its own: ``Region.each([Region.box(...), ...], name="sign")``, one a pair, in order.

An effect of a region is that of its tokens, whose states hold, after the first blocks, what other patches passed on to them. To ask what the
pixels of a region do, exchange them in the picture itself, or patch ``vision.hook_embed``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from PIL import Image
from torch import Tensor

from care_lens.core.digests import content_digest
from care_lens.core.display import ShortRepr
from care_lens.core.spans import SPAN_NAMES, PatchGrid
from care_lens.lvlm import LVLMInputs
from care_lens.mediation.errors import MediationError
from care_lens.mediation.region_areas import clipped, mask_areas, polygon_area

if TYPE_CHECKING:
    import plotly.graph_objects as go

Kind = Literal["box", "polygon", "mask", "each"]


@dataclass(frozen=True, eq=False)
class Region(ShortRepr):
    """A part of a picture. Make one with :meth:`box`, :meth:`polygon`, :meth:`mask` or :meth:`each`.

    Attributes:
        kind: "box", "polygon", "mask" or "each".
        name: What it is called in results.
        points: Corners (x, y) in pixels, of a box and a polygon.
        pixels: [height, width] of a mask.
        members: One region a pair, of "each".
        image: Which of an example's pictures, counted from 0.
        cover: A token belongs to the region if at least this share of its rectangle is in it; 0: if any of it is.
        is_outside: Whether the other tokens of the picture's grids are meant.
    """

    kind: Kind
    name: str
    points: tuple[tuple[float, float], ...] = ()
    pixels: Bool[ndarray, "height width"] | None = None
    members: "tuple[Region, ...]" = ()
    image: int = 0
    cover: float = 0.0
    is_outside: bool = False

    def __post_init__(self) -> None:
        if not self.name or self.name in SPAN_NAMES or self.name == "each" or self.name.isdecimal():
            raise MediationError(
                f"name must be a name of its own, not that of a span or of a token, got {self.name!r}; give name=..."
            )
        if not 0 <= self.cover <= 1:
            raise MediationError(f"cover must be in [0, 1], a share of a token's rectangle, got {self.cover}")
        if self.image < 0:
            raise MediationError(f"image must be 0 or more, the index of a picture, got {self.image}")

    @classmethod
    def box(
        cls,
        x0: float | int,
        y0: float | int,
        x1: float | int,
        y1: float | int,
        *,
        name: str = "",
        image: int = 0,
        cover: float | int = 0.0,
    ) -> "Region":
        """A rectangle.

        Args:
            x0: Left edge in pixels.
            y0: Upper edge.
            x1: Right edge.
            y1: Lower edge.
            name: What it is called; empty: its edges.
            image: Which of an example's pictures.
            cover: Least share of a token's rectangle.

        Raises:
            MediationError: If it has no area.

        Example:
            >>> grid = PatchGrid(start=5, rows=2, cols=2, width=16, height=16)
            >>> Region.box(0, 0, 9, 4).tokens([grid], size=(16, 16))
            [5, 6]
            >>> Region.box(0, 0, 9, 4, cover=0.5).tokens([grid], size=(16, 16))
            [5]
        """
        if not (np.isfinite([x0, y0, x1, y1]).all() and x0 < x1 and y0 < y1):
            raise MediationError(
                f"box must have x0 < x1 and y0 < y1, got {(x0, y0, x1, y1)}; give left, upper, right, lower edge"
            )
        corners = tuple((float(x), float(y)) for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1)))
        label = name or f"box {x0:g},{y0:g},{x1:g},{y1:g}" + (f" of {image}" if image else "")
        return cls("box", label, points=corners, image=image, cover=float(cover))

    @classmethod
    def polygon(
        cls, points: Sequence[Sequence[float | int]], *, name: str = "", image: int = 0, cover: float | int = 0.0
    ) -> "Region":
        """A polygon whose edges do not cross.

        Args:
            points: Corners (x, y) in pixels, three or more, in order.
            name: What it is called; empty: a digest of its corners.
            image: Which of an example's pictures.
            cover: Least share of a token's rectangle.

        Raises:
            MediationError: If it has no area.
        """
        corners = tuple((float(x), float(y)) for x, y in points)
        if len(corners) < 3 or not np.isfinite(corners).all() or polygon_area(np.array(corners)) == 0:
            raise MediationError(f"points must be three corners or more, not on one line, got {list(points)[:4]}")
        return cls(
            "polygon", name or f"polygon {content_digest(corners)[:6]}", points=corners, image=image, cover=float(cover)
        )

    @classmethod
    def mask(cls, pixels: Any, *, name: str = "", image: int = 0, cover: float | int = 0.0) -> "Region":
        """Any set of pixels.

        Args:
            pixels: [height, width] true or non-zero in the region; an array, a tensor or a picture, as large as the original picture.
            name: What it is called; empty: a digest of it.
            image: Which of an example's pictures.
            cover: Least share of a token's rectangle.

        Raises:
            MediationError: If it is no such array, or no pixel is in it.
        """
        given = pixels.convert("L") if isinstance(pixels, Image.Image) else pixels
        held = np.asarray(given.cpu() if isinstance(given, Tensor) else given)
        if held.ndim != 2 or held.dtype.kind not in "biuf":
            raise MediationError(
                f"pixels must be [height, width] numbers, got {held.dtype} {held.shape}; give one value a pixel"
            )
        inside = held != 0
        if not inside.any():
            raise MediationError("pixels must have one or more in the region, got none")
        label = name or f"mask {content_digest(inside.tobytes().hex())[:6]}"
        return cls("mask", label, pixels=inside, image=image, cover=float(cover))

    @classmethod
    def each(cls, regions: "Sequence[Region]", *, name: str) -> "Region":
        """One region a pair (or an example), in order, under one name.

        Args:
            regions: As many as there are pairs.
            name: What they are called together.

        Raises:
            MediationError: If there are none.
        """
        if not regions or any(region.kind == "each" for region in regions):
            raise MediationError(f"regions must be one simple region a pair, got {len(regions)}")
        return cls("each", name, members=tuple(regions))

    def outside(self, *, name: str = "") -> "Region":
        """The other tokens of the picture's grids: a control, usually much larger.

        Args:
            name: What they are called; empty: "not " and this region's name.
        """
        return replace(self, name=name or f"not {self.name}", is_outside=not self.is_outside)

    def of(self, index: int) -> "Region":
        """The region of a pair.

        Raises:
            MediationError: If there is none for it.
        """
        if self.kind != "each":
            return self
        if index >= len(self.members):
            raise MediationError(
                f"regions of {self.name!r} must be one a pair, got {len(self.members)} for pair {index}"
            )
        member = self.members[index]
        return replace(member, is_outside=member.is_outside != self.is_outside)

    def describe(self) -> dict[str, Any]:
        """What it is, JSON-able, for settings and digests."""
        if self.kind == "each":
            members = [member.describe() for member in self.members]
            return {"kind": "each", "members": members, "outside": self.is_outside}
        found: dict[str, Any] = {
            "kind": self.kind,
            "image": self.image,
            "cover": self.cover,
            "outside": self.is_outside,
        }
        if self.pixels is not None:
            return {
                **found,
                "size": list(self.pixels.shape[::-1]),
                "digest": content_digest(np.packbits(self.pixels).tobytes().hex()),
            }
        return {**found, "points": [list(point) for point in self.points]}

    def shares(self, rectangles: Sequence[tuple[float, float, float, float]]) -> Float[ndarray, " n"]:
        """Which share of each rectangle is in the region, whatever :meth:`outside` says.

        Args:
            rectangles: n of (x0, y0, x1, y1) in pixels.

        Returns:
            [n] shares in [0, 1].
        """
        sizes = np.array([(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in rectangles])
        if self.pixels is not None:
            return mask_areas(self.pixels, np.array(rectangles)) / sizes
        return np.array([polygon_area(clipped(np.array(self.points), box)) for box in rectangles]) / sizes

    def tokens(self, grids: Sequence[PatchGrid], *, size: tuple[int, int]) -> list[int]:
        """The positions of the region's image tokens.

        Args:
            grids: The patch grids of one row.
            size: Width and height of the picture in pixels.

        Returns:
            Positions in ascending order.

        Raises:
            MediationError: If a mask is of another size than the picture, or the region is one a pair.
        """
        if self.kind == "each":
            raise MediationError(f"region {self.name!r} is one a pair; ask region.of(pair)")
        if self.pixels is not None and self.pixels.shape != (size[1], size[0]):
            raise MediationError(
                f"mask {self.name!r} must be as large as the picture, {size[0]} x {size[1]} pixels, got "
                f"{self.pixels.shape[1]} x {self.pixels.shape[0]}; resize it, or give one a pair with Region.each"
            )
        positions = [(grid, at) for grid in grids if grid.image == self.image for at in grid.positions()]
        if not positions:
            return []
        share = self.shares([grid.rectangle(at) for grid, at in positions])
        chosen = share > 1e-9 if self.cover == 0 else share >= self.cover - 1e-9
        return sorted(
            at for (_, at), inside in zip(positions, chosen.tolist(), strict=True) if inside != self.is_outside
        )

    def plot(self, image: Image.Image, *, grids: Sequence[PatchGrid] = (), value: str = "") -> "go.Figure":
        """The region over a picture, with the rectangles of its tokens where grids are given.

        Args:
            image: The picture.
            grids: The patch grids of the prepared example, ``lvlm.prepare(example).spans.grids[0]``.
            value: What is written beside it.
        """
        from care_lens.plots.regions import plot_region

        return plot_region(self, image, grids=grids, value=value)


Place = str | Region
"""A position: the name of a span, the index of a token, or a region."""


def split_regions(places: Sequence[Place]) -> tuple[tuple[str, ...], dict[str, Region]]:
    """Positions by name, and those of them that are regions.

    Raises:
        MediationError: If two regions have one name, or it is a single text.
    """
    if isinstance(places, (str, Region)):
        shown = repr(places) if isinstance(places, str) else "a region"
        raise MediationError(f"positions must be several names, got the text {shown}; write ({shown},)")
    regions: dict[str, Region] = {}
    for place in places:
        if isinstance(place, Region):
            if (before := regions.get(place.name)) is not None and before.describe() != place.describe():
                raise MediationError(
                    f"regions must have names of their own, got two called {place.name!r}; give name=..."
                )
            regions[place.name] = place
    if clash := [place for place in places if isinstance(place, str) and place in regions]:
        raise MediationError(
            f"regions must have names of their own, got the position {clash[0]!r} beside a region of that name"
        )
    return tuple(dict.fromkeys(place.name if isinstance(place, Region) else place for place in places)), regions


def region_settings(regions: Mapping[str, Region]) -> dict[str, Any]:
    """What settings and checkpoints say of regions; nothing without any."""
    return {"regions": {name: region.describe() for name, region in regions.items()}} if regions else {}


def region_mask(inputs: LVLMInputs, region: Region, index: Sequence[int]) -> Bool[Tensor, "rows pos"]:
    """Where each row of a batch has the region's tokens.

    Args:
        inputs: The batch, as ``HookedLVLM.prepare`` made it.
        region: The region.
        index: For each row the pair or example that it is of.

    Returns:
        [rows, pos] on the CPU; nothing in rows without that picture.

    Raises:
        MediationError: If a mask is of another size than a picture, or the batch was not prepared from examples.
    """
    mask = torch.zeros(inputs.input_ids.shape, dtype=torch.bool)
    if len(inputs.examples) != inputs.batch_size:
        raise MediationError(
            "inputs must be prepared from examples for regions, got a batch whose pictures' sizes are not known"
        )
    for row, (example, pair) in enumerate(zip(inputs.examples, index, strict=True)):
        one = region.of(pair)
        if one.image < len(example.images):
            mask[row, one.tokens(inputs.spans.grids[row], size=example.images[one.image].size)] = True
    return mask


def patch_region(
    inputs: LVLMInputs, region: Region, index: Sequence[int], picture: Bool[Tensor, "entry pos"]
) -> Bool[Tensor, "entry pos"]:
    """Where the region's patches are in an activation of the vision tower or the projector.

    Args:
        inputs: The batch; each row has one picture that is not cut in tiles.
        region: The region.
        index: For each row the pair that it is of.
        picture: [entry, pos] which entries of the activation are patches of the picture.

    Raises:
        MediationError: If the patches are no multiple of the image tokens, so that it is not known what they show.
    """
    mask = torch.zeros(picture.shape, dtype=torch.bool)
    for entry, row in enumerate(inputs.image_rows):
        grids = inputs.spans.grids[row]
        places = picture[entry].nonzero()[:, 0]
        finer = (len(places) / (grids[0].rows * grids[0].cols)) ** 0.5 if len(grids) == 1 else 0.0
        if finer < 1 or finer != int(finer):
            raise MediationError(
                f"patches must be those of one picture in one piece for a region, got {len(places)} of them for {len(grids)} grids; "
                "use sites of the language tower"
            )
        fine = replace(grids[0], start=0, rows=grids[0].rows * int(finer), cols=grids[0].cols * int(finer), stride=None)
        one = region.of(index[row])
        mask[entry, places[one.tokens([fine], size=inputs.examples[row].images[one.image].size)]] = True
    return mask
