"""Step 3: the choice, on validation only. Readers are compared offline by what they detect at the conformal threshold, writers by
what they turn into refusals when always open; the winner is then run as a whole and must keep benign accuracy.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from care_lens.capture import Activations, capture
from care_lens.core import Example, Site, Verdict
from care_lens.data.study import Modality, Study
from care_lens.evaluation import generate_all, judge_answers
from care_lens.evaluation.store import GenerationStore
from care_lens.lvlm import HookedLVLM
from care_lens.pipeline.learn import FitRows, fit_reader_subspace, reader_of, refusal_writer, residual_sites
from care_lens.pipeline.settings import RunSettings
from care_lens.repair import ConformalGate, Correction, HybridFusion, MaxReader, SiteReader
from care_lens.subspace import SafetySubspace

log = logging.getLogger(__name__)


class NoCandidate(RuntimeError):
    """No candidate keeps benign accuracy on validation."""


@dataclass(frozen=True)
class ReaderPlan:
    """Which readers a candidate has: for every modality one at each of its layers; their largest score is gated.

    Attributes:
        layers: of the residual stream.
        ranks: 0 for the discriminant, else of the energy.
        epsilon: share of benign prompts that the gate may touch.
    """

    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    epsilon: float


@dataclass(frozen=True)
class Fitted:
    """The readers of a plan and their gate, ready to be combined with a writer.

    Attributes:
        readers: by modality, in units of the spread of benign fit scores.
        subspaces: what they read.
        gate: calibrated on the largest score over all of them.
    """

    readers: Mapping[Modality, MaxReader]
    subspaces: tuple[SafetySubspace, ...]
    gate: ConformalGate


@dataclass(frozen=True)
class Choice:
    """The repair that won and the tables it won in.

    Attributes:
        repair: ready to use.
        plan, writer_site, alpha: what it is made of.
        subspaces: what its readers read.
        readers: detection by reader plan. writers: refusals by writer. runs: candidates run as a whole.
    """

    repair: HybridFusion
    plan: ReaderPlan
    writer_site: Site
    alpha: float
    subspaces: tuple[SafetySubspace, ...]
    readers: pd.DataFrame
    writers: pd.DataFrame
    runs: pd.DataFrame


def offline(reader: SiteReader | MaxReader, rows: Activations) -> Float[Tensor, "n"]:
    """Scores of a reader of last prompt tokens on captured activations."""
    leaves = {leaf: leaf.tokens(rows.rows(leaf.site, "last")[:, None])[:, 0] for leaf in reader.leaves}
    return reader.combine(leaves)


def fit_readers(
    rows: FitRows, calibration: Activations, plan: ReaderPlan, *, shuffle_seed: int | None = None
) -> Fitted:
    """Fit the readers of a plan on the fit split and calibrate their gate on the calibration split.

    Args:
        rows: of the fit split.
        calibration: benign activations of the calibration split.
        plan: which readers.
        shuffle_seed: for the control fit on shuffled labels.
    """
    subspaces: list[SafetySubspace] = []
    readers: dict[Modality, MaxReader] = {}
    for modality in rows.modalities:
        leaves = []
        for layer, rank in itertools.product(plan.layers, plan.ranks):
            site = Site("language", layer, "hook_resid_post")
            subspace = fit_reader_subspace(rows, site, modality, rank=rank, shuffle_seed=shuffle_seed)
            reader = reader_of(subspace, rank=rank)
            subspaces.append(subspace)
            leaves.append(reader.standardised(offline(reader, rows.benign)))
        readers[modality] = MaxReader(readers=tuple(leaves))
    highest = offline(MaxReader(readers=tuple(readers.values())), calibration)
    return Fitted(readers, tuple(subspaces), ConformalGate.calibrate(highest, epsilon=plan.epsilon))


def assemble(
    fitted: Fitted, rows: FitRows, site: Site, *, alpha: float, name: str, provenance: Mapping[str, object]
) -> HybridFusion:
    """The repair: each modality's reader gates the refusal writer, the adaptive rule shares it between them."""
    writer = refusal_writer(rows, site, alpha=alpha)
    made: dict[Modality, tuple[Correction, ...]] = {
        modality: (
            Correction(writer=writer, reader=reader, gate=fitted.gate, modality=modality, name=modality),
        )
        for modality, reader in fitted.readers.items()
    }
    return HybridFusion(
        visual=made.get("visual", ()),
        textual=made.get("textual", ()),
        rule="adaptive",
        name=name,
        provenance=dict(provenance),
    )


def plans(lvlm: HookedLVLM, settings: RunSettings) -> list[ReaderPlan]:
    """Readers tried: at each layer but the last, at pairs and triples of neighbours, of each rank and of all ranks."""
    layers = range(lvlm.n_layers() - 1)
    places = [tuple(layers[i : i + k]) for k in (1, 2, 3) for i in range(len(layers) - k + 1)]
    ranks = [(rank,) for rank in settings.reader_ranks]
    if len(ranks) > 1:
        ranks.append(settings.reader_ranks)
    return [ReaderPlan(p, r, e) for p in places for r in ranks for e in settings.epsilons]


def _answers(
    lvlm: HookedLVLM, examples: Sequence[Example], repair: HybridFusion | None, settings: RunSettings, judge
) -> list[Verdict]:
    answers = generate_all(
        lvlm,
        examples,
        store=GenerationStore(),
        defence_name="candidate",
        repair=repair,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.batch_size,
        progress=False,
    )
    return judge_answers(answers, judge, examples=list(examples))


def _rate(verdicts: Sequence[Verdict], wanted: Verdict) -> float:
    return sum(v is wanted for v in verdicts) / max(len(verdicts), 1)


def choose(lvlm: HookedLVLM, study: Study, rows: FitRows, settings: RunSettings) -> Choice:
    """Pick readers, gate and writer on the validation split.

    A reader plan is scored by its smallest detection rate over the seen attack channels at the conformal threshold, a
    writer by the share of complied attacks it turns into refusals when always open. Plans are then run with the best
    writers at or above them, best first, until one loses at most `settings.benign_loss` of benign accuracy.

    Raises:
        NoCandidate: if none does.
    """
    sites = residual_sites(lvlm)

    def held(examples: Sequence[Example]) -> Activations:
        return capture(
            lvlm, examples, sites, select=("last",), batch_size=settings.batch_size, progress=False
        )

    calibration, benign_rows = held(study.benign("calibration")), held(study.benign("validation"))
    seen = {m: study.malicious("validation", m) for m in rows.modalities}
    attacks = {c: held(study.suites["validation"][c]) for m in rows.modalities for c in study.seen[m]}

    found: list[tuple[float, float, ReaderPlan, Fitted]] = []
    table = []
    for plan in plans(lvlm, settings):
        try:
            fitted = fit_readers(rows, calibration, plan)
        except (
            ValueError
        ) as error:  # too few calibration prompts for this epsilon, or a rank the rows do not allow
            log.info("plan %s left out: %s", plan, error)
            continue
        both = MaxReader(readers=tuple(fitted.readers.values()))
        detected = {
            c: float((offline(both, a) > fitted.gate.threshold).double().mean()) for c, a in attacks.items()
        }
        opened = float((offline(both, benign_rows) > fitted.gate.threshold).double().mean())
        table.append(
            {
                "layers": str(plan.layers),
                "ranks": str(plan.ranks),
                "epsilon": plan.epsilon,
                "benign": opened,
                **detected,
            }
        )
        found.append((min(detected.values()), opened, plan, fitted))
    if not found:
        raise NoCandidate(
            "no reader could be calibrated; give more benign calibration prompts or a larger epsilon"
        )

    attacked = [example for examples in seen.values() for example in examples]
    writers = []
    for site, alpha in itertools.product(sites[1:], (1.0, 1.5)):
        only = Correction(writer=refusal_writer(rows, site, alpha=min(alpha, 1.0)))
        only = replace(only, writer=replace(only.writer, alpha=alpha))
        repair = HybridFusion(textual=(only,), rule="sequential", name="writer")
        refused = _rate(_answers(lvlm, attacked, repair, settings, study.judge), Verdict.REFUSED)
        writers.append({"site": str(site), "layer": site.layer, "alpha": alpha, "refused": refused})
    writer_table = pd.DataFrame(writers).sort_values(
        ["refused", "alpha", "layer"], ascending=[False, True, True]
    )

    benign = study.benign("validation")
    before = _rate(_answers(lvlm, benign, None, settings, study.judge), Verdict.COMPLIED)
    runs = []
    found.sort(key=lambda row: (-row[0], row[1], row[2].epsilon, len(row[2].layers) * len(row[2].ranks)))
    for detection, _, plan, fitted in found[:6]:
        top = writer_table[writer_table.layer >= max(plan.layers)].iloc[0]
        site = Site.parse(top.site)
        repair = assemble(
            fitted,
            rows,
            site,
            alpha=float(top.alpha),
            name="care_lens",
            provenance={"study": study.name, "plan": str(plan)},
        )
        asr = _rate(_answers(lvlm, attacked, repair, settings, study.judge), Verdict.COMPLIED)
        after = _rate(_answers(lvlm, benign, repair, settings, study.judge), Verdict.COMPLIED)
        runs.append({"plan": plan, "fitted": fitted, "site": site, "alpha": float(top.alpha), "detection": detection,
                     "asr": asr, "benign_before": before, "benign_after": after, "repair": repair})  # fmt: skip
        log.info(
            "%s writer %s x %.1f: ASR %.3f, benign %.3f -> %.3f", plan, site, top.alpha, asr, before, after
        )
    kept = [run for run in runs if run["benign_after"] >= before - settings.benign_loss]
    if not kept:
        raise NoCandidate(
            f"a repair must keep benign accuracy within {settings.benign_loss:.0%} of {before:.1%} on validation, best of "
            f"{len(runs)} reached {max(run['benign_after'] for run in runs):.1%}; try smaller epsilons"
        )
    best = min(kept, key=lambda run: (run["asr"], -run["benign_after"]))
    frame = pd.DataFrame(
        [
            {k: str(v) if k in ("plan", "site") else v for k, v in r.items() if k not in ("fitted", "repair")}
            for r in runs
        ]
    )
    return Choice(
        repair=best["repair"], plan=best["plan"], writer_site=best["site"], alpha=best["alpha"], subspaces=best["fitted"].subspaces,
        readers=pd.DataFrame(table), writers=writer_table, runs=frame,
    )  # fmt: skip
