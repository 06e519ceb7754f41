"""The former place of :mod:`care_lens.defences`, whose names are given here with a warning."""

from care_lens.core.renames import moved

__getattr__ = moved(
    __name__,
    {
        "NoRefusalDirection": "care_lens.defences.NoRefusalDirectionError",
        "RefusalDirection": "care_lens.defences.RefusalDirection",
    },
)
