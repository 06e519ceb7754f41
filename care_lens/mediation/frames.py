"""The former place of what results share, which is in ``care_lens.core.details``."""

from care_lens.core.renames import moved

__getattr__ = moved(
    __name__,
    {
        name: f"care_lens.core.details.{name}"
        for name in (
            "DetailedResult",
            "describe_outcome",
            "groups_of",
            "metric_name",
            "sampling",
            "site_columns",
            "tidy",
        )
    },
)
