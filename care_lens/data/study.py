"""What a diagnose-learn-repair-evaluate run works on: example sets by channel, kept apart in four splits.

fit: subspaces, means and directions are learned here. calibration: benign only, for gates. validation: settings are chosen
here. test: reported, and read once. No item (group) stands in two splits.
"""

import logging
import random
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from care_lens.core.display import ShortRepr, as_text
from care_lens.core.errors import CareLensError
from care_lens.core.examples import Example, PairedExamples
from care_lens.core.held import Named
from care_lens.core.outcome import BaseOutcome, Judge, Outcome, UnsafeMargin
from care_lens.core.require import require_examples
from care_lens.data.joining import dealt, held_channels, with_twins
from care_lens.data.twins import attack_pairs

log = logging.getLogger(__name__)

Split = Literal["fit", "calibration", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Modality = Literal["visual", "textual"]
_MODALITIES = get_args(Modality)
#: Names that become names of files: letters and digits of any script, spaces, and . _ + - , ( ) = inside.
_FILE_NAME = re.compile(r"\w(?:[\w .+,()=-]*[\w+)=-])?")


class StudyError(CareLensError, ValueError):
    """A study contradicts itself, or lacks what a step needs."""


@dataclass(frozen=True)
class Study(ShortRepr):
    """Example sets of one study.

    Attributes:
        name: for the report.
        suites: examples by split, then by channel.
        seen: attack channels that the fit may use, by the modality through which they act; every other
            harmful channel is held out, to measure transfer.
        pairs: counterfactual twins by channel, from the fit split, for mediation. Results are written to files of these names, so
            that they must be plain: letters, digits, spaces and ._+-,()= within.
        judge: says whether an answer complies, or is right.
        outcome: number read off the logits, larger = less safe, for mediation.
        pair_outcomes: another outcome for some pair sets.
        refusal: a refusal in the model's own words.
        plain: the attack channel that the undefended model refuses; its mean activation is the refusal target.
        gradient: test requests that the undefended model refuses, with pictures, to attack by gradient; responses are the
            compliant answers aimed at.
        about: what it is, in a sentence or two for the report.
        counterpart: the benign channel that asks as ``plain`` does, of permitted things; the refusal direction of Arditi et al. is
            fitted between the two where it cannot be against all benign channels. None: there is none.
        meanings: what a channel is, in a sentence for the report, by channel; those without one are told by an example. Nothing that is
            measured depends on it.

    Raises:
        StudyError: if a split or modality is unknown, a group stands in two splits, an id stands twice in a channel of a split, the
            counterpart is no benign channel, a seen channel has no fit examples, a channel mixes harmful and benign, a seen or the plain channel is benign, or the name of a pair
            set is no plain file name. It is a ValueError.
        TypeError: if a channel holds other things than examples, or seen names channels by one text.
    """

    name: str
    suites: Mapping[Split, Mapping[str, tuple[Example, ...]]]
    seen: Mapping[Modality, tuple[str, ...]]
    judge: Judge
    outcome: UnsafeMargin
    refusal: str
    pairs: Mapping[str, PairedExamples] = field(default_factory=dict)
    pair_outcomes: Mapping[str, Outcome | BaseOutcome] = field(default_factory=dict)
    plain: str = "plain"
    gradient: tuple[Example, ...] = ()
    about: str = ""
    counterpart: str | None = None
    meanings: Mapping[str, str] = field(default_factory=dict)

    def shown(self) -> tuple[str, dict[str, str]]:
        """Its splits, channels and pair sets, counted."""
        told = {split: f"{sum(map(len, c.values()))} examples of {len(c)} channels" for split, c in self.suites.items()}
        told |= {"seen": "; ".join(f"{m}: {', '.join(c)}" for m, c in self.seen.items())}
        return "Study", {"name": self.name} | told | {
            "pairs": ", ".join(f"{k} ({len(p)})" for k, p in self.pairs.items())
        }

    def __repr__(self) -> str:
        return as_text(*self.shown())

    def __post_init__(self) -> None:
        for what in ("suites", "seen", "pairs", "pair_outcomes", "meanings"):
            if not isinstance(getattr(self, what), Mapping):
                raise TypeError(f"{what} must be a mapping, got {type(getattr(self, what)).__name__}; give a dict")
        suites = {
            split: Named(channels, what="channel") if isinstance(channels, Mapping) else channels
            for split, channels in self.suites.items()
        }
        for field_name, what, given in (
            ("suites", "split", suites),
            ("seen", "modality", self.seen),
            ("pairs", "pair set", self.pairs),
            ("pair_outcomes", "pair set with an outcome of its own", self.pair_outcomes),
        ):
            object.__setattr__(self, field_name, Named(given, what=what))
        for what, keys, known in (("suites", self.suites, SPLITS), ("seen", self.seen, _MODALITIES)):
            if unknown := [key for key in keys if key not in known]:
                raise StudyError(f"keys of {what} must be out of {list(known)}, got {unknown}; name them so")
        for modality, channels in self.seen.items():
            if isinstance(channels, str):
                raise TypeError(f"seen[{modality!r}] must be a tuple of channels, got the text {channels!r}")
        self._require_channels()
        self._require_names()
        missing = [c for channels in self.seen.values() for c in channels if not self.suites.get("fit", {}).get(c)]
        if missing:
            raise StudyError(f"seen channels must have examples in the fit split, got none for {missing}")
        attacks = dict.fromkeys([*(c for channels in self.seen.values() for c in channels), self.plain])
        if self.counterpart is not None and any(self.counterpart in self.channels(s, harmful=True) for s in SPLITS):
            raise StudyError(
                f"counterpart must name a benign channel, got {self.counterpart!r}, which is harmful; name another"
            )
        known = sorted({c for split in SPLITS for c in self.channels(split, harmful=False)})
        if self.counterpart is not None and self.counterpart not in known:
            raise StudyError(
                f"counterpart must name a benign channel of the study, one of {known}, got {self.counterpart!r}; name one of them, or None"
            )
        if benign := [c for c in attacks if any(c in self.channels(split, harmful=False) for split in SPLITS)]:
            raise StudyError(
                f"seen and plain must name channels of harmful requests, got {benign}, which are benign; name attack channels, or set "
                "harmful in their examples"
            )

    @classmethod
    def from_examples(
        cls,
        examples: Sequence[Example] | Sequence[Sequence[Example]],
        *,
        name: str,
        judge: Judge,
        outcome: UnsafeMargin,
        refusal: str,
        seen: Mapping[Modality, tuple[str, ...]] | None = None,
        plain: str = "plain",
        held_out: Sequence[str] = (),
        held_templates: float | int = 0.0,
        twins: bool = False,
        pairs: int = 0,
        shares: Mapping[Split, float] | None = None,
        seed: int = 0,
        about: str = "",
    ) -> "Study":
        """A study of one or several benchmarks, dealt to splits so that no behaviour stands in two.

        Examples with one group, or with one text of a behaviour, go to one split, of whatever benchmark they are; each channel is spread over
        the splits by the shares. Behaviours that are harmful only are not dealt to the calibration split, which is for gates and
        benign. The same examples and seed give the same study, in whatever order they come.

        Args:
            examples: Examples, or a list of benchmarks (:mod:`care_lens.data.benchmarks`) or other lists of examples.
            name: As of the study, and so are ``judge``, ``outcome``, ``refusal``, ``plain`` and ``about``.
            seen: Attack channels that the fit may use. None: all but ``plain`` and those held out that have behaviours enough to be in the fit
                split; those with pictures are visual, the others textual. Channels whose examples say ``meta["modality"]`` "textual" are textual
                with pictures too.
            held_out: Attack channels, or benchmarks, that the fit may not use; they are tested on.
            held_templates: Share of the jailbreak templates of each channel that no split but the test has, where templates are known
                (:mod:`care_lens.data.templates`). Test prompts made with them stand in a channel of their own.
            twins: Whether to add a plain request for each behaviour, in the channel ``plain``; attacks that are in plain words already go
                to that channel too.
            pairs: So many pairs of twins a seen channel for mediation (:func:`care_lens.data.twins.attack_pairs`); 0: none.
            shares: Share of the behaviours of each split; by default 40 % fit, 15 % calibration, 15 % validation, 30 % test.
            seed: Of the deal.

        Returns:
            The study. Responses are those of the examples; :meth:`require` says which are missing, and
            ``care_lens.evaluation.answered_study`` makes them.

        Raises:
            StudyError: If there are no examples, ids stand twice in a channel, a channel is harmful and benign, or a seen channel has too few
                behaviours to be in the fit split.
            HeldOutError: If ``held_out`` names no attack channel or benchmark. It is a ValueError.
            ValueError: If shares do not sum to 1, or are of no split.

        Example:
            >>> from care_lens.evaluation import SubstringRefusalJudge
            >>> rows = [Example(f"fold {i}", harmful=i % 2 == 0, channel="ab"[i % 2], id=str(i), group=f"item {i % 5}") for i in range(20)]
            >>> study = Study.from_examples(
            ...     rows, name="folds", judge=SubstringRefusalJudge(), outcome=UnsafeMargin(comply=(1,), refuse=(2,)), refusal="no", plain="a"
            ... )
            >>> {split: sum(map(len, suites.values())) for split, suites in study.suites.items()}
            {'fit': 8, 'calibration': 4, 'validation': 4, 'test': 4}
        """
        rows = _flat(examples)
        if not rows:
            raise StudyError("examples must hold one or more, got none; see the problems of their benchmarks")
        shares = _require_shares(shares)
        rows = with_twins(rows, plain) if twins else rows
        apart = held_channels(rows, held_out)
        suites = dealt(rows, {s: shares.get(s, 0.0) for s in SPLITS}, templates=held_templates, seed=seed)
        if seen is None:
            seen = _seen_by_pictures(suites["fit"], {plain, *apart})
            usable = {plain, *apart, *(c for some in seen.values() for c in some)}
            if held := sorted({e.channel for e in rows if e.harmful} - usable):
                log.warning("%s: too few behaviours for the fit split, and so held out: %s", name, ", ".join(held))
        elif both := sorted(apart.intersection(c for some in seen.values() for c in some)):
            raise StudyError(f"held_out must name channels that are not seen, got {both} in both; take them out of one")
        attacks = [e for channels in seen.values() for c in channels for e in suites["fit"].get(c, ())]
        return cls(
            name=name,
            about=about,
            suites={split: {c: tuple(some) for c, some in channels.items()} for split, channels in suites.items()},
            seen=seen,
            judge=judge,
            outcome=outcome,
            refusal=refusal,
            plain=plain,
            pairs=attack_pairs(attacks, n=pairs) if pairs else {},
        )

    def held_out(self) -> tuple[str, ...]:
        """The attack channels of the test split that the fit does not use: unseen ones, and those of new templates."""
        fitted = {self.plain, *(c for channels in self.seen.values() for c in channels)}
        return tuple(c for c in self.channels("test", harmful=True) if c not in fitted)

    def _require_channels(self) -> None:
        home: dict[str, str] = {}
        for split in SPLITS:
            if not isinstance(suites := self.suites.get(split, {}), Mapping):
                raise TypeError(
                    f"suites[{split!r}] must be a mapping of channels, got {type(suites).__name__}; give a dict"
                )
            for channel, examples in suites.items():
                require_examples(examples, f"channel {channel!r} of {split!r}")
                if len({example.harmful for example in examples}) > 1:
                    raise StudyError(f"channel {channel!r} must be all harmful or all benign; split it in two channels")
                ids: set[str] = set()
                for example in examples:
                    if example.id and example.id in ids:
                        raise StudyError(
                            f"ids must differ in channel {channel!r} of {split!r}, got {example.id!r} twice"
                        )
                    ids.add(example.id)
                    group = example.group or example.id
                    if group and home.setdefault(group, split) != split:
                        raise StudyError(
                            f"group {group!r} must stand in one split, got {home[group]!r} and {split!r}; "
                            "use split_by_group"
                        )

    def _require_names(self) -> None:
        names: dict[str, str] = {}
        for name, pairs in self.pairs.items():
            if not isinstance(pairs, PairedExamples):
                raise TypeError(f"pairs[{name!r}] must be PairedExamples, got {type(pairs).__name__}")
            if not isinstance(name, str) or len(name) > 80 or not _FILE_NAME.fullmatch(name):
                raise StudyError(
                    f"names of pair sets must be plain, since files are called by them: at most 80 letters, digits, spaces and "
                    f"._+-,()= within, got {name!r}; rename it"
                )
            if (other := names.setdefault(name.casefold(), name)) != name:
                raise StudyError(f"names of pair sets must differ in more than case, got {other!r} and {name!r}")
        if unknown := [name for name in self.pair_outcomes if name not in self.pairs]:
            raise StudyError(f"pair_outcomes must be for pair sets out of {list(self.pairs)}, got {unknown}")

    def channels(self, split: Split, *, harmful: bool) -> dict[str, tuple[Example, ...]]:
        """The attack or the benign channels of a split."""
        _require_name(split, SPLITS, "split")
        return {c: tuple(e) for c, e in self.suites.get(split, {}).items() if e and e[0].harmful == harmful}

    def benign(self, split: Split) -> list[Example]:
        """All benign examples of a split, hard ones included."""
        return [example for examples in self.channels(split, harmful=False).values() for example in examples]

    def malicious(self, split: Split, modality: Modality) -> list[Example]:
        """Examples of the attack channels that act through a modality and that the fit may use."""
        _require_name(split, SPLITS, "split")
        _require_name(modality, _MODALITIES, "modality")
        suites = self.suites.get(split, {})
        return [example for channel in self.seen.get(modality, ()) for example in suites.get(channel, ())]

    def refused(self, split: Split) -> list[Example]:
        """Plain harmful requests of a split, which the undefended model refuses."""
        return list(self.suites.get(split, {}).get(self.plain, ()))

    def require(self) -> None:
        """Refuse a study that lacks what the four steps need, before anything is run.

        Raises:
            StudyError: naming every gap: splits without benign or seen attack channels, missing plain requests, examples
                without the response that is teacher-forced, and gradient requests without a picture or without the answer aimed at.
        """
        gaps = [f"{split}: no benign examples" for split in SPLITS if not self.benign(split)]
        for split in ("fit", "validation", "test"):
            channels = [self.plain, *(c for names in self.seen.values() for c in names)]
            gaps += [f"{split}: no examples of {c!r}" for c in channels if not self.suites.get(split, {}).get(c)]
        if not any(self.seen.values()):
            gaps.append("no attack channel is seen in the fit")
        for split in ("fit", "calibration", "validation"):
            rows = [*self.benign(split), *(e for m in self.seen for e in self.malicious(split, m))]
            gaps += [f"{split}: example {e.id!r} of {e.channel!r} has no response" for e in rows if e.response is None]
        for what, lacking in (
            ("picture", [e.id for e in self.gradient if e.image is None]),
            ("response", [e.id for e in self.gradient if not e.response]),
        ):
            gaps += [f"gradient: example {name!r} has no {what}" for name in lacking]
        if gaps:
            more = f" and {len(gaps) - 12} more" if len(gaps) > 12 else ""
            raise StudyError(f"the study must hold what the steps need, got gaps: {'; '.join(gaps[:12])}{more}")

    def only(self, channels: Collection[str], *, splits: Collection[Split] = ("validation", "test")) -> "Study":
        """The same study with some of its channels in some of its splits: by default all that a repair is learned from stays.

        Raises:
            StudyError: if the test split has no such channel.
        """
        if unknown := [c for c in channels if c not in self.suites["test"]]:
            raise StudyError(f"channels must be of the test split, some of {list(self.suites['test'])}, got {unknown}")
        suites = {
            s: {c: e for c, e in some.items() if c in channels or s not in splits} for s, some in self.suites.items()
        }
        return replace(self, suites=suites)

    def limited(self, n: int, *, splits: Collection[Split] = SPLITS) -> "Study":
        """The same study with at most n examples a channel and n pairs: for a quick look.

        Args:
            n: how many.
            splits: those that are limited; pairs are of the fit split, requests for gradient attacks of the test split.

        Raises:
            ValueError: if n is below 1.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be a whole number of 1 or more, got {n!r}")
        suites = {
            s: {c: e[:n] if s in splits else e for c, e in channels.items()} for s, channels in self.suites.items()
        }
        pairs = {channel: p[:n] if "fit" in splits else p for channel, p in self.pairs.items()}
        return replace(
            self, suites=suites, pairs=pairs, gradient=self.gradient[:n] if "test" in splits else self.gradient
        )


def _flat(examples: Any) -> list[Example]:
    """Examples out of a list of them, or of a list of such lists."""
    if isinstance(examples, (str, bytes, Example)) or not isinstance(examples, Iterable):
        raise TypeError(f"examples must be a list of examples or of benchmarks, got {type(examples).__name__}")
    rows: list[Example] = []
    for index, one in enumerate(examples):
        rows += [one] if isinstance(one, Example) else require_examples(one, f"examples[{index}]")
    return rows


def _seen_by_pictures(
    suites: Mapping[str, Sequence[Example]], apart: Collection[str]
) -> dict[Modality, tuple[str, ...]]:
    """All attack channels but some: those with a picture act through it, unless their examples say that they act through the words."""
    attacks = {c: some for c, some in suites.items() if some[0].harmful and c not in apart}
    pictured = [
        c
        for c, some in attacks.items()
        if any(example.image is not None and example.meta.get("modality") != "textual" for example in some)
    ]
    return {"visual": tuple(sorted(pictured)), "textual": tuple(sorted({*attacks} - {*pictured}))}


def _require_shares(shares: Mapping[Split, float] | None) -> Mapping[Split, float]:
    """Shares of the splits, by default those of the docstrings."""
    shares = shares or {"fit": 0.4, "calibration": 0.15, "validation": 0.15, "test": 0.3}
    if unknown := [split for split in shares if split not in SPLITS]:
        raise ValueError(f"shares must be of splits out of {list(SPLITS)}, got {unknown}")
    if not all(share >= 0 for share in shares.values()) or abs(sum(shares.values()) - 1.0) > 1e-6:
        raise ValueError(f"shares must be 0 or more and sum to 1, got {dict(shares)}")
    return shares


def _require_name(name: object, known: Sequence[str], what: str) -> None:
    if name not in known:
        raise ValueError(f"{what} must be one of {list(known)}, got {name!r}")


def split_by_group(
    examples: Sequence[Example],
    *,
    shares: Mapping[Split, float] | None = None,
    seed: int = 0,
) -> dict[Split, dict[str, tuple[Example, ...]]]:
    """Deal examples to splits so that a group never stands in two.

    Args:
        examples: of any channels; an example without a group is a group of its own.
        shares: share of the groups of each split; by default 40 % fit, 15 % calibration, 15 % validation, 30 % test.
        seed: of the deal.

    Returns:
        Examples by split and channel, as `Study` takes them.

    Raises:
        ValueError: if shares do not sum to 1, one is negative or of no split, or examples have neither group nor id.
    """
    require_examples(examples)
    shares = _require_shares(shares)
    if nameless := [i for i, example in enumerate(examples) if not (example.group or example.id)]:
        raise ValueError(
            f"examples must have a group or an id to be dealt by, got neither at {nameless[:5]}; give them ids"
        )
    groups = sorted({example.group or example.id for example in examples})
    random.Random(seed).shuffle(groups)
    home: dict[str, Split] = {}
    start = 0.0
    for split, share in shares.items():
        home |= dict.fromkeys(groups[round(start * len(groups)) : round((start + share) * len(groups))], split)
        start += share
    out: dict[Split, dict[str, list[Example]]] = {split: {} for split in SPLITS}
    for example in examples:
        out[home[example.group or example.id]].setdefault(example.channel, []).append(example)
    return {split: {channel: tuple(rows) for channel, rows in channels.items()} for split, channels in out.items()}
