"""What all commands share: the application, the console, how errors are told, and the file of options."""

import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.logging import RichHandler

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Diagnose and repair unsafe channels of vision-language models.",
)
console = Console()

#: Set it to see the traceback of an error that is otherwise told in a line.
TRACEBACK = "CARE_LENS_TRACEBACK"

Command = TypeVar("Command", bound=Callable[..., None])


def _version(asked: bool | None) -> None:
    if asked:
        from care_lens import __version__

        typer.echo(f"care-lens {__version__}")
        raise typer.Exit()


@app.callback()
def whole(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = None,
) -> None:
    """Diagnose and repair unsafe channels of vision-language models."""
    del version


def told(command: Command) -> Command:
    """A command that tells errors of its user (a missing folder, a file of another kind, too small a study) in a line, not in a traceback."""

    @functools.wraps(command)
    def tidy(*args: Any, **kwargs: Any) -> None:
        try:
            with _own_logging():
                command(*args, **kwargs)
        except Exception as error:
            if os.environ.get(TRACEBACK) or not _is_told(error):
                raise
            _fail(str(error) or type(error).__name__)

    return tidy  # type: ignore[return-value]


def _is_told(error: Exception) -> bool:
    """Whether an error is of what the user asked for or of files, and not a fault of the code.

    CareLensError is known by its name: with its module torch and the rest would be imported.
    """
    if isinstance(error, (OSError, ValueError, NotImplementedError)):
        return True
    kinds = {f"{base.__module__}.{base.__name__}" for base in type(error).__mro__}
    ours = type(error).__module__.startswith("care_lens.")
    return "care_lens.core.errors.CareLensError" in kinds or (isinstance(error, RuntimeError) and ours)


@contextmanager
def _own_logging() -> Iterator[None]:
    """A command sets logging for itself: a process that calls it (a notebook, a test) gets its own back."""
    loggers = [logging.getLogger(name) for name in (None, "care_lens", "care_lens.subspace")]
    handlers, levels = list(loggers[0].handlers), [log.level for log in loggers]
    try:
        yield
    finally:
        loggers[0].handlers[:] = handlers
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _fail(message: str) -> NoReturn:
    """Say what was wrong on standard error and leave with status 2."""
    typer.echo(f"error: {message}\n(set {TRACEBACK}=1 to see where)", err=True)
    raise typer.Exit(2)


def start(threads: int) -> None:
    """Threads, memory and logging of a command."""
    import torch

    from care_lens.core.memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(threads)
    root = logging.getLogger()
    shown = RichHandler(console=console, show_path=False)
    shown.setFormatter(logging.Formatter("%(message)s"))
    root.handlers[:] = [shown]
    root.setLevel(logging.WARNING)
    logging.getLogger("care_lens").setLevel(logging.INFO)
    logging.getLogger("care_lens.subspace").setLevel(logging.WARNING)  # a run fits hundreds of small subspaces


def require_out(out: Path) -> None:
    """Refuse a folder of results that cannot be written, before a model is loaded; it is not made, since nothing may come to run."""
    try:
        there = next((path for path in (out, *out.parents) if path.exists()), Path())
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise typer.BadParameter(f"--out must be a folder that can be written, got {out} ({error.strerror})") from None


def read_settings(path: Path, what: str = "--config") -> dict[str, Any]:
    """The mapping in a yaml or json file.

    Raises:
        typer.BadParameter: If there is no such file, or it holds no mapping.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise typer.BadParameter(f"{what} must be a yaml or json file, got {path} ({error})") from None
    try:
        found = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{what} must be a yaml or json file, got {path} ({error})") from None
    if not isinstance(found, Mapping):
        raise typer.BadParameter(f"{what} must hold names and values, got {type(found).__name__} in {path}")
    return {str(name): value for name, value in found.items()}


def take_config(context: Any, path: Path | None) -> Path | None:
    """Take the options of a file as the command's defaults: what stands on the command line goes before them.

    Args:
        context: The command's click context; typer's own class of it is another than the one that it passes.
        path: The file; None: nothing is taken.

    Raises:
        typer.BadParameter: If a name is no option of the command.
    """
    if path is None:
        return None
    options = {option.name: option for option in context.command.params if option.name}
    names = {name: name for name in options}
    for option in options.values():
        names |= {flag.lstrip("-"): str(option.name) for flag in option.opts}
    against = {flag.lstrip("-"): str(option.name) for option in options.values() for flag in option.secondary_opts}
    given: dict[str, Any] = {}
    for key, value in read_settings(path).items():
        if key in against and isinstance(value, bool):  # --greedy is --sample the other way round
            given[against[key]] = not value
            continue
        name = names.get(key) or names.get(key.replace("-", "_"))
        if name is None or name == "config":
            flags = [flag for option in options.values() for flag in (*option.opts, *option.secondary_opts)]
            known = sorted({flag.lstrip("-") for flag in flags if flag[:2] == "--"} - {"config", "help"})
            raise typer.BadParameter(f"{path} must name options of the command, some of {known}, got {key!r}")
        many = getattr(options[name], "multiple", False) or getattr(options[name], "nargs", 1) == -1
        listed = isinstance(value, (list, tuple))
        given[name] = ",".join(map(str, value)) if listed and not many else value
    if given.pop("short", False) and "size" in options:
        given["size"] = "short"  # so that --size on the command line goes before it
    context.default_map = {**(context.default_map or {}), **given}
    return path
