"""The options of a run, which four commands take: written down once, as the fields of :class:`Asked`.

@app.command()
@told
@takes_options()
def run(asked: Asked) -> None: ...
"""

import functools
import inspect
import os
from collections.abc import Callable, Collection
from copy import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

from care_lens.cli import loading
from care_lens.cli.early import require_defences, require_one_process, require_processes
from care_lens.cli.options import (
    Batch,
    Config,
    Data,
    Depths,
    Device,
    Dtype,
    Epsilons,
    JudgeOf,
    Least,
    Model,
    Out,
    Quantization,
    Ranks,
    Revision,
    Sample,
    Seed,
    Short,
    SizeOf,
    System,
    Temperature,
    Threads,
    Tokens,
    TopK,
    TopP,
    Workers,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from care_lens.data import Study
    from care_lens.lvlm import HookedLVLM
    from care_lens.pipeline import RunSettings
    from care_lens.pipeline.settings import Size


Command = Callable[..., None]
_GENERATION = ("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_p", "top_k", "system")
#: Of large models, each operation of which keeps all cores busy, answers are not generated in several processes unless that is asked for.
_LARGE, _MOST_WORKERS = 10**9, 8
#: What only a repair that is tuned has use for.
TUNING = ("epsilons", "ranks", "depths")
_MODEL = ("device", "dtype", "revision", "quantization")


@dataclass(frozen=True)
class Asked:
    """What was asked for on the command line, or in its file of options."""

    model: Model = "bundled"
    data: Data = None
    out: Out = Path("results/run")
    size: SizeOf = None
    short: Short = False
    seed: Seed = 0
    threads: Threads = 2
    workers: Workers = None
    device: Device = None
    dtype: Dtype = None
    revision: Revision = None
    quantization: Quantization = None
    batch_size: Batch = None
    max_new_tokens: Tokens = None
    min_new_tokens: Least = None
    do_sample: Sample = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    system: System = None
    epsilons: Epsilons = None
    ranks: Ranks = None
    depths: Depths = None
    judge: JudgeOf = None
    config: Config = None

    @property
    def title(self) -> str:
        """What the model is called in the report."""
        return self.model if self.revision is None else f"{self.model} at {self.revision}"

    @property
    def asked_size(self) -> "Size":
        """How much is done; `--short` goes before `--size`."""
        return "short" if self.short else self.size or "full"

    def refuse(self) -> None:
        """Tell what is wrong in the options before torch and the rest are imported."""
        loading.checked_numbers(self.epsilons, self.ranks, self.depths)
        where = {name: getattr(self, name) for name in _MODEL}
        loading.refuse(self.model, data=self.data, judge=self.judge, out=self.out, **where)

    def load(self) -> "tuple[HookedLVLM, Study]":
        """The model and the study, after what is wrong in the settings has been refused."""
        loading.generation(**{name: getattr(self, name) for name in _GENERATION})
        return loading.load(
            self.model,
            self.data,
            self.seed,
            self.device,
            self.dtype,
            self.judge,
            self.out,
            self.revision,
            self.quantization,
            self.asked_size,
        )

    def settings(self, study: "Study") -> "RunSettings":
        """The settings of the run."""
        given = {name: getattr(self, name) for name in (*_GENERATION, "batch_size", "epsilons", "ranks", "depths")}
        return loading.run_settings(study, self.model, self.asked_size, self.seed, **given)

    def answering(self, lvlm: "HookedLVLM") -> "AbstractContextManager[None]":
        """Inside, work is shared between as many processes as were asked for."""
        from care_lens.core.forked import in_workers

        small = sum(parameter.numel() for parameter in lvlm.hf_model.parameters()) < _LARGE
        return in_workers(self.workers or (min(_cores(), _MOST_WORKERS) if small else 1))


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def takes_options(*, unused: Collection[str] = (), out: str | None = None) -> Callable[[Command], Command]:
    """A decorator for a command whose first argument is :class:`Asked`, with each of its fields as an option.

    What is wrong in them, and in the command's ``defences`` if it takes such, is told before the command begins.

    Args:
        unused: Options that the command has no use for. It takes them, so that commands can share a file of options, but its help does not
            show them.
        out: Its folder of results by default, if it is another than that of a run.
    """
    return functools.partial(_with_options, unused=unused, out=out)


def _with_options(command: Command, *, unused: Collection[str], out: str | None) -> Command:
    first, *own = inspect.signature(command).parameters.values()
    options = [
        inspect.Parameter(
            part.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=Path(out) if out and part.name == "out" else part.default,
            annotation=_hidden(part.type) if part.name in unused else part.type,
        )
        for part in fields(Asked)
    ]
    names = {option.name for option in options}

    @functools.wraps(command)
    def wide(**given: Any) -> None:
        asked = Asked(**{name: value for name, value in given.items() if name in names})
        require_processes()
        require_defences(given.get("defences") or ())
        asked.refuse()
        command(asked, **{name: value for name, value in given.items() if name not in names})

    wide.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
    wide.__annotations__ = {part.name: part.annotation for part in (*own, *options)}
    del wide.__wrapped__, first  # type: ignore[attr-defined]
    return wide


def _hidden(option: Any) -> Any:
    """An option that help does not show."""
    kind, info = get_args(option)
    info = copy(info)
    info.hidden = True
    return Annotated[kind, info]


def one_process(command: Command) -> Command:
    """A command that is refused, before anything else is looked at, where torchrun or accelerate has started it several times."""

    @functools.wraps(command)
    def alone(*args: Any, **kwargs: Any) -> None:
        require_one_process(command.__name__)
        command(*args, **kwargs)

    return alone
