"""Translators: affine maps from the residual stream at a layer to the last one, which a lens reads instead of the stream itself.

The logit lens takes the stream at a layer as if it were the last one. A translator says what it becomes: h -> A h + b, per site.

- :func:`fit_tuned_lens`, method "ridge": least squares of the last stream on this one, over the tokens of examples; its normal
  equations are solved in float64 with the ridge that held-out groups prefer. Method "kl": goes on from there by gradient descent on
  KL(output of the model || output of the lens), the published tuned lens.
- :func:`fit_jacobian_lens`: A is the mean derivative of the last stream, summed over the position itself and those after it, by the
  stream at the layer, b = 0. It says what the model does with a direction, to first order, not what predicts its output best. One
  backward pass a dimension of the stream and batch: for small models.

    tuned = fit_tuned_lens(lvlm, examples)
    logit_lens(lvlm, others, translators=tuned)

Source: Belrose et al. 2023, "Eliciting latent predictions from transformers with the tuned lens"; Gurnee et al. 2026, "Verbalizable
representations form a global workspace in language models" (the Jacobian lens, in TransformerLens as ``JacobianLens``, whose
estimator this is; that one takes text alone).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core import Example, Site, SiteLike, examples_digest, package_versions
from care_lens.core.details import groups_of
from care_lens.core.display import ShortRepr
from care_lens.core.errors import ArtifactError
from care_lens.core.files import load_artifact, save_artifact, tensor_bytes, tensors_of
from care_lens.core.options import require_options
from care_lens.core.progress import Steps
from care_lens.core.renames import renamed
from care_lens.core.require import require_examples
from care_lens.lens.errors import LensError
from care_lens.lens.readout import full_log_probs
from care_lens.lens.states import positions_of, require_streams, states
from care_lens.lvlm import HookedLVLM

TunedMethod = Literal["ridge", "kl"]
_KIND, _SCHEMA = "LensTranslators", 1
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True, eq=False)
class LensTranslators(ShortRepr):
    """Affine maps to the last residual stream, per site.

    Attributes:
        method: "ridge", "kl" or "jacobian".
        matrices: By site name [d_model, d_model] A.
        biases: By site name [d_model] b.
        settings: What made them: examples, seed, versions, and of each site the ridge that was chosen.

    Raises:
        LensError: If a map has another shape than the rest.
    """

    method: str
    matrices: Mapping[str, Float[Tensor, "d d"]]
    biases: Mapping[str, Float[Tensor, " d"]]
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        widths = {tuple(matrix.shape) for matrix in self.matrices.values()}
        if self.matrices.keys() != self.biases.keys() or len(widths) != 1:
            raise LensError(f"matrices and biases must be of the same sites and one width, got shapes {sorted(widths)}")

    @property
    def sites(self) -> list[Site]:
        """The sites that have a map, in the order of the forward pass."""
        return sorted(Site.parse(name) for name in self.matrices)

    def __call__(self, site: SiteLike, state: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """What the last stream is expected to be.

        Args:
            site: Where the state was read.
            state: [..., d_model].

        Raises:
            LensError: If there is no map for the site.
        """
        name = str(Site.parse(site))
        if name not in self.matrices:
            raise LensError(
                f"site must be one of the translators', {list(self.matrices)[:4]}, got {name}; fit it there"
            )
        matrix, bias = (held[name].to(state.device, torch.float32) for held in (self.matrices, self.biases))
        return (state.float() @ matrix.T + bias).to(state.dtype)

    def save(self, directory: str | Path, name: str) -> Path:
        """Write ``name.safetensors`` and ``name.json`` into a directory; returns the path of the json file."""
        tensors = {f"matrix {site}": matrix.contiguous() for site, matrix in self.matrices.items()}
        tensors |= {f"bias {site}": bias.contiguous() for site, bias in self.biases.items()}
        content = {"method": self.method, "settings": self.settings}
        return save_artifact(
            directory, name, kind=_KIND, schema=_SCHEMA, data={"safetensors": tensor_bytes(tensors)}, content=content
        )

    @classmethod
    def load(cls, directory: str | Path, name: str) -> "LensTranslators":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: If a file is not there.
            ArtifactError: If the files are damaged or of another kind.
        """
        data, content = load_artifact(directory, name, kind=_KIND, schema=_SCHEMA)
        tensors = tensors_of(data, where=Path(directory) / name)
        parts: dict[str, dict[str, Tensor]] = {"matrix": {}, "bias": {}}
        for key, tensor in tensors.items():
            part, _, site = key.partition(" ")
            if part not in parts:
                raise ArtifactError(f"{name}.safetensors must hold matrices and biases, got {key!r}; save it again")
            parts[part][site] = tensor
        return cls(content["method"], parts["matrix"], parts["bias"], content["settings"])


@renamed(span="positions")
def fit_tuned_lens(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    *,
    sites: Sequence[SiteLike] | None = None,
    positions: str = "all",
    method: TunedMethod = "ridge",
    steps: int = 200,
    rate: float = 1e-3,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> LensTranslators:
    """Fit an affine translator for every site.

    Memory: the states of these tokens at all sites, on the CPU.

    Args:
        lvlm: The model.
        examples: What to fit on; of at least two groups (items), of which a fifth chooses the ridge. Not those that are looked at.
        sites: Residual streams; None: all, those of the vision tower too where examples have pictures.
        positions: The tokens that are fitted on, a span's name.
        method: "ridge" or "kl".
        steps: Gradient steps of "kl".
        rate: Their step size (Adam).
        batch_size: Examples of a forward pass.
        seed: Of the held-out groups and of the gradient steps' tokens.
        progress: Whether to show a progress bar.

    Returns:
        The translators.

    Raises:
        LensError: If there are too few examples, or a site is no residual stream.
    """
    require_options(steps=steps, batch_size=batch_size, seed=seed)
    rows = list(require_examples(examples))
    if method not in get_args(TunedMethod):
        raise LensError(f"method must be one of {get_args(TunedMethod)}, got {method!r}")
    items = groups_of(rows)
    kinds = sorted(set(items))
    if len(kinds) < 2:
        raise LensError(f"examples must be of at least two groups to hold one out, got {len(kinds)}; give more items")
    order = torch.randperm(len(kinds), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = {kinds[i] for i in order[: max(1, len(kinds) // 5)]}
    wanted = require_streams(lvlm, sites, vision=any(row.images for row in rows))
    last = Site("language", lvlm.n_layers() - 1, "hook_resid_post")
    kept: dict[Site, list[Tensor]] = {site: [] for site in wanted}
    finals: dict[Site, list[Tensor]] = {site: [] for site in wanted}
    outs: dict[Site, list[Tensor]] = {site: [] for site in wanted}
    for start in Steps(range(0, len(rows), batch_size), desc="reading streams", disable=not progress):
        some = rows[start : start + batch_size]
        inputs = lvlm.prepare(some, responses=all(row.response is not None for row in some))
        out = torch.tensor([items[start + i] in held_out for i in range(len(some))], device=inputs.input_ids.device)
        final = dict(states(lvlm, inputs, [last]))[last]
        seeing = [site for site in wanted if site.tower == "language" or inputs.pixel_values is not None]
        for site, stream in states(lvlm, inputs, seeing):
            mask = positions_of(inputs, site, positions)
            kept[site].append(stream[mask].cpu())
            finals[site].append(final[mask].cpu())
            outs[site].append(out[:, None].expand_as(mask)[mask].cpu())
    matrices, biases, chosen = {}, {}, {}
    for site in Steps(wanted, desc="fitting translators", disable=not progress):
        x, y, out = torch.cat(kept[site]), torch.cat(finals[site]), torch.cat(outs[site])
        if int((~out).sum()) < 2 or int(out.sum()) < 1:
            raise LensError(
                f"examples must have tokens of span {positions!r} at {site} in both parts, got {len(x)} in all"
            )
        matrix, bias, ridge = _ridge(x, y, out)
        if method == "kl":
            matrix, bias = _by_kl(lvlm, x, y, out, matrix, bias, steps=steps, rate=rate, seed=seed)
        matrices[str(site)], biases[str(site)], chosen[str(site)] = matrix.float(), bias.float(), ridge
    settings = {"span": positions, "ridge": chosen, "seed": seed, "n": len(rows), "examples": examples_digest(rows)}
    if method == "kl":
        settings |= {"steps": steps, "rate": rate}
    return LensTranslators(method, matrices, biases, {**settings, "versions": package_versions()})


def _ridge(x: Tensor, y: Tensor, out: Tensor) -> tuple[Tensor, Tensor, float]:
    """The map of least squares with the ridge whose residual on held-out tokens is smallest, in float64."""
    x, y = x.double(), y.double()
    fit_x, fit_y = x[~out], y[~out]
    mean_x, mean_y = fit_x.mean(0), fit_y.mean(0)
    cx, cy = fit_x - mean_x, fit_y - mean_y
    square, cross = cx.T @ cx, cx.T @ cy
    scale = square.diagonal().mean()
    best: tuple[float, Tensor, Tensor, float] | None = None
    for ridge in _RIDGES:
        eye = torch.eye(len(square), dtype=torch.float64)
        # Towards the identity, the logit lens: with an infinite ridge nothing is translated.
        matrix = torch.linalg.solve(square + ridge * scale * eye, cross + ridge * scale * eye).T
        bias = mean_y - matrix @ mean_x
        error = float((x[out] @ matrix.T + bias - y[out]).square().mean())
        if best is None or error < best[0]:
            best = error, matrix, bias, ridge
    assert best is not None
    return best[1], best[2], best[3]


def _by_kl(
    lvlm: HookedLVLM,
    x: Tensor,
    y: Tensor,
    out: Tensor,
    matrix: Tensor,
    bias: Tensor,
    *,
    steps: int,
    rate: float,
    seed: int,
    size: int = 128,
) -> tuple[Tensor, Tensor]:
    """Gradient descent on KL(model || lens) from a map; the best on held-out tokens is kept."""
    generator = torch.Generator().manual_seed(seed)
    device = lvlm.device
    # Optimised relative to the width of the stream, so that the step size means the same at every layer.
    a = matrix.float().to(device).requires_grad_()
    b = bias.float().to(device).requires_grad_()
    optimiser = torch.optim.Adam([a, b], lr=rate)
    fit, held = (~out).nonzero()[:, 0], out.nonzero()[:, 0]
    held = held[torch.randperm(len(held), generator=generator)[: 4 * size]]

    def loss(index: Tensor) -> Tensor:
        state, final = x[index].float().to(device), y[index].float().to(device)
        target = full_log_probs(lvlm, final)
        made = full_log_probs(lvlm, state @ a.T + b, enable_grad=True)
        return (target.exp() * (target - made)).sum(-1).mean()

    best = (float("inf"), matrix, bias)
    with torch.enable_grad():
        for step in range(steps + 1):
            if step % max(1, steps // 10) == 0 or step == steps:
                with torch.no_grad():
                    now = float(loss(held))
                if now < best[0]:
                    best = now, a.detach().cpu().double(), b.detach().cpu().double()
            if step == steps:
                break
            index = fit[torch.randint(len(fit), (min(size, len(fit)),), generator=generator)]
            value = loss(index)
            gradients = torch.autograd.grad(value, [a, b])
            a.grad, b.grad = gradients
            optimiser.step()
            optimiser.zero_grad()
    return best[1], best[2]


@renamed(span="positions")
def fit_jacobian_lens(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    *,
    sites: Sequence[SiteLike] | None = None,
    positions: str = "all",
    batch_size: int = 4,
    progress: bool = True,
) -> LensTranslators:
    """The mean Jacobian of the last residual stream by the stream at every site of the language tower.

    A = mean over examples and positions t of the span of sum over t' >= t of d h_last[t'] / d h_site[t].

    Args:
        lvlm: The model.
        examples: What to average over.
        sites: Residual streams of the language tower; None: all.
        positions: Those of t and t', a span's name.
        batch_size: Examples of a backward pass.
        progress: Whether to show a progress bar.

    Returns:
        The translators, with biases of 0.

    Raises:
        LensError: If a site is not of the language tower, or an example has no token of the span.
    """
    require_options(batch_size=batch_size, seed=0)
    rows = list(require_examples(examples))
    if not rows:
        raise LensError("examples must hold at least one example, got none")
    wanted = require_streams(lvlm, sites, vision=False)
    if outside := [str(site) for site in wanted if site.tower != "language"]:
        raise LensError(
            f"sites must be of the language tower, got {outside}; the tuned lens has those of the vision tower"
        )
    last = Site("language", lvlm.n_layers() - 1, "hook_resid_post")
    width = lvlm.width(last)
    sums = {site: torch.zeros(width, width, dtype=torch.float64) for site in wanted}
    bar = Steps(total=width * -(-len(rows) // batch_size), desc="Jacobians", disable=not progress)
    with bar:
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            inputs = lvlm.prepare(some, responses=all(row.response is not None for row in some))
            mask = inputs.spans.mask(positions)
            counts = mask.sum(dim=1)
            if bool((counts == 0).any()):
                raise LensError(
                    f"examples must each have a token of span {positions!r}, got one that has none; leave it out"
                )
            held: dict[Site, Tensor] = {}

            def keep(activation: Tensor, hook: Any, site: Site, held: dict[Site, Tensor] = held) -> Tensor:
                held[site] = activation if activation.requires_grad else activation.detach().requires_grad_()
                return held[site]

            hooks = [
                (site, lambda activation, hook, site=site: keep(activation, hook, site))
                for site in dict.fromkeys((*wanted, last))
            ]
            with torch.enable_grad():
                lvlm.run_with_hooks(inputs, fwd_hooks=hooks, logits_to_keep=1)
                chosen = held[last][mask]
                for dimension in range(width):
                    gradients = torch.autograd.grad(
                        chosen[:, dimension].sum(), [held[site] for site in wanted], retain_graph=dimension + 1 < width
                    )
                    for site, gradient in zip(wanted, gradients, strict=True):
                        # A mean over an example's positions, then over examples.
                        kept = (gradient * mask[..., None]).double().sum(dim=1) / counts[:, None]
                        sums[site][dimension] += kept.sum(dim=0).cpu()
                    bar.update()
    matrices = {str(site): (total / len(rows)).float() for site, total in sums.items()}
    settings = {"span": positions, "n": len(rows), "examples": examples_digest(rows), "versions": package_versions()}
    return LensTranslators("jacobian", matrices, {name: torch.zeros(width) for name in matrices}, settings)
