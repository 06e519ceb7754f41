"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import typer

from care_lens.cli.base import take_config

Number = TypeVar("Number", int, float)

Model = Annotated[str, typer.Option(help="'bundled', a hub name, or a directory.")]
Data = Annotated[
    Path | None,
    typer.Option(
        "--study",
        "--data",
        help="Folder with examples.jsonl and study.json.",
        show_default="the bundled model's own",
    ),
]
Out = Annotated[Path, typer.Option(help="Folder of the results; a stopped call goes on there.")]
SizeOf = Annotated[
    Literal["short", "compact", "full"] | None,
    typer.Option(
        help="How much is done: a quick look, a part of the study with every step, or all.", show_default="full"
    ),
]
Short = Annotated[bool, typer.Option("--short", help="As --size short.", show_default="full size")]
Seed = Annotated[int, typer.Option(help="Seed of every draw.", min=0, max=2**32 - 1)]
Threads = Annotated[int, typer.Option(help="CPU threads.", min=1)]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Processes that share the work on a CPU.",
        min=1,
        show_default="one a core, 8 at most; 1 from a billion parameters on",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="As device_map of transformers: 'auto', 'cuda', 'cuda:1', 'cpu'.", show_default="cpu"),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.", show_default="that of the weights")]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of the model on the hub.", show_default="main")
]
Quantization = Annotated[
    str | None, typer.Option(help="'4bit' or '8bit', by bitsandbytes.", show_default="as the weights are")
]
Batch = Annotated[int | None, typer.Option(help="Examples at a time.", min=1, show_default="128 bundled, 8 others")]
Tokens = Annotated[
    int | None, typer.Option(help="New tokens of an answer.", min=1, show_default="14 bundled, 128 others")
]
Least = Annotated[
    int | None, typer.Option("--min-new-tokens", help="New tokens of an answer at least.", min=0, show_default="none")
]
Sample = Annotated[
    bool | None,
    typer.Option(
        "--sample/--greedy", help="Sample answers, or take the likeliest token.", show_default="the model's own"
    ),
]
Temperature = Annotated[float | None, typer.Option(help="Of sampled answers.", show_default="the model's own")]
TopP = Annotated[
    float | None, typer.Option("--top-p", help="Share of the probability sampled from.", show_default="the model's own")
]
TopK = Annotated[
    int | None, typer.Option("--top-k", help="Number of tokens sampled from.", min=0, show_default="the model's own")
]
System = Annotated[
    str | None, typer.Option(help="System prompt of examples that have none of their own.", show_default="none")
]
Epsilons = Annotated[
    str | None,
    typer.Option(
        help="Shares of benign prompts that a gate may touch, tried: '0.01,0.02'.", show_default="0.01,0.015,0.02"
    ),
]
Ranks = Annotated[
    str | None, typer.Option(help="Ranks of the readers tried; 0 is the linear one: '0,8'.", show_default="0,8")
]
Depths = Annotated[
    str | None,
    typer.Option(
        help="After how many blocks at once a classifier reads the last prompt token, tried: '1' reads one block, as runs of earlier versions did.",
        show_default="1,5",
    ),
]
JudgeOf = Annotated[
    str | None,
    typer.Option(
        help="'module:name' of a judge object.",
        show_default="the exact judge of the bundled study; of others refusal substrings, which take any other answer for compliance",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        callback=take_config,
        is_eager=True,
        help="yaml or json file of options by name; those on the command line go before it.",
        show_default="none",
    ),
]


def numbers(text: str | None, option: str, kind: Callable[[str], Number]) -> tuple[Number, ...] | None:
    """Numbers written with commas between them, or None.

    Raises:
        typer.BadParameter: If it is no such list.
    """
    if text is None:
        return None
    try:
        found = tuple(kind(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = ()
    if not found:
        raise typer.BadParameter(f"{option} must be numbers with commas between them, such as 0,8, got {text!r}")
    return found


def texts(text: str | None, option: str) -> tuple[str, ...] | None:
    """Texts written with commas between them, or None.

    Raises:
        typer.BadParameter: If there is none.
    """
    if text is None:
        return None
    found = tuple(part.strip() for part in text.split(",") if part.strip())
    if not found:
        raise typer.BadParameter(f"{option} must be texts with commas between them, got {text!r}")
    return found
