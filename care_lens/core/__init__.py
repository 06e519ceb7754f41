"""What every room speaks of: sites, examples, token spans, outcomes and judges, results, statistics."""

from care_lens.core.arguments import ArgumentError, checked
from care_lens.core.attack import Attack, AttackResult
from care_lens.core.conversation import PICTURE, ExampleError, Turn
from care_lens.core.defence import Defence, defended
from care_lens.core.digests import content_digest, examples_digest
from care_lens.core.errors import ArtifactError, CareLensError, InUseError
from care_lens.core.examples import Example, PairedExamples
from care_lens.core.outcome import (
    BaseOutcome,
    GeneratedOutcome,
    HasSpans,
    Judge,
    KLDivergence,
    LogitDifference,
    Outcome,
    OutcomeError,
    PrefixMargin,
    Repair,
    ResponseLogProb,
    UnsafeMargin,
    Verdict,
    as_outcome,
)
from care_lens.core.pictures import PictureError, PictureNotFoundError, open_picture, shown_picture
from care_lens.core.results import FrameResult, package_versions
from care_lens.core.site import BLOCK_COMPONENTS, Site, SiteLike, Tower
from care_lens.core.spans import PatchGrid, TokenSpans
from care_lens.core.stats import Interval, cluster_bootstrap, clustered_rate, paired_difference, rate_ci, ratio_of_means
from care_lens.core.verdicts import JudgeError, require_outcome, require_verdicts

__all__ = [
    "BLOCK_COMPONENTS",
    "PICTURE",
    "ArgumentError",
    "ArtifactError",
    "Attack",
    "AttackResult",
    "BaseOutcome",
    "CareLensError",
    "Defence",
    "Example",
    "ExampleError",
    "FrameResult",
    "GeneratedOutcome",
    "HasSpans",
    "InUseError",
    "Interval",
    "Judge",
    "JudgeError",
    "KLDivergence",
    "LogitDifference",
    "Outcome",
    "OutcomeError",
    "PairedExamples",
    "PatchGrid",
    "PictureError",
    "PictureNotFoundError",
    "PrefixMargin",
    "Repair",
    "ResponseLogProb",
    "Site",
    "SiteLike",
    "TokenSpans",
    "Tower",
    "Turn",
    "UnsafeMargin",
    "Verdict",
    "as_outcome",
    "cluster_bootstrap",
    "clustered_rate",
    "content_digest",
    "defended",
    "examples_digest",
    "open_picture",
    "package_versions",
    "paired_difference",
    "rate_ci",
    "ratio_of_means",
    "require_outcome",
    "require_verdicts",
    "shown_picture",
]

checked(globals(), __all__)
