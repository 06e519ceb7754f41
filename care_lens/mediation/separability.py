"""Under their earlier name: separability is in ``care_lens.lens.separability``."""

from care_lens.lens.separability import (
    COLUMNS,
    METRICS,
    SeparabilityResult,
    class_figures,
    probe_auc,
    separability,
)

__all__ = ["COLUMNS", "METRICS", "SeparabilityResult", "class_figures", "probe_auc", "separability"]
