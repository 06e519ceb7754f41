"""Random pictures, for processes that do not import the conftest."""

import torch
from PIL import Image


def make_picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())
