"""Optimiser steps that can be stopped at any time: weights, moments and the number of steps done lie in one file.

What a step is trained on must follow from the seed and the number of the step alone (`random.Random(f"{seed}/{step}")`), so that a run
that was stopped and goes on does the same as one that was not.

    descent = Descent(parameters, matrices=names, steps=1000, lr=2e-3, matrix_lr=0.02, saved=Path("part.safetensors"))
    for step in descent:
        descent.descend(loss_of(step))
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from care_lens.core.files import write_whole
from care_lens.organism.train.muon import Muon

WARM = 0.04


def warm_cosine(step: int, steps: int, *, floor: float = 0.0) -> float:
    """Learning-rate factor of a step: linear warm-up over the first `WARM` of the steps, then half a cosine down to `floor`."""
    warm = WARM * steps
    if step < warm:
        return (step + 1) / warm
    return floor + (1 - floor) * 0.5 * (1.0 + math.cos(math.pi * (step - warm) / (steps - warm)))


class Descent:
    """Muon for matrices, AdamW for the rest, one schedule, and a file from which a stopped run goes on.

    Args:
        parameters: what is trained, by name.
        matrices: names of those that Muon trains.
        steps: optimiser steps in all.
        lr: peak learning rate of AdamW.
        matrix_lr: peak learning rate of Muon.
        floor: share of the peaks that both fall to.
        weight_decay: of AdamW.
        saved: file of the state; None keeps none.
        every: steps between two states.

    Attributes:
        done: steps done.
        numbers: whatever else the loop needs to go on; kept with the state.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        *,
        matrices: Collection[str],
        steps: int,
        lr: float,
        matrix_lr: float,
        floor: float = 0.0,
        weight_decay: float = 0.05,
        saved: Path | None = None,
        every: int = 100,
    ) -> None:
        self.parameters = dict(parameters)
        inside = [p for name, p in self.parameters.items() if name in matrices]
        rest = [p for name, p in self.parameters.items() if name not in matrices]
        self.optimisers: list[torch.optim.Optimizer] = [
            Muon(inside, lr=matrix_lr, weight_decay=0.05),
            torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True),
        ]
        self.peaks = (matrix_lr, lr)
        self.steps, self.floor, self.saved, self.every = steps, floor, saved, every
        self.done, self.numbers = 0, {}
        if saved is not None and saved.exists():
            self._load(saved)

    def __iter__(self) -> Iterator[int]:
        """The steps that are left."""
        while self.done < self.steps:
            yield self.done

    def descend(self, loss: Tensor) -> None:
        """One step of both optimisers down the gradient of a loss, its norm clipped to one."""
        factor = warm_cosine(self.done, self.steps, floor=self.floor)
        for optimiser, peak in zip(self.optimisers, self.peaks, strict=True):
            optimiser.zero_grad()
            optimiser.param_groups[0]["lr"] = peak * factor
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.done += 1

    def keep(self) -> None:
        """Write the state now and then (call it at the end of every step)."""
        if self.saved is not None and self.done % self.every == 0:
            write_whole(self.saved, self._state())

    def _moments(self) -> Iterator[tuple[str, nn.Parameter, dict[str, Tensor]]]:
        for name, p in self.parameters.items():
            for optimiser in self.optimisers:
                if p in optimiser.state:
                    yield name, p, optimiser.state[p]

    def _state(self) -> bytes:
        tensors = {f"weight:{name}": p.detach().contiguous() for name, p in self.parameters.items()}
        for name, _, state in self._moments():
            tensors |= {f"{key}:{name}": value.contiguous() for key, value in state.items()}
        told = {"done": self.done, "steps": self.steps, "numbers": self.numbers}
        return save(tensors, metadata={"descent": json.dumps(told)})

    @torch.no_grad()
    def _load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {}).get("descent", "{}"))
            names = {key.partition(":")[2] for key in file.keys()}  # noqa: SIM118
            if told.get("steps") != self.steps or names != set(self.parameters):
                raise ValueError(
                    f"{path.name} must be the state of a run of {self.steps} steps on these parameters, got one of "
                    f"{told.get('steps')} steps; delete it to begin the stage anew"
                )
            owner = {name: o for o in self.optimisers for name, p in self.parameters.items() if self._of(o, p)}
            for key in file.keys():  # noqa: SIM118
                kind, _, name = key.partition(":")
                p, value = self.parameters[name], file.get_tensor(key)
                if kind == "weight":
                    p.copy_(value)
                else:
                    owner[name].state[p][kind] = value if kind == "step" else value.to(p.device)
        self.done, self.numbers = told["done"], told["numbers"]

    @staticmethod
    def _of(optimiser: torch.optim.Optimizer, parameter: nn.Parameter) -> bool:
        return any(parameter is p for p in optimiser.param_groups[0]["params"])
