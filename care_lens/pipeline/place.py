"""The former place of ``care_lens.mediation.placement``, where readers are tried."""

from care_lens.core.renames import moved

__getattr__ = moved(
    __name__, {name: f"care_lens.mediation.placement.{name}" for name in ("Placement", "localised", "reader_layers")}
)
