"""The logit lens: which word a state stands for, if the model's own final norm and unembedding read it as it is.

At every residual stream of both towers (``care_lens.lens.states``) and every chosen token the state is read as if it were the last
one, after a translator where one is given (``care_lens.lens.translators``). What comes out is legible there. Whether the model reads
it is another question, which ``care_lens.mediation.patch_map`` answers; ``care_lens.lens.picture_reading`` puts the two side by side.

Measures of a site and span, means over examples of means over the span's tokens; larger is not better for all of them:

- "entropy": of the words read there, in nats; by chance that of equal probabilities.
- "kl to output": KL(the model's output at the token || the lens), in nats; by chance with the output at another token.
- "agreement": share of tokens at which the lens's first word is the model's own next word; by chance with another token's.
- "target hit": share of examples in which a target is among the first ``top_k`` words of any token; by chance with the targets of
  other examples, so that a word which the lens reads everywhere is no success.
- "target log probability": the largest log probability of a target at any token, in nats; by chance with the targets of others.

    found = logit_lens(lvlm, examples, targets=[example.group for example in examples])
    found.plot()
    found.viewer("lens.html")

Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; Neo et al. 2024, "Towards interpreting visual information processing in
vision-language models", for image tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from care_lens.core import Example, Site, SiteLike, examples_digest
from care_lens.core.details import groups_of, sampling, site_columns, tidy
from care_lens.core.options import require_options
from care_lens.core.progress import Steps
from care_lens.core.renames import renamed
from care_lens.core.require import require_examples
from care_lens.core.spans import SPAN_NAMES
from care_lens.lens.errors import LensError
from care_lens.lens.measures import LensMeasures, Measured, against_others, measure_rows, thumbnails
from care_lens.lens.readout import CHUNK, full_log_probs
from care_lens.lens.states import positions_of, require_streams, states
from care_lens.lens.tokens import PLACE, target_ids, token_rows, word_of
from care_lens.lens.translators import LensTranslators
from care_lens.lvlm import HookedLVLM

if TYPE_CHECKING:
    import plotly.graph_objects as go

KEPT = 32
"""Examples of which every token's words are kept by default."""
_SITE = ("tower", "layer", "component")
DETAIL_COLUMNS = ("example", "id", "group", *_SITE, *PLACE, "rank", "word_id", "word", "value", "entropy")


@dataclass(frozen=True, repr=False)
class LensResult(LensMeasures):
    """Words read at the states of a model.

    Attributes:
        frame: One row a site, span and measure: tower, layer, component, span, metric, value, ci_low, ci_high, chance, n, seed.
        settings: Sites, spans, translators, top_k, and what made it.
        details: One row an example, site, token and rank: example (its index), id, group, tower, layer, component, token_index, span,
            token, image, grid, row, col, x0, y0, x1, y1 (the rectangle in pixels of the picture), rank (from 1), word_id, word,
            value (its probability), entropy (of the token's words, in nats).
        pictures: The pictures, small.
    """

    def plot(self) -> "go.Figure":
        """Each measure by layer, with intervals and chance lines."""
        from care_lens.plots.lens import plot_lens

        return plot_lens(self)

    def viewer(self, path: str | Path) -> Path:
        """Write a page that shows the words over the pictures: layers by slider, words on hover. It needs no network.

        Args:
            path: Where to; the suffix .html is added if there is none.

        Returns:
            The path written.
        """
        from care_lens.lens.viewer import write_viewer

        return write_viewer(self, path)


@renamed(spans="positions")
def logit_lens(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    *,
    sites: Sequence[SiteLike] | None = None,
    positions: Sequence[str] = ("image", "text"),
    targets: Sequence[Any] | None = None,
    translators: LensTranslators | None = None,
    top_k: int = 5,
    keep: int = KEPT,
    batch_size: int = 4,
    n_boot: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> LensResult:
    """Words that are legible at the tokens of examples, at every layer of both towers.

    Args:
        lvlm: The model; a repair that is on it acts.
        examples: The examples, with and without pictures.
        sites: Residual streams: "vision.blocks.1.hook_resid_post", "blocks.3.hook_resid_pre"; None: those of every layer, the vision
            tower's too where an example has a picture, and with translators those that have one.
        positions: Which tokens, by names of spans as of ``TokenSpans.mask``; the vision tower has image tokens alone.
        targets: One word or token id (or several that count alike) an example, for the measures of targets.
        translators: What states go through before they are read.
        top_k: Words kept of each token.
        keep: Of how many examples, from the first, details hold the words; measures are of all.
        batch_size: Examples of a forward pass.
        n_boot: Bootstrap resamples of the examples' groups.
        seed: Their seed.
        progress: Whether to show a progress bar.

    Returns:
        Measures by site and span, and the words of every token.

    Raises:
        MediationError: If a number is none that it can be run with. It is a ValueError.
        LensError: If a site is no residual stream, a span is not known, there are no examples, or a target is no single token.

    Example:
        >>> from care_lens import organism
        >>> from care_lens.lvlm import HookedLVLM
        >>> lvlm = HookedLVLM.from_hf(*organism.untrained(seed=0))
        >>> found = logit_lens(lvlm, organism.examples("typographic", "fit", n=2), positions=("image",), progress=False)
        >>> found.frame.metric.unique().tolist()
        ['entropy', 'kl to output', 'agreement']
    """
    require_options(top_k=top_k, keep=keep, batch_size=batch_size, n_boot=n_boot, seed=seed, least={"keep": 0})
    rows = list(require_examples(examples))
    if not rows:
        raise LensError("examples must hold at least one example, got none")
    names = require_spans(positions)
    pictured = any(row.images for row in rows)
    if sites is None and translators is not None:
        sites = [site for site in translators.sites if pictured or site.tower == "language"]
    wanted = require_streams(lvlm, sites, vision=pictured)
    if translators is not None and (lacking := [str(site) for site in wanted if site not in translators.sites]):
        raise LensError(
            f"translators must have all sites, got none for {lacking[:3]}; fit them there, or leave those out"
        )
    size = int(lvlm.hf_model.get_output_embeddings().weight.shape[0])
    if top_k > size:
        raise LensError(f"top_k must be at most the size of the vocabulary, {size}, got {top_k}")
    own = [] if targets is None else target_ids(lvlm, targets, rows)
    run = _Run(lvlm, rows, names, own, translators, top_k, keep)
    steps = len(wanted) * -(-len(rows) // batch_size)
    with Steps(total=steps, desc="reading words", disable=not progress) as bar:
        for start in range(0, len(rows), batch_size):
            run.batch(start, rows[start : start + batch_size], wanted, bar)
    groups = groups_of(rows)
    settings: dict[str, Any] = {
        "sites": [str(site) for site in wanted],
        "spans": list(names),
        "translators": None if translators is None else translators.method,
        "top_k": top_k,
        "targets": [list(ids) for ids in own],
        "examples": examples_digest(rows),
        **sampling(len(rows), groups, n_boot, seed),
    }
    frame = measure_rows(run.measured(), groups, n_boot=n_boot, seed=seed)
    details = tidy(run.details, DETAIL_COLUMNS)
    return LensResult(frame, settings, details, thumbnails(rows[:keep]))


def require_spans(spans: Sequence[str]) -> tuple[str, ...]:
    """Names of spans.

    Raises:
        LensError: If they are a single text, none, or one of them is no name of a span.
    """
    if isinstance(spans, str) or not spans or (unknown := [name for name in spans if name not in SPAN_NAMES]):
        told = spans if isinstance(spans, str) or not spans else unknown
        raise LensError(f"positions must be some of {SPAN_NAMES}, got {told!r}; give a list of names")
    return tuple(dict.fromkeys(spans))


class _Run:
    """Measures and words, batch by batch."""

    def __init__(
        self,
        lvlm: HookedLVLM,
        rows: Sequence[Example],
        spans: tuple[str, ...],
        own: Sequence[tuple[int, ...]],
        translators: LensTranslators | None,
        top_k: int,
        keep: int,
    ) -> None:
        self._lvlm, self._rows, self._spans, self._own = lvlm, rows, spans, own
        self._translators, self._top_k, self._of = translators, top_k, keep
        self._groups = groups_of(rows)
        self._unique = sorted({token for ids in own for token in ids})
        self._words: dict[int, str] = {}
        self._values: dict[tuple[Site, str, str], np.ndarray] = {}
        self._chance: dict[tuple[Site, str, str], np.ndarray] = {}
        self._hits: dict[tuple[Site, str, str], np.ndarray] = {}
        self.details: list[dict[str, Any]] = []

    def batch(self, start: int, some: Sequence[Example], wanted: Sequence[Site], bar: Any) -> None:
        """Read one batch at every site."""
        lvlm = self._lvlm
        inputs = lvlm.prepare(some, responses=all(row.response is not None for row in some))
        spans = inputs.spans
        union = torch.stack([spans.mask(name) for name in self._spans]).any(dim=0)
        places = [token_rows(lvlm, inputs, row) for row in range(len(some))]
        last = Site("language", lvlm.n_layers() - 1, "hook_resid_post")
        final = dict(states(lvlm, inputs, [last]))[last]
        seeing = [site for site in wanted if site.tower == "language" or inputs.pixel_values is not None]
        for site, stream in states(lvlm, inputs, seeing):
            where = union & spans.image if site.tower == "vision" else union
            for row in range(len(some)):
                at = where[row].nonzero()[:, 0]
                if len(at):
                    state = stream[row, at]
                    state = state if self._translators is None else self._translators(site, state)
                    told = self._read(state, final[row, at])
                    self._keep(site, start + row, at, places[row], told)
                    for name in self._spans:
                        self._measure(site, name, start + row, positions_of(inputs, site, name)[row, at].cpu(), told)
            bar.update()
        bar.update(len(wanted) - len(seeing))

    def _read(self, state: Tensor, final: Tensor) -> dict[str, Tensor]:
        """[n] measures of tokens, and [n, k] words."""
        found: dict[str, list[Tensor]] = {}
        before: Tensor | None = None
        for start in range(0, len(state), CHUNK):
            part = slice(start, start + CHUNK)
            lens, model = full_log_probs(self._lvlm, state[part]), full_log_probs(self._lvlm, final[part])
            # By chance: the output at another token, of the chunk before where this one has a single token.
            other = model.roll(1, dims=0) if before is None or len(model) > 1 else before
            before = model[-1:]
            top = lens.topk(self._top_k, dim=-1)
            told = {
                "entropy": -(lens.exp() * lens).sum(-1),
                "kl to output": (model.exp() * (model - lens)).sum(-1),
                "kl by chance": (other.exp() * (other - lens)).sum(-1),
                "agreement": (lens.argmax(-1) == model.argmax(-1)).float(),
                "agreement by chance": (lens.argmax(-1) == other.argmax(-1)).float(),
                "words": top.indices,
                "probabilities": top.values.exp(),
            }
            if self._unique:
                ids = torch.tensor(self._unique, device=lens.device)
                told["targets"] = lens[:, ids]
                told["in top"] = (lens[:, ids] >= top.values[:, -1:]).float()
            for name, value in told.items():
                found.setdefault(name, []).append(value.cpu())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _keep(
        self, site: Site, example: int, at: Tensor, places: dict[int, dict[str, Any]], told: dict[str, Tensor]
    ) -> None:
        if example >= self._of:
            return
        row = self._rows[example]
        shared = {"example": example, "id": row.id, "group": self._groups[example], **site_columns(site)}
        words, values, entropy = (told[name].tolist() for name in ("words", "probabilities", "entropy"))
        for i, position in enumerate(at.tolist()):
            for rank, (word, value) in enumerate(zip(words[i], values[i], strict=True), 1):
                if word not in self._words:
                    self._words[word] = word_of(self._lvlm, word)
                self.details.append(
                    {**shared, **places[position], "rank": rank, "word_id": word, "word": self._words[word]}
                    | {"value": value, "entropy": entropy[i]}
                )

    def _measure(self, site: Site, span: str, example: int, inside: Tensor, told: dict[str, Tensor]) -> None:
        if not bool(inside.any()):
            return
        n = len(self._rows)
        size = self._lvlm.hf_model.get_output_embeddings().weight.shape[0]

        def put(table: dict[tuple[Site, str, str], np.ndarray], metric: str, value: float) -> None:
            table.setdefault((site, span, metric), np.full(n, np.nan))[example] = value

        several = len(inside) > 1
        for metric, chance in (
            ("entropy", None),
            ("kl to output", "kl by chance"),
            ("agreement", "agreement by chance"),
        ):
            put(self._values, metric, float(told[metric][inside].double().mean()))
            by_chance = float(np.log(size)) if chance is None else float(told[chance][inside].double().mean())
            put(self._chance, metric, by_chance if several or chance is None else float("nan"))
        if self._unique:
            for name in ("in top", "targets"):
                table = self._hits.setdefault((site, span, name), np.full((n, len(self._unique)), np.nan))
                table[example] = told[name][inside].double().amax(dim=0).numpy()

    def measured(self) -> dict[tuple[Site, str], Measured]:
        """Measures by site and span, in the order of the forward pass."""
        found: dict[tuple[Site, str], Measured] = {}
        for (site, span, metric), values in self._values.items():
            one = found.setdefault((site, span), Measured())
            one.values[metric], one.chance[metric] = values, self._chance[site, span, metric]
        column = {token: i for i, token in enumerate(self._unique)}
        same = np.array([[a == b for b in self._own] for a in self._own])
        for (site, span, name), table in self._hits.items():
            metric = "target hit" if name == "in top" else "target log probability"
            by_target = np.stack([table[:, [column[token] for token in ids]].max(axis=1) for ids in self._own], axis=1)
            one = found[site, span]
            one.values[metric], one.chance[metric] = against_others(by_target, same)
        return dict(sorted(found.items(), key=lambda item: (self._spans.index(item[0][1]), item[0][0])))
