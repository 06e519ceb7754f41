"""Measure what docs/gallery holds: small results of the bundled model, from which the gallery's figures are made.

    python docs/gallery_data.py RUN [LOG]

RUN is the folder of a finished ``care-lens run`` on the bundled model, LOG the log of a training of its world. It takes a few minutes on two
cores; the documentation and the tests only read the files.
"""

import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from care_lens import Example, PairedExamples, organism
from care_lens.capture import capture
from care_lens.core import ResponseLogProb
from care_lens.evaluation import search
from care_lens.lens import TextBank, logit_lens, nearest_text, picture_reading
from care_lens.lens.separability import separability
from care_lens.mediation import (
    Region,
    attribute,
    circuit_faithfulness,
    edge_attribution,
    heads,
    knockout,
    mediate,
    neurons,
    patch_map,
    path_effects,
    verify,
    verify_edges,
)
from care_lens.mediation.writing import writes_towards
from care_lens.planted.scorecard import summary
from care_lens.plots import training_frame
from care_lens.repair import HybridFusion, read_scores
from care_lens.subspace import SafetySubspace
from care_lens.subspace.uncertainty import measure_uncertainty

log = logging.getLogger("gallery")
HERE = Path(__file__).parent / "gallery"
QUIET = {"progress": False}
#: Where the word is in picture.png, in pixels.
WORD = Region.box(14, 46, 52, 60, name="word")


def keep(name: str, frame: pd.DataFrame, drop: tuple[str, ...] = ("seed", "p_value", "metric_unit")) -> None:
    """A frame as csv of five significant digits."""
    kept = frame.drop(columns=[column for column in drop if column in frame.columns])
    kept.to_csv(HERE / f"{name}.csv", index=False, float_format="%.5g")
    log.info("%s: %d rows", name, len(kept))


def of_run(run: Path) -> None:
    """Frames that the run has already."""
    frames = run / "frames"
    for name in ("effects.wrapper", "effects.picture"):
        frame = pd.read_csv(frames / f"{name}.csv")
        keep(name, pd.DataFrame(frame[frame["effect"].isin(["TE", "NIE", "NDE"])]))
    keep("places.wrapper", pd.read_csv(frames / "places.wrapper.csv"))
    ablation = pd.read_csv(frames / "ablation.csv")
    keep("ablation", pd.DataFrame(ablation[ablation["effect"] == "share"]))
    keep("patches.picture", pd.read_csv(frames / "patches.picture.csv"))
    (defences,) = (path for path in frames.glob("defences.*.csv") if not path.name.endswith("trials.csv"))
    frame = pd.read_csv(defences)
    keep("defences", pd.DataFrame(frame[frame["metric"].isin(["asr", "accuracy", "refusal"])]), drop=())
    trials = pd.read_csv(frames / f"{defences.stem}.trials.csv")
    trials = trials[trials["metric"].isin(["asr", "accuracy"])]
    counted = (
        trials.groupby(["defence", "channel", "metric", "judge", "group"], sort=False)["value"].mean().reset_index()
    )
    np.savez_compressed(
        HERE / "trials.npz",
        value=counted["value"].to_numpy(np.float32),
        **{c: pd.factorize(counted[c])[0].astype(np.int16) for c in ("defence", "channel", "metric", "group")},
        **{f"{c}_names": np.array(list(dict.fromkeys(counted[c]))) for c in ("defence", "channel", "metric", "group")},
    )


def of_model(lvlm, study, repair: HybridFusion) -> None:
    """Frames that the run does not measure."""
    pairs, outcome = study.pairs["wrapper"][:8], study.outcome
    twins = study.pairs["typographic"][:8]
    options = {"outcome": outcome, "n_boot": 300, **QUIET}
    keep("heads", mediate(lvlm, pairs, sites=heads(lvlm), positions=("all",), **options).frame.query("effect == 'NIE'"))
    some = neurons("blocks.6.mlp.hook_post", [*range(0, 40, 2), list(range(100))])
    keep("neurons", mediate(lvlm, pairs, sites=some, positions=("all",), **options).frame.query("effect == 'NIE'"))
    sites = [f"blocks.{k}.hook_resid_post" for k in range(0, 8, 2)]
    one = study.pairs["picture"][:4]
    # One pair, so that the columns have words; its effects have no intervals.
    each = mediate(
        lvlm, one[:1], sites=sites, positions=("each",), **{**options, "outcome": study.pair_outcomes["picture"]}
    )
    keep("each", each.frame.query("effect == 'NIE'"))
    ids = lvlm.prepare([one.unsafe[0]])
    row = ids.input_ids[0][~ids.spans.padding[0]].tolist()
    keep("tokens", pd.DataFrame({"token": [lvlm.tokenizer.convert_ids_to_tokens(i) for i in row]}))
    for layer in (0, 1, 2, 4, 6, 7):
        found = patch_map(
            lvlm,
            one,
            outcome=study.pair_outcomes["picture"],
            site=f"blocks.{layer}.hook_resid_pre",
            n_boot=300,
            **QUIET,
        )
        keep(f"patches.{layer}", found.frame)
    one.unsafe[0].image.convert("L").save(HERE / "picture.png", optimize=True)
    found = attribute(lvlm, pairs, points=16, **options)
    largest = (
        found.frame.assign(size=found.frame["value"].abs())
        .sort_values("size", ascending=False)
        .groupby("kind", sort=False)
        .head(15)
    )
    keep("attribution", pd.DataFrame(largest.drop(columns="size")))
    keep("verified", verify(lvlm, pairs, found, top=8, random=8, **options).frame)
    cut = knockout(lvlm, twins, source="text", target="last", window=2, **options)
    keep("knockout", cut.frame)
    ends = [f"blocks.{k}.{c}" for k in (5, 6, 7) for c in ("hook_attn_out", "hook_mlp_out")]
    keep("paths", path_effects(lvlm, pairs, senders=ends, receivers=[*ends, "end"], **options).frame)
    site = "blocks.6.hook_resid_post"
    benign, attacks = study.benign("fit")[:400], study.malicious("fit", "textual") + study.malicious("fit", "visual")
    each_site = [f"blocks.{k}.{c}" for k in range(8) for c in ("hook_attn_out", "hook_mlp_out")]
    classes = [
        capture(lvlm, rows, [*each_site, site], positions=("last",), progress=False) for rows in (benign, attacks)
    ]
    keep("separability", separability(*classes, sites=each_site, n_boot=50).frame)
    rows = [captured.rows(site, "last") for captured in classes]
    for name, rank in (("auto", "auto"), ("energy", "energy"), ("permutation", "permutation"), ("pair", 2)):
        fitted = SafetySubspace.fit(*rows, rank=rank, site=site, modality="textual")
        fitted.save(HERE / f"subspace.{name}")
    keep(
        "uncertainty",
        measure_uncertainty(SafetySubspace.load(HERE / "subspace.auto"), *rows, n_boot=60, n_halves=20).frame,
    )
    keep("writing", writes_towards(lvlm, fitted, k=5).frame)
    outputs = [f"blocks.{layer}.hook_mlp_out" for layer in range(8)]
    for modality in ("visual", "textual"):
        captured = capture(lvlm, study.malicious("fit", modality)[:56], outputs, positions=("last",), progress=False)
        for layer, at in enumerate(outputs):
            both = (classes[0].rows(at, "last"), captured.rows(at, "last"))
            SafetySubspace.fit(*both, rank=2, site=at, modality=modality).save(HERE / "angles" / f"{layer}.{modality}")
    shown = {"benign": study.benign("test")[::50][:32], "typographic": study.suites["test"]["typographic"][:32]}
    kept = {}
    for name, examples in shown.items():
        kept[f"{name}, before"] = capture(lvlm, examples, [site], positions=("last",), progress=False).rows(
            site, "last"
        )
        with repair.on(lvlm):
            kept[f"{name}, after"] = capture(lvlm, examples, [site], positions=("last",), progress=False).rows(
                site, "last"
            )
    np.savez_compressed(HERE / "rows.npz", **{name: tensor.numpy().astype(np.float16) for name, tensor in kept.items()})
    attack = study.suites["test"]["typographic"][0]
    inputs = lvlm.prepare([attack])
    with repair.recording(lvlm) as seen:
        texts = lvlm.generate(inputs, max_new_tokens=10)
    keep("recording", seen.to_dataframe())
    row = inputs.input_ids[0][~inputs.spans.padding[0]].tolist()
    words = [lvlm.tokenizer.convert_ids_to_tokens(i) for i in row] + texts.texts[0].split() + ["<eos>"] * 3
    keep("recording.tokens", pd.DataFrame({"token": words}))
    attack.image.convert("RGB").save(HERE / "recording.png", optimize=True)
    keep(
        "trace",
        read_scores(lvlm, [attack], repair.readers, max_new_tokens=10, trace=True, progress=False).to_dataframe(),
    )

    def at_strength(*, alpha: float) -> HybridFusion:
        sides = {
            m: tuple(replace(c, writer=replace(c.writer, alpha=alpha)) for c in getattr(repair, m))
            for m in ("visual", "textual")
        }
        return replace(repair, name=f"strength {alpha:g}", **sides)

    found = search(
        lvlm,
        at_strength,
        {"alpha": [0.25, 0.5, 1.0, 1.5]},
        study.limited(3),
        benign_loss=0.05,
        max_new_tokens=14,
        batch_size=128,
    )
    keep("frontier", found.frontier.frame)


def of_lenses(lvlm, study) -> None:
    """Frames of lenses, regions and edges; about a minute on one core."""
    pictured = study.pairs["picture"][:8]
    names = [example.group for example in pictured.unsafe]
    words = logit_lens(lvlm, pictured.unsafe, targets=names, positions=("image",), n_boot=300, **QUIET)
    keep("lens", pd.DataFrame(words.frame[words.frame["metric"].isin(["target hit", "entropy"])]))
    options = {"outcome": study.pair_outcomes["picture"], "n_boot": 300, **QUIET}
    sites = ["blocks.0.hook_resid_pre"]
    found = mediate(lvlm, pictured[:1], sites=sites, positions=(WORD, WORD.outside()), **options)
    keep("regions", found.frame.query("effect == 'NIE'"))
    pairs, options = study.pairs["typographic"][:4], {**options, "outcome": study.outcome}
    edges = edge_attribution(lvlm, pairs, points=4, **options)
    keep("edges", edges.frame.head(20))
    keep("edges.verified", verify_edges(lvlm, pairs, edges, top=10, random=10, **options).details)
    circuit = circuit_faithfulness(lvlm, pairs, edges, sizes=(0, 5, 20, 50, 200), random=5, **options)
    keep("faithfulness", circuit.frame)


def of_pictures(lvlm) -> None:
    """Frames of what the patches of one picture hold and do, and of a request with two pictures; about a minute on one core."""
    place, outcome = "blocks.0.hook_resid_pre", ResponseLogProb()
    pairs = organism.picture_pairs("test", n=2)
    seen = pairs.unsafe
    nouns = organism.world().select(split="test")
    bank = TextBank.of(lvlm, [Example(f"tell me how to make the {noun.name}") for noun in nouns], progress=False)
    words = logit_lens(
        lvlm, seen, sites=[place], targets=[e.meta["item"] for e in seen], positions=("image",), n_boot=2, **QUIET
    )
    near = nearest_text(lvlm, seen, bank, sites=[place], n_boot=2, **QUIET)
    effects = patch_map(lvlm, pairs, outcome=outcome, site=place, n_boot=300, **QUIET)
    keep("reading", picture_reading(words, effects, example=1, site=place, neighbours=near, n_boot=2).frame)
    seen[1].image.convert("L").save(HERE / "reading.png", optimize=True)

    def both(one: Example, other: Example) -> Example:
        """The first request, with the second one's picture behind its own."""
        return replace(one, more_images=(other.image,))

    pair = PairedExamples((both(*pairs.safe[1::-1]),), (both(*pairs.unsafe[1::-1]),))
    # One pair, so that its pictures are the ones below; its effects have no intervals.
    found = patch_map(lvlm, pair, outcome=outcome, site=place, n_boot=300, **QUIET)
    keep("tiles", found.frame.merge(found.details[["grid", "row", "col", "x0", "y0", "x1", "y1"]]))
    for at, image in enumerate(pair.unsafe[0].images):
        image.convert("L").save(HERE / f"tiles.{at}.png", optimize=True)


def of_bench() -> None:
    """The scorecard of the planted bench, from what ``benchmarks/bench_localise.py`` measured."""
    table = pd.read_csv(HERE.parents[1] / "benchmarks" / "measured" / "localise.csv").dropna(subset="rank")
    columns = {
        "localise": "rank",
        "NIE alone": "NIE alone",
        "TIE alone": "TIE alone",
        "integrated gradients": "integrated alone",
        "gradient": "gradient alone",
        "linear probe": "probe alone",
    }
    shared = table[["plant", "dose", "opened", "of", "chance"]].assign(took=(table["opened"] >= 0.5).astype(float))
    details = pd.concat([shared.assign(method=name, rank=table[of]) for name, of in columns.items()])
    keep("scorecard", summary(details))
    keep("scorecard.details", details)


def main() -> None:
    """See above."""
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    HERE.mkdir(exist_ok=True)
    run = Path(sys.argv[1])
    of_run(run)
    of_bench()
    if len(sys.argv) > 2:
        frame = training_frame(Path(sys.argv[2]))
        thin = frame["metric"].isin(["exact"]) | (frame.groupby(["stage", "metric"]).cumcount() % 4 == 0)
        keep("training", pd.DataFrame(frame[thin]))
    with organism.load() as lvlm:
        study = organism.study()
        of_model(lvlm, study, HybridFusion.load(run / "repair"))
        of_lenses(lvlm, study)
        of_pictures(lvlm)


if __name__ == "__main__":
    main()
