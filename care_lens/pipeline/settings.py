"""Settings of a run: frozen, JSON-able, and what resuming is checked against."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class RunSettings:
    """What the four steps do.

    Attributes:
        seed: of every draw.
        limit: at most so many examples a channel and split; None: all.
        batch_size, max_new_tokens: of generation; the same for safety and utility.
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
        benign_loss: most that accuracy on benign validation prompts may fall, as a share, for a repair to be chosen.
        printed_layers: on how many neighbouring layers published CARE is put; every window is tried.
        printed_rank, printed_alphas: its rank (four times that is tried too), and its strengths tried (1: projection; published runs use
            4 to 4.5). The rank is also that of the subspaces that are learned at every layer.
        steering: strengths of the difference of means and of the refusal direction tried.
        random_seeds: draws of the random-writer control.
        fidelity: benign examples a channel on which answers and distributions are compared with the undefended model's.
        restarts: of the gradient attack that sees the repair, for each of its two losses.
        pgd_epsilon, pgd_steps, pgd_examples: the gradient attack, of 255; 0 examples: none.
    """

    seed: int = 0
    limit: int | None = None
    batch_size: int = 128
    max_new_tokens: int = 14
    n_boot: int = 1000
    pairs: int = 10
    carrier_score: float = 0.5
    ablated: int = 24
    epsilons: tuple[float, ...] = (0.01, 0.02)
    answer_tokens: int = 6
    alphas: tuple[float, ...] = (1.0, 1.5)
    candidates: int = 4
    reader_ranks: tuple[int, ...] = (0, 8)
    reader_classifier: bool = True
    benign_loss: float = 0.03
    printed_layers: int = 3
    printed_rank: int = 8
    printed_alphas: tuple[float, ...] = (1.0, 4.5)
    steering: tuple[float, ...] = (0.25, 0.5, 1.0)
    random_seeds: int = 5
    fidelity: int = 24
    restarts: int = 1
    pgd_epsilon: int = 64
    pgd_steps: int = 40
    pgd_examples: int = 24

    def short(self) -> "RunSettings":
        """For a quick look: a few examples a channel; the figures are not to be quoted."""
        few = {"limit": 12, "pairs": 6, "ablated": 6, "n_boot": 200, "pgd_steps": 8, "pgd_examples": 6}
        return replace(
            self,
            **few,
            epsilons=(0.02,),
            candidates=2,
            random_seeds=2,
            printed_alphas=(1.0, 4.5),
            steering=(0.5,),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return json.loads(json.dumps(asdict(self)))


def fingerprint(parts: Mapping[str, Any]) -> str:
    """A short digest of JSON-able settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
