"""Activations of many examples, pooled as they are read: spans, last tokens, the paper's attribution."""

from care_lens.capture.activations import Activations
from care_lens.capture.attribution import TokenAttribution, select_tokens, text_scores, visual_scores
from care_lens.capture.capturing import SELECTIONS, capture
from care_lens.capture.gradients import token_gradients
from care_lens.capture.sharded import capture_moments_sharded, capture_sharded
from care_lens.capture.streaming import capture_moments
from care_lens.capture.token_scores import TokenScores, score_tokens
from care_lens.core.arguments import checked

__all__ = [
    "SELECTIONS",
    "Activations",
    "TokenAttribution",
    "TokenScores",
    "capture",
    "capture_moments",
    "capture_moments_sharded",
    "capture_sharded",
    "score_tokens",
    "select_tokens",
    "text_scores",
    "token_gradients",
    "visual_scores",
]

checked(globals(), __all__)
