"""Several malicious classes at once, one per attack family, and several benign references.

Malicious: :func:`fit_families` fits each family against one benign class, and all of them pooled, and finds what the
families share by principal angles. Pooled rows see directions that any large family has; the shared part only those
that every family has.

Benign: which reference is called benign (ordinary answers, or refusals of harmful prompts) changes what is removed;
:func:`compare_references` fits the same malicious class against each and says how far the fits agree.

The shared part: with orthonormal bases Q_f, the eigenvalues of the mean projector ``1/F sum Q_f Q_f^T`` are the mean
squared cosines of its eigenvectors with the families: 1 for a direction in all of them, 1/F for one in a single family.
Those eigenvectors are the directions of largest agreement (for two families the bisectors of the principal angles;
Krzanowski 1979, "Between-groups comparison of principal components").
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.display import ShortRepr
from care_lens.subspace.comparison import compare_bases
from care_lens.subspace.errors import SubspaceError, TooFewRowsError, WidthError
from care_lens.subspace.moments import Moments
from care_lens.subspace.moments_table import merge_all
from care_lens.subspace.safety_subspace import SafetySubspace


@dataclass(frozen=True, eq=False)
class SharedSubspace(ShortRepr):
    """What several subspaces have in common.

    Attributes:
        basis: [d, k] orthonormal, float64, by falling agreement; k may be 0.
        agreement: [m] mean squared cosine of each direction of the joint span with the subspaces, falling; the first
            k are those of ``basis``.
        cosines: [k, F] cosine of each direction of ``basis`` with each subspace, in the order of ``names``.
        names: Of the subspaces.
        threshold: Least squared cosine with every subspace that a direction had to have.
        chance: What the largest agreement is for random subspaces of these ranks, at the 95th percentile.
        draws: Number of random draws for ``chance``; 0 if it was not asked for, and then ``chance`` is NaN.
        seed: Of those draws.
    """

    basis: Float[Tensor, "d k"]
    agreement: Float[Tensor, "m"]
    cosines: Float[Tensor, "k F"]
    names: tuple[str, ...]
    threshold: float
    chance: float
    draws: int
    seed: int

    @property
    def rank(self) -> int:
        """Number of shared directions."""
        return self.basis.shape[1]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a shared direction and subspace: direction, family, cosine, agreement, chance, draws, seed."""
        return pd.DataFrame(
            [
                {
                    "direction": index,
                    "family": name,
                    "cosine": float(self.cosines[index, column]),
                    "agreement": float(self.agreement[index]),
                    "chance": self.chance,
                    "draws": self.draws,
                    "seed": self.seed,
                }
                for index in range(self.rank)
                for column, name in enumerate(self.names)
            ],
            columns=["direction", "family", "cosine", "agreement", "chance", "draws", "seed"],
        )


@dataclass(frozen=True, eq=False)
class FamilyFits:
    """Fits of several malicious families against one benign class.

    Attributes:
        families: Name to its own fit.
        pooled: The fit of all their rows together.
        shared: What their subspaces have in common.
    """

    families: Mapping[str, SafetySubspace]
    pooled: SafetySubspace
    shared: SharedSubspace

    def to_dataframe(self) -> pd.DataFrame:
        """Overlap of every two fits, the pooled one included; columns as for :func:`overlaps`."""
        return overlaps({**self.families, "pooled": self.pooled})


def pool(parts: Mapping[str, Moments], *, between: bool = True) -> Moments:
    """The moments of several classes as one.

    Args:
        parts: Name to moments, of one width. A class counts by its rows.
        between: Whether the differences of the class means count as variance. False: every class about its own mean
            (the scatter within classes), with the mean of all rows.

    Returns:
        The moments, in the form of rows if every part is.

    Raises:
        TooFewRowsError: If there are no parts.
        WidthError: If their widths differ.
    """
    whole = merge_all(list(parts.values()))
    if between:
        return whole
    zero = torch.zeros_like(whole.mean)
    within = merge_all([Moments(zero, part.rows, part.kept) for part in parts.values()])
    return Moments(whole.mean, within.rows, within.kept)


def shared_subspace(
    bases: Mapping[str, Float[Tensor, "d _"]], *, threshold: float = 0.5, draws: int = 20, seed: int = 0
) -> SharedSubspace:
    """The directions that all of several subspaces have, nearly.

    Args:
        bases: Name to a [d, k_f] basis of full column rank, of any scale.
        threshold: Least squared cosine with every one of them; 0.5 is within 45 degrees of each.
        draws: Random sets of subspaces of the same ranks to compare with; 0 for none.
        seed: Of the draws.

    Returns:
        The shared directions, and what chance would give.

    Raises:
        SubspaceError: If there are fewer than two, one lacks full column rank, or the threshold is not in (0, 1].
        WidthError: If they differ in width.

    Notes:
        Directions are the leading eigenvectors of the mean projector, up to the first that misses the threshold; where
        agreement is tied, any basis of the tied ones serves.

    Example:
        >>> import torch
        >>> eye = torch.eye(4, dtype=torch.float64)
        >>> shared_subspace({"a": eye[:, :2], "b": eye[:, 1:3]}).basis.abs().argmax().item()
        1
    """
    if len(bases) < 2:
        raise SubspaceError(f"bases must be of two subspaces or more, got {list(bases)}; one shares with none")
    if not 0 < threshold <= 1:
        raise SubspaceError(f"threshold must be in (0, 1], got {threshold!r}")
    widths = {name: basis.shape[0] for name, basis in bases.items()}
    if len(set(widths.values())) != 1:
        raise WidthError(f"bases must be equally wide, got {widths}; take all from one site of one model")
    orthonormal = [_orthonormal(name, basis) for name, basis in bases.items()]
    vectors, agreement = _agreement(orthonormal)
    cosines = torch.stack([(basis.T @ vectors).norm(dim=0) for basis in orthonormal], dim=1)
    missed = (cosines.square().min(dim=1).values < threshold - 1e-9).nonzero()
    rank = int(missed[0]) if len(missed) else vectors.shape[1]
    generator = torch.Generator().manual_seed(seed)
    random = []
    for _ in range(draws):
        drawn = [torch.randn(basis.shape, generator=generator, dtype=torch.float64) for basis in orthonormal]
        random.append(float(_agreement([torch.linalg.qr(one).Q for one in drawn])[1][0]))
    chance = float(torch.tensor(random, dtype=torch.float64).quantile(0.95)) if random else float("nan")
    return SharedSubspace(
        basis=vectors[:, :rank].clone(),
        agreement=agreement,
        cosines=cosines[:rank].clamp_max(1.0),
        names=tuple(bases),
        threshold=threshold,
        chance=chance,
        draws=draws,
        seed=seed,
    )


def fit_families(
    benign: Float[Tensor, "n_b d"],
    malicious: Mapping[str, Float[Tensor, "_ d"]],
    *,
    threshold: float = 0.5,
    seed: int = 0,
    **options: Any,
) -> FamilyFits:
    """Fit each malicious family, and all of them pooled, against one benign class.

    Args:
        benign: [n_b, d] rows.
        malicious: Family to its [n_f, d] rows; two families or more.
        threshold: As for :func:`shared_subspace`.
        seed: Of the fits and of the draws for chance.
        **options: Of :meth:`SafetySubspace.fit`, but for ``groups``. A number for ``rank`` must be one that the
            smallest family determines.

    Returns:
        The fits and their shared part.

    Raises:
        TooFewRowsError: If a family is empty or too small; its name is in the message.
        SubspaceError: As for a fit, or if there are fewer than two families.
    """
    if len(malicious) < 2:
        raise SubspaceError(f"malicious must hold two families or more, got {list(malicious)}; use SafetySubspace.fit")
    _refuse_groups(options)
    families = {name: _fit(name, benign, rows, seed, options) for name, rows in malicious.items()}
    rows = torch.cat([rows.to(benign.device, torch.float64) for rows in malicious.values()])
    pooled = SafetySubspace.fit(benign, rows, seed=seed, **options)
    bases = {name: fitted.basis for name, fitted in families.items()}
    return FamilyFits(families, pooled, shared_subspace(bases, threshold=threshold, seed=seed))


def compare_references(
    benign: Mapping[str, Float[Tensor, "_ d"]],
    malicious: Float[Tensor, "n_m d"],
    *,
    seed: int = 0,
    **options: Any,
) -> dict[str, SafetySubspace]:
    """Fit one malicious class against each of several benign references.

    Args:
        benign: Reference (e.g. "answers", "refusals") to its [n_r, d] rows.
        malicious: [n_m, d] rows.
        seed: Of the fits.
        **options: Of :meth:`SafetySubspace.fit`, but for ``groups``.

    Returns:
        Reference to fit; :func:`overlaps` says how far they agree.

    Raises:
        TooFewRowsError: If a reference is empty or too small; its name is in the message.
        SubspaceError: As for a fit.
    """
    _refuse_groups(options)
    return {name: _fit(name, rows, malicious, seed, options) for name, rows in benign.items()}


def overlaps(subspaces: Mapping[str, SafetySubspace]) -> pd.DataFrame:
    """Principal angles of every two subspaces.

    Returns:
        One row a pair: first, second, rank_first, rank_second, smallest_cosine, largest_cosine, normalized (the
        projection kernel over ``sqrt(k1 k2)``) and chance (its mean for random subspaces).
    """
    rows = []
    if len(subspaces) < 2:
        raise ValueError(f"subspaces must be two or more, got {len(subspaces)}")
    for (first, one), (second, other) in itertools.combinations(subspaces.items(), 2):
        found = compare_bases(one.basis, other.basis)
        rows.append(
            {
                "first": first,
                "second": second,
                "rank_first": one.rank,
                "rank_second": other.rank,
                "smallest_cosine": float(found.cosines.min()),
                "largest_cosine": float(found.cosines.max()),
                "normalized": found.normalized,
                "chance": found.chance,
            }
        )
    return pd.DataFrame(rows)


def _fit(name: str, benign: Tensor, malicious: Tensor, seed: int, options: Mapping[str, Any]) -> SafetySubspace:
    try:
        return SafetySubspace.fit(benign, malicious, seed=seed, **options)
    except TooFewRowsError as error:
        raise TooFewRowsError(f"{name}: {error}") from error


def _refuse_groups(options: Mapping[str, Any]) -> None:
    if "groups" in options:
        raise SubspaceError("groups must not be given for several classes at once; fit each with SafetySubspace.fit")


def _orthonormal(name: str, basis: Tensor) -> Tensor:
    wide = basis.detach().to("cpu", torch.float64)
    left, singular, _ = torch.linalg.svd(wide, full_matrices=False)
    if wide.shape[1] == 0 or wide.shape[1] > wide.shape[0] or float(singular[-1]) <= 1e-8 * float(singular[0]):
        raise SubspaceError(f"{name} must have full column rank and a column or more, got shape {tuple(wide.shape)}")
    return left


def _agreement(bases: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Eigenvectors and eigenvalues of the mean projector on the joint span, falling."""
    left, singular, _ = torch.linalg.svd(torch.cat(bases, dim=1), full_matrices=False)
    kept = singular > 1e-8
    return left[:, kept], (singular[kept].square() / len(bases)).clamp_max(1.0)
