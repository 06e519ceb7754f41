"""The former place of :mod:`care_lens.defences`; its names are there now, and still here."""

from care_lens.defences.refusal_direction import NoRefusalDirection, RefusalDirection

__all__ = ["NoRefusalDirection", "RefusalDirection"]
