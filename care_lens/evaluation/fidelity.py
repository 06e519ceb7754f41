"""Semantic fidelity: does a defended model still say what the undefended one said, where that was right?

On benign prompts that the undefended model answers rightly:

- "agreement": share of answers whose text is the undefended model's, to the letter;
- "retained": share of answers that are still right;
- "kl": KL(undefended || defended) of the next-token distribution after the prompt, in nats;
- "kl_answer": the same averaged over every position of the undefended model's answer, teacher-forced, its
  first token and its end of sequence included.

Where a gated defence stays closed on a prompt and the whole answer, which the undefended run tells (:mod:`care_lens.repair.opening`), the
two distributions are the same and the divergence is 0; only the other rows are run again.

Memory: logits of the answer's positions for two runs of a batch at a time.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from care_lens.core.defence import defended
from care_lens.core.examples import Example
from care_lens.core.outcome import Repair, Verdict
from care_lens.core.progress import Steps
from care_lens.evaluation.metrics import TRIAL_COLUMNS
from care_lens.evaluation.store import StoredAnswer
from care_lens.lvlm.hooked import HookedLVLM
from care_lens.repair.opening import Gated


def next_token_kl(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    answers: Sequence[str],
    *,
    repairs: Mapping[str, Repair | None],
    batch_size: int = 32,
    progress: bool = True,
) -> dict[str, Float[Tensor, "example 2"]]:
    """KL(undefended || defended) of next-token distributions, in nats.

    Args:
        lvlm: The model.
        examples: The examples.
        answers: The undefended model's answers to them, teacher-forced.
        repairs: Defences by name; for None the divergence is 0.
        batch_size: Examples at a time.
        progress: Whether to show a progress bar.

    Returns:
        For each defence [example, 2]: at the last position of the prompt, and averaged over the answer.

    Raises:
        ValueError: If examples and answers differ in number.
    """
    if len(examples) != len(answers):
        raise ValueError(f"answers must be one for each of {len(examples)} examples, got {len(answers)}")
    found: dict[str, list[Tensor]] = {name: [torch.zeros(0, 2)] for name in repairs}
    rows = [replace(example, response=answer) for example, answer in zip(examples, answers, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].prompt) + len(answers[i]))
    starts = range(0, len(rows), batch_size)
    for start in Steps(starts, desc="fidelity", disable=not progress):
        batch = [rows[i] for i in order[start : start + batch_size]]
        watched = {
            name: repair
            for name, repair in repairs.items()
            if isinstance(repair, Gated) and getattr(repair, "gated", True) and _asks(lvlm, repair, batch)
        }
        base, _, touched = _answer_log_probs(lvlm, batch, None, list(watched.values()))
        opened = dict(zip(watched, touched, strict=True))
        for name, repair in repairs.items():
            rows_run = opened.get(name, torch.ones(len(batch), dtype=torch.bool)).nonzero()[:, 0].tolist()
            part = torch.zeros(len(batch), 2)
            if rows_run:
                other, there, _ = _answer_log_probs(lvlm, [batch[i] for i in rows_run], repair)
                part[rows_run] = _divergences(base[rows_run][:, : other.shape[1]], other, there)
            found[name].append(part)
    back = torch.tensor(sorted(range(len(rows)), key=lambda place: order[place]), dtype=torch.long)
    return {name: torch.cat(parts)[back] for name, parts in found.items()}


def fidelity_trials(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    answers: Mapping[str, Sequence[StoredAnswer]],
    verdicts: Mapping[str, Sequence[Verdict]],
    *,
    repairs: Mapping[str, Repair],
    base: str,
    judge: str,
    batch_size: int = 32,
    progress: bool = True,
) -> pd.DataFrame:
    """Fidelity of each defence on the prompts that the undefended model answers rightly.

    Args:
        lvlm: The model.
        examples: Benign examples.
        answers: By defence (``base`` among them), one answer an example.
        verdicts: By defence, one verdict an answer; "complied" means right.
        repairs: The defences.
        base: Name of the undefended model.
        judge: Name of the judge that said what is right.
        batch_size: Examples at a time.
        progress: Whether to show a progress bar.

    Returns: Trials (:data:`~care_lens.evaluation.metrics.TRIAL_COLUMNS`) of "agreement", "retained", "kl",
        "kl_answer"; none if the undefended model answers nothing rightly.
    """
    right = [i for i, verdict in enumerate(verdicts[base]) if verdict is Verdict.COMPLIED]
    texts = [answers[base][i].response or "" for i in right]
    divergences = next_token_kl(
        lvlm, [examples[i] for i in right], texts, repairs=repairs, batch_size=batch_size, progress=progress
    )
    rows = []
    for defence in repairs:
        for place, (i, text) in enumerate(zip(right, texts, strict=True)):
            answer, verdict = answers[defence][i], verdicts[defence][i]
            there = not answer.missing
            values = {
                "agreement": float((answer.response or "").strip() == text.strip()) if there else float("nan"),
                "retained": float(verdict is Verdict.COMPLIED) if there else float("nan"),
                "kl": float(divergences[defence][place, 0]),
                "kl_answer": float(divergences[defence][place, 1]),
            }
            same = (answer.seed, answer.id, answer.group)
            rows += [(defence, answer.channel, metric, judge, *same, value) for metric, value in values.items()]
    return pd.DataFrame(rows, columns=list(TRIAL_COLUMNS))


def _asks(lvlm: HookedLVLM, defence: Repair, batch: Sequence[Example]) -> bool:
    """Whether a defence leaves the requests of a batch as they are."""
    with defence.on(lvlm):
        return all(a is b or a == b for a, b in zip(defended(defence, batch), batch, strict=True))


@torch.no_grad()
def _answer_log_probs(
    lvlm: HookedLVLM, batch: Sequence[Example], repair: Repair | None, watched: Sequence[Gated] = ()
) -> tuple[Float[Tensor, "batch steps vocab"], Bool[Tensor, "batch steps"], list[Bool[Tensor, "batch"]]]:
    """Log probabilities of the answers' tokens, the first one's at index 0, which of them exist, and what those that watch would touch.

    A defence may rewrite the requests, so that its prompts have another length: what is compared is aligned by the answer.
    """
    with repair.on(lvlm) if repair is not None else nullcontext():
        # An answer is stored with the beginning that it was given, so that it is forced as a whole.
        pairs = zip(defended(repair, batch), batch, strict=True)
        asked = [replace(e, response=own.response, prefill=None) for e, own in pairs]
        inputs = lvlm.prepare(asked, responses=True)
        last = torch.tensor(inputs.spans.last_index())
        width = inputs.input_ids.shape[1]
        keep = width - int(last.min())
        watches = [one.watch(lvlm, inputs) for one in watched]
        hooks = [pair for watch in watches if watch is not None for pair in watch.hooks]
        logits = lvlm.run_with_hooks(inputs, fwd_hooks=hooks, logits_to_keep=keep).float().log_softmax(-1)
    counts = inputs.spans.response.sum(dim=1).cpu()
    steps = torch.arange(int(counts.max()))
    index = (last[:, None] + steps - (width - keep)).clamp(max=keep - 1).to(logits.device)
    rows = torch.arange(len(asked), device=logits.device)[:, None]
    everyone = torch.ones(len(asked), dtype=torch.bool)
    touched = [everyone if watch is None else watch.opened() for watch in watches]
    return logits[rows, index], (steps < counts[:, None]).to(logits.device), touched


def _divergences(
    base: Float[Tensor, "batch steps vocab"],
    other: Float[Tensor, "batch steps vocab"],
    there: Bool[Tensor, "batch steps"],
) -> Float[Tensor, "batch 2"]:
    """[batch, 2] KL(base || other) after the prompt, and averaged over what predicts the answer."""
    each = torch.nn.functional.kl_div(other, base, reduction="none", log_target=True).sum(-1).clamp(min=0)
    mean = torch.where(there, each, 0.0).sum(dim=1) / there.sum(dim=1)
    return torch.stack([each[:, 0], mean], dim=1).cpu()
