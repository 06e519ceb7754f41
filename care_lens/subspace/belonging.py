"""Where a subspace may be used: the site, modality, width and model that it was fitted for."""

from typing import TYPE_CHECKING, get_args

from care_lens.core.site import Site, SiteLike
from care_lens.subspace.errors import SubspaceError, SubspaceMismatchError
from care_lens.subspace.model_identity import Match, ModelIdentity

if TYPE_CHECKING:
    from care_lens.subspace.safety_subspace import SafetySubspace


def require(
    subspace: "SafetySubspace",
    *,
    site: SiteLike | None,
    modality: str | None,
    width: int | None,
    model: ModelIdentity | None,
    match: Match,
) -> None:
    """See ``SafetySubspace.check``."""
    wanted = {"site": None if site is None else Site.parse(site), "modality": modality, "width": width}
    for name, value in wanted.items():
        own = getattr(subspace, name)
        if value is not None and value != own:
            known = f"fitted for {name} {own}" if own is not None else f"fitted without a {name}"
            raise SubspaceMismatchError(
                f"{name} must be the one the subspace was fitted for, got {value} for a subspace "
                f"{known}; fit one on activations of that place"
            )
    if match not in get_args(Match):
        raise SubspaceError(f"match must be one of {get_args(Match)}, got {match!r}")
    if model is not None and match != "width":
        if subspace.model is None:
            raise SubspaceMismatchError(
                f"model must be the one the subspace was fitted for, got {model.name} for a subspace fitted without a "
                "model; fit with model=ModelIdentity(...), or use match='width' if you know that it carries over"
            )
        subspace.model.require(model, match)
