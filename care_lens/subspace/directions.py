"""A safety subspace along directions that are given: those of a classifier, a probe, a dictionary, a refusal direction.

::

    direction = classifier_direction(benign, malicious)
    subspace = subspace_along(direction, benign, malicious, site="blocks.6.hook_resid_post")

The generalised eigenvectors of `SafetySubspace.fit` are the directions of most malicious energy a unit of benign variance; they need
not tell the classes apart row by row, and what does need not have much energy. Everything that a subspace is asked (coordinates,
projector, comparison, reader, saving) works on these alike.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core.site import Site, SiteLike
from care_lens.core.threads import one_blas_thread
from care_lens.subspace.contrast import class_moments, pencil
from care_lens.subspace.errors import RankError, SubspaceError, WidthError
from care_lens.subspace.fitting import Projection, subspace_tensors
from care_lens.subspace.model_identity import ModelIdentity
from care_lens.subspace.safety_subspace import Modality, SafetySubspace
from care_lens.subspace.shrinkage import Shrinkage
from care_lens.subspace.solvers import PencilSolution

_RANK_TOLERANCE = 1e-6
"""Of the largest singular value of the directions at length 1: below it one of them is taken to depend on the others."""


def classifier_direction(
    benign: Float[Tensor, "n_b d"], malicious: Float[Tensor, "n_m d"], *, strength: float = 0.1
) -> Float[Tensor, "d"]:
    """Normal of a logistic regression's boundary, pointing to the malicious side.

    Coordinates are divided by their standard deviations over both classes, so that the penalty treats them alike; the direction that
    is returned is that of the activations as they are. Rows count alike, whatever the sizes of the classes: the threshold is a gate's
    business.

    The regression ends at scikit-learn's default tolerance (gradient 1e-4), which regularises a little more than the penalty says: with many
    coordinates and a weak penalty the exact optimum is some way off. Of the bundled model's readers of five blocks (800 coordinates, strength 0.3) it takes
    four times the steps, and scores then differ by a tenth of a benign standard deviation.

    Args:
        benign: Rows of the one class.
        malicious: Rows of the other.
        strength: Inverse of the ridge penalty, scikit-learn's ``C``: the sum of the log losses is weighed by it.

    Returns:
        [d] float32, on the CPU; not of length 1.

    Raises:
        SubspaceError: As for `SafetySubspace.fit`, or if strength is not above 0.

    Warns:
        UserWarning: If the regression has not come to that tolerance.

    Example:
        >>> import torch
        >>> from care_lens.subspace import classifier_direction
        >>> generator = torch.Generator().manual_seed(0)
        >>> benign, malicious = torch.randn(2, 100, 8, generator=generator)
        >>> malicious[:, 3] += 4
        >>> int(classifier_direction(benign, malicious).argmax())
        3
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    if not 0 < strength < float("inf"):
        raise SubspaceError(f"strength must be a number above 0, got {strength}; smaller ones regularise more")
    class_moments(benign, malicious, "mean", "benign")  # refuses rows that are none
    rows = torch.cat([benign.detach().double().cpu(), malicious.detach().double().cpu()]).numpy()
    labels = np.repeat([0, 1], [len(benign), len(malicious)])
    scaler = StandardScaler().fit(rows)
    with warnings.catch_warnings(record=True) as said, one_blas_thread():
        warnings.simplefilter("always", ConvergenceWarning)
        model = LogisticRegression(C=strength, max_iter=5000).fit(scaler.transform(rows), labels)
    if any(issubclass(one.category, ConvergenceWarning) for one in said):
        warnings.warn(
            f"the regression must converge, and has not in 5000 steps at strength {strength:g}; take a smaller strength",
            UserWarning,
            stacklevel=2,
        )
    return torch.from_numpy(model.coef_[0] / scaler.scale_).float()


def subspace_along(
    directions: Float[Tensor, "*d_k"],
    benign: Float[Tensor, "n_b d"],
    malicious: Float[Tensor, "n_m d"],
    *,
    shrinkage: Shrinkage = "ledoit-wolf",
    projection: Projection = "oblique",
    site: SiteLike | None = None,
    modality: Modality | None = None,
    model: ModelIdentity | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> SafetySubspace:
    """The subspace whose reading directions span those given.

    Within their span the pencil ``C_m u = lambda C_b u`` is solved, with the second moment of the malicious rows about the benign mean
    as C_m (their covariance, shrunk, plus the outer product of the difference of the means, as `SafetySubspace.fit` has it), so that columns are in the order of their energy and ``U^T C_b U = I``. The oblique projector writes along ``C_b U``: for a
    classifier's direction that is its activation pattern (Haufe et al. 2014, NeuroImage 87, equation 6), how the activations
    move with what it reads.

    Args:
        directions: [d] or [d, k], not dependent on each other.
        benign: Rows of the one class.
        malicious: Rows of the other; their mean will be on the positive side of each column.
        shrinkage: As for `SafetySubspace.fit`; likewise projection, site, modality, model and provenance.
        projection: See there.
        site: See there.
        modality: See there.
        model: See there.
        provenance: See there.

    Raises:
        RankError: If the directions depend on each other, or one is 0.
        SubspaceError: As for `SafetySubspace.fit`, or if the directions are not as wide as the rows or not finite.

    Example:
        >>> import torch
        >>> from care_lens.subspace import subspace_along
        >>> benign, malicious = torch.randn(2, 100, 8, generator=torch.Generator().manual_seed(0))
        >>> subspace = subspace_along(torch.eye(8)[:, :2], benign, malicious)
        >>> subspace.rank, bool(subspace.read[2:].abs().max() < 1e-6)
        (2, True)
    """
    both = class_moments(benign, malicious, "second_moment", "benign")
    columns = directions.detach().double().cpu()
    columns = columns[:, None] if columns.ndim == 1 else columns
    if columns.ndim != 2 or columns.shape[0] != both[0].width or not columns.shape[1]:
        raise WidthError(
            f"directions must be [d] or [d, k] with the rows' d = {both[0].width}, got {list(directions.shape)}; take them at one site"
        )
    if not torch.isfinite(columns).all():
        raise SubspaceError("directions must be finite, got NaN or infinity")
    lengths = columns.norm(dim=0)
    columns = columns / lengths.clamp(min=torch.finfo(torch.float64).tiny)
    sizes = torch.linalg.svdvals(columns)
    if columns.shape[1] > columns.shape[0] or not lengths.all() or sizes[-1] <= _RANK_TOLERANCE * sizes[0]:
        raise RankError(
            "directions must not depend on each other, got some that do, or a 0; leave out what is redundant",
            largest=int((sizes > _RANK_TOLERANCE * sizes[0]).sum()) if lengths.any() else 0,
        )
    numerator, metric = pencil(*both, contrast="second_moment", metric="benign", shrinkage=shrinkage)
    within = columns.T @ metric.times(columns)
    lower = torch.linalg.cholesky((within + within.T) / 2)
    half = torch.linalg.solve_triangular(lower, (columns.T @ numerator.times(columns)), upper=False)
    small = torch.linalg.solve_triangular(lower, half.T, upper=False)
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    read = columns @ torch.linalg.solve_triangular(lower.T, vectors, upper=True)
    solution = PencilSolution(values, read, "within directions", len(lengths), 1.0, 0.0, torch.zeros_like(values))
    device = benign.device
    return SafetySubspace(
        # Apple's GPUs have no float64.
        **{
            name: (t.float() if device.type == "mps" else t).to(device)
            for name, t in subspace_tensors(solution, metric, both, projection).items()
        },
        site=None if site is None else Site.parse(site),
        modality=modality,
        model=model,
        diagnostics={
            # No contrast: there is no recipe to fit it again by.
            "operation": "given directions",
            "metric": "benign",
            "projection": projection,
            "n_benign": both[0].count,
            "n_malicious": both[1].count,
            "shrinkage": shrinkage,
            "shrinkage_benign": metric.weight,
            "shrinkage_malicious": numerator.weight,
        },
        provenance=dict(provenance or {}),
    )
