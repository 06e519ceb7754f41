"""What has to be said about a family of models so that its sites can be named, read and edited.

A :class:`Family` maps care_lens's uniform site names to TransformerLens's hook points of one architecture, and says how its
processor's output becomes a batch. Everything in it is a statement about the architecture; nothing in it runs the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

from care_lens.lvlm.packing import Packing


class PictureRegion(NamedTuple):
    """The part of a picture that the model sees, in the picture's own pixels."""

    left: float
    top: float
    width: float
    height: float


class Dims(NamedTuple):
    """Sizes of a tower.

    Attributes:
        layers: Number of blocks.
        width: Of the residual stream.
        heads: Of attention.
        d_head: Width of a head.
        d_mlp: Number of neurons of an MLP.
    """

    layers: int
    width: int
    heads: int
    d_head: int
    d_mlp: int


def common_dims(config: Any) -> Dims:
    """Sizes under the names that most towers' configs have."""
    heads = config.num_attention_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Dims(config.num_hidden_layers, config.hidden_size, heads, d_head, config.intermediate_size)


class Tile(NamedTuple):
    """A rectangle of image tokens.

    Attributes:
        offset: Its first token, counted among the image's own tokens.
        rows: Rows of tokens.
        cols: Tokens a row.
        region: What it shows of the picture.
        stride: Tokens from the start of a row to the start of the next, newline tokens included; None: ``cols``.
    """

    offset: int
    rows: int
    cols: int
    region: PictureRegion
    stride: int | None = None


class ImageLayout(NamedTuple):
    """The tokens of one image: how many, and which rectangles of the picture they show."""

    tokens: int
    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Pictured:
    """What is known of the images of one example when its tokens are laid out.

    Attributes:
        config: The model's config.
        processor: The processor.
        sizes: Width and height of each picture in pixels.
        outputs: What the processor made of this example alone: tensors by name, first axes as the processor gives them.
    """

    config: Any
    processor: Any
    sizes: Sequence[tuple[int, int]]
    outputs: Mapping[str, Tensor]


Side: TypeAlias = Literal["in", "out"]
"""Of a module: its first argument, or what it returns (the first of them, if it returns several)."""


@dataclass(frozen=True)
class PlainTower:
    """Where a tower's components are on a plain Hugging Face model, for hooks of plain torch.

    Attributes:
        blocks: Path of the list of blocks on the model.
        points: Component name to a module inside a block ("" is the block itself) and the side of it that is the component.
        mid_norm: Module of a block whose input is the residual stream between attention and MLP.
        mlp: Module of a block whose output is added to that stream.
        attn: Module of a block that is attention.
        out: Components whose value is a linear map's output, to that linear map inside a block; only where nothing (no norm, no
            scale, no router) stands between the two. What is linear can be folded into their weights.
        final_norm: Path on the model of the norm before the unembedding; "" for towers without one.
    """

    blocks: str
    points: Mapping[str, tuple[str, Side]]
    mid_norm: str
    mlp: str = "mlp"
    attn: str = "self_attn"
    out: Mapping[str, str] = field(default_factory=dict)
    final_norm: str = ""


@dataclass(frozen=True)
class TowerMap:
    """Where a tower's components are on a TransformerBridge.

    Attributes:
        blocks: Name of the list of blocks on the bridge.
        points: Component name to TransformerLens's hook point inside a block. Only points at which a returned edit does
            what the component's name says belong here, or in ``read_only``.
        mid_norm: Submodule of a block whose input is the residual stream between attention and MLP. A hook point
            ``hook_resid_mid`` is made there, whose edit reaches the MLP and the residual stream alike.
        mlp: Submodule of a block whose output is added to that stream.
        attn: Submodule of a block that is attention.
        own_resid_post: Whether ``hook_resid_post`` is made inside the wrapped Hugging Face block rather than taken from
            TransformerLens. True for a vision tower whose features are recorded there, before TransformerLens's point.
        own_pattern: Whether ``attn.hook_pattern`` is made inside eager attention, so that edits act.
        eager: Name of the eager attention function in the model's file.
        scales: Parameters of the wrapped block that multiply the outputs of attention and MLP before they are added to the
            stream, if there are any; ``hook_attn_out`` and ``hook_mlp_out`` are then made after them.
        read_only: Components at which activations can be read but not edited, with the reason.
        absent: Components that this tower, or some of its layers, do not have, with the reason.
        packing: Key of the packing (see :attr:`Family.packings`) of this tower's activations, if all images share one row.
        dims: The model's config to the tower's sizes.
        plain: Where the same components are on the plain model; None: not said, so that plain models cannot be hooked.
    """

    blocks: str
    points: Mapping[str, str]
    mid_norm: str
    mlp: str
    dims: Callable[[Any], Dims]
    attn: str = "attn"
    own_resid_post: bool = False
    own_pattern: bool = False
    eager: str = "eager_attention_forward"
    scales: tuple[str, str] | None = None
    read_only: Mapping[str, str] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    packing: str | None = None
    plain: PlainTower | None = None


def _image_ids(processor: Any) -> Sequence[int]:
    # Gemma3's ``image_token_id`` is the one that starts an image; the plural has those that its tokens become.
    return getattr(processor, "image_token_ids", None) or [processor.image_token_id]


@dataclass(frozen=True)
class Family:
    """A family of vision-language models.

    Attributes:
        name: Its name.
        architectures: Class names of the Hugging Face models that belong to it.
        language: The language tower.
        vision: The vision tower.
        outside: Sites outside the blocks to TransformerLens's hook points.
        plain_outside: The same sites to a module's path on the plain Hugging Face model and the side of it.
        vision_depth: Config to the number of vision blocks whose output reaches the language model.
        projector_width: Config to the width of the projector's input.
        layout: The images of one example to the layout of their tokens, one each.
        class_tokens: Config to the number of tokens before the patches in the vision tower (a CLS token).
        closing_tokens: Config to the number of tokens after them (Llama 4 has its CLS token there).
        entries: The images of one example to the number of entries (images or tiles) of the vision tower's activations.
        outside_packing: Sites outside the blocks to keys of packings.
        packings: Model, arguments and keyword arguments of the vision tower's forward pass to packings by key; None where
            activations are [image or tile, patch, d] in raster order already.
        tower_module: Path of the Hugging Face module whose forward pass ``packings`` looks at.
        image_text: The processor to the text that stands for an image in a formatted prompt.
        image_ids: The processor to the ids among which that of the model's image tokens must be.
        prompt: Processor, text and number of images to the formatted prompt; None: the processor's chat template.
        nested_images: Whether the processor wants images as one list an example.
        batched: Whether one call of the processor can take rows with and without images, each with one image at most, and
            gives one pixel tensor of one size an image.
        extra_inputs: Other outputs of the processor about images that the model takes.
        token_inputs: Outputs of the processor about tokens that the model takes, with their value at response tokens.
        own_positions: Whether positions are counted by the model itself (rotary embeddings in several dimensions).
        pixels_in_dtype: Whether pixels must come in the model's dtype because the model does not cast them itself.
        first_position: Position of a row's first token, where they are not.
        needs_images: Whether the processor refuses text without images, which the tokenizer alone then encodes.
        variant: Config to the family of models with that config, where it depends on more than the architecture's name.
        adapters: Architectures to TransformerLens adapters that stand in for TransformerLens's own (or for none).
        notes: Site components of a tower ("vision.hook_resid_post") to what else to know about them.
    """

    name: str
    architectures: tuple[str, ...]
    language: TowerMap
    vision: TowerMap
    outside: Mapping[str, str]
    vision_depth: Callable[[Any], int]
    projector_width: Callable[[Any], int]
    layout: Callable[[Pictured], Sequence[ImageLayout]]
    class_tokens: Callable[[Any], int] = lambda config: 0
    closing_tokens: Callable[[Any], int] = lambda config: 0
    entries: Callable[[Pictured], int] = lambda about: len(about.sizes)
    outside_packing: Mapping[str, str] = field(default_factory=dict)
    packings: Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Mapping[str, Packing]] | None = None
    tower_module: str = ""
    image_text: Callable[[Any], str] = lambda processor: processor.image_token
    image_ids: Callable[[Any], Sequence[int]] = _image_ids
    prompt: Callable[[Any, str, int], str] | None = None
    nested_images: bool = False
    batched: bool = False
    extra_inputs: tuple[str, ...] = ()
    token_inputs: Mapping[str, int] = field(default_factory=dict)
    own_positions: bool = False
    pixels_in_dtype: bool = False
    first_position: int = 0
    needs_images: bool = False
    variant: "Callable[[Any], Family] | None" = None
    adapters: Mapping[str, type] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    plain_outside: Mapping[str, tuple[str, Side]] = field(default_factory=dict)
