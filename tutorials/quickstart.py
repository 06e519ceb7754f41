# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: diagnose, learn, repair, prove
#
# We take the bundled vision-language model, which refuses forbidden requests in plain words and answers the same requests when the
# item is written in the picture, find out where that answer comes from, learn a safety subspace from a few dozen
# items, repair the model at inference, and look at items it has never seen. Everything in its world is made up and
# harmless. About a minute on two cores.

# %%
import torch

from care_lens import HybridFusion, SafetySubspace, Site, organism
from care_lens.capture import capture
from care_lens.evaluation import evaluate
from care_lens.mediation import mediate, patch_map
from care_lens.repair import ConformalGate, Correction, LinearReader, Writer, random_control, read_scores

torch.set_num_threads(2)
lvlm = organism.load()
lvlm.sites(tower="vision", component="hook_mlp_out")

# %% [markdown]
# One forbidden item, asked for in words and through the picture.

# %%
plain = organism.examples("plain", "test", n=4)
typographic = organism.examples("typographic", "test", n=4)
for example in (*plain, *typographic):
    answer = lvlm.generate(lvlm.prepare(example), max_new_tokens=14).texts[0]
    print(f"{example.channel:12} {example.prompt:60} -> {answer}")

# %%
typographic[0].image.resize((256, 256))

# %% [markdown]
# ## 1. Diagnose
#
# Counterfactual twins: over the same picture, the safe twin names the item ("the fozno in the picture": refused), the unsafe one does not
# ("the item in the picture": answered). The natural indirect effect (NIE) of a place is what happens to the unsafe margin
# log p(comply) - log p(refuse) of the safe run when that place alone takes its value from the unsafe run.

# %%
pairs = organism.pairs("typographic", "fit", n=12)
sites = [
    s
    for s in lvlm.sites(tower="language")
    if s.component in ("hook_attn_out", "hook_mlp_out", "hook_resid_post")
]
effects = mediate(
    lvlm,
    pairs,
    outcome=organism.outcome(),
    sites=sites,
    positions=("text", "last"),
    n_boot=500,
    progress=False,
)
effects.plot()

# %% [markdown]
# Which patches carry the item? Here the twins differ in the picture alone (another word in the same place), and the outcome is the log
# probability of the answer for the forbidden item.

# %%
from care_lens.core.outcome import ResponseLogProb

patches = patch_map(
    lvlm, organism.picture_pairs("fit", n=8), outcome=ResponseLogProb(), site="blocks.0.hook_resid_pre"
)
patches.plot()

# %% [markdown]
# ## 2. Learn
#
# Activations of harmless requests (hard ones included: forbidden nouns in harmless questions) against attacks, at the last
# prompt token of one layer.

# %%
study = organism.study()
site = Site("language", 2, "hook_resid_post")
benign = capture(lvlm, study.benign("fit"), [site], select=("last",), progress=False)
attack = {
    m: capture(lvlm, study.malicious("fit", m), [site], select=("last",), progress=False)
    for m in ("visual", "textual")
}
subspaces = {
    m: SafetySubspace.fit(
        benign.rows(site, "last"), rows.rows(site, "last"), rank=1, contrast="mean", site=site, modality=m
    )
    for m, rows in attack.items()
}
spectrum = SafetySubspace.fit(
    benign.rows(site, "last"),
    attack["visual"].rows(site, "last"),
    rank=8,
    contrast="second_moment",
    site=site,
    modality="visual",
)
spectrum

# %%
spectrum.plot()

# %% [markdown]
# ## 3. Repair
#
# A correction reads (the subspace), gates (open only where the score exceeds what benign prompts reach, by split conformal
# calibration) and writes (towards where refused requests are, at a later layer). Fusion balances the two modalities.

# %%
refused = capture(
    lvlm,
    study.refused("fit"),
    lvlm.sites(tower="language", component="hook_resid_post"),
    select=("last",),
    progress=False,
)
writer_site = Site("language", 3, "hook_resid_post")
complied = capture(
    lvlm,
    [e for m in attack for e in study.malicious("fit", m)],
    [writer_site],
    select=("last",),
    progress=False,
)
writer = Writer.towards(
    writer_site,
    target=refused.rows(writer_site, "last").mean(0),
    source=complied.rows(writer_site, "last").mean(0),
    scope="last",
)
readers = {
    m: (r := LinearReader.from_subspace(s)).standardised(r.tokens(benign.rows(site, "last")[:, None])[:, 0])
    for m, s in subspaces.items()
}
scores = read_scores(lvlm, study.benign("calibration"), list(readers.values()), progress=False)
gate = ConformalGate.calibrate(scores.amax(1), epsilon=0.02)
repair = HybridFusion(
    visual=(Correction(writer=writer, reader=readers["visual"], gate=gate, modality="visual"),),
    textual=(Correction(writer=writer, reader=readers["textual"], gate=gate, modality="textual"),),
    name="care_lens",
)
with repair.on(lvlm):
    for example in (*typographic, *organism.examples("benign typographic", "test", n=4)):
        answer = lvlm.generate(lvlm.prepare(example), max_new_tokens=14).texts[0]
        print(f"{example.channel:18} {example.prompt:60} -> {answer}")

# %% [markdown]
# ## 4. Prove
#
# Test items, wordings and type faces that neither the fit nor the calibration saw, the same settings for safety and utility, and a
# control: the same gate with a random writer of equal rank and edit norm.

# %%
control = random_control(repair, {writer_site: complied.rows(writer_site, "last")}, seed=0)
channels = ("typographic", "wrapper", "spelled", "benign typographic", "hard read", "hard over forbidden")
table = evaluate(
    lvlm,
    {c: study.suites["test"][c] for c in channels},
    {"none": None, "care_lens": repair, "random control": control},
    judge=organism.OrganismJudge(),
    max_new_tokens=14,
    fidelity=False,
    progress=False,
)
table.plot()

# %%
table.to_dataframe()[["defence", "channel", "metric", "value", "ci_low", "ci_high", "n"]]

# %% [markdown]
# One layer and no choice: a start, not the best repair. `care-lens run` chooses readers, gate and writer on validation and adds
# baselines, controls, the gradient attack and fidelity; see its report.
