"""Activations of many examples, pooled as they are read: spans, last tokens, the paper's attribution."""

from care_lens.capture.activations import Activations
from care_lens.capture.attribution import TokenAttribution, select_tokens, text_scores, visual_scores
from care_lens.capture.capturing import SELECTIONS, capture

__all__ = [
    "SELECTIONS",
    "Activations",
    "TokenAttribution",
    "capture",
    "select_tokens",
    "text_scores",
    "visual_scores",
]
