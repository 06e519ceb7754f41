"""Are the files, pictures and the model of a recipe as it needs them? Looked at before any GPU time.

found = look(recipe, "files")
found.frame  # a row for each check
found.require()  # an error that lists all gaps
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from care_lens.core.errors import CareLensError
from care_lens.data.benchmarks import READERS, BenchmarkError
from care_lens.data.preflight import preflight
from care_lens.evaluation.metrics import records
from care_lens.pipeline.recipe import Recipe


class NotReadyError(CareLensError, ValueError):
    """Files, pictures or the model of a recipe are not as they must be; the message lists all gaps."""


@dataclass(frozen=True)
class Looked:
    """What :func:`look` found.

    Attributes:
        frame: A row for each check of each source: source, benchmark, check, level, count, what, do.
        problems: Rows of the files that give no example.
    """

    frame: pd.DataFrame
    problems: pd.DataFrame

    @property
    def ok(self) -> bool:
        """Whether no check found an error."""
        return not (self.frame["level"] == "error").any()

    def require(self) -> None:
        """Refuse to go on with errors.

        Raises:
            NotReadyError: It lists them. It is a ValueError.
        """
        bad = records(pd.DataFrame(self.frame[self.frame["level"] == "error"]))
        if bad:
            told = "; ".join(
                f"{row['source']}: {row['check']} ({row['count']}): {row['what']}; {row['do']}" for row in bad
            )
            raise NotReadyError(f"files and model must be as the recipe needs them, got {len(bad)} errors: {told}")


def look(recipe: Recipe, files: str | Path, *, pixels: bool = False, model: bool = True) -> Looked:
    """Look through all files of a recipe, and at the configuration of its model, without loading it.

    Args:
        recipe: Which table.
        files: The folder that the roots of its sources are in.
        pixels: Decode every picture to its end.
        model: Whether the model's configuration is looked at; where it is on the hub that needs the network.
    """
    rows: list[dict[str, Any]] = []
    problems: list[pd.DataFrame] = []
    for title, source in recipe.sources.items():
        about = {"source": title, "benchmark": source.benchmark}
        try:
            found = preflight(Path(files) / source.root, format=source.benchmark, pixels=pixels)
            n = len(READERS[source.benchmark](Path(files) / source.root, **source.options))
        except BenchmarkError as error:
            what = {
                "check": "files",
                "level": "error",
                "count": 1,
                "what": str(error),
                "do": "get them from their authors",
            }
            rows.append(about | what)
            continue
        rows += [about | row for row in found.frame.drop(columns="benchmark").to_dict("records")]
        problems.append(found.problems.assign(source=title))
        if not n:
            what = {
                "check": "examples",
                "level": "error",
                "count": 0,
                "what": "none with these options",
                "do": "see options",
            }
            rows.append(about | what)
    if model:
        rows += [{"source": "model", "benchmark": recipe.model.name, **row} for row in _model_checks(recipe)]
    columns = ["source", "benchmark", "check", "level", "count", "what", "do"]
    frame = pd.DataFrame([{c: row[c] for c in columns} for row in rows], columns=pd.Index(columns))
    return Looked(frame, pd.concat(problems, ignore_index=True) if problems else pd.DataFrame())


def _model_checks(recipe: Recipe) -> list[dict[str, Any]]:
    """What the configuration of the model says about the recipe's blocks and ranks."""
    from transformers import AutoConfig

    from care_lens.lvlm.loading import require_known, require_loadable

    try:
        require_loadable(recipe.model.name, recipe.model.dtype)
        config = AutoConfig.from_pretrained(recipe.model.name, revision=recipe.model.revision)
        require_known(config)
    except (OSError, ValueError) as error:
        return [{"check": "model", "level": "error", "count": 1, "what": str(error), "do": "see --model"}]
    text = config.get_text_config()
    rows = [
        {
            "check": "model",
            "level": "ok",
            "count": text.num_hidden_layers,
            "what": f"{type(config).__name__}: blocks",
            "do": "",
        }
    ]
    for name, defence in recipe.defences.items():
        ranks = defence.rank if isinstance(defence.rank, tuple) else (defence.rank,)
        beyond = [layer for layer in defence.layers if not 0 <= layer < text.num_hidden_layers]
        if beyond or max(ranks) > text.hidden_size:
            what = f"{name}: blocks {list(defence.layers)} and rank {max(ranks)} of {text.num_hidden_layers} blocks of width {text.hidden_size}"
            rows.append(
                {"check": "settings", "level": "error", "count": 1, "what": what, "do": "change layers or rank"}
            )
    return rows
