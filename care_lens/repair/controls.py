"""Controls: what must stand beside every repair figure.

:func:`random_control` keeps a repair's structure, readers, gates and targets, and writes along random
directions instead, by as much: it says whether WHERE the repair writes matters, or any edit of that size on
those requests would do. :func:`shuffled_labels` gives the rows for a fit that has nothing to find, which says
what fitting alone brings.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.site import Site, SiteLike
from care_lens.repair.correction import Correction
from care_lens.repair.fusion import HybridFusion
from care_lens.repair.positions import Positions
from care_lens.repair.writer import Writer
from care_lens.subspace import random_isometry


def random_control(
    fusion: HybridFusion,
    activations: Mapping[SiteLike | tuple[SiteLike, Positions], Float[Tensor, "n d"]],
    *,
    seed: int = 0,
) -> HybridFusion:
    """The same repair with random subspaces in its writers.

    Each writer's pair W, L is carried by a random isometry from its own span to a random subspace, so rank,
    obliqueness and lengths stay; then alpha is scaled so that its mean edit norm on the given activations is
    the original's. Norms are matched writer by writer. A writer that several corrections share stays shared, so
    that modalities that agree in the repair agree in the control, and the fused edits have equal norms too.

    Args:
        fusion: The repair.
        activations: For each site written, or each (site, scope) of its writers, [n, d] activations such as those
            the writer edits: take them at the tokens that it acts on.
        seed: Seed of the generator.

    Returns:
        The control, named "random control of ...".

    Raises:
        ValueError: If a site's activations are missing.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: dict[tuple[Site, object], Tensor] = {
        (Site.parse(key[0]), key[1]) if isinstance(key, tuple) else (Site.parse(key), None): tensor
        for key, tensor in activations.items()
    }
    made: dict[int, Writer] = {}

    def randomised(correction: Correction) -> Correction:
        writer = correction.writer
        if id(writer) not in made:
            made[id(writer)] = _random_writer(writer, rows, generator)
        return dataclasses.replace(correction, writer=made[id(writer)])

    return dataclasses.replace(
        fusion,
        visual=tuple(randomised(correction) for correction in fusion.visual),
        textual=tuple(randomised(correction) for correction in fusion.textual),
        name=f"random control of {fusion.name}",
        provenance={**fusion.provenance, "control": "random subspace", "control_seed": seed},
    )


def _random_writer(writer: Writer, rows: Mapping[tuple[Site, object], Tensor], generator: torch.Generator) -> Writer:
    scopes = [writer.scope, None]
    if writer.scope == "context_end":  # without a begun answer it is the last prompt token
        scopes.insert(1, "last")
    here = next((rows[writer.site, scope] for scope in scopes if (writer.site, scope) in rows), None)
    if here is None:
        known = [str(site) if scope is None else f"{site} {scope}" for site, scope in rows]
        raise ValueError(f"activations must hold the site {writer.site} (scope {writer.scope}), got {known}")
    pair = (writer.write, writer.left)
    write, left = random_isometry(pair, span=pair, generator=generator)
    moved = dataclasses.replace(writer, write=write, left=left)
    here = here.to(writer.target)
    original, random = (w.delta(here).norm(dim=-1).double().mean() for w in (writer, moved))
    return dataclasses.replace(moved, alpha=writer.alpha * float(original / random))


def shuffled_labels(
    benign: Float[Tensor, "n_benign d"],
    malicious: Float[Tensor, "n_malicious d"],
    *,
    seed: int = 0,
    groups: tuple[Sequence[str], Sequence[str]] | None = None,
) -> tuple[Float[Tensor, "n_first d"], Float[Tensor, "n_second d"]]:
    """The same rows, dealt to the two classes at random.

    Args:
        benign: [n_benign, d] rows.
        malicious: [n_malicious, d] rows.
        seed: Seed of the generator.
        groups: The item of each benign and of each malicious row: rows of one item and class are dealt
            together, since they are not independent; the classes' numbers of such units are kept. None: every
            row by itself.

    Returns:
        Two sets of rows to fit as benign and malicious; without groups, of the sizes given.

    Raises:
        ValueError: If groups are not as long as the rows.
    """
    if benign.shape[1] != malicious.shape[1]:
        raise ValueError(
            f"benign and malicious must be of one width, got {benign.shape[1]} and {malicious.shape[1]}; capture both at one site"
        )
    labels = groups or (range(len(benign)), range(len(malicious)))
    if [len(names) for names in labels] != [len(benign), len(malicious)]:
        raise ValueError(
            f"groups must be as long as the rows ({len(benign)}, {len(malicious)}), got "
            f"{[len(names) for names in labels]}"
        )
    keys = [(kind, name) for kind, names in enumerate(labels) for name in names]
    units = list(dict.fromkeys(keys))
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed)).tolist()
    n_benign = sum(kind == 0 for kind, _ in units)
    dealt = {units[unit] for unit in order[:n_benign]}
    rows, first = torch.cat([benign, malicious]), torch.tensor([key in dealt for key in keys])
    return rows[first], rows[~first]
