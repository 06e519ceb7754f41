"""Baselines: other defences, under the same interface as the repairs."""

from care_lens.baselines.refusal_direction import NoRefusalDirection, RefusalDirection

__all__ = ["NoRefusalDirection", "RefusalDirection"]
