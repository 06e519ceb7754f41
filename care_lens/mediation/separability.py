"""The former place of ``care_lens.lens.separability``."""

from care_lens.core.renames import moved

__getattr__ = moved(
    __name__,
    {
        name: f"care_lens.lens.separability.{name}"
        for name in ("COLUMNS", "METRICS", "SeparabilityResult", "class_figures", "probe_auc", "separability")
    },
)
