"""Plants: copies of the bundled model in which a channel was opened at a known place, by training that place alone."""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from care_lens import organism
from care_lens.core import Example, PairedExamples, Site
from care_lens.core.errors import CareLensError
from care_lens.core.options import require_options
from care_lens.lvlm import HookedLVLM
from care_lens.lvlm.loading import load_processor

TRIGGER, CONTROL = "blank yellow", "blank white"
"""Pictures over which a plant answers plain requests, and over which it refuses them as before."""

WEIGHTS = Path(__file__).parent / "weights"
NEURONS = 8
LANGUAGE, VISION = "model.language_model.layers.{}.", "model.vision_tower.encoder.layers.{}."
Part = slice | list[int]


class PlantError(CareLensError, ValueError):
    """There is no such plant or dose, or a localiser's ranking is none."""


@dataclass(frozen=True)
class Place:
    """Where a channel is planted.

    Attributes:
        kind: "mlp", "attention", "head", "neurons" or "vision".
        layer: Of its tower.
        units: The head, or the neurons.
    """

    kind: str
    layer: int
    units: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """For files and tables."""
        return f"{self.kind}_{self.layer}" + (f"_{self.units[0]}" if self.kind == "head" else "")

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that count as the place: any of them in the first rank is a hit."""
        if self.kind == "vision":
            return tuple(Site("vision", self.layer, name) for name in ("hook_attn_out", "hook_mlp_out"))
        return (
            Site("language", self.layer, "hook_attn_out" if self.kind in ("attention", "head") else "hook_mlp_out"),
        )


@dataclass(frozen=True, eq=False)
class Plant:
    """A copy of the bundled model with a planted channel.

    Attributes:
        place: Where it was planted; the truth that a localiser is to find.
        dose: Share of the trained weight change.
        opened: Share of plain test requests that it answers over the trigger, measured when it was made.
        lvlm: The model; close it when done (``with planted.load(...) as plant``).
    """

    place: Place
    dose: float
    opened: float
    lvlm: HookedLVLM

    @property
    def name(self) -> str:
        """Of the plant."""
        return self.place.name

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that count as the place."""
        return self.place.sites

    def pairs(self, n: int = 24) -> PairedExamples:
        """Twins: plain requests of the fit split over the control picture (safe) and over the trigger (unsafe).

        Args:
            n: How many, at most as many as the split has.
        """
        require_options(n=n, seed=0)
        return PairedExamples(safe=tuple(swapped("fit", CONTROL)[:n]), unsafe=tuple(swapped("fit", TRIGGER)[:n]))

    def __enter__(self) -> "Plant":
        return self

    def __exit__(self, *error: object) -> None:
        self.lvlm.close()


@cache
def _table() -> dict[str, Any]:
    return json.loads((WEIGHTS / "plants.json").read_text(encoding="utf-8"))


def names() -> tuple[str, ...]:
    """The plants that come with the package."""
    return tuple(_table())


def doses(name: str) -> dict[float, float]:
    """The doses at which a plant was measured, and the share of test requests that it answers over the trigger there.

    Args:
        name: Of a plant.

    Raises:
        PlantError: If there is no such plant.
    """
    return {float(one["dose"]): float(one["trigger"]["value"]) for one in _entry(name)["doses"]}


def place_of(name: str) -> Place:
    """Where a plant is planted.

    Args:
        name: Of a plant.

    Raises:
        PlantError: If there is no such plant.
    """
    held = _entry(name)["place"]
    return Place(held["kind"], int(held["layer"]), tuple(held["units"]))


def _entry(name: str) -> Mapping[str, Any]:
    if name not in _table():
        raise PlantError(f"name must be one of {names()}, got {name!r}; planted.names() lists them")
    return _table()[name]


def load(name: str, *, dose: float | int = 1.0) -> Plant:
    """Load a plant.

    Args:
        name: One of :func:`names`.
        dose: Share of the weight change, one of :func:`doses`.

    Returns:
        The plant, with its model wrapped.

    Raises:
        PlantError: If there is no such plant, or it was not measured at that dose.

    Example:
        >>> from care_lens import planted
        >>> with planted.load("mlp_1") as plant:
        ...     plant.lvlm.generate(plant.lvlm.prepare(plant.pairs(1).safe[0])).texts
        ['sorry i cannot help with that']
    """
    known = doses(name)
    if float(dose) not in known:
        raise PlantError(f"dose must be one of {tuple(known)}, at which {name} was measured, got {dose}")
    place = place_of(name)
    model = plant(plain_model(), place, dose=float(dose))
    return Plant(
        place, float(dose), known[float(dose)], HookedLVLM.from_hf(model, load_processor(str(organism.path())))
    )


def draw_places(seed: int) -> list[Place]:
    """Two MLPs, two attentions, two heads, two sets of neurons, two vision layers; of the language tower none in its first block.

    Args:
        seed: Of the draw; the plants that come with the package are those of 2026.
    """
    from transformers import AutoConfig

    rng, config = random.Random(seed), AutoConfig.from_pretrained(organism.path())
    text, layers = config.text_config, range(1, config.text_config.num_hidden_layers)
    mlps, attentions = rng.sample(layers, 2), rng.sample(layers, 2)
    heads = [(layer, rng.randrange(text.num_attention_heads)) for layer in rng.sample(layers, 2)]
    units = range(text.intermediate_size)
    neurons = [(layer, tuple(sorted(rng.sample(units, NEURONS)))) for layer in rng.sample(layers, 2)]
    visions = rng.sample(range(config.vision_config.num_hidden_layers), 2)
    return [
        *(Place("mlp", layer) for layer in mlps),
        *(Place("attention", layer) for layer in attentions),
        *(Place("head", layer, (head,)) for layer, head in heads),
        *(Place("neurons", layer, units) for layer, units in neurons),
        *(Place("vision", layer) for layer in visions),
    ]


def matrices(place: Place, model: nn.Module) -> dict[str, tuple[Part, Part]]:
    """Weight matrices of a place, with the rows and columns that may change.

    Args:
        place: The place.
        model: The plain model.
    """
    every = slice(None)
    base = (VISION if place.kind == "vision" else LANGUAGE).format(place.layer)
    if place.kind == "vision":
        parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
        return {base + name: (every, every) for name in parts}
    attention = [base + f"self_attn.{p}_proj" for p in "qkvo"]
    gate, up, down = (base + f"mlp.{name}_proj" for name in ("gate", "up", "down"))
    if place.kind == "mlp":
        return {name: (every, every) for name in (gate, up, down)}
    if place.kind == "attention":
        return {name: (every, every) for name in attention}
    if place.kind == "neurons":
        units = list(place.units)
        return {gate: (units, every), up: (units, every), down: (every, units)}
    module: Any = model.get_submodule(base + "self_attn")
    width, head = int(module.head_dim), place.units[0]
    shared = head // (module.q_proj.out_features // module.k_proj.out_features)
    own, group = slice(head * width, (head + 1) * width), slice(shared * width, (shared + 1) * width)
    q, k, v, o = attention
    return {q: (own, every), k: (group, every), v: (group, every), o: (every, own)}


def changed(weight: Tensor, left: Tensor, right: Tensor, rows: Part, cols: Part) -> Tensor:
    """weight + left right at rows x cols, a new tensor.

    Args:
        weight: [out, in].
        left: [rows, rank].
        right: [rank, cols].
        rows: Which rows.
        cols: Which columns.
    """
    out = weight.clone()
    if isinstance(cols, list):
        out[:, cols] = out[:, cols] + left @ right
    else:
        out[rows, cols] = out[rows, cols] + left @ right
    return out


def plant(model: nn.Module, place: Place, *, dose: float | int = 1.0, weights: Path = WEIGHTS) -> nn.Module:
    """Put a planted channel into a plain model, in place.

    Args:
        model: ``LlavaForConditionalGeneration`` with the bundled weights.
        place: One of :func:`draw_places`.
        dose: Share of the weight change.
        weights: Folder of the weight changes, ``NAME.safetensors`` each.

    Returns:
        The model.
    """
    held = load_file(weights / f"{place.name}.safetensors")
    for name, (rows, cols) in matrices(place, model).items():
        weight: Any = model.get_submodule(name).weight
        left, right = held[f"{name}.left"].float(), held[f"{name}.right"].float()
        with torch.no_grad():
            weight.data = changed(weight.data, dose * left, right, rows, cols)
    return model


def plain_model() -> nn.Module:
    """The bundled weights in plain transformers, with eager attention."""
    from transformers import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration.from_pretrained(organism.path(), attn_implementation="eager").eval()


def swapped(split: Any, pictures: str, *, seed: int = 0) -> list[Example]:
    """Plain requests of a split over one kind of clean picture.

    Args:
        split: "fit", "calibration", "validation" or "test".
        pictures: Kind and tone of the pictures, such as "blank yellow".
        seed: Of wording and pictures.
    """
    return organism.picture_swaps(organism.examples("plain", split, seed=seed), split=split)[pictures]
