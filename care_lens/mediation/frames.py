"""Under their earlier name: what results share is in ``care_lens.core.details``."""

from care_lens.core.details import (
    DetailedResult,
    describe_outcome,
    groups_of,
    metric_name,
    sampling,
    site_columns,
    tidy,
)

__all__ = ["DetailedResult", "describe_outcome", "groups_of", "metric_name", "sampling", "site_columns", "tidy"]
