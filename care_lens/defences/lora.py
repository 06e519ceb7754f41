"""Training low-rank adapters on the language tower: the linear maps of its blocks, the loss, and the way back to the untouched model.

peft makes the layers that are trained (it knows quantised linear maps too) and is needed here alone: what is learned is two small
matrices for each linear map, which :class:`~care_lens.defences.SafetyTuning` applies, saves and loads by itself.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example
from care_lens.core.progress import Steps
from care_lens.defences.stored import FitError, WrongModelError
from care_lens.lvlm import HookedLVLM, LVLMInputs

_ADAPTER = "care_lens"


class MissingPeftError(CareLensError, ImportError):
    """The package peft, which trains adapters, is not installed."""


@dataclass(frozen=True)
class Lesson:
    """An answer that is taught.

    Attributes:
        example: The request, with the answer as its response.
        ends: Whether the answer ends where the response does; False: it was cut off, so that no end is taught.
    """

    example: Example
    ends: bool = True


def linear_maps(
    lvlm: HookedLVLM, *, layers: Sequence[int] | None = None, modules: Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """The linear maps of the language tower's blocks, by block and path: "2.mlp.down_proj".

    Args:
        lvlm: The model.
        layers: Of these blocks; None: of all.
        modules: Those whose path ends with one of these names; None: all.

    Raises:
        WrongModelError: If the family does not say where its blocks are, or there are no such maps.
    """
    where = lvlm.family.language.plain
    if where is None:
        raise WrongModelError(
            f"the {lvlm.family.name} family must say where its blocks are on a plain model (TowerMap.plain), got None; say it"
        )
    n = lvlm.n_layers()
    if layers is not None and (not layers or not all(0 <= layer < n for layer in layers)):
        raise WrongModelError(f"layers must be one or more from 0 to {n - 1}, got {list(layers)}")
    if isinstance(modules, str):
        raise TypeError(f"modules must be a list of names, got the text {modules!r}; write [{modules!r}]")
    start = f"{where.blocks}."
    maps = {
        name.removeprefix(start): module
        for name, module in lvlm.plain_modules().items()
        if name.startswith(start) and _is_linear(module)
    }
    chosen = {
        name: module
        for name, module in maps.items()
        if (layers is None or int(name.split(".")[0]) in layers)
        and (modules is None or any(f".{name}".endswith(f".{end}") for end in modules))
    }
    if not chosen:
        there = sorted({name.split(".", 1)[1] for name in maps})
        raise WrongModelError(f"modules must be among {there}, got {modules}; name those to be trained")
    return chosen


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear map and nothing more; a router of experts, say, is an nn.Linear that returns something else."""
    quantised = type(module).__module__.startswith("bitsandbytes")
    return type(module) is nn.Linear or (quantised and isinstance(module, nn.Linear))


def require_peft() -> Any:
    """The package peft.

    Raises:
        MissingPeftError: If it is not installed; the message says how to install it.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingPeftError(
            f'peft must be installed to train adapters, got "{error}"; install it with: pip install "care-lens[tuning]" (or: pip install '
            "peft). An adapter that was saved is loaded and used without it"
        ) from None
    return peft


def response_loss(
    logits: Float[Tensor, "batch pos vocab"], inputs: LVLMInputs, counted: Bool[Tensor, "batch pos"]
) -> Float[Tensor, "batch"]:
    """Mean cross entropy of each row's answer, in nats a token.

    Args:
        logits: Of the batch.
        inputs: The batch, with responses.
        counted: Which tokens are predicted.
    """
    scores = functional.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), inputs.input_ids[:, 1:].to(logits.device), reduction="none"
    )
    mask = counted[:, 1:].to(scores)
    return (scores * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def taught(inputs: LVLMInputs, lessons: Sequence[Lesson]) -> Bool[Tensor, "batch pos"]:
    """The tokens that are taught: those of the responses, and the end of those that end.

    Args:
        inputs: Of the lessons' examples, with responses.
        lessons: One for each row.
    """
    counted = inputs.spans.response & ~inputs.spans.prefill
    for row, lesson in enumerate(lessons):
        if not lesson.ends:
            counted[row, int(counted[row].nonzero()[-1])] = False
    return counted


def train(
    lvlm: HookedLVLM,
    lessons: Sequence[Lesson],
    maps: Mapping[str, nn.Module],
    *,
    rank: int,
    scale: float,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    progress: bool,
) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[float, ...]]:
    """Train adapters; the model is afterwards what it was, to the bit.

    Args:
        lvlm: The model, without a defence on it.
        lessons: What is taught.
        maps: The linear maps that get an adapter, as :func:`linear_maps` gives them.
        rank: Of each adapter.
        scale: Of each adapter's output.
        epochs: Passes over the lessons.
        lr: Step size of AdamW, without weight decay; gradients are clipped at norm 1.
        batch_size: Lessons a step.
        seed: Of the adapters' first values and of the order of the lessons.
        progress: Whether to show a progress bar.

    Returns:
        A [rank, d_in] and B [d_out, rank] of each map, in float32 on the CPU, and the mean loss of each epoch in nats a token.

    Raises:
        FitError: If the loss is not finite.
    """
    peft = require_peft()
    order = torch.Generator().manual_seed(seed)
    losses = []
    with _with_adapters(peft, lvlm, maps, rank=rank, scale=scale, seed=seed) as adapters:
        weights = [weight for pair in adapters.values() for weight in pair]
        optimiser = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
        steps = math.ceil(len(lessons) / batch_size)
        with torch.enable_grad(), Steps(total=epochs * steps, desc="safety tuning", disable=not progress) as bar:
            for epoch in range(epochs):
                total = 0.0
                shuffled = torch.randperm(len(lessons), generator=order).tolist()
                for start in range(0, len(lessons), batch_size):
                    part = [lessons[i] for i in shuffled[start : start + batch_size]]
                    inputs = lvlm.prepare([lesson.example for lesson in part], responses=True)
                    loss = response_loss(lvlm(inputs), inputs, taught(inputs, part)).mean()
                    if not bool(torch.isfinite(loss)):
                        raise FitError(
                            f"the loss must be finite, got {float(loss)} in epoch {epoch}; take a smaller lr than {lr:g}"
                        )
                    optimiser.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(weights, 1.0)
                    optimiser.step()
                    total += float(loss.detach()) * len(part)
                    bar.update()
                losses.append(total / len(lessons))
        learned = {name: (a.detach().float().cpu(), b.detach().float().cpu()) for name, (a, b) in adapters.items()}
    return learned, tuple(losses)


@contextmanager
def _with_adapters(
    peft: Any, lvlm: HookedLVLM, maps: Mapping[str, nn.Module], *, rank: int, scale: float, seed: int
) -> Iterator[dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """Have peft's layers stand in for linear maps; afterwards the maps themselves are back, and every flag is as it was."""
    model, names = lvlm.hf_model, {id(module): name for name, module in maps.items()}
    where = lvlm.family.language.plain
    assert where is not None
    blocks: Any = lvlm.plain_modules()[where.blocks]
    homes = [
        (owner, child, module)
        for owner in list(blocks.modules())
        for child, module in owner._modules.items()
        if id(module) in names
    ]
    paths = [path for path, module in blocks.named_modules() if id(module) in names]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = peft.LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=paths, lora_dropout=0.0, bias="none")
    with lvlm.turn():
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            devices = sorted({p.device.index or 0 for p, _ in flags if p.device.type == "cuda"})
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(seed)
                peft.inject_adapter_in_model(config, blocks, adapter_name=_ADAPTER)
            made = {}
            for owner, child, module in homes:
                layer: Any = owner._modules[child]
                for part in (layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]):
                    part.weight.data = part.weight.data.float()  # half precision is too coarse for small steps
                made[names[id(module)]] = (layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight)
            yield {name: made[name] for name in maps}
        finally:
            for owner, child, module in homes:
                owner._modules[child] = module
            blocks.__dict__.pop("peft_config", None)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
                parameter.grad = None if not flag else parameter.grad
