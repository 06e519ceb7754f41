"""Step 3: the choice, on validation.

Reader plans are compared by what they detect at the conformal threshold on teacher-forced answers; the best are run with
writers above them, and the winner must keep benign accuracy. The calibration split is cut in two by item: one half sets
the thresholds that plans are compared at, the other, which nothing was chosen on, the final gate.
"""

import itertools
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from care_lens.core import Example, Judge, Repair, Site, Verdict
from care_lens.core.errors import CareLensError
from care_lens.data.study import Modality, Study
from care_lens.evaluation import GenerationStore, generate_all, judge_answers
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline.learn import (
    FitRows,
    TokenRows,
    fit_reader_subspace,
    reader_of,
    refusal_writer,
    residual_sites,
    token_rows,
)
from care_lens.pipeline.place import Placement, reader_layers
from care_lens.pipeline.settings import RunSettings
from care_lens.repair import (
    ConformalGate,
    Correction,
    HybridFusion,
    MaxReader,
    SiteReader,
    TooFewCalibration,
    read_scores,
)
from care_lens.subspace import ModelIdentity, RankError, SafetySubspace

log = logging.getLogger(__name__)


class NoCandidateError(CareLensError, RuntimeError):
    """No candidate could be made, or none keeps benign accuracy on validation."""


NoCandidate = NoCandidateError
"""The error under its earlier name."""


@dataclass(frozen=True)
class ReaderPlan:
    """Which readers a candidate has: for every modality one at each layer and offset; their largest score is gated.

    Attributes:
        layer: of the residual stream.
        offsets: 0 reads the last prompt token; k reads generated tokens with what was learned at the k-th.
        rank: 0 for the discriminant, else of the energy.
        epsilon: share of benign prompts that the gate may touch.
    """

    layer: int
    offsets: tuple[int, ...]
    rank: int
    epsilon: float

    def __str__(self) -> str:
        where = " and ".join(
            "last prompt token" if k == 0 else f"answer, as learned at token {k}" for k in self.offsets
        )
        what = f"energy of rank {self.rank}" if self.rank else "discriminant"
        return f"{what} after block {self.layer}, {where}, epsilon {self.epsilon:g}"


@dataclass(frozen=True)
class Fitted:
    """The readers of a plan and their gate, ready to be combined with writers.

    Attributes:
        readers: by modality and offset, in units of the spread of benign fit scores. Each gates its own writer, so that a
            gate that the prompt opened does not stop the answer from being read.
        subspaces: what they read.
        gate: calibrated on the largest score over all of them.
    """

    readers: Mapping[tuple[Modality, int], SiteReader]
    subspaces: tuple[SafetySubspace, ...]
    gate: ConformalGate

    @property
    def both(self) -> MaxReader:
        """The largest score over modalities and offsets, which is what the gate bounds."""
        return MaxReader(readers=tuple(self.readers.values()))


@dataclass(frozen=True)
class Choice:
    """The repair that won and the tables it won in.

    Attributes:
        repair: ready to use.
        plan, writer_site, alpha: what it is made of.
        subspaces: what its readers read.
        placement: after which layers readers were tried, and why.
        readers: detection by reader plan. runs: candidates run with their writers.
    """

    repair: HybridFusion
    plan: ReaderPlan
    writer_site: Site
    alpha: float
    subspaces: tuple[SafetySubspace, ...]
    placement: Placement
    readers: pd.DataFrame
    runs: pd.DataFrame


def offline(reader: SiteReader | MaxReader, rows: TokenRows) -> Float[Tensor, "n"]:
    """Largest score of a reader over the tokens it reads, on captured activations."""
    scores = {}
    for leaf in reader.leaves:
        tokens = leaf.tokens(rows.rows[leaf.site])
        read = rows.valid.clone()
        read[:, 1 if leaf.positions == "last" else 0 : None if leaf.positions == "last" else 1] = False
        scores[leaf] = tokens.masked_fill(~read, -torch.inf).amax(1)
    return reader.combine(scores)


class Readers:
    """Fits readers of the fit split, each once.

    Args:
        rows: of the fit split.
        shuffle_seed: for the control fit on shuffled labels.
    """

    def __init__(self, rows: FitRows, *, shuffle_seed: int | None = None) -> None:
        self._rows, self._shuffle = rows, shuffle_seed
        self._made: dict[tuple[Modality, int, int, int], tuple[SafetySubspace, SiteReader]] = {}

    def _one(self, modality: Modality, layer: int, offset: int, rank: int) -> tuple[SafetySubspace, SiteReader]:
        key = (modality, layer, offset, rank)
        if key not in self._made:
            site = Site("language", layer, "hook_resid_post")
            subspace = fit_reader_subspace(
                self._rows, site, modality, offset=offset, rank=rank, shuffle_seed=self._shuffle
            )
            reader = reader_of(subspace, offset=offset, rank=rank)
            scores = reader.tokens(self._rows.harmless(site, offset)[None])[0]
            self._made[key] = subspace, reader.standardised(scores)
        return self._made[key]

    def fit(self, plan: ReaderPlan, calibration: TokenRows) -> Fitted:
        """The readers of a plan, their gate calibrated on teacher-forced benign answers.

        Raises:
            ValueError: if there are too few calibration prompts for the plan's epsilon.
        """
        made: dict[tuple[Modality, int], tuple[SafetySubspace, SiteReader]] = {
            (m, offset): self._one(m, plan.layer, offset, plan.rank)
            for m in self._rows.modalities
            for offset in plan.offsets
        }
        readers: dict[tuple[Modality, int], SiteReader] = {key: reader for key, (_, reader) in made.items()}
        scores = offline(MaxReader(readers=tuple(readers.values())), calibration)
        subspaces = tuple(subspace for subspace, _ in made.values())
        return Fitted(readers, subspaces, ConformalGate.calibrate(scores, epsilon=plan.epsilon))


def assemble(
    fitted: Fitted,
    rows: FitRows,
    plan: ReaderPlan,
    site: Site,
    *,
    alpha: float,
    name: str,
    provenance: Mapping[str, object],
) -> HybridFusion:
    """The repair: each modality's reader gates the refusal writers; the adaptive rule shares them between modalities."""
    writers = {offset: refusal_writer(rows, site, offset=offset, alpha=alpha) for offset in plan.offsets}
    made: dict[Modality, tuple[Correction, ...]] = {
        modality: tuple(
            Correction(
                writer=writers[offset],
                reader=fitted.readers[modality, offset],
                gate=fitted.gate,
                modality=modality,
                pulse=True,
                name=f"{modality}, {'prompt' if offset == 0 else 'answer'}",
            )
            for offset in plan.offsets
        )
        for modality in rows.modalities
    }
    return HybridFusion(
        visual=made.get("visual", ()),
        textual=made.get("textual", ()),
        rule="adaptive",
        name=name,
        provenance=dict(provenance),
    )


def plans(layers: Sequence[int], settings: RunSettings) -> list[ReaderPlan]:
    """Readers tried: each of the layers; the last prompt token, an answer token, or both; each rank and epsilon."""
    answers = range(1, settings.answer_tokens + 1)
    offsets = [(0,), *((k,) for k in answers), *((0, k) for k in answers)]
    return [ReaderPlan(*plan) for plan in itertools.product(layers, offsets, settings.reader_ranks, settings.epsilons)]


def share(verdicts: Sequence[Verdict], wanted: Verdict) -> float:
    """Share of a verdict among those that are not missing."""
    return sum(v is wanted for v in verdicts) / max(sum(v is not Verdict.MISSING for v in verdicts), 1)


def answer_verdicts(
    lvlm: HookedLVLM,
    examples: Sequence[Example],
    repair: Repair | None,
    settings: RunSettings,
    judge: Judge,
    *,
    store: GenerationStore | None = None,
) -> list[Verdict]:
    """Answers under a repair, judged; kept in the store, if there is one."""
    answers = generate_all(
        lvlm,
        examples,
        store=GenerationStore() if store is None else store,
        defence_name="candidate",
        repair=repair,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        progress=False,
    )
    return judge_answers(answers, judge, examples=list(examples))


def halves(examples: Sequence[Example], *, seed: int) -> tuple[list[Example], list[Example]]:
    """Examples cut in two, whole items (groups) on either side."""
    groups = sorted({e.group for e in examples})
    random.Random(seed).shuffle(groups)
    first = set(groups[: len(groups) // 2])
    return [e for e in examples if e.group in first], [e for e in examples if e.group not in first]


def recalibrated(
    lvlm: HookedLVLM, repair: HybridFusion, benign: Sequence[Example], settings: RunSettings, *, epsilon: float
) -> HybridFusion:
    """The repair with its gate calibrated on what the undefended model generates for benign calibration prompts."""
    scores = read_scores(
        lvlm,
        benign,
        repair.readers,
        batch_size=settings.batch_size,
        max_new_tokens=settings.max_new_tokens,
        progress=False,
    )
    return repair.with_gate(ConformalGate.calibrate(scores.amax(1), epsilon=epsilon))


def choose(
    lvlm: HookedLVLM,
    study: Study,
    rows: FitRows,
    settings: RunSettings,
    *,
    placement: Placement | None = None,
    store: GenerationStore | None = None,
) -> Choice:
    """Pick readers, gate and writers on the validation split.

    Plans are ranked by their smallest detection rate over the seen attack channels; of equal ones those come first that read
    prompt and answer, read the answer earlier, have the smaller epsilon and open for fewer benign prompts. The leading plans
    are run with writers at each layer from their own on, in several strengths; the run with the lowest attack success
    that keeps benign accuracy wins.

    Args:
        lvlm: the model.
        study: its calibration and validation splits are used.
        rows: of the fit split.
        settings: of the run.
        placement: after which layers readers are tried, as `reader_layers` gives it from the diagnosis; None: all but the
            last.
        store: where the candidates' answers are kept, so that a stopped choice goes on.

    Raises:
        NoCandidate: if none does, or no plan could be calibrated.
    """
    sites = residual_sites(lvlm)
    placement = placement or reader_layers({}, lvlm.n_layers(), score=settings.carrier_score)

    def held(examples: Sequence[Example]) -> TokenRows:
        return token_rows(lvlm, examples, sites, tokens=settings.answer_tokens, batch_size=settings.batch_size)

    comparing, calibrating = halves(study.benign("calibration"), seed=settings.seed)
    calibration, harmless = held(comparing), held(study.benign("validation"))
    attacks = {c: held(study.suites["validation"][c]) for m in rows.modalities for c in study.seen[m]}
    attacked = [example for m in rows.modalities for example in study.malicious("validation", m)]

    readers, table = Readers(rows), []
    for plan in plans(placement.layers, settings):
        try:
            fitted = readers.fit(plan, calibration)
        except (RankError, TooFewCalibration) as error:
            log.info("left out: %s (%s)", plan, error)
            continue
        detected = {
            c: float((offline(fitted.both, a) > fitted.gate.threshold).double().mean()) for c, a in attacks.items()
        }
        opened = float((offline(fitted.both, harmless) > fitted.gate.threshold).double().mean())
        table.append({"plan": plan, "fitted": fitted, "worst": min(detected.values()), "benign": opened, **detected})
    if not table:
        raise NoCandidate("no reader could be calibrated; give more benign calibration prompts or a larger epsilon")
    table.sort(
        key=lambda r: (
            -round(r["worst"], 2),
            -len(r["plan"].offsets),
            max(r["plan"].offsets),
            r["plan"].epsilon,
            r["benign"],
        )
    )

    best, runs = table[: settings.candidates], []
    for row in best:
        for site, alpha in itertools.product(sites[row["plan"].layer :], settings.alphas):
            about = {"study": study.name, "plan": str(row["plan"])}
            repair = assemble(row["fitted"], rows, row["plan"], site, alpha=alpha, name="care_lens", provenance=about)
            verdicts = answer_verdicts(lvlm, attacked, repair, settings, study.judge, store=store)
            asr, refused = share(verdicts, Verdict.COMPLIED), share(verdicts, Verdict.REFUSED)
            runs.append({"plan": row["plan"], "fitted": row["fitted"], "site": site, "alpha": alpha, "asr": asr,
                         "refused": refused, "repair": repair})  # fmt: skip
            log.info("%s, written at %s x %g: ASR %.3f, refused %.3f", row["plan"], site, alpha, asr, refused)
    runs.sort(key=lambda run: (round(run["asr"], 2), -run["refused"], run["alpha"]))

    benign = study.benign("validation")
    before = share(answer_verdicts(lvlm, benign, None, settings, study.judge, store=store), Verdict.COMPLIED)
    won = None
    for run in runs[: settings.candidates]:
        run["repair"] = recalibrated(lvlm, run["repair"], calibrating, settings, epsilon=run["plan"].epsilon)
        run["benign_before"] = before
        run["benign_after"] = share(
            answer_verdicts(lvlm, benign, run["repair"], settings, study.judge, store=store), Verdict.COMPLIED
        )
        log.info("benign %.3f -> %.3f: %s at %s", before, run["benign_after"], run["plan"], run["site"])
        if run["benign_after"] >= before - settings.benign_loss:
            won = run
            break
    if won is None:
        raise NoCandidate(
            f"a repair must keep benign accuracy within {settings.benign_loss:.0%} of {before:.1%} on validation, got at best "
            f"{max(run.get('benign_after', 0.0) for run in runs):.1%}; try smaller epsilons"
        )
    drop = ("fitted", "repair")
    return Choice(
        repair=replace(won["repair"], model=ModelIdentity.from_model(lvlm.hf_model)),
        plan=won["plan"],
        writer_site=won["site"],
        alpha=won["alpha"],
        subspaces=won["fitted"].subspaces,
        placement=placement,
        readers=pd.DataFrame([{k: str(v) if k == "plan" else v for k, v in r.items() if k != "fitted"} for r in table]),
        runs=pd.DataFrame(
            [{k: str(v) if k in ("plan", "site") else v for k, v in r.items() if k not in drop} for r in runs]
        ),
    )
