"""Settings of a run: frozen, JSON-able, and what resuming is checked against."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from care_lens.data.study import Split, Study
from care_lens.evaluation.settings import GenerationSettings
from care_lens.repair.learning import require_depths

#: Fields that are left out of a run's record where they are None, as they are in the records of earlier versions.
_GENERATION = ("min_new_tokens", "do_sample", "temperature", "top_p", "top_k", "system")
_LEARNED: tuple[Split, ...] = ("fit", "calibration")
_ASKED: tuple[Split, ...] = ("validation", "test")

Rival = Literal["refusal direction", "difference of means", "published CARE"]
RIVALS: tuple[Rival, ...] = get_args(Rival)

#: How much a run does: a few examples to see that everything works; a part of the study, with every step and control; all.
Size = Literal["short", "compact", "full"]
SIZES: tuple[Size, ...] = get_args(Size)


@dataclass(frozen=True)
class RunSettings:
    """What the four steps do.

    Attributes:
        seed: of every draw.
        limit: at most so many examples a channel and split; None: all.
        learn_limit: at most so many a channel of the fit and calibration splits, instead of `limit`; None: as that.
        batch_size, max_new_tokens: of generation; the same for safety and utility.
        min_new_tokens, do_sample, temperature, top_p, top_k, system: the other settings of generation, the same for safety and utility; None:
            as the model's own configuration says. `system` is the system prompt of examples that have none of their own. Ablation
            by generation is greedy whatever they say.
        n_boot: bootstrap resamples.
        pairs: pairs a channel for mediation.
        carrier_score: readers are tried after the blocks with an attention or MLP output of at least this score (mean of
            the shares of the total effect that it brings and that its removal takes).
        ablated: examples a channel for the ablation by generation.
        epsilons: shares of benign prompts that a gate may touch, tried on validation.
        answer_tokens: so many tokens of an answer may be read.
        alphas: strengths of the writers tried; beyond 1 they go past their target.
        candidates: reader plans that are run with writers, and runs that are checked on benign prompts.
        reader_ranks: ranks of the energy readers tried; 0 stands for the linear (discriminant) reader.
        reader_classifier: whether readers fitted as classifiers are tried too.
        reader_depths: after how many blocks at once such a classifier reads the last prompt token, tried.
        benign_loss: most that accuracy on benign validation prompts may fall, as a share, for a repair to be chosen.
        printed_layers: on how many neighbouring layers published CARE is put; every window is tried.
        printed_rank, printed_alphas: its rank (four times that is tried too), and its strengths tried (1: projection; published runs use
            4 to 4.5). The rank is also that of the subspaces that are learned at every layer.
        rivals: what the repair is compared with, beside its controls.
        steering: strengths of the difference of means and of the refusal direction tried.
        random_seeds: draws of the random-writer control.
        fidelity: benign examples a channel on which answers and distributions are compared with the undefended model's.
        restarts: of the gradient attack that sees the repair, for each of its two losses.
        pgd_epsilon, pgd_steps, pgd_examples: the gradient attack, of 255; 0 examples: none.
    """

    seed: int = 0
    limit: int | None = None
    learn_limit: int | None = None
    batch_size: int = 128
    max_new_tokens: int = 14
    n_boot: int = 1000
    pairs: int = 10
    carrier_score: float = 0.5
    ablated: int = 24
    epsilons: tuple[float, ...] = (0.01, 0.015, 0.02)
    answer_tokens: int = 6
    alphas: tuple[float, ...] = (1.0, 1.5)
    candidates: int = 4
    reader_ranks: tuple[int, ...] = (0, 8)
    reader_classifier: bool = True
    reader_depths: tuple[int, ...] = (1, 5)
    benign_loss: float = 0.03
    printed_layers: int = 3
    printed_rank: int = 8
    printed_alphas: tuple[float, ...] = (1.0, 4.5)
    rivals: tuple[Rival, ...] = RIVALS
    steering: tuple[float, ...] = (0.25, 0.5, 1.0)
    random_seeds: int = 5
    fidelity: int = 24
    restarts: int = 1
    pgd_epsilon: int = 64
    pgd_steps: int = 40
    pgd_examples: int = 24
    min_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | int | None = None
    top_p: float | int | None = None
    top_k: int | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        for name in ("limit", "learn_limit"):
            n = getattr(self, name)
            if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
                raise ValueError(f"{name} must be a whole number of 1 or more, or None for all, got {n!r}")
        for name in ("epsilons", "alphas", "reader_ranks", "reader_depths", "printed_alphas", "steering", "rivals"):
            if isinstance(getattr(self, name), (str, int, float)):
                raise TypeError(f"{name} must be a tuple, got {getattr(self, name)!r}; give ({getattr(self, name)!r},)")
        _ = self.generation  # refuses what contradicts itself
        for name in ("epsilons", "alphas", "reader_ranks", "reader_depths", "printed_alphas", "steering"):
            if not getattr(self, name):
                raise ValueError(f"{name} must hold one value or more, got none; leave it out for the default")
        require_depths(self.reader_depths)
        if unknown := [rival for rival in self.rivals if rival not in RIVALS]:
            raise ValueError(f"rivals must be out of {list(RIVALS)}, got {unknown}")

    @property
    def generation(self) -> GenerationSettings:
        """How answers are generated, for safety and utility alike.

        Example:
            >>> RunSettings(do_sample=True, temperature=0.7).generation.options()
            {'max_new_tokens': 14, 'do_sample': True, 'temperature': 0.7}
        """
        return GenerationSettings(
            max_new_tokens=self.max_new_tokens, **{name: getattr(self, name) for name in _GENERATION}
        )

    def part(self, study: Study) -> Study:
        """The part of a study that is worked on, as `limit` and `learn_limit` say."""
        learned = self.limit if self.learn_limit is None else self.learn_limit
        for limit, splits in ((learned, _LEARNED), (self.limit, _ASKED)):
            study = study if limit is None else study.limited(limit, splits=splits)
        return study

    def asked(self, study: Study) -> Study:
        """The study whose examples have the system prompt, where they have none of their own."""
        if self.system is None:
            return study
        told = self.generation.examples
        return replace(
            study,
            suites={s: {c: tuple(told(some)) for c, some in channels.items()} for s, channels in study.suites.items()},
            pairs={
                name: replace(pairs, safe=tuple(told(pairs.safe)), unsafe=tuple(told(pairs.unsafe)))
                for name, pairs in study.pairs.items()
            },
            gradient=tuple(told(study.gradient)),
        )

    def sized(self, size: Size) -> "RunSettings":
        """`short`, `compact` or, as they are, "full".

        Raises:
            ValueError: if there is no such size.
        """
        if size not in SIZES:
            raise ValueError(f"size must be one of {list(SIZES)}, got {size!r}")
        if size == "full":
            return self
        return self.short() if size == "short" else self.compact()

    def compact(self) -> "RunSettings":
        """For a demonstration: every step and control on few examples a channel, one rival fewer, and fewer settings tried; wide intervals.

        What is less already stays as it is.
        """
        return self._smaller(limit=12, learn_limit=36, n_boot=400, pgd_steps=16, pgd_examples=8, fidelity=8)

    def short(self) -> "RunSettings":
        """For a quick look: a few examples a channel and no rivals; the figures are not to be quoted. What is less already stays as it is."""
        few = self._smaller(limit=8, learn_limit=16, n_boot=200, pgd_steps=6, pgd_examples=4, fidelity=4)
        return replace(few, rivals=())

    def _smaller(self, **most: int) -> "RunSettings":
        most |= {"pairs": 4, "ablated": 4, "candidates": 2, "random_seeds": 2}
        held = {name: getattr(self, name) for name in most}
        if held["learn_limit"] is None:
            held["learn_limit"] = self.limit
        numbers = {name: n if held[name] is None else min(n, held[name]) for name, n in most.items()}
        return replace(
            self,
            **numbers,
            epsilons=self.epsilons[-1:],
            alphas=self.alphas[:1],
            printed_alphas=self.printed_alphas[-1:],
            rivals=tuple(rival for rival in self.rivals if rival != "refusal direction"),
            steering=(self.steering[len(self.steering) // 2],),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values; settings that records of earlier versions do not have are left out where they are not given."""
        held = json.loads(json.dumps(asdict(self)))
        absent = {**dict.fromkeys((*_GENERATION, "learn_limit")), "rivals": list(RIVALS), "reader_depths": [1]}
        return {name: value for name, value in held.items() if name not in absent or value != absent[name]}

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The names of all settings."""
        return tuple(part.name for part in fields(cls))


def fingerprint(parts: Mapping[str, Any]) -> str:
    """A short digest of JSON-able settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
