"""Capture: run a model over examples once and keep one pooled row an example for each site and selection.

One forward pass a batch gives every site and selection. Activations are pooled inside the hook, in float32,
and moved to the CPU, so that only ``n x d`` numbers a site and selection are ever kept; logits of one
position are computed. Padding is never read.

Selections at sites of the language tower ([batch, pos, d]):

- any span of ``TokenSpans.mask`` ("image", "text", "prompt", "response", "all", "last", ...): the mean over
  its positions;
- "image:attributed", "text:attributed": the mean over the tokens that the paper's attribution keeps, scored
  at that very site (``care_lens.capture.attribution``).

At sites of the vision tower and the projector ([image, patch, d]): "image", the mean over the patches
(without the class token), and "all", the mean over everything. Selections that have no meaning at a site are
not taken there.
"""

from collections.abc import Sequence
from pathlib import Path

from care_lens.capture.activations import Activations
from care_lens.capture.attribution import TokenAttribution
from care_lens.capture.pooling import SELECTIONS, PooledRun
from care_lens.capture.shards import Shards, held
from care_lens.core import BaseOutcome, Example, Outcome, SiteLike
from care_lens.core.progress import Steps, resume_from
from care_lens.core.renames import renamed
from care_lens.lvlm import HookedLVLM

__all__ = ["SELECTIONS", "capture"]


@renamed(select="positions")
def capture(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    sites: Sequence[SiteLike],
    *,
    positions: Sequence[str] = ("image", "text", "last"),
    attribution: TokenAttribution | None = None,
    outcome: Outcome | BaseOutcome | None = None,
    responses: bool = False,
    batch_size: int = 32,
    progress: bool = True,
    checkpoint: str | Path | None = None,
) -> Activations:
    """Pooled activations of examples at many sites, from one forward pass a batch.

    Args:
        lvlm: The model; a repair that is on it acts.
        examples: The examples; with and without images can be mixed.
        sites: The sites, of any tower.
        positions: What to pool over; see the module's docstring.
        attribution: How the attributed selections score tokens, and how many they keep; None: the paper's way, half of
            each kind.
        outcome: What method "gradient" of the attribution differentiates; costs a forward and a backward pass more a
            batch.
        responses: Whether to append the examples' responses, teacher-forced; "text" then includes them.
        batch_size: Examples a forward pass.
        progress: Whether to show a progress bar.
        checkpoint: A directory in which finished batches are kept; a run that was stopped goes on from them. Examples, items, weights,
            repairs and settings are compared, and the first batch is captured again; what a hook function of your own does
            beyond that batch is not known.

    Returns:
        The activations. Where an example has no such positions (no image), ``Activations.rows`` says so.

    Raises:
        ValueError: If the model has no such site, a selection is not known or has no meaning at a site, there
            are no examples, a site of the vision tower is asked for and no example has an image, method "gradient"
            has no outcome or another method has one, or the checkpoint is of another capture or damaged.
        InUseError: If another process works in the checkpoint.

    Example:
        >>> from care_lens import organism
        >>> from care_lens.lvlm import HookedLVLM
        >>> lvlm = HookedLVLM.from_hf(*organism.untrained(seed=0))
        >>> site = "blocks.1.hook_resid_post"
        >>> held = capture(lvlm, organism.examples("typographic", "fit", n=3), [site], progress=False)
        >>> held.rows(site, "image").shape
        torch.Size([3, 32])
    """
    run = PooledRun.of(
        lvlm, examples, sites, positions=positions, attribution=attribution, outcome=outcome, responses=responses,
        batch_size=batch_size,
    )  # fmt: skip
    with held(checkpoint):
        shards = Shards(checkpoint, run)
        with Steps(run.batches(), desc="capturing", disable=not progress, resume=resume_from(checkpoint)) as batches:
            return Activations.concatenate([shards.activations(batch) for batch in batches])
