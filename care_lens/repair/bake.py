"""Fold a repair into the weights: an ordinary checkpoint that needs no hooks, with a certificate of what it computes.

    certificate = repair.bake(lvlm, "baked", examples=requests)
    certificate.largest_logit_difference  # between the baked model and the one with hooks, on those requests
    model = AutoModelForImageTextToText.from_pretrained("baked")

An edit ``h' = h + E h + e`` of what a linear map gives, ``h = W x + b``, is a linear map again: ``W' = (1 + E) W`` and ``b' = b + E b +
e``; of what a linear map is given (the neurons of an MLP), ``W' = W (1 + E)`` and ``b' = b + W e``. So a repair can be baked where its
parts are linear (ungated, without positions, not weighed by norms) and at a site that a linear map alone makes: the output of an MLP or
of attention, or an MLP's neurons. Everything else is refused, part by part, with the reason. A bias that the architecture has no room
for is refused too; where its config can switch one on (``mlp_bias``, ``attention_bias``), that is done and said in the certificate.

The fold is computed in float64 and cast to the dtype of the weights. In half precision the cast is felt, as the certificate tells.
"""

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor, nn

from care_lens.core import files
from care_lens.core.examples import Example
from care_lens.core.identity import examples_digest, model_fingerprint, repair_fingerprint
from care_lens.core.results import package_versions
from care_lens.core.site import Site
from care_lens.lvlm import HookedLVLM
from care_lens.lvlm.attached import acquire, release
from care_lens.lvlm.families import Family
from care_lens.repair.errors import BakeError
from care_lens.repair.linear import LinearPart, RowEdit

_NAME, _KIND, _SCHEMA = "care_lens_certificate", "care_lens.BakeCertificate", 1
_ROWS = 4096
_FLAGS = {"hook_attn_out": "attention_bias", "hook_mlp_out": "mlp_bias", "mlp.hook_post": "mlp_bias"}
"""Settings of a language config that give the output maps a bias, where its architecture knows them."""


@dataclass(frozen=True)
class Folded:
    """One part that was folded.

    Attributes:
        part: Its name in the repair.
        site: Where it edited.
        module: The linear map that does it now.
        bias: What became of the map's bias: "none", "kept", "changed" or "added".
    """

    part: str
    site: str
    module: str
    bias: str


@dataclass(frozen=True, kw_only=True)
class BakeCertificate:
    """What was folded, and how far the baked model is from the one with hooks on given examples.

    Attributes:
        repair: Name of the repair.
        repair_fingerprint: Digest of the repair and all its numbers.
        model_fingerprint: Digest of the weights that it was folded into.
        weights: SHA-256 of each file of weights of the checkpoint.
        folded: The parts.
        config: Settings of the language config that were changed.
        examples: Number of examples.
        examples_digest: Digest of the examples.
        positions: Number of positions that were compared; all but padding.
        largest_logit_difference: Between the model with hooks and the baked one as loaded from disk.
        largest_logit_change: By the repair: between the model with hooks and without, to compare with.
        same_token: Share of positions at which both have the same likeliest next token.
        dtype: Of the weights.
        attention: The attention implementation that both ran with.
        versions: Of the packages.
    """

    repair: str
    repair_fingerprint: str
    model_fingerprint: str
    weights: Mapping[str, str]
    folded: tuple[Folded, ...]
    config: Mapping[str, Any]
    examples: int
    examples_digest: str
    positions: int
    largest_logit_difference: float
    largest_logit_change: float
    same_token: float
    dtype: str
    attention: str
    versions: Mapping[str, str]

    @classmethod
    def load(cls, directory: str | Path) -> "BakeCertificate":
        """Read the certificate of a baked checkpoint, and check that the weights beside it are those it is about.

        Args:
            directory: The checkpoint.

        Raises:
            FileNotFoundError: If there is none.
            ArtifactError: If it is damaged.
            BakeError: If the weights beside it are others.
        """
        _, content = files.load_artifact(directory, _NAME, kind=_KIND, schema=_SCHEMA)
        held = dict(content["certificate"])
        certificate = cls(**{**held, "folded": tuple(Folded(**part) for part in held["folded"])})
        if (found := _weight_sums(Path(directory))) != dict(certificate.weights):
            wrong = sorted(
                name for name in {*found, *certificate.weights} if found.get(name) != certificate.weights.get(name)
            )
            raise BakeError(
                f"the weights in {directory} must be those of its certificate, got others in {wrong}; bake the repair again"
            )
        return certificate


def bake(
    repair: Any,
    model: HookedLVLM | nn.Module,
    directory: str | Path,
    *,
    examples: Sequence[Example],
    processor: Any = None,
    batch_size: int = 8,
) -> BakeCertificate:
    """Fold a repair into the weights of a model and save it as an ordinary checkpoint, with the processor and a certificate.

    The model itself is not changed. Memory: a second copy of it, which is loaded from the checkpoint and compared.

    Args:
        repair: A HybridFusion, or a defence that says in ``linear_parts`` what it is.
        model: The model; a HookedLVLM or a plain Hugging Face model.
        directory: Where to; it must not exist, or be empty.
        examples: What the two models are compared on; with their responses, where all have one.
        processor: The processor of a plain model.
        batch_size: Examples a forward pass.

    Returns:
        The certificate, which also lies in the directory as ``care_lens_certificate.json``.

    Raises:
        BakeError: If a part cannot be folded; ``reasons`` has the reason of every such part. Also if there are no examples, the
            directory is taken, or the weights are not in memory.
        ValueError: If the repair does not fit the model.

    Example:
        >>> certificate = bake(repair, lvlm, "baked", examples=requests)  # doctest: +SKIP
    """
    directory = Path(directory)
    if not examples:
        raise BakeError(
            "examples must hold at least one to compare the models on, got none; give requests of the kind it is for"
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise BakeError(
            f"directory must not exist or be empty, got {directory}, which holds something; give another one"
        )
    if isinstance(model, HookedLVLM):
        return _bake(repair, model, directory, examples, batch_size)
    if processor is None:
        raise BakeError("processor must be given with a plain model, got None; give the model's processor")
    lvlm = acquire(model, processor)
    try:
        return _bake(repair, lvlm, directory, examples, batch_size)
    finally:
        release(lvlm)


def _bake(
    repair: Any, lvlm: HookedLVLM, directory: Path, examples: Sequence[Example], batch_size: int
) -> BakeCertificate:
    repair.check(lvlm)
    model = lvlm.hf_model
    state, folded, flags = _fold_all(repair, lvlm)
    directory.parent.mkdir(parents=True, exist_ok=True)
    work = directory.with_name(f".{directory.name}.{uuid4().hex}")
    work.mkdir()
    try:
        _save(model, state, flags, work)
        lvlm.processor.save_pretrained(work)
        certificate = BakeCertificate(
            repair=repair.name,
            repair_fingerprint=repair_fingerprint(repair),
            model_fingerprint=model_fingerprint(model),
            weights=_weight_sums(work),
            folded=tuple(folded),
            config=flags,
            examples=len(examples),
            examples_digest=examples_digest(examples),
            **_compared(repair, lvlm, work, examples, batch_size),
            dtype=str(model.dtype).removeprefix("torch."),
            attention=_attention(model),
            versions=package_versions(),
        )
        files.save_artifact(
            work, _NAME, kind=_KIND, schema=_SCHEMA, data={}, content={"certificate": asdict(certificate)}
        )
        if directory.exists():
            directory.rmdir()
        work.rename(directory)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return certificate


def _fold_all(repair: Any, lvlm: HookedLVLM) -> tuple[dict[str, Tensor], list[Folded], dict[str, Any]]:
    """The new state dict, what was folded, and the settings of the config that it needs."""
    model, family = lvlm.hf_model, lvlm.family
    if not hasattr(repair, "linear_parts"):
        raise BakeError(
            f"{repair.name} must say in linear_parts() what is linear in it, got a {type(repair).__name__} without"
        )
    state = dict(model.state_dict())
    if any(tensor.is_meta for tensor in state.values()):
        raise BakeError(
            "the weights must be in memory to be folded, got offloaded ones; load the model without offloading"
        )
    folded, flags, reasons = list[Folded](), dict[str, Any](), dict[str, str]()
    for part in repair.linear_parts():
        try:
            made, flag = _fold(part, model, family, state)
        except BakeError as error:
            reasons[f"{part.name} at {part.site}"] = str(error)
            continue
        folded.append(made)
        flags |= flag
    if reasons:
        told = "; ".join(f"{part}: {reason}" for part, reason in reasons.items())
        raise BakeError(
            f"every part of a repair must be linear to be baked, got parts of {repair.name} that are not: {told}. Attach the repair instead "
            "(repair.attach(model, processor))",
            reasons,
        )
    return state, folded, flags


def _fold(part: LinearPart, model: Any, family: Family, state: dict[str, Tensor]) -> tuple[Folded, dict[str, Any]]:
    """Fold one part into the state dict; its tensors are replaced, never written into."""
    if part.edit is None:
        raise BakeError(part.reason)
    path, side, scale = _map_of(part.site, model, family, state)
    weight, bias = state[f"{path}.weight"], state.get(f"{path}.bias")
    new_weight, new_bias = folded_map(weight, bias, part.edit, side=side, scale=scale)
    flags: dict[str, Any] = {}
    became = "kept" if bias is not None else "none"
    if bool((new_bias != (0 if bias is None else bias)).any()):
        became = "changed" if bias is not None else "added"
    if became == "added":
        flag = _FLAGS[part.site.component]
        if not _has_bias_with(model, flag, path):
            raise BakeError(
                f"it needs a bias at {path}, which this architecture has not and cannot be given ({flag} does nothing there); a writer whose "
                "target is zero needs none"
            )
        flags[flag] = True
    state[f"{path}.weight"] = new_weight
    if became in ("changed", "added"):
        state[f"{path}.bias"] = new_bias
    return Folded(part.name, str(part.site), path, became), flags


def folded_map(
    weight: Tensor, bias: Tensor | None, edit: RowEdit, *, side: str, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A linear map with an affine edit in it.

    Args:
        weight: [out, in].
        bias: [out], or None.
        edit: The edit.
        side: "out": it edits what the map gives; "in": what it is given.
        scale: What the map gives is multiplied with this before it is edited.

    Returns:
        Weight and bias, in the dtype of the weight.
    """
    exact = weight.detach().double()
    shift = exact.new_zeros(exact.shape[0]) if bias is None else bias.detach().double()
    width = exact.shape[0 if side == "out" else 1]
    constant = edit(exact.new_zeros(1, width))[0]
    change = torch.zeros_like(exact)
    for start in range(0, exact.shape[1], _ROWS):
        columns = slice(start, min(start + _ROWS, exact.shape[1]))
        if side == "out":
            change[:, columns] = (edit(scale * exact[:, columns].T) - constant).T / scale
        else:
            unit = torch.eye(width, dtype=exact.dtype, device=exact.device)[columns]
            change[:, columns] = exact @ (edit(unit) - constant).T
    moved = edit((scale * shift)[None])[0] / scale if side == "out" else exact @ constant
    return (exact + change).to(weight.dtype), (shift + moved).to(weight.dtype)


def _map_of(site: Site, model: Any, family: Family, state: Mapping[str, Tensor]) -> tuple[str, str, float]:
    """The linear map that alone makes a site or is alone given it: its path, which side of it, and what scales its output."""
    where = family.language
    plain = where.plain
    if plain is None:
        raise BakeError(f"the {family.name} family does not say where its modules are (TowerMap.plain)")
    if site.component.startswith("hook_resid"):
        raise BakeError(
            "it edits the residual stream, which passes the block by as well: no weight makes all of it; edit hook_mlp_out or hook_attn_out"
        )
    block = f"{plain.blocks}.{site.layer}"
    scale = 1.0
    if site.component == "mlp.hook_post":
        inside, side = plain.points[site.component][0], "in"
    elif (found := plain.out.get(site.component)) is not None:
        inside, side = found, "out"
        if where.scales:
            scale = float(getattr(model.get_submodule(block), where.scales[site.component == "hook_mlp_out"]))
    else:
        raise BakeError(f"a norm or a router stands between the last linear map and {site.component} in this family")
    path = f"{block}.{inside}"
    weight = state.get(f"{path}.weight")
    known = f"{path}.weight" in state and weight is not None and weight.ndim == 2 and weight.is_floating_point()
    if not known or not _is_linear(model, path):
        raise BakeError(f"{path} is not an ordinary linear map (it may be quantised or have an adapter on it)")
    if scale == 0:
        raise BakeError(f"the block multiplies what {path} gives with 0")
    return path, side, scale


def _is_linear(model: Any, path: str) -> bool:
    """Whether a module is torch's own linear map; a bridge's stands for the one that it holds."""
    module = model.get_submodule(path)
    while (inside := getattr(module, "original_component", None)) is not None:
        module = inside
    return type(module) is nn.Linear


def _fresh(model: Any, flags: Mapping[str, Any]) -> Any:
    """A model of the same class without weights, its language config changed."""
    config = copy.deepcopy(model.config)
    for name, value in flags.items():
        setattr(config.text_config, name, value)
    with torch.device("meta"):
        return type(model)(config)


def _has_bias_with(model: Any, flag: str, path: str) -> bool:
    """Whether a setting of the language config gives a map a bias."""
    if not hasattr(model.config.text_config, flag):
        return False
    return f"{path}.bias" in _fresh(model, {flag: True}).state_dict()


def _save(model: Any, state: Mapping[str, Tensor], flags: Mapping[str, Any], directory: Path) -> None:
    fresh = _fresh(model, flags)
    complete = dict(state)
    for name, tensor in fresh.state_dict().items():
        if name not in complete:  # a setting that gives one map a bias gives it to others too, where it must be nothing
            complete[name] = torch.zeros(tensor.shape, dtype=model.dtype)
    fresh.load_state_dict(complete, strict=True, assign=True)
    fresh.tie_weights()
    fresh.generation_config = copy.deepcopy(model.generation_config)
    fresh.save_pretrained(directory)


@torch.no_grad()
def _compared(
    repair: Any, lvlm: HookedLVLM, directory: Path, examples: Sequence[Example], batch_size: int
) -> dict[str, Any]:
    """The model with hooks, and without, against the baked one as it is loaded."""
    model = lvlm.hf_model
    options = {"device_map": model.hf_device_map} if hasattr(model, "hf_device_map") else {}
    baked = type(model).from_pretrained(
        directory, dtype="auto", attn_implementation=_attention(model), local_files_only=True, **options
    )
    baked = baked.eval() if options else baked.eval().to(lvlm.device)
    responses = all(example.response is not None for example in examples)
    difference, change, same, positions = 0.0, 0.0, 0, 0
    for start in range(0, len(examples), batch_size):
        inputs = lvlm.prepare(examples[start : start + batch_size], responses=responses)
        real = inputs.attention_mask.bool()
        bare = lvlm(inputs)[real]
        with repair.on(lvlm):
            hooked = lvlm(inputs)[real]
        ours = baked(**inputs.model_kwargs()).logits[real].to(hooked)
        difference = max(difference, float((hooked.double() - ours.double()).abs().max()))
        change = max(change, float((hooked.double() - bare.double()).abs().max()))
        same += int((hooked.argmax(-1) == ours.argmax(-1)).sum())
        positions += len(hooked)
    return {
        "positions": positions,
        "largest_logit_difference": difference,
        "largest_logit_change": change,
        "same_token": same / positions,
    }


def _attention(model: Any) -> str:
    """The attention implementation; a bridge's is eager with a hook point in it."""
    name = model.config.text_config._attn_implementation
    return "eager" if name.startswith("care_lens") else name


def _weight_sums(directory: Path) -> dict[str, str]:
    return {path.name: files.sha256(path.read_bytes()) for path in sorted(directory.glob("*.safetensors"))}
