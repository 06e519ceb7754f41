"""A correction: a reader gives a score, a gate opens on it, a writer edits, as strongly as a schedule says. The paper's has neither."""

from dataclasses import dataclass
from typing import get_args

from care_lens.core.display import ShortRepr
from care_lens.core.site import Site
from care_lens.repair.checks import require_flag, require_text
from care_lens.repair.errors import RepairError
from care_lens.repair.gate import AlwaysOpen, Gate
from care_lens.repair.kinds import register_kind
from care_lens.repair.positions import Positions, includes_generated
from care_lens.repair.reader import Reader, SiteReader
from care_lens.repair.schedule import Schedule
from care_lens.repair.writer import Writer
from care_lens.subspace import Modality, SafetySubspace

_OPEN = AlwaysOpen()


@register_kind
@dataclass(frozen=True, eq=False, kw_only=True)
class Correction(ShortRepr):
    """``h' = h - alpha g s W L^T (h - target)``, with g from what the reader sees and s from the schedule.

    g is decided for each row at prefill, from activations before this repair's edits at the reader's own site
    (edits below it are seen), and holds for the row from then on; generated tokens that the reader reads can
    open it further. With ``pulse`` it acts only where it opens, once: a correction whose edit does not take is not repeated,
    so give readings that should act independently corrections of their own. With ``unless`` it acts again and again, but not while a
    refusal is under way.

    Attributes:
        writer: What is done.
        reader: What is looked at; None: nothing, the gate must then be always open. Each of its sites must be
            the writer's or come before it in the forward pass.
        gate: How far the writer acts on the reader's score.
        modality: "visual" or "textual" if it was fitted for one, else None.
        pulse: Write only where the gate opens: on the prompt if the prompt opens it, else on the one generated token
            that does, so that what the model says after the edit is left to it; in a begun answer (a prefill) also at the last
            token given, which no edit before it can spend. False: from there on.
        schedule: How strongly it acts at each token of the answer; None: the same at every token.
        unless: At a token of the answer that this reader scores above 0 by itself (not by the largest so far) nothing is written; it
            re-arms there. A reader of refusals (:func:`~care_lens.repair.refusal_reader`) leaves a refusal under way alone. It is no part
            of the gate's score. None: nothing is spared.
        name: A label.

    Raises:
        RepairError: If the reader sits above the writer, a gate has no reader, or a part or option is of another kind.
    """

    writer: Writer
    reader: Reader | None = None
    gate: Gate = _OPEN
    modality: Modality | None = None
    pulse: bool = False
    schedule: Schedule | None = None
    unless: SiteReader | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.writer, Writer):
            raise RepairError(f"writer must be a Writer, got a {type(self.writer).__name__}")
        if self.reader is not None and not isinstance(self.reader, Reader):
            raise RepairError(f"reader must be a Reader or None, got a {type(self.reader).__name__}")
        if not callable(self.gate):
            raise RepairError(f"gate must be a function of the score, got a {type(self.gate).__name__}")
        if self.modality not in (None, *get_args(Modality)):
            raise RepairError(f"modality must be one of {get_args(Modality)} or None, got {self.modality!r}")
        require_flag(self.pulse, name="pulse")
        if self.schedule is not None and not callable(self.schedule):
            raise RepairError(f"schedule must be a function of the step or None, got a {type(self.schedule).__name__}")
        if self.unless is not None and not isinstance(self.unless, SiteReader):
            raise RepairError(f"unless must be a reader of one site or None, got a {type(self.unless).__name__}")
        if self.unless is not None and not includes_generated(self.unless.positions):
            raise RepairError(
                f"unless must read the tokens of the answer, got a reader of {self.unless.positions!r}; give it positions='generated'"
            )
        require_text(self.name, name="name")
        if self.reader is None and not isinstance(self.gate, AlwaysOpen):
            raise RepairError(f"reader must be given for a {type(self.gate).__name__}, got None; it needs a score")
        if self.pulse and (self.reader is None or isinstance(self.gate, AlwaysOpen)):
            raise RepairError("pulse needs a reader and a gate that can open, got none; it acts where the gate opens")
        late = [str(leaf.site) for leaf in self.leaves if leaf.site > self.writer.site]
        if late:
            raise RepairError(
                f"reader must sit at or before its writer ({self.writer.site}), got {late}, which the model "
                "computes later; move the reader down or the writer up"
            )

    @property
    def leaves(self) -> tuple[SiteReader, ...]:
        """The readers of single sites it depends on."""
        reads = () if self.reader is None else self.reader.leaves
        return reads if self.unless is None or self.unless in reads else (*reads, self.unless)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites it reads and writes, in the order of the forward pass."""
        return tuple(sorted({self.writer.site, *(leaf.site for leaf in self.leaves)}))

    @classmethod
    def care(
        cls, subspace: SafetySubspace, *, alpha: float = 1.0, beta: float = 1.0, scope: Positions = "all"
    ) -> "Correction":
        """The paper's correction: always open, ``h' = h - alpha P (h - beta mean_benign)``.

        Args:
            subspace: The fitted subspace.
            alpha: Strength; published runs use 4 to 4.5.
            beta: How much of the benign mean to put in place of what is removed.
            scope: Which tokens are edited.

        Returns:
            The correction, of the subspace's modality.

        Raises:
            RepairError: If the subspace does not say which site it belongs to.
        """
        writer = Writer.from_subspace(subspace, alpha=alpha, beta=beta, scope=scope)
        return cls(writer=writer, modality=subspace.modality)
