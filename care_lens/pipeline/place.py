"""Where readers are tried, under its earlier name; see `care_lens.mediation.placement`."""

from care_lens.mediation.placement import Placement, localised, reader_layers

__all__ = ["Placement", "localised", "reader_layers"]
