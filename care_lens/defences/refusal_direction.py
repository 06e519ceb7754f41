"""The refusal direction of Arditi et al. 2024 (arXiv:2406.11717), as a defence.

Candidates are ``r[p, l]``, the mean over harmful minus the mean over harmless requests of ``hook_resid_pre``
at layer l and position p, one of the tokens after the instruction; means are taken in float64. Each is scored
on validation requests by the refusal score, the logit of the summed probability of the tokens that refusals
begin with:

- bypass: mean score on harmful requests with r ablated (``h - (h . r_hat) r_hat`` at every block's input,
  attention output and MLP output); small if r is what refusals need.
- induce: mean score on harmless requests with r added at its layer; large if r suffices for a refusal.
- kl: mean KL divergence of the next-token distribution from the unhooked to the ablated one, on harmless
  requests.

Of those with finite figures, l < int(0.8 L), kl <= 0.1 and induce >= 0, the one with the smallest bypass is
taken. The defence adds it: ``h + c r`` at the input of layer l at every token but padding, r as it is, not
normalised.

Data filter (``filter_data``): before anything else, harmful requests with a refusal score below 0 and harmless ones with one
above 0 are left out of all four sets, as the method's code does; without it attacks that are complied with would count as harmful.

Cost: three passes over the validation requests for each candidate.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.examples import Example
from care_lens.core.progress import Steps
from care_lens.core.site import Site
from care_lens.defences.base import Batch, HookDefence
from care_lens.defences.folding import added_vector_part
from care_lens.defences.stored import FitError
from care_lens.lvlm import HookedLVLM, LVLMInputs
from care_lens.repair.base import HookPair
from care_lens.repair.linear import LinearPart
from care_lens.repair.plan import PlanPart

_MAX_KL = 0.1
_MIN_INDUCE = 0.0
_LAYER_SHARE = 0.8
_EPSILON = 1e-8


class NoRefusalDirectionError(FitError):
    """No candidate passed the filters: this model has no refusal direction in the sense of the method.

    Attributes:
        nearest: The candidate that comes nearest, as a defence with the figures of all candidates: of those in layers that are considered and
            that miss the fewest of the other filters, the one with the largest induce; None if there was none.
    """

    nearest: "RefusalDirection | None"

    def __init__(self, message: str = "", *, nearest: "RefusalDirection | None" = None) -> None:
        super().__init__(message)
        self.nearest = nearest


@dataclass(frozen=True, eq=False, kw_only=True)
class RefusalDirection(HookDefence):
    """Adds the refusal direction to the residual stream at the input of one layer.

    Attributes:
        direction: [d] r, unnormalised.
        layer: The layer at whose input it is added.
        position: Where it was read, counted from the end of the prompt (-1 is the last token).
        coefficient: c.
        candidates: One row a candidate: position, layer, bypass, induce, kl, kept.
        name: Row of a defence table.
    """

    direction: Float[Tensor, "d"]
    layer: int
    position: int
    candidates: pd.DataFrame
    coefficient: float = 1.0
    name: str = "refusal direction"

    @property
    def site(self) -> Site:
        """Where it is added."""
        return Site("language", self.layer, "hook_resid_pre")

    @classmethod
    def fit(
        cls,
        lvlm: HookedLVLM,
        *,
        harmful: Sequence[Example],
        harmless: Sequence[Example],
        harmful_validation: Sequence[Example],
        harmless_validation: Sequence[Example],
        refusal_tokens: Sequence[int],
        positions: int | None = None,
        coefficient: float = 1.0,
        filter_data: bool = False,
        batch_size: int = 32,
        progress: bool = True,
    ) -> "RefusalDirection":
        """Compute the candidates and select one.

        Args:
            lvlm: The model, without a repair on it.
            harmful: Requests that the model should refuse; the paper takes 128.
            harmless: Requests that it should not; 128.
            harmful_validation: Others of the first kind, to select on; 32.
            harmless_validation: Others of the second kind; 32.
            refusal_tokens: Ids of the tokens that refusals begin with.
            positions: How many tokens at the end of the prompt are candidates; None: those that come after
                the instruction, i.e. those that end all the prompts given.
            coefficient: c of the defence.
            filter_data: Whether to leave out harmful requests that the model does not begin to refuse, and harmless ones that it does.
            batch_size: Examples a forward pass.
            progress: Whether to show a progress bar.

        Returns:
            The defence, with the figures of all candidates.

        Raises:
            FitError: If a set of examples or tokens is empty.
            NoRefusalDirectionError: If no candidate passes the filters (its attribute `nearest` is the one that comes nearest), or the data
                filter leaves nothing of a set.
        """
        if filter_data and len(refusal_tokens):
            harmful, harmful_validation, harmless, harmless_validation = (
                _filtered(lvlm, examples, list(refusal_tokens), kind, batch_size)
                for kind, examples in (
                    ("harmful", harmful),
                    ("harmful", harmful_validation),
                    ("harmless", harmless),
                    ("harmless", harmless_validation),
                )
            )
        sets = {"harmful": harmful, "harmless": harmless, "refusal_tokens": refusal_tokens}
        sets |= {"harmful_validation": harmful_validation, "harmless_validation": harmless_validation}
        if empty := [name for name, items in sets.items() if not len(items)]:
            raise FitError(f"{', '.join(empty)} must not be empty")
        n_layers = lvlm.n_layers("language")
        with torch.no_grad():
            if positions is None:
                positions = _common_ending(lvlm, [*harmful, *harmless])
            directions = _means(lvlm, harmful, positions, batch_size) - _means(lvlm, harmless, positions, batch_size)
            rows = _figures(
                lvlm,
                directions,
                harmful=list(_batches(lvlm, harmful_validation, batch_size)),
                harmless=list(_batches(lvlm, harmless_validation, batch_size)),
                refusal_tokens=list(refusal_tokens),
                progress=progress,
            )
        end_layer = int(_LAYER_SHARE * n_layers)
        for row in rows:
            row["kept"] = not _missed(row, end_layer)

        def one(row: dict[str, Any]) -> RefusalDirection:
            return cls(
                direction=directions[row["position"], row["layer"]].float(),
                layer=row["layer"],
                position=row["position"],
                candidates=pd.DataFrame(rows),
                coefficient=coefficient,
            )

        if kept := [row for row in rows if row["kept"]]:
            return one(min(kept, key=lambda row: row["bypass"]))
        considered = [row for row in rows if _finite(row) and row["layer"] < end_layer]
        nearest = min(considered, key=lambda row: (_missed(row, end_layer), -row["induce"]), default=None)
        told = (
            f"; the nearest has layer {nearest['layer']}, kl {nearest['kl']:.3g} and induce {nearest['induce']:.3g}"
            if nearest
            else ""
        )
        raise NoRefusalDirectionError(
            f"a candidate must have layer < {end_layer}, kl <= {_MAX_KL} and induce >= {_MIN_INDUCE}, "
            f"got none in {len(rows)}{told}; does the model refuse harmful requests and answer harmless ones?",
            nearest=one(nearest) if nearest else None,
        )

    def widths(self) -> dict[Site, int]:
        """Its site."""
        return {self.site: len(self.direction)}

    @property
    def off(self) -> bool:
        """Whether its coefficient is 0."""
        return self.coefficient == 0

    def plan_parts(self) -> list[PlanPart]:
        """What it does, for ``explain``."""
        return [
            PlanPart(
                name=str(self.site),
                site=self.site,
                positions="all",
                writer="adds the refusal direction",
                rank=1,
                width=len(self.direction),
                rank_rule="one direction",
                alpha=self.coefficient,
                multiply_adds=len(self.direction),
                note=f"chosen of {len(self.candidates)} candidates",
            )
        ]

    def edits(self, batch: Batch) -> list[HookPair]:
        """One hook, at its site."""
        return [batch.edit(self.site, lambda h: h + self.coefficient * self.direction.to(h))]

    def linear_parts(self) -> list[LinearPart]:
        """Its direction, a bias of the block before; none where its coefficient is 0."""
        if self.off:
            return []
        return [added_vector_part(self.name, self.site, self.coefficient * self.direction.double())]

    def describe(self) -> dict[str, Any]:
        """Its settings, as JSON-able values."""
        return {
            "name": self.name,
            "site": str(self.site),
            "position": self.position,
            "coefficient": self.coefficient,
            "norm": float(self.direction.norm()),
            "candidates": len(self.candidates),
            "kept": int(self.candidates["kept"].sum()),
        }


def _batches(lvlm: HookedLVLM, examples: Sequence[Example], batch_size: int) -> Iterator[LVLMInputs]:
    for start in range(0, len(examples), batch_size):
        yield lvlm.prepare(examples[start : start + batch_size])


@torch.no_grad()
def _filtered(
    lvlm: HookedLVLM, examples: Sequence[Example], refusal_tokens: list[int], kind: str, batch_size: int
) -> list[Example]:
    """Harmful requests with a refusal score of 0 or more; harmless ones with 0 or less."""
    kept: list[Example] = []
    for start in range(0, len(examples), batch_size):
        part = list(examples[start : start + batch_size])
        scores = _refusal_scores(_log_probs(lvlm, [lvlm.prepare(part)], []), refusal_tokens)
        right = scores >= 0 if kind == "harmful" else scores <= 0
        kept += [example for example, keep in zip(part, right.tolist(), strict=True) if keep]
    if examples and not kept:
        raise NoRefusalDirectionError(
            f"{kind} requests must be {'refused' if kind == 'harmful' else 'answered'} by the model, got none of {len(examples)}; "
            "the data filter left nothing to take a direction from"
        )
    return kept


def _common_ending(lvlm: HookedLVLM, examples: Sequence[Example]) -> int:
    """Number of tokens that end all prompts; at least 1."""
    ends = [inputs.input_ids[0].flip(0).cpu() for inputs in _batches(lvlm, examples, 1)]
    shortest = min(len(end) for end in ends)
    same = torch.stack([end[:shortest] == ends[0][:shortest] for end in ends]).all(dim=0)
    return max(1, int(same.long().cumprod(dim=0).sum()))


def _means(
    lvlm: HookedLVLM, examples: Sequence[Example], positions: int, batch_size: int
) -> Float[Tensor, "positions layers d"]:
    """Mean ``hook_resid_pre`` of the last tokens of the prompt, in float64; [-1] is the last one."""
    sites = [Site("language", layer, "hook_resid_pre") for layer in range(lvlm.n_layers("language"))]
    total = torch.zeros(positions, len(sites), lvlm.width(sites[0]), dtype=torch.float64)
    for inputs in _batches(lvlm, examples, batch_size):
        _, cache = lvlm.run_with_cache(inputs, sites=sites, logits_to_keep=1)
        ends = [cache[str(site)][:, -positions:].double().sum(dim=0).cpu() for site in sites]
        total += torch.stack(ends, dim=1)
    return total / len(examples)


def _figures(
    lvlm: HookedLVLM,
    directions: Tensor,
    *,
    harmful: Sequence[LVLMInputs],
    harmless: Sequence[LVLMInputs],
    refusal_tokens: list[int],
    progress: bool,
) -> list[dict[str, Any]]:
    """One row a candidate: its position, layer, bypass, induce and kl."""
    positions, n_layers = directions.shape[:2]
    plain = _log_probs(lvlm, harmless, [])
    cells = [(position, layer) for position in range(-positions, 0) for layer in range(n_layers)]
    rows = []
    for position, layer in Steps(cells, desc="refusal direction", disable=not progress):
        direction = directions[position, layer]
        ablate = _ablation(direction, n_layers)
        add = [(str(Site("language", layer, "hook_resid_pre")), _adder(direction))]
        ablated = _log_probs(lvlm, harmless, ablate)
        rows.append(
            {
                "position": position,
                "layer": layer,
                "bypass": _refusal_score(_log_probs(lvlm, harmful, ablate), refusal_tokens),
                "induce": _refusal_score(_log_probs(lvlm, harmless, add), refusal_tokens),
                "kl": float((plain.exp() * (plain - ablated)).sum(dim=-1).mean()),
            }
        )
    return rows


def _finite(row: dict[str, Any]) -> bool:
    return all(math.isfinite(row[figure]) for figure in ("bypass", "induce", "kl"))


def _missed(row: dict[str, Any], end_layer: int) -> int:
    """How many of the three filters a candidate does not pass; one whose figures are not finite passes none."""
    passed = (row["layer"] < end_layer, row["kl"] <= _MAX_KL, row["induce"] >= _MIN_INDUCE)
    return 3 - sum(passed) if _finite(row) else 3


def _log_probs(lvlm: HookedLVLM, batches: Sequence[LVLMInputs], hooks: Sequence[HookPair]) -> Tensor:
    """[example, vocab] log probabilities of the first token of the answer, in float64 on the CPU."""
    logits = [lvlm.run_with_hooks(inputs, fwd_hooks=hooks, logits_to_keep=1)[:, -1] for inputs in batches]
    return torch.cat(logits).double().cpu().log_softmax(dim=-1)


def _refusal_scores(log_probs: Tensor, refusal_tokens: list[int]) -> Tensor:
    p = log_probs[:, refusal_tokens].exp().sum(dim=-1)
    return (p + _EPSILON).log() - (1 - p + _EPSILON).log()


def _refusal_score(log_probs: Tensor, refusal_tokens: list[int]) -> float:
    return float(_refusal_scores(log_probs, refusal_tokens).mean())


def _ablation(direction: Tensor, n_layers: int) -> list[HookPair]:
    unit = direction / direction.norm()

    def ablate(activation: Tensor, hook: Any) -> Tensor:
        here = unit.to(activation)
        return activation - (activation @ here)[..., None] * here

    components = ("hook_resid_pre", "hook_attn_out", "hook_mlp_out")
    return [(str(Site("language", layer, component)), ablate) for layer in range(n_layers) for component in components]


def _adder(direction: Tensor) -> Any:
    return lambda activation, hook: activation + direction.to(activation)
