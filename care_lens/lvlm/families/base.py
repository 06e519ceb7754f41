"""What has to be said about a family of models so that its sites can be named, read and edited.

A :class:`Family` maps care_lens's uniform site names to TransformerLens's hook points of one architecture.
Everything in it is a statement about the architecture; nothing in it runs the model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class PictureRegion(NamedTuple):
    """The part of a picture that the model sees, in the picture's own pixels."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class TowerMap:
    """Where a tower's components are on a TransformerBridge.

    Attributes:
        blocks: Name of the list of blocks on the bridge.
        points: Component name to TransformerLens's hook point inside a block. Only points at which a returned
            edit does what the component's name says belong here, or in ``read_only``.
        mid_norm: Submodule of a block whose input is the residual stream between attention and MLP. A hook
            point ``hook_resid_mid`` is made there, whose edit reaches the MLP and the residual stream alike.
        mlp: Submodule of a block whose output is added to that stream.
        own_resid_post: Whether ``hook_resid_post`` is made inside the wrapped Hugging Face block rather than
            taken from TransformerLens. True for a vision tower whose features are recorded there, before
            TransformerLens's point.
        read_only: Components at which activations can be read but not edited, with the reason.
    """

    blocks: str
    points: Mapping[str, str]
    mid_norm: str
    mlp: str
    own_resid_post: bool = False
    read_only: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A family of vision-language models.

    Attributes:
        name: Its name.
        architectures: Class names of the Hugging Face models that belong to it.
        language: The language tower.
        vision: The vision tower.
        outside: Sites outside the blocks to TransformerLens's hook points.
        vision_depth: Config to the number of vision blocks whose output reaches the language model.
        class_tokens: Config to the number of tokens before the patches in the vision tower (a CLS token).
        projector_width: Config to the width of the projector's input.
        patch_grid: Config, height and width of the pixel tensor to (rows, cols) of image tokens.
        image_tokens: Config, rows and cols to the number of placeholders of one image.
        picture_region: Image processor, width and height of a picture to the part of it that the model sees.
        extra_inputs: Other outputs of the processor that the model takes, one entry an image.
    """

    name: str
    architectures: tuple[str, ...]
    language: TowerMap
    vision: TowerMap
    outside: Mapping[str, str]
    vision_depth: Callable[[Any], int]
    class_tokens: Callable[[Any], int]
    projector_width: Callable[[Any], int]
    patch_grid: Callable[[Any, int, int], tuple[int, int]]
    image_tokens: Callable[[Any, int, int], int]
    picture_region: Callable[[Any, int, int], PictureRegion]
    extra_inputs: tuple[str, ...] = ()
