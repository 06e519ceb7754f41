"""Areas of polygons and masks within rectangles: what share of an image token's rectangle a region covers."""

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray


def polygon_area(points: ndarray) -> float:
    """Of a polygon, by the shoelace formula."""
    if len(points) < 3:
        return 0.0
    x, y = points[:, 0], points[:, 1]
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def clipped(points: ndarray, box: tuple[float, float, float, float]) -> ndarray:
    """What of a polygon is in a rectangle (Sutherland and Hodgman 1974); edges that run along the rectangle have no area."""
    x0, y0, x1, y1 = box
    for axis, edge, sign in ((0, x0, 1.0), (0, x1, -1.0), (1, y0, 1.0), (1, y1, -1.0)):
        if not len(points):
            break
        kept = []
        inside = sign * (points[:, axis] - edge) >= 0
        for i in range(len(points)):
            a, b = points[i - 1], points[i]
            if inside[i] != inside[i - 1]:
                t = (edge - a[axis]) / (b[axis] - a[axis])
                kept.append(a + t * (b - a))
            if inside[i]:
                kept.append(b)
        points = np.array(kept).reshape(-1, 2)
    return points


def mask_areas(pixels: Bool[ndarray, "height width"], boxes: Float[ndarray, "n 4"]) -> Float[ndarray, " n"]:
    """Area of a mask in each rectangle, parts of pixels counted: differences of its integral, which is bilinear within a pixel."""
    height, width = pixels.shape
    total = np.zeros((height + 1, width + 1))
    total[1:, 1:] = pixels.cumsum(axis=0, dtype=np.float64).cumsum(axis=1)

    def integral(x: ndarray, y: ndarray) -> ndarray:
        x, y = np.clip(x, 0, width), np.clip(y, 0, height)
        column, row = np.minimum(x.astype(int), width - 1), np.minimum(y.astype(int), height - 1)
        u, v = x - column, y - row
        upper = total[row, column] * (1 - u) + total[row, column + 1] * u
        lower = total[row + 1, column] * (1 - u) + total[row + 1, column + 1] * u
        return upper * (1 - v) + lower * v

    x0, y0, x1, y1 = boxes.T
    return integral(x1, y1) - integral(x0, y1) - integral(x1, y0) + integral(x0, y0)
