"""Safety tuning: fine-tuning on refusals, as low-rank adapters (LoRA, Hu et al. 2021) on the linear maps of the language tower.

Question: what does ordinary alignment training reach on the same examples as a repair at inference?

Attacks are taught a refusal, harmless requests the model's own answers, so that what it answered before it goes on answering. Each
linear map ``W`` of a block then computes ``W x + alpha scale B A x`` with A [rank, d_in] and B [d_out, rank].

    tuned = SafetyTuning.fit(lvlm, benign=harmless, malicious=attacks, refusals=["sorry i cannot help"])
    with tuned.on(lvlm):
        answers = lvlm.generate(lvlm.prepare(requests))
    tuned.save("tuned")

The weights are never written: the adapters act through hooks, so that the model is bit-identical once the block is left. Training
needs peft (``pip install "care-lens[tuning]"``); using, saving and loading what was trained does not. An adapter acts at every token,
and so on batches and padding as on single rows. Cost of the fit: ``epochs`` times a forward and backward pass over the examples.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from care_lens.core.blocks import with_block
from care_lens.core.examples import Example
from care_lens.defences.lora import Lesson, linear_maps, require_peft, train
from care_lens.defences.stored import (
    FitError,
    StoredDefence,
    StoredPart,
    WrongModelError,
    require_examples,
    require_finite,
)
from care_lens.lvlm import HookedLVLM, LVLMInputs
from care_lens.repair.placed import compute_dtype
from care_lens.repair.plan import PlanPart

Answers = Literal["own", "given"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Adapter(StoredPart):
    """The adapter of one linear map.

    Attributes:
        a: [rank, d_in].
        b: [d_out, rank].
    """

    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "d_out rank"]

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(
                f"a and b must be [rank, d_in] and [d_out, rank], got {list(self.a.shape)} and {list(self.b.shape)}"
            )
        require_finite(a=self.a, b=self.b)

    def delta(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """``x A^T B^T``, in the dtype of x."""
        return (x @ self.a.to(x).T) @ self.b.to(x).T


@dataclass(frozen=True, eq=False, kw_only=True)
class SafetyTuning(StoredDefence):
    """The language tower with adapters that were trained to refuse attacks and to answer harmless requests as before.

    Attributes:
        adapters: By linear map, named by block and path: "2.mlp.down_proj".
        scale: Of all adapters, fixed by the training.
        alpha: Strength; 1 is what was trained, 0 the model itself.
        losses: Mean loss of each epoch of the training, in nats a token.
        name: Row of a defence table.
    """

    adapters: Mapping[str, Adapter]
    scale: float = 2.0
    alpha: float = 1.0
    losses: tuple[float, ...] = ()
    name: str = "safety tuning"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.adapters:
            raise ValueError("adapters must hold one or more, got none; make them with SafetyTuning.fit")

    @classmethod
    def fit(
        cls,
        lvlm: HookedLVLM,
        *,
        benign: Sequence[Example],
        malicious: Sequence[Example],
        refusals: Sequence[str],
        benign_answers: Answers = "own",
        rank: int = 8,
        scale: float = 2.0,
        layers: Sequence[int] | None = None,
        modules: Sequence[str] | None = None,
        epochs: int = 3,
        lr: float = 2e-4,
        alpha: float = 1.0,
        answer_tokens: int = 64,
        batch_size: int = 8,
        seed: int = 0,
        progress: bool = True,
    ) -> "SafetyTuning":
        """Train the adapters.

        Args:
            lvlm: The model, without a defence on it. Its weights stay as they are; they may be half precision or quantised, the
                adapters are float32.
            benign: Harmless requests.
            malicious: Attacks; their own responses are not used.
            refusals: One refusal, or a list that is cycled over the attacks.
            benign_answers: What harmless requests are taught: "own", the model's own greedy answers, or "given", their responses.
            rank: Of each adapter.
            scale: Of each adapter's output (peft's ``lora_alpha / r``).
            layers: Blocks of the language tower that get adapters; None: all.
            modules: Linear maps that get one, by the end of their path ("q_proj", "mlp.down_proj"); None: all of a block.
            epochs: Passes over the examples.
            lr: Step size of AdamW.
            alpha: Strength.
            answer_tokens: Most tokens of the model's own answers; one that is cut off there is not taught to end there.
            batch_size: Examples a step, and requests answered at a time.
            seed: Of the adapters' first values and of the order of the examples.
            progress: Whether to show a progress bar.

        Returns:
            The defence, with the mean loss of each epoch.

        Raises:
            MissingPeftError: If peft is not installed; it is an ImportError.
            FitError: If a set is empty, an option makes no sense, a response is missing, or the loss is not finite.
            WrongModelError: If the model has no such layers or modules.
        """
        require_peft()
        require_examples(benign=benign, malicious=malicious)
        if isinstance(refusals, str) or not refusals:
            raise FitError(f"refusals must be a list of one or more texts, got {refusals!r}")
        if benign_answers not in ("own", "given"):
            raise FitError(f"benign_answers must be 'own' or 'given', got {benign_answers!r}")
        counts = {
            "rank": rank,
            "epochs": epochs,
            "lr": lr,
            "scale": scale,
            "answer_tokens": answer_tokens,
            "batch_size": batch_size,
        }
        if wrong := {name: value for name, value in counts.items() if not value > 0}:
            raise FitError(f"{' and '.join(wrong)} must be above 0, got {list(wrong.values())}")
        maps = linear_maps(lvlm, layers=layers, modules=modules)
        lessons = [
            Lesson(replace(example, response=refusals[i % len(refusals)])) for i, example in enumerate(malicious)
        ]
        if benign_answers == "given":
            if missing := [example.id for example in benign if example.response is None]:
                raise FitError(f"benign examples must have a response to be taught it, got none for {missing[:3]}")
            lessons += [Lesson(example) for example in benign]
        else:
            lessons += own_answers(lvlm, benign, tokens=answer_tokens, batch_size=batch_size)
        learned, losses = train(
            lvlm,
            lessons,
            maps,
            rank=rank,
            scale=scale,
            epochs=epochs,
            lr=lr,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
        adapters = {name: Adapter(a=a, b=b) for name, (a, b) in learned.items()}
        return cls(adapters=adapters, scale=scale, alpha=alpha, losses=losses)

    @property
    def off(self) -> bool:
        """Whether its strength is 0."""
        return self.alpha == 0

    def check(self, lvlm: HookedLVLM) -> None:
        """Refuse a model that it was not trained on.

        Raises:
            WrongModelError: If a linear map is not there or of another size.
        """
        self._maps(lvlm)

    @with_block("defence.on(lvlm)")
    def on(self, lvlm: HookedLVLM) -> Iterator[HookedLVLM]:
        """Have the adapters on a model until the block is left; its weights are not written.

        Args:
            lvlm: The model.

        Raises:
            WrongModelError: If the model does not fit.
        """
        maps = self._maps(lvlm)
        edits = {} if self.off else {module: self._edit(self.adapters[name]) for name, module in maps.items()}
        with lvlm.module_hooks(edits, self._no_hooks):
            yield lvlm

    def plan_parts(self) -> list[PlanPart]:
        """What it does, for ``explain``: a part for each kind of linear map."""
        kinds: dict[str, list[str]] = {}
        for name in self.adapters:
            layer, path = name.split(".", 1)
            kinds.setdefault(path, []).append(layer)
        parts = []
        for path, layers in kinds.items():
            here = [self.adapters[f"{layer}.{path}"] for layer in layers]
            blocks = f"block {layers[0]}" if len(layers) == 1 else f"{len(layers)} blocks ({layers[0]} to {layers[-1]})"
            parts.append(
                PlanPart(
                    name=path,
                    site=f"{path} of {blocks}",
                    positions="all",
                    writer="a trained low-rank adapter (LoRA)",
                    rank=here[0].a.shape[0],
                    width=here[0].b.shape[0],
                    rank_rule="given to the training",
                    alpha=self.alpha,
                    multiply_adds=sum(one.a.numel() + one.b.numel() for one in here),
                    note="" if not self.losses else f"loss {self.losses[0]:.3g} to {self.losses[-1]:.3g} nats a token",
                )
            )
        return parts

    def _edit(self, adapter: Adapter) -> Callable[[Tensor, Tensor], Tensor]:
        placed: dict[torch.device, Adapter] = {}  # moved once, not at every token

        def edit(x: Tensor, output: Tensor) -> Tensor:
            wide = compute_dtype(output.dtype)
            if output.device not in placed:
                a, b = (weight.to(output.device, wide) for weight in (adapter.a, adapter.b))
                placed[output.device] = Adapter(a=a, b=b)
            delta = placed[output.device].delta(x.to(wide))
            return (output.to(wide) + self.alpha * self.scale * delta).to(output.dtype)

        return edit

    def _no_hooks(self, inputs: LVLMInputs) -> list[Any]:
        """What is made for a batch: nothing. Being of the defence it says what is acting on the model."""
        return []

    def _maps(self, lvlm: HookedLVLM) -> dict[str, nn.Module]:
        there = linear_maps(lvlm)
        if missing := [name for name in self.adapters if name not in there]:
            raise WrongModelError(f"the model must have the linear maps of {self.name}, got none named {missing[:3]}")
        for name, adapter in self.adapters.items():
            module: Any = there[name]
            sizes, ours = (module.in_features, module.out_features), (adapter.a.shape[1], adapter.b.shape[0])
            if sizes != ours:
                raise WrongModelError(
                    f"{self.name} must be as wide as the model at {name} ({sizes[0]} to {sizes[1]}), got {ours[0]} to {ours[1]}; fit it "
                    "on this model"
                )
        return {name: there[name] for name in self.adapters}


def own_answers(lvlm: HookedLVLM, examples: Sequence[Example], *, tokens: int, batch_size: int) -> list[Lesson]:
    """The model's own greedy answers to requests.

    Args:
        lvlm: The model, without a defence on it.
        examples: The requests; their responses are not used.
        tokens: Most tokens of an answer.
        batch_size: Requests at a time.
    """
    ends = lvlm.generation_settings().get("eos_token_id", lvlm.tokenizer.eos_token_id)
    stops = torch.tensor([ends] if isinstance(ends, int) else list(ends or ()))
    lessons = []
    for start in range(0, len(examples), batch_size):
        part = [replace(example, response=None) for example in examples[start : start + batch_size]]
        made = lvlm.generate(lvlm.prepare(part), max_new_tokens=tokens, do_sample=False)
        ended = torch.isin(made.new_tokens.cpu(), stops).any(dim=1).tolist()
        lessons += [
            Lesson(replace(example, response=text), ends=end)
            for example, text, end in zip(part, made.texts, ended, strict=True)
        ]
    return lessons
