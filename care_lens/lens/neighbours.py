"""Nearest neighbours of image tokens among states of words in context.

A bank holds residual streams of text tokens at several layers, each with its word and the text it stood in. For a token of a picture
the bank's states with the largest cosine similarity say what it is like, in words that the model itself uses: the unembedding need
not be able to read a state for it to be like that of a word. States of one layer are compared with those of all layers of the bank,
since what a picture's token holds early may be what a word holds only in the middle.

    bank = TextBank.of(lvlm, [Example(text) for text in texts])
    found = nearest_text(lvlm, examples, bank)

Measures of a site and span, means over examples:

- "similarity": mean over tokens of the largest cosine; by chance that of Gaussian states with the bank's own mean and variances per
  layer.
- "bank layer": mean over tokens of the layer at which the nearest state stood.
- "target hit": share of examples in which a target word is among the first ``top_k`` neighbours of any token; by chance with the
  targets of other examples.

Source: Krojer et al. 2026, "LatentLens: revealing highly interpretable visual tokens in LLMs".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core import Example, Site, SiteLike, examples_digest, package_versions
from care_lens.core.details import groups_of, sampling, site_columns, tidy
from care_lens.core.display import ShortRepr
from care_lens.core.files import load_artifact, save_artifact, tensor_bytes, tensors_of
from care_lens.core.options import require_options
from care_lens.core.progress import Steps
from care_lens.core.renames import renamed
from care_lens.core.require import require_examples
from care_lens.lens.errors import LensError
from care_lens.lens.logit import KEPT, require_spans
from care_lens.lens.measures import LensMeasures, Measured, against_others, measure_rows, thumbnails
from care_lens.lens.states import positions_of, require_streams, states
from care_lens.lens.tokens import PLACE, shown_token, token_rows
from care_lens.lvlm import HookedLVLM

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SITE = ("tower", "layer", "component")
DETAIL_COLUMNS = ("example", "id", "group", *_SITE, *PLACE, "rank", "word", "context", "bank_layer", "value")
_KIND, _SCHEMA, _CHUNK = "TextBank", 1, 256


@dataclass(frozen=True, eq=False)
class TextBank(ShortRepr):
    """States of words in context.

    Attributes:
        states: By layer [n, d_model] the residual stream before that block; the number of layers stands for the last stream.
        words: n words.
        contexts: n texts in which they stood, the word marked as [word].
        settings: What made it.

    Raises:
        LensError: If the numbers of states, words and contexts differ.
    """

    states: Mapping[int, Float[Tensor, "n d"]]
    words: tuple[str, ...]
    contexts: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {len(held) for held in self.states.values()} | {len(self.words), len(self.contexts)}
        if len(sizes) != 1 or not self.words:
            raise LensError(
                f"a bank must have as many states a layer as words and contexts, 1 or more, got {sorted(sizes)}"
            )

    @classmethod
    def of(
        cls,
        lvlm: HookedLVLM,
        texts: Sequence[Example | str],
        *,
        layers: Sequence[int] | None = None,
        most: int = 5_000,
        batch_size: int = 32,
        progress: bool = True,
    ) -> "TextBank":
        """States of the words of texts.

        Args:
            lvlm: The model.
            texts: Texts, or examples without pictures, which are put through the chat template; its own tokens are kept too, with
                the response's where all examples have one.
            layers: Before which blocks, and the number of layers for the last stream; None: all.
            most: Tokens that are kept, evenly spread over all: the bank takes 2 bytes times tokens, layers and width.
            batch_size: Texts of a forward pass.
            progress: Whether to show a progress bar.

        Raises:
            LensError: If there are no texts, an example has a picture, or there is no such layer.
        """
        require_options(most=most, batch_size=batch_size, seed=0)
        rows = [Example(text) if isinstance(text, str) else text for text in texts]
        if not rows or any(row.images for row in require_examples(rows)):
            raise LensError(
                "texts must hold at least one text, and examples without pictures; give [Example(prompt), ...]"
            )
        depth = lvlm.n_layers()
        chosen = list(range(depth + 1)) if layers is None else sorted(set(layers))
        if not chosen or not 0 <= chosen[0] <= chosen[-1] <= depth:
            raise LensError(f"layers must be in [0, {depth}], got {layers}; {depth} stands for the last stream")
        sites = {_stream(layer, depth): layer for layer in chosen}
        held: dict[int, list[Tensor]] = {layer: [] for layer in chosen}
        words: list[str] = []
        contexts: list[str] = []
        answered = all(row.response is not None for row in rows)
        for start in Steps(range(0, len(rows), batch_size), desc="reading texts", disable=not progress):
            inputs = lvlm.prepare(rows[start : start + batch_size], responses=answered)
            mask = inputs.spans.mask("text")
            for site, stream in states(lvlm, inputs, list(sites)):
                held[sites[site]].append(stream[mask].float().cpu())
            for row in range(inputs.batch_size):
                ids = inputs.input_ids[row][mask[row]].tolist()
                for at, token in enumerate(ids):
                    words.append(shown_token(str(lvlm.tokenizer.decode([token]))))
                    contexts.append(_context(lvlm, ids, at))
        step = max(1, -(-len(words) // most))
        kept = {layer: torch.cat(parts)[::step].half() for layer, parts in held.items()}
        settings = {"n": len(rows), "examples": examples_digest(rows), "versions": package_versions()}
        return cls(kept, tuple(words[::step]), tuple(contexts[::step]), settings)

    def nearest(
        self, state: Float[Tensor, "m d"], top_k: int, *, layers: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The states of the bank with the largest cosine similarity.

        Args:
            state: [m, d_model].
            top_k: How many; each word in its context counts once, at its nearest layer.
            layers: Which layers of the bank; None: all.

        Returns:
            [m, k] similarities, [m, k] layers, and [m, k] indices of words and contexts.
        """
        chosen = sorted(self.states) if layers is None else list(layers)
        if missing := [layer for layer in chosen if layer not in self.states]:
            raise LensError(f"layers must be some of the bank's, {sorted(self.states)}, got {missing}")
        given = torch.nn.functional.normalize(state.float().cpu(), dim=-1)
        best = torch.full((len(given), len(self.words)), -2.0)
        layer_of = torch.zeros(best.shape, dtype=torch.long)
        for layer in chosen:
            cosine = given @ torch.nn.functional.normalize(self.states[layer].float(), dim=-1).T
            better = cosine > best
            best, layer_of = torch.where(better, cosine, best), layer_of.masked_fill(better, layer)
        top = best.topk(min(top_k, len(self.words)), dim=-1)
        return top.values, layer_of.gather(1, top.indices), top.indices

    def gaussian(self, layer: int, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """States that are of no word: Gaussian, with the mean and the variances of the bank's states at a layer."""
        held = self.states[layer].float()
        return held.mean(0) + held.std(0) * torch.randn(n, held.shape[1], generator=generator)

    def save(self, directory: str | Path, name: str) -> Path:
        """Write ``name.safetensors`` and ``name.json`` into a directory; returns the path of the json file."""
        tensors = {f"layer {layer}": held.contiguous() for layer, held in self.states.items()}
        content = {"words": list(self.words), "contexts": list(self.contexts), "settings": self.settings}
        return save_artifact(
            directory, name, kind=_KIND, schema=_SCHEMA, data={"safetensors": tensor_bytes(tensors)}, content=content
        )

    @classmethod
    def load(cls, directory: str | Path, name: str) -> "TextBank":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: If a file is not there.
            ArtifactError: If the files are damaged or of another kind.
        """
        data, content = load_artifact(directory, name, kind=_KIND, schema=_SCHEMA)
        held = tensors_of(data, where=Path(directory) / name)
        found = {int(key.removeprefix("layer ")): tensor for key, tensor in held.items()}
        return cls(found, tuple(content["words"]), tuple(content["contexts"]), content["settings"])


@dataclass(frozen=True, repr=False)
class NeighbourResult(LensMeasures):
    """Words in context that states are like.

    Attributes:
        frame: One row a site, span and measure.
        settings: Sites, spans, top_k, the bank's settings, and what made it.
        details: One row an example, site, token and rank: as of ``LensResult``, with word, context (the text it stood in), bank_layer
            and value (cosine similarity).
        pictures: The pictures, small.
    """

    def plot(self) -> "go.Figure":
        """Each measure by layer, with intervals and chance lines."""
        from care_lens.plots.lens import plot_lens

        return plot_lens(self)

    def viewer(self, path: str | Path) -> Path:
        """Write a page that shows the neighbours over the pictures; see :meth:`LensResult.viewer`."""
        from care_lens.lens.viewer import write_viewer

        return write_viewer(self, path)


@renamed(spans="positions")
def nearest_text(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    bank: TextBank,
    *,
    sites: Sequence[SiteLike] | None = None,
    positions: Sequence[str] = ("image",),
    targets: Sequence[str] | None = None,
    same_layer: bool = False,
    top_k: int = 5,
    keep: int = KEPT,
    batch_size: int = 8,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> NeighbourResult:
    """The words in context that are nearest to the tokens of examples, at every layer.

    Args:
        lvlm: The model.
        examples: The examples.
        bank: Of the same model.
        sites: Residual streams; None: those of every layer, the vision tower's too where an example has a picture.
        positions: Which tokens, by names of spans.
        targets: One word an example, for "target hit"; compared without case and surrounding spaces.
        same_layer: Whether a state of the language tower is compared with the bank's states of its own layer alone.
        top_k: Neighbours kept of each token.
        keep: Of how many examples, from the first, details hold the neighbours; measures are of all.
        batch_size: Examples of a forward pass.
        n_boot: Bootstrap resamples of the examples' groups.
        seed: Of the resamples, and of the states that chance is measured with.
        progress: Whether to show a progress bar.

    Returns:
        Measures by site and span, and the neighbours of every token.

    Raises:
        MediationError: If a number is none that it can be run with. It is a ValueError.
        LensError: If the bank is of another width, a site is no residual stream, or the targets are not one an example.
    """
    require_options(top_k=top_k, keep=keep, batch_size=batch_size, n_boot=n_boot, seed=seed, least={"keep": 0})
    rows, names = list(require_examples(examples)), require_spans(positions)
    if not rows:
        raise LensError("examples must hold at least one example, got none")
    wanted = require_streams(lvlm, sites, vision=any(row.images for row in rows))
    width, depth = lvlm.width(Site("language", 0, "hook_resid_pre")), lvlm.n_layers()
    if any(held.shape[1] != width for held in bank.states.values()):
        raise LensError(
            f"bank must be of this model, with states of width {width}, got another; make it with TextBank.of"
        )
    if targets is not None and (isinstance(targets, str) or len(targets) != len(rows)):
        raise LensError(f"targets must be one word an example, {len(rows)}, got {targets!r:.60}; give [word, ...]")
    plain = [word.strip().lower() for word in bank.words]
    wishes = [] if targets is None else [str(target).strip().lower() for target in targets]
    unique = sorted(set(wishes))
    groups = groups_of(rows)
    generator = torch.Generator().manual_seed(seed)
    # What states of no word reach does not depend on the example: one figure a set of layers.
    by_layers: dict[tuple[int, ...], float] = {}
    measured: dict[tuple[Site, str], Measured] = {}
    tables: dict[tuple[Site, str], np.ndarray] = {}
    details: list[dict[str, Any]] = []
    steps = len(wanted) * -(-len(rows) // batch_size)
    with Steps(total=steps, desc="finding neighbours", disable=not progress) as bar:
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            inputs = lvlm.prepare(some, responses=all(row.response is not None for row in some))
            places = [token_rows(lvlm, inputs, row) for row in range(len(some))]
            seeing = [site for site in wanted if site.tower == "language" or inputs.pixel_values is not None]
            for site, stream in states(lvlm, inputs, seeing):
                layers = _layers(site, depth, bank) if same_layer else sorted(bank.states)
                if tuple(layers) not in by_layers:
                    by_layers[tuple(layers)] = _by_chance(bank, layers, generator)
                chance = by_layers[tuple(layers)]
                masks = {name: positions_of(inputs, site, name).cpu() for name in names}
                union = torch.stack([*masks.values()]).any(dim=0)
                for row in range(len(some)):
                    at = union[row].nonzero()[:, 0]
                    if not len(at):
                        continue
                    parts = [
                        bank.nearest(part, top_k, layers=layers)
                        for part in stream[row, at.to(stream.device)].split(_CHUNK)
                    ]
                    value, layer, index = (torch.cat(part) for part in zip(*parts, strict=True))
                    shared = {
                        "example": start + row,
                        "id": some[row].id,
                        "group": groups[start + row],
                        **site_columns(site),
                    }
                    for i, position in enumerate(at.tolist() if start + row < keep else ()):
                        for rank in range(value.shape[1]):
                            word = int(index[i, rank])
                            details.append(
                                {**shared, **places[row][position], "rank": rank + 1, "word": bank.words[word]}
                                | {"context": bank.contexts[word], "bank_layer": int(layer[i, rank])}
                                | {"value": float(value[i, rank])}
                            )
                    for name, mask in masks.items():
                        inside = mask[row, at]
                        if not bool(inside.any()):
                            continue
                        one = measured.setdefault((site, name), Measured())
                        told = {"similarity": value[inside, 0].mean(), "bank layer": layer[inside, 0].double().mean()}
                        for metric, number in told.items():
                            one.values.setdefault(metric, np.full(len(rows), np.nan))[start + row] = float(number)
                        one.chance.setdefault("similarity", np.full(len(rows), np.nan))[start + row] = chance
                        if unique:
                            seen = {plain[word] for word in index[inside].flatten().tolist()}
                            table = tables.setdefault((site, name), np.full((len(rows), len(unique)), np.nan))
                            table[start + row] = [float(word in seen) for word in unique]
                bar.update()
            bar.update(len(wanted) - len(seeing))
    same = np.array([[a == b for b in wishes] for a in wishes])
    for key, table in tables.items():
        by_target = table[:, [unique.index(word) for word in wishes]]
        measured[key].values["target hit"], measured[key].chance["target hit"] = against_others(by_target, same)
    ordered = dict(sorted(measured.items(), key=lambda item: (names.index(item[0][1]), item[0][0])))
    settings: dict[str, Any] = {
        "sites": [str(site) for site in wanted],
        "spans": list(names),
        "same_layer": same_layer,
        "top_k": top_k,
        "targets": wishes,
        "bank": {
            "states": len(bank.words),
            "layers": sorted(bank.states),
            "examples": bank.settings.get("examples", ""),
        },
        "examples": examples_digest(rows),
        **sampling(len(rows), groups, n_boot, seed),
    }
    frame = measure_rows(ordered, groups, n_boot=n_boot, seed=seed)
    return NeighbourResult(frame, settings, tidy(details, DETAIL_COLUMNS), thumbnails(rows[:keep]))


def _stream(layer: int, depth: int) -> Site:
    """The residual stream before a block, or the last one."""
    return (
        Site("language", depth - 1, "hook_resid_post") if layer == depth else Site("language", layer, "hook_resid_pre")
    )


def _layers(site: Site, depth: int, bank: TextBank) -> list[int]:
    if site.tower == "vision" or site.layer is None:
        return [min(bank.states)]
    wanted = site.layer + (site.component == "hook_resid_post")
    if wanted not in bank.states:
        raise LensError(f"bank must have layer {wanted} for {site} with same_layer=True, got {sorted(bank.states)}")
    return [wanted]


def _by_chance(bank: TextBank, layers: Sequence[int], generator: torch.Generator, n: int = 32) -> float:
    return float(
        np.mean([float(bank.nearest(bank.gaussian(at, n, generator), 1, layers=layers)[0].mean()) for at in layers])
    )


def _context(lvlm: HookedLVLM, ids: Sequence[int], at: int, around: int = 6) -> str:
    parts = [str(lvlm.tokenizer.decode(list(some))) for some in (ids[max(0, at - around) : at], ids[at : at + 1])]
    after = str(lvlm.tokenizer.decode(list(ids[at + 1 : at + 1 + around])))
    return shown_token(f"{parts[0]} [{parts[1].strip()}] {after}".strip())
