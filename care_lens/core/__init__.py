"""What every room speaks of: sites, examples, token spans, outcomes and judges, results, statistics."""

from care_lens.core.digests import content_digest, examples_digest
from care_lens.core.examples import Example, PairedExamples
from care_lens.core.outcome import (
    HasSpans,
    Judge,
    KLDivergence,
    LogitDifference,
    Outcome,
    PrefixMargin,
    Repair,
    ResponseLogProb,
    UnsafeMargin,
    Verdict,
)
from care_lens.core.results import FrameResult, package_versions
from care_lens.core.site import BLOCK_COMPONENTS, Site, SiteLike, Tower
from care_lens.core.spans import PatchGrid, TokenSpans
from care_lens.core.stats import Interval, cluster_bootstrap, paired_difference, rate_ci

__all__ = [
    "BLOCK_COMPONENTS",
    "Example",
    "FrameResult",
    "HasSpans",
    "Interval",
    "Judge",
    "KLDivergence",
    "LogitDifference",
    "Outcome",
    "PairedExamples",
    "PatchGrid",
    "PrefixMargin",
    "Repair",
    "ResponseLogProb",
    "Site",
    "SiteLike",
    "TokenSpans",
    "Tower",
    "UnsafeMargin",
    "Verdict",
    "cluster_bootstrap",
    "content_digest",
    "examples_digest",
    "package_versions",
    "paired_difference",
    "rate_ci",
]
