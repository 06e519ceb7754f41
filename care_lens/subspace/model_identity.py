"""Which model a subspace or a repair belongs to, and how nearly another one is it."""

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from care_lens.core.identity import model_fingerprint
from care_lens.subspace.errors import SubspaceError, SubspaceMismatchError

#: Where the Hub's cache keeps a model.
_SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")

Match = Literal["exact", "architecture", "width"]
"""How much of a model must agree: the weights, by name and revision or by their digest; the architecture; the width alone."""


@dataclass(frozen=True)
class ModelIdentity:
    """A model, as far as a subspace depends on it.

    Attributes:
        name: Hub name, or what the model is called.
        revision: Commit of its weights, or None where it is not known.
        architecture: Class of the model, such as "LlavaForConditionalGeneration", or None.
        fingerprint: Digest of its weights (``care_lens.core.identity.model_fingerprint``), or None. It tells models that have no
            revision, such as one trained here, and it changes with their dtype.

    Example:
        >>> fitted = ModelIdentity("org/model", "abc", "LlavaForConditionalGeneration")
        >>> fitted.require(ModelIdentity("org/tuned", "def", "LlavaForConditionalGeneration"), "architecture")
    """

    name: str
    revision: str | None = None
    architecture: str | None = None
    fingerprint: str | None = None

    @property
    def hub_name(self) -> str | None:
        """The name on the Hub ("org/model"); None of a folder, whose path says nothing to others, and of a model without an organisation."""
        if kept := _SNAPSHOT.search(self.name.replace("\\", "/")):
            return f"{kept[1]}/{kept[2]}"
        local = Path(self.name).is_absolute() or self.name.startswith((".", "~")) or "\\" in self.name
        return self.name if not local and self.name.count("/") == 1 and not Path(self.name).is_dir() else None

    @property
    def label(self) -> str:
        """What tables, plans and cards call it: its name, and of a folder the last part alone.

        Example:
            >>> ModelIdentity("org/model").label, ModelIdentity("/home/me/models/tuned-7b").label
            ('org/model', 'tuned-7b')
            >>> ModelIdentity("/home/me/.cache/hub/models--org--model/snapshots/0123abcd").label
            'org/model'
        """
        return self.hub_name or self.name.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1] or self.name

    @classmethod
    def from_model(cls, model: nn.Module) -> "ModelIdentity":
        """Of a Hugging Face model that is loaded, with the digest of its weights.

        Args:
            model: The model, e.g. ``lvlm.hf_model``; a few numbers are copied from each of its parameters.

        Returns:
            The identity.

        """
        config: Any = getattr(model, "config", None)
        own = type(model).__name__
        if not getattr(config, "architectures", None) and not getattr(config, "name_or_path", ""):
            return cls(own, architecture=own, fingerprint=model_fingerprint(model))
        found = cls.from_config(config)
        return replace(found, architecture=found.architecture or own, fingerprint=model_fingerprint(model))

    @classmethod
    def from_config(cls, config: Any) -> "ModelIdentity":
        """Of a Hugging Face model, from its ``config``: name, commit and first architecture as loading noted them.

        Args:
            config: A ``PretrainedConfig``, or anything with its attributes.

        Returns:
            The identity.

        Raises:
            SubspaceError: If the config has neither a name nor an architecture.
        """
        architectures = getattr(config, "architectures", None) or ()
        architecture = str(architectures[0]) if architectures else None
        name = str(getattr(config, "name_or_path", "") or getattr(config, "_name_or_path", "") or architecture or "")
        if not name:
            raise SubspaceError("config must have a name or an architecture, got neither; give a ModelIdentity by hand")
        revision = getattr(config, "_commit_hash", None)
        return cls(name, None if revision is None else str(revision), architecture)

    def require(self, other: "ModelIdentity", match: Match = "exact") -> None:
        """Refuse another model.

        Args:
            other: The model it is about to be used on.
            match: "exact": the digests of the weights must be equal, or name, revision and architecture, and known;
                "architecture": the architecture alone; "width": nothing here (what asks checks the width itself).

        Raises:
            SubspaceMismatchError: If they are not.
            SubspaceError: If the level is not known.
        """
        if match not in get_args(Match):
            raise SubspaceError(f"match must be one of {get_args(Match)}, got {match!r}")
        if match == "exact" and self.fingerprint is not None and self.fingerprint == other.fingerprint:
            return
        wanted = {"exact": ("name", "revision", "architecture"), "architecture": ("architecture",), "width": ()}[match]
        for what in wanted:
            own, theirs = getattr(self, what), getattr(other, what)
            if own is None or own != theirs:
                looser = "architecture" if what in ("name", "revision") else "width"
                wrong = (
                    f"known, but the fit did not note it (give it model=ModelIdentity(...)), got {theirs}"
                    if own is None
                    else f"{own} as in the fit, got {theirs}"
                )
                if match == "exact" and self.fingerprint is not None and other.fingerprint is not None:
                    wrong += " (and its weights are others)"
                raise SubspaceMismatchError(
                    f"the model's {what} must be {wrong}; fit on this model, or load with match={looser!r} if you know "
                    "that the subspace carries over"
                )

    def to_dict(self) -> dict[str, str | None]:
        """As JSON-able values."""
        return asdict(self)
