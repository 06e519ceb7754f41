"""Which family a model belongs to."""

from torch import nn

from care_lens.lvlm.families.base import Family

_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Make a family known; it takes precedence over those registered before it.

    Args:
        family: The family.

    Returns:
        The same object.
    """
    for architecture in family.architectures:
        _FAMILIES[architecture] = family
    return family


def families() -> tuple[Family, ...]:
    """The families that are known."""
    return tuple({family.name: family for family in _FAMILIES.values()}.values())


def family_of(model: nn.Module) -> Family:
    """The family of a Hugging Face model, by the name of its class.

    Args:
        model: The model.

    Returns:
        Its family.

    Raises:
        ValueError: If none is registered for it.
    """
    for cls in type(model).__mro__:
        if cls.__name__ in _FAMILIES:
            family = _FAMILIES[cls.__name__]
            return family if family.variant is None else family.variant(model.config)
    raise ValueError(
        f"model must be one of {sorted(_FAMILIES)}, got {type(model).__name__}; describe its "
        "family in a Family object and pass it to care_lens.lvlm.families.register_family"
    )
