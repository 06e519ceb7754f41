"""What a defence does to the model's language on ordinary text: perplexity of reference answers, and divergence from the undefended model.

    language_drift(lvlm, examples, {"none": None, "mine": repair})

Perplexity is exp(negative log probability / number of tokens) of the examples' own ``response``, teacher-forced, its end of sequence included; a beginning that the model was given does not
count. "perplexity_ratio" compares it with the undefended model's on the same answers. "kl" is KL(undefended || defended) of the next-token distribution after the prompt, "kl_answer" the same
averaged over the response, in nats. Nothing is generated, so that sampling does not matter.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.defence import defended
from care_lens.core.examples import Example
from care_lens.core.outcome import Repair, ResponseLogProb
from care_lens.core.progress import Steps
from care_lens.core.stats import Interval, cluster_bootstrap, ratio_of_means
from care_lens.evaluation.fidelity import next_token_kl
from care_lens.lvlm.hooked import HookedLVLM


def language_drift(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    defences: Mapping[str, Repair | None],
    *,
    system: str | None = None,
    batch_size: int = 32,
    n_boot: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
    progress: bool = True,
) -> pd.DataFrame:
    """Perplexity and KL drift of every defence, on the same reference answers.

    Args:
        lvlm: The model.
        examples: Ordinary examples, each with a ``response``.
        defences: Defences by name; one must be None, the undefended model.
        system: System prompt of examples that have none of their own.
        batch_size: Examples at a time.
        n_boot: Resamples of whole groups.
        seed: Their seed.
        confidence: Coverage of the intervals.
        progress: Whether to show a progress bar.

    Returns:
        Frame with the columns defence, metric ("perplexity"; "perplexity_ratio", "kl" and "kl_answer" of defences), value, ci_low, ci_high, n (examples), tokens, groups. The ends are NaN
        where no bounded interval has that coverage: where all examples are one group, or few groups have texts of very different lengths.

    Raises:
        ValueError: If there are no examples, one has no response, or no defence is None.
    """
    if not examples or any(not example.response for example in examples):
        without = [example.id or str(i) for i, example in enumerate(examples) if not example.response]
        raise ValueError(
            f"examples must each have a response, and there must be some, got {len(examples)}, of which {without[:3]} have none"
        )
    base = next((name for name, repair in defences.items() if repair is None), None)
    if base is None:
        raise ValueError(f"defences must include the undefended model (None), got {[*defences]}; add it")
    asked = [e if system is None or e.system is not None else replace(e, system=system) for e in examples]
    groups = [example.group or f"id:{i}" for i, example in enumerate(asked)]
    options = {"n_boot": n_boot, "seed": seed, "confidence": confidence}
    losses = {
        name: response_losses(lvlm, asked, repair, batch_size=batch_size, progress=progress)
        for name, repair in defences.items()
    }
    repairs = {name: repair for name, repair in defences.items() if repair is not None}
    texts = [(example.prefill or "") + (example.response or "") for example in asked]
    drift = (
        next_token_kl(lvlm, asked, texts, repairs=repairs, batch_size=batch_size, progress=progress) if repairs else {}
    )
    rows = []

    def add(defence: str, metric: str, found: Interval, tokens: float) -> None:
        figure = {"value": float(found[0]), "ci_low": float(found[1]), "ci_high": float(found[2])}
        counts = {"n": len(asked), "tokens": int(tokens), "groups": len(set(groups))}
        rows.append({"defence": defence, "metric": metric, **figure, **counts})

    for name in defences:
        loss, tokens = losses[name].numpy().T
        add(name, "perplexity", _exp(ratio_of_means(loss, tokens, groups, **options)), tokens.sum())
        if name in repairs:
            change = loss - losses[base].numpy().T[0]
            add(name, "perplexity_ratio", _exp(ratio_of_means(change, tokens, groups, **options)), tokens.sum())
            for metric, values in zip(("kl", "kl_answer"), drift[name].double().numpy().T, strict=True):
                mean, low, high = cluster_bootstrap(values, groups, kind="numbers", **options)
                add(name, metric, Interval(mean, max(low, 0.0), high), tokens.sum())  # no divergence is below 0
    return pd.DataFrame(rows)


@torch.no_grad()
def response_losses(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    defence: Repair | None = None,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> Float[Tensor, "example 2"]:
    """Negative log probability of each example's response, in nats, and its number of tokens with the end of sequence.

    Args:
        lvlm: The model.
        examples: Each with a ``response``.
        defence: What is on the model; None: nothing.
        batch_size: Examples at a time.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If ``batch_size`` is below 1, or an example has no response.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
    measure, parts = ResponseLogProb(total=True), [torch.zeros(0, 2, dtype=torch.float64)]
    starts = range(0, len(examples), batch_size)
    with defence.on(lvlm) if defence is not None else nullcontext():
        for start in Steps(starts, desc="perplexity", disable=not progress):
            inputs = lvlm.prepare(defended(defence, examples[start : start + batch_size]), responses=True)
            losses = -measure(lvlm(inputs), inputs).double().cpu()
            counts = (inputs.spans.response & ~inputs.spans.prefill).sum(dim=1).double().cpu()
            parts.append(torch.stack([losses, counts], dim=1))
    return torch.cat(parts)


def _exp(found: Interval) -> Interval:
    return Interval(*(float(np.exp(end)) for end in found))
