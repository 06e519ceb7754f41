"""Learning a repair: readers, gates and writers of one plan, from rows.

A reader is a linear classifier (or the discriminant, or the energy of the top generalised eigenvectors) of attacks against harmless
rows, for each modality and each token that is looked at, after one block or several together; a writer moves a token to where the model
stands before it refuses. The paper's pencil
C_m u = lambda C_b u is that of `SafetySubspace.fit`; readers and writers apart, and reading the answer, are ours.

    rows = study_rows(lvlm, study)
    plan = ReaderPlan(layer=2, offsets=(0, 5))
    fitted = Readers(rows).fit(plan, calibration)  # calibration: TokenRows of benign prompts
    repair = assemble(fitted, rows, plan, alpha=1.5)

`learn_repair` does these steps and calibrates the gate in one call; `care_lens.evaluation.tune` tries many plans.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from care_lens.core.display import ShortRepr
from care_lens.core.site import Site, SiteLike
from care_lens.repair.calibrating import captured_scores
from care_lens.repair.combined import SumReader
from care_lens.repair.controls import shuffled_labels
from care_lens.repair.correction import Correction
from care_lens.repair.errors import RepairError
from care_lens.repair.fusion import HybridFusion
from care_lens.repair.gate import ConformalGate
from care_lens.repair.positions import Positions, includes_generated
from care_lens.repair.reader import EnergyReader, LinearReader, MaxReader, Reader, SiteReader
from care_lens.repair.refusing import Answers, refusal_reader, refusal_writer, require_answers
from care_lens.repair.rows import FitRows, TokenRows
from care_lens.subspace import Modality, SafetySubspace, classifier_direction, subspace_along


@dataclass(frozen=True)
class ReaderPlan:
    """Which readers a repair has: for every modality one at each offset, after one block; their largest score is gated.

    Attributes:
        layer: Readers look at the residual stream after this block of the language tower.
        offsets: 0 reads the last prompt token; k reads generated tokens with what was learned at the k-th.
        rank: 0 for one direction, else of the energy.
        epsilon: Share of benign prompts that the gate may touch.
        classifier: The one direction is that of a logistic regression; else it is the discriminant's, the difference of the means
            whitened by the benign covariance.
        depth: Of a classifier of the last prompt token: it reads the residual stream after so many blocks at once, `layer` the last of them.
        joint: Of such a classifier: one is learned from the attacks of all modalities, for all of them, where else each modality has its own. With
            a depth above 1 it always is.

    Raises:
        RepairError: If layer, an offset or the rank is below 0, there is no offset, a classifier shall have a rank, a depth is not from 1 to
            layer + 1, or a reader that is no classifier of the last prompt token shall have a depth above 1 or be joint.
    """

    layer: int
    offsets: tuple[int, ...] = (0,)
    rank: int = 0
    epsilon: float = 0.01
    classifier: bool = False
    depth: int = 1
    joint: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", tuple(self.offsets))
        if not self.offsets or min(self.offsets) < 0 or len({*self.offsets}) < len(self.offsets):
            raise RepairError(f"offsets must be one or more different numbers of 0 or more, got {self.offsets}")
        if self.layer < 0 or self.rank < 0:
            raise RepairError(f"layer and rank must be 0 or more, got {self.layer} and {self.rank}")
        if self.classifier and self.rank:
            raise RepairError(
                f"rank must be 0 for a classifier, which is one direction, got {self.rank}; leave one out"
            )
        if isinstance(self.depth, bool) or not 1 <= self.depth <= self.layer + 1:
            raise RepairError(
                f"depth must be from 1 to the {self.layer + 1} blocks up to layer {self.layer}, got {self.depth!r}"
            )
        if (self.depth > 1 or self.joint) and not (self.classifier and 0 in self.offsets):
            raise RepairError(
                f"depth must be 1 and joint False but for classifiers of the last prompt token, got {self.depth} and {self.joint}; add "
                "classifier=True and offset 0"
            )
        object.__setattr__(self, "joint", bool(self.joint) or self.depth > 1)

    @property
    def layers(self) -> tuple[int, ...]:
        """After which blocks it reads the last prompt token."""
        return tuple(range(self.layer + 1 - self.depth, self.layer + 1))

    def __str__(self) -> str:
        where = " and ".join(
            "last prompt token" if k == 0 else f"answer, as learned at token {k}" for k in self.offsets
        )
        what = f"energy of rank {self.rank}" if self.rank else "classifier" if self.classifier else "discriminant"
        blocks = f"block {self.layer}" if self.depth == 1 else f"blocks {self.layers[0]} to {self.layer} together"
        if self.joint and self.depth == 1:
            what += " of all modalities"
        return f"{what} after {blocks}, {where}, epsilon {self.epsilon:g}"


@dataclass(frozen=True)
class FittedReaders(ShortRepr):
    """The readers of a plan and their gate, ready to be combined with writers.

    Attributes:
        readers: By modality and offset, in units of the spread of benign fit scores; one and the same for all modalities where it was
            learned from all of them. Each gates its own writer, so that a gate that the prompt opened does not stop the answer from being read.
        subspaces: The axes that they read, in benign units, each turned to its own attacks. A reader of one block is its axis; one of several blocks
            weights its axes, and may weight one of them negatively (``readers`` hold the weights).
        gate: Calibrated on the largest score over all of them.
    """

    readers: Mapping[tuple[Modality, int], Reader]
    subspaces: tuple[SafetySubspace, ...]
    gate: ConformalGate

    @property
    def both(self) -> MaxReader:
        """The largest score over modalities and offsets, which is what the gate bounds."""
        return MaxReader(readers=tuple(dict.fromkeys(self.readers.values())))


def require_depths(depths: Sequence[int]) -> None:
    """Refuse depths that are no numbers of blocks.

    Raises:
        ValueError: If one is not a whole number of 1 or more.
    """
    for depth in depths:
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depths must be whole numbers of 1 or more, got {depth!r}")


def reader_plans(
    layers: Sequence[int],
    *,
    answer_tokens: int = 6,
    ranks: Sequence[int] = (0, 8),
    epsilons: Sequence[float] = (0.01, 0.015, 0.02),
    classifier: bool = True,
    depths: Sequence[int] = (1, 5),
) -> list[ReaderPlan]:
    """Every plan of some layers: the last prompt token, an answer token, or both; each rank, depth and epsilon.

    Args:
        layers: After whose blocks.
        answer_tokens: So many tokens of an answer may be read.
        ranks: Ranks of the readers; 0 stands for the discriminant.
        epsilons: Shares of benign prompts that a gate may touch.
        classifier: Whether classifiers are among them.
        depths: After how many blocks at once a classifier of the last prompt token reads; 1 stands for one block. Where there are not so many
            blocks up to a layer, there is no such plan.

    Raises:
        ValueError: If a depth is not a whole number of 1 or more.

    Example:
        >>> from care_lens.repair import reader_plans
        >>> plans = reader_plans([2], answer_tokens=2, ranks=[], epsilons=[0.02], depths=[1, 3])
        >>> [plan.offsets for plan in plans if plan.depth == 1], [plan.offsets for plan in plans if plan.depth == 3]
        ([(0,), (1,), (2,), (0, 1), (0, 2)], [(0,), (0, 1), (0, 2)])
    """
    require_depths(depths)
    answers = range(1, answer_tokens + 1)
    offsets = [(0,), *((k,) for k in answers), *((0, k) for k in answers)]
    kinds = [
        *((rank, False, 1) for rank in dict.fromkeys(ranks)),
        *((0, True, depth) for depth in dict.fromkeys(depths) if classifier),
    ]
    return [
        ReaderPlan(layer, where, rank, epsilon, learned, depth)
        for layer, where, (rank, learned, depth), epsilon in itertools.product(layers, offsets, kinds, epsilons)
        if depth == 1 or (0 in where and depth <= layer + 1)
    ]


def fit_reader_subspace(
    rows: FitRows,
    site: Site,
    modality: Modality,
    *,
    offset: int,
    rank: int,
    classifier: bool = False,
    shuffle_seed: int | None = None,
) -> SafetySubspace:
    """The subspace that a reader reads: rank 0 is one direction, of the discriminant or of a classifier, else the top generalised
    eigenvectors.

    At the last prompt token (offset 0) it is fitted on last prompt tokens; for the answer, on the malicious token at the
    offset against every token of benign prompts' ends and answers, since the reader will look at all of them.

    Args:
        rows: What to learn from.
        site: One of the rows' sites.
        modality: One of the rows' modalities.
        offset: 0, or which token of the answer.
        rank: 0 or the number of eigenvectors.
        classifier: For rank 0: the direction of a logistic regression (`care_lens.subspace.classifier_direction`), not of the
            discriminant.
        shuffle_seed: Deal the rows to the classes at random first: the control fit.

    Raises:
        RepairError: If the rows have no such site, modality or offset.
        ValueError: If there are too few rows for the rank (RankError).
    """
    rows.require(site, modality=modality, offset=offset)
    benign = rows.harmless(site, offset)
    malicious = rows.malicious[modality].at(site, offset)
    if shuffle_seed is not None:
        benign, malicious = shuffled_labels(benign, malicious, seed=shuffle_seed)
    token = "last prompt token" if offset == 0 else f"answer token {offset}"
    provenance = {"rows": token, "split": "fit", "shuffled": shuffle_seed is not None}
    if classifier:
        direction = classifier_direction(benign, malicious)
        return subspace_along(
            direction,
            benign,
            malicious,
            site=site,
            modality=modality,
            provenance={**provenance, "direction": "classifier"},
        )
    return SafetySubspace.fit(
        benign,
        malicious,
        rank=max(rank, 1),
        contrast="second_moment" if rank else "mean",
        projection="oblique",
        site=site,
        modality=modality,
        provenance=provenance,
    )


def fit_joint_reader(
    rows: FitRows, layers: Sequence[int], *, strength: float = 0.3, shuffle_seed: int | None = None
) -> tuple[tuple[SafetySubspace, ...], SumReader]:
    """One linear classifier of the last prompt token's residual stream after several blocks, of the attacks of all modalities against benign requests.

    Args:
        rows: What to learn from.
        layers: After which blocks, one or more different ones.
        strength: Inverse of the ridge penalty, as in `care_lens.subspace.classifier_direction`.
        shuffle_seed: Deal the rows to the classes at random first: the control fit.

    Returns:
        The axis that it reads after each block (a subspace of one direction that belongs to no modality), and the reader: the sum of a linear reader
        after each block. A subspace is its axis alone, in benign units and turned to its own attacks; sign and weight are those of the reader's
        parts, and stand in the subspace's provenance ("weight": what its coordinate counts in the sum, in the unit that this function returns).

    Raises:
        RepairError: If the rows lack a site, or no or equal layers are given.
    """
    if not layers or len({*layers}) < len(layers):
        raise RepairError(f"layers must be one or more different blocks, got {list(layers)}")
    sites = [Site("language", layer, "hook_resid_post") for layer in layers]
    for site in sites:
        rows.require(site)
    benign = torch.cat([rows.benign.at(site, 0) for site in sites], dim=1)
    malicious = torch.cat([rows.complied(site, 0) for site in sites], dim=1)
    if shuffle_seed is not None:
        benign, malicious = shuffled_labels(benign, malicious, seed=shuffle_seed)
    widths = [rows.benign.rows[site].shape[-1] for site in sites]
    direction = classifier_direction(benign, malicious, strength=strength).to(benign.dtype)
    subspaces: list[SafetySubspace] = []
    leaves: list[LinearReader] = []
    parts = zip(sites, *(held.split(widths, dim=-1) for held in (direction, benign, malicious)), strict=True)
    for site, along, harmless, harmful in parts:
        provenance = {"rows": "last prompt token, several blocks", "split": "fit", "shuffled": shuffle_seed is not None}
        provenance |= {"direction": "classifier", "blocks": list(layers)}
        axis = subspace_along(along, harmless, harmful, site=site, provenance=provenance)
        read = axis.read[:, 0].to(along)  # parallel to the direction, so that the projection is the whole of it
        weight = float(along.double() @ read.double() / read.double().square().sum())
        subspaces.append(replace(axis, provenance={**axis.provenance, "weight": weight}))
        leaves.append(LinearReader(site=site, direction=along.clone(), centre=harmless.mean(0), positions="last"))
    return tuple(subspaces), SumReader(readers=tuple(leaves))


def reader_of(subspace: SafetySubspace, *, offset: int, rank: int) -> SiteReader:
    """The reader of such a subspace: of the last prompt token, or of every generated token.

    Args:
        subspace: From `fit_reader_subspace`.
        offset: 0, or which token of the answer it was fitted at.
        rank: 0 for the coordinate along its first direction, else its energy.
    """
    kind = EnergyReader if rank else LinearReader
    return kind.from_subspace(subspace, positions="generated" if offset else "last")


def writer_rows(repair: HybridFusion, rows: FitRows) -> dict[SiteLike | tuple[SiteLike, Positions], Tensor]:
    """Activations at the tokens that each writer of a learned repair edits, for :func:`~care_lens.repair.random_control`.

    Args:
        repair: Learned from the rows.
        rows: The rows.

    Returns:
        By site and scope [n, d]: last prompt tokens of attacks, or all tokens of their answers where the writer edits generated tokens.

    Raises:
        RepairError: If the rows have no such site.
    """
    made: dict[SiteLike | tuple[SiteLike, Positions], Tensor] = {}
    for writer in (c.writer for c in repair.corrections):
        rows.require(writer.site)
        if includes_generated(writer.scope):
            sides = [held.answers(writer.site) for held in rows.malicious.values()]
            made[writer.site, writer.scope] = torch.cat(sides)
        else:
            made[writer.site, writer.scope] = rows.complied(writer.site, 0)
    return made


class Readers:
    """Fits readers, each once, however many plans share it.

    Args:
        rows: What to learn from.
        shuffle_seed: For the control fit on shuffled labels.
    """

    def __init__(self, rows: FitRows, *, shuffle_seed: int | None = None) -> None:
        self._rows, self._shuffle = rows, shuffle_seed
        self._made: dict[tuple[Modality, int, int, int, bool], tuple[SafetySubspace, SiteReader]] = {}
        self._joint: dict[tuple[int, ...], tuple[tuple[SafetySubspace, ...], SumReader]] = {}

    def _one(self, modality: Modality, plan: ReaderPlan, offset: int) -> tuple[SafetySubspace, SiteReader]:
        key = (modality, plan.layer, offset, plan.rank, plan.classifier)
        if key not in self._made:
            subspace = fit_reader_subspace(
                self._rows,
                Site("language", plan.layer, "hook_resid_post"),
                modality,
                offset=offset,
                rank=plan.rank,
                classifier=plan.classifier,
                shuffle_seed=self._shuffle,
            )
            reader = reader_of(subspace, offset=offset, rank=plan.rank)
            # In units of the largest score of each benign prompt: a reader of the answer looks at many tokens, and a gate that is
            # shared with one of the prompt alone would otherwise be set by the answer's tail.
            self._made[key] = subspace, reader.standardised(captured_scores(reader, self._rows.benign))
        return self._made[key]

    def _together(self, layers: tuple[int, ...]) -> tuple[tuple[SafetySubspace, ...], SumReader]:
        if layers not in self._joint:
            subspaces, reader = fit_joint_reader(self._rows, layers, shuffle_seed=self._shuffle)
            self._joint[layers] = subspaces, reader.standardised(captured_scores(reader, self._rows.benign))
        return self._joint[layers]

    def fit(self, plan: ReaderPlan, calibration: TokenRows) -> FittedReaders:
        """The readers of a plan, their gate calibrated on teacher-forced benign answers.

        Args:
            plan: Which readers.
            calibration: Rows of benign prompts that nothing was learned from, at the plan's layers.

        Raises:
            ValueError: If there are too few calibration prompts for the plan's epsilon (TooFewCalibrationError), or too few rows
                for its rank (RankError).
        """
        readers: dict[tuple[Modality, int], Reader] = {}
        subspaces: dict[SafetySubspace, None] = {}
        for modality, offset in itertools.product(self._rows.modalities, plan.offsets):
            if plan.joint and offset == 0:
                read, readers[modality, offset] = self._together(plan.layers)
            else:
                one, readers[modality, offset] = self._one(modality, plan, offset)
                read = (one,)
            subspaces |= dict.fromkeys(read)
        scores = captured_scores(MaxReader(readers=tuple(dict.fromkeys(readers.values()))), calibration)
        return FittedReaders(readers, tuple(subspaces), ConformalGate.calibrate(scores, epsilon=plan.epsilon))


def assemble(
    fitted: FittedReaders,
    rows: FitRows,
    plan: ReaderPlan,
    site: Site | None = None,
    *,
    alpha: float = 1.0,
    answers: Answers = "rearmed",
    name: str = "care_lens",
    provenance: Mapping[str, Any] | None = None,
) -> HybridFusion:
    """The repair: each modality's reader gates the refusal writers; the adaptive rule shares them between modalities.

    A correction of the prompt acts once, at the last token that the model is given. With ``answers="rearmed"`` a correction of the answer
    stands behind it: once prompt or answer have opened the gate, it writes at every token of the answer at which no refusal is under way
    (:func:`refusal_reader`). So it writes once, leaves the refusal that follows alone, and writes again if the answer turns: an edit cannot be
    spent on a begun answer, a forced opening or a forbidden word, and nothing is repeated for ever.

    Args:
        fitted: The plan's readers and gate.
        rows: What the writers are learned from.
        plan: The plan.
        site: Where to write; None: where the readers look.
        alpha: Strength of the writers.
        answers: "rearmed"; or "held", as versions before had it: the prompt is written at its last token, whatever of the answer is given
            after it, and the answer from the token on that opens the gate of its own readers, at every token (a refusal is then often one
            word repeated). Without answer tokens in the rows a plan of the prompt alone has no correction of the answer.
        name: Row of a defence table.
        provenance: What it came from, JSON-able.

    Raises:
        RepairError: If the rows lack what the plan asks for, or ``answers`` is not known.
    """
    require_answers(answers)
    read_at = Site("language", plan.layer, "hook_resid_post")
    site = read_at if site is None else site
    rearmed = answers == "rearmed"
    offsets = plan.offsets
    if rearmed:  # one correction watches the answer for all readers, for those of the prompt too
        answer = max(offsets) or min(1, rows.tokens)
        offsets = tuple(dict.fromkeys((min(offsets), answer)))
    writers = {offset: refusal_writer(rows, site, offset=offset, alpha=alpha, answers=answers) for offset in offsets}
    unless = refusal_reader(rows, read_at) if rearmed else None

    def watching(modality: Modality, offset: int) -> Reader:
        own = [fitted.readers[modality, k] for k in plan.offsets]
        if offset == 0 or not rearmed:
            return fitted.readers[modality, offset]
        return own[0] if len(own) == 1 else MaxReader(readers=tuple(own))

    made: dict[Modality, tuple[Correction, ...]] = {
        modality: tuple(
            Correction(
                writer=writers[offset],
                reader=watching(modality, offset),
                gate=fitted.gate,
                modality=modality,
                # On the answer it goes on acting: an edit spent on one token is undone by forcing another opening after it.
                pulse=offset == 0,
                unless=unless if offset else None,
                name=f"{modality}, {'prompt' if offset == 0 else 'answer'}",
            )
            for offset in offsets
        )
        for modality in rows.modalities
    }
    return HybridFusion(
        visual=made.get("visual", ()),
        textual=made.get("textual", ()),
        rule="adaptive",
        name=name,
        provenance=dict(provenance or {}),
    )
