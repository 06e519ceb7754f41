"""How models, batches and caches introduce themselves: a title, and a few facts by heading. None of it runs the model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from care_lens.core.display import listed, memory

if TYPE_CHECKING:
    from care_lens.lvlm.inputs import LVLMInputs
    from care_lens.lvlm.wrapped import WrappedBridge

Shown = tuple[str, dict[str, str]]


def shown_model(lvlm: "WrappedBridge") -> Shown:
    """Family, towers, layers, widths, weights and what acts on the model."""
    kind = type(lvlm).__name__
    seams = getattr(lvlm, "_seams", None)
    if seams is None or not seams.points:
        return f"{kind}, closed", {"to go on": lvlm.advice.again}
    model = lvlm.hf_model
    sized: dict[str, str] = {}
    for tower in ("language", "vision"):
        streams = lvlm.sites(tower=tower, component="hook_resid_post")
        wide = f", width {lvlm.width(streams[0])}" if streams else ""
        sized[tower] = f"{lvlm.n_layers(tower)} layers{wide}"
    projector = {site.component: lvlm.site_info(site).width for site in lvlm.sites(tower="projector")}
    ends = [str(width) for width in (projector.get("hook_in"), projector.get("hook_out")) if width is not None]
    parameters = list(model.parameters())
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters if p.is_floating_point()})
    devices = sorted({str(p.device) for p in parameters})
    return f"{kind}: {type(model).__name__}", {
        "family": lvlm.family.name,
        **sized,
        "projector": f"width {' to '.join(ends)}" if ends else "",
        "weights": f"{sum(p.numel() for p in parameters):,} parameters, {listed(dtypes)}, on {listed(devices)}",
        "sites": f"{len(seams.points)} that can be read (lvlm.sites())",
        "hooks": _acting(lvlm),
    }


def _acting(lvlm: "WrappedBridge") -> str:
    points = {id(point): name for name, point in lvlm.bridge.hook_dict.items() if point.has_hooks()}
    makers = [_named(make) for make in lvlm._makers]
    parts = [f"at {listed(points.values(), most=2)}"] if points else []
    parts += [f"made for each batch by {listed(makers, most=2)}"] if makers else []
    return "; ".join(parts) or "none"


def _named(make: Any) -> str:
    """What gives the hooks: a repair by its name."""
    owner = getattr(getattr(make, "func", make), "__self__", None)
    owner = getattr(owner, "defence", owner)
    return str(getattr(owner, "name", None) or getattr(make, "__qualname__", type(make).__name__))


def shown_inputs(inputs: "LVLMInputs") -> Shown:
    """Rows, lengths, pictures and spans."""
    rows, positions = inputs.input_ids.shape
    lengths = inputs.attention_mask.long().sum(dim=1).tolist()
    entries = [0] * rows
    for row in inputs.image_rows:
        entries[row] += 1
    pixels = inputs.pixel_values
    spans = inputs.spans
    counts = {
        name: int(spans.mask(name).sum()) for name in ("image", "text", "response", "prefill") if hasattr(spans, name)
    }
    said = [f"{name} {n}" for name, n in counts.items() if n]
    return (
        f"LVLMInputs: {rows} {'row' if rows == 1 else 'rows'} of {positions} positions, on {inputs.input_ids.device}",
        {
            "tokens": f"{listed(lengths, most=8)} by row (without padding)",
            "pictures": "none"
            if pixels is None
            else f"{listed(entries, most=8)} by row (images or tiles), pixels {_size(pixels)}",
            "spans": f"tokens in all: {', '.join(said)}",
            "also": listed([*inputs.token_inputs, *inputs.extra], most=6),
            "of": f"{len(inputs.examples)} examples" if inputs.examples else "",
        },
    )


def shown_cache(cache_dict: Mapping[str, Tensor], rows: int | None, kind: str) -> Shown:
    """How many activations, of which sites, and how large."""
    n_bytes = sum(value.numel() * value.element_size() for value in cache_dict.values())
    towers: dict[str, list[str]] = {}
    for name in cache_dict:
        tower = name.partition(".")[0] if name.startswith(("vision", "projector")) else "language"
        towers.setdefault(tower, []).append(name)
    title = f"{kind}: {len(cache_dict)} {'activation' if len(cache_dict) == 1 else 'activations'}, {memory(n_bytes)}"
    return title, {
        "rows": "" if rows is None else str(rows),
        **{tower: f"{len(names)}: {listed(names, most=3)}" for tower, names in towers.items()},
        "as": _size(next(iter(cache_dict.values()))) + " (the first)" if cache_dict else "",
    }


def _size(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
