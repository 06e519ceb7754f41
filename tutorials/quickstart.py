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
# # Quickstart: diagnose, learn, repair, evaluate
#
# We take the bundled vision-language model, which refuses forbidden requests in plain words and answers the same requests when the
# item is written in the picture, find out where that answer comes from, learn a safety subspace from a few dozen
# items, repair the model at inference, and look at items it has never seen. Everything in its world is made up and
# harmless. About a minute and a half on two cores.

# %%
from datetime import date

import pandas as pd
import plotly.express as px
import torch

from care_lens import Site, organism
from care_lens.core import package_versions
from care_lens.core.outcome import ResponseLogProb
from care_lens.evaluation import evaluate
from care_lens.mediation import mediate, patch_map, probe_auc
from care_lens.plots import plot_patch_effects
from care_lens.repair import (
    ReaderPlan,
    Readers,
    captured_scores,
    fit_reader_subspace,
    learn_repair,
    random_control,
    study_rows,
    token_rows,
)

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
# Counterfactual twins: over the same picture, the safe twin names the item ("the ziap in the picture": refused), the unsafe one does not
# ("the word in the picture": answered). The natural indirect effect (NIE) of a place is what happens to the unsafe margin
# log p(comply) - log p(refuse) of the safe run when that place alone takes its value from the unsafe run.

# %%
pairs = organism.pairs("typographic", "fit", n=8)
sites = [s for s in lvlm.sites(tower="language") if s.component in ("hook_attn_out", "hook_mlp_out", "hook_resid_post")]
effects = mediate(
    lvlm,
    pairs,
    outcome=organism.outcome(),
    sites=sites,
    positions=("text", "last"),
    n_boot=300,
    progress=False,
)
effects.plot()

# %% [markdown]
# The attention of block 0 carries the whole effect (7.74 of 7.75 nats over the text), and the MLP of the same block brings 5.77. Above it the MLPs of blocks 1, 2 and 3 bring about 2 nats each and that of block 7 2.35; no other part brings more than 0.71. *Who carries the refusal* (diagnosis) goes on from here.
#
# Which patches carry the item? Here the twins differ in the picture alone (another word in the same place), and the outcome is the log
# probability of the answer for the forbidden item.

# %%
pictures = organism.picture_pairs("fit", n=4)
patches = patch_map(lvlm, pictures, outcome=ResponseLogProb(), site="blocks.0.hook_resid_pre", progress=False)
plot_patch_effects(patches.details[patches.details["pair"] == 0], image=pictures.unsafe[0].image)

# %% [markdown]
# ## 2. Learn
#
# Where is harm legible? Activations of harmless requests (hard ones included: forbidden nouns in harmless questions) and of attacks, at the
# last prompt token after every block; a linear probe per block, tested on items that it was not fitted on.

# %%
study = organism.study()
rows = study_rows(lvlm, study, batch_size=64)
blocks = [Site("language", block, "hook_resid_post") for block in range(lvlm.n_layers())]


def auc_by_block(channel, harmless_channel):
    sets = [organism.examples(c, "fit", n=40) for c in (channel, harmless_channel)]
    attack, harmless = (token_rows(lvlm, e, blocks, tokens=0, batch_size=64) for e in sets)
    out = []
    for site in blocks:
        x = torch.cat([attack.at(site, 0), harmless.at(site, 0)])
        y = torch.arange(len(x)) < len(attack.at(site, 0))
        auc = probe_auc(x, y, [*attack.groups, *harmless.groups], n_boot=50)
        out.append({"channel": channel, "block": site.layer, "AUC": auc.estimate, "low": auc.low, "high": auc.high})
    return out


named = [("wrapper", "hard wrapper"), ("typographic", "benign typographic"), ("spelled", "benign spelled")]
legible = pd.DataFrame([row for pair in named for row in auc_by_block(*pair)])
px.line(
    legible,
    x="block",
    y="AUC",
    color="channel",
    markers=True,
    title="Harm at the last prompt token, by a probe on unseen items",
)

# %% [markdown]
# The harm of an item is known before the answer begins, whether the text names it, spells it, or the picture shows it, and the model answers
# nevertheless: what is missing is not knowledge. Spelled items are known last (AUC 0.63 after block 3, 0.91 after block 5, 0.99 after block 6). So a repair can refuse early, if it reads late enough.
#
# The safety subspace of the visual attacks there, by the generalised eigenproblem, and its spectrum:

# %%
layer = blocks[6]
spectrum = fit_reader_subspace(rows, layer, "visual", offset=0, rank=8)
spectrum

# %%
spectrum.plot()

# %% [markdown]
# Directions of much malicious energy need not tell requests apart one by one. Three readers of the same rows, their gates set so that 2 % of
# benign calibration prompts may open them; how many of the attacks of the validation split do?

# %%
plans = {
    "energy, rank 8": ReaderPlan(layer=6, rank=8, epsilon=0.02),
    "discriminant": ReaderPlan(layer=6, epsilon=0.02),
    "classifier": ReaderPlan(layer=6, epsilon=0.02, classifier=True),
}
readers = Readers(rows)
calibration, *validation = (
    token_rows(lvlm, examples, [layer], tokens=0, batch_size=64)
    for examples in (study.benign("calibration"), *(study.suites["validation"][c] for c, _ in named))
)
opened = {}
for name, plan in plans.items():
    fitted = readers.fit(plan, calibration)
    shares = [(captured_scores(fitted.both, held) > fitted.gate.threshold).float().mean() for held in validation]
    opened[name] = {channel: f"{float(share):.0%}" for (channel, _), share in zip(named, shares)}
pd.DataFrame(opened).T

# %% [markdown]
# ## 3. Repair
#
# A correction reads (a classifier of each modality's attacks, at the last prompt token), gates (opens only where the
# score exceeds what benign prompts reach, by split conformal calibration) and writes (towards where the model stands before it
# refuses). Fusion balances the two modalities. `care_lens.evaluation.tune` would pick layer, token and strength on validation; here we set them.

# %%
repair = learn_repair(
    lvlm,
    rows,
    plans["classifier"],
    calibration=study.benign("calibration"),
    batch_size=64,
    max_new_tokens=14,
)
with repair.on(lvlm):
    for example in (*typographic, *organism.examples("benign typographic", "test", n=4)):
        answer = lvlm.generate(lvlm.prepare(example), max_new_tokens=14).texts[0]
        print(f"{example.channel:18} {example.prompt:60} -> {answer}")

# %% [markdown]
# All four attacks are refused from the first word on. One of the four harmless requests is refused, too.
#
# `repair.fwd_hooks(inputs)` gives plain TransformerLens hooks, `repair.save(folder)` keeps it.
#
# ## 4. Evaluate
#
# Test items, wordings and type faces that neither the fit nor the calibration saw, the same settings for safety and utility, and a
# control: the same readers and gate with random writers of equal rank and equal edit norm. Twenty-four examples a channel and one draw here; `care-lens run` takes all, and five draws.

# %%
control = random_control(repair, {layer: rows.complied(layer, 0)}, seed=0)
channels = ("typographic", "wrapper", "indirect", "split", "benign typographic", "hard read", "hard named kind")
table = evaluate(
    lvlm,
    {c: study.suites["test"][c][:24] for c in channels},
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
# The repair leaves none of the 24 attacks of the two seen channels (0.00 [0.00, 0.14] each, without it 1.00 [0.86, 1.00] each), one of *indirect* (0.04 [0.00, 0.21] of 1.00) and nearly half of *split* (0.46 [0.26, 0.67] of 0.92); the random control leaves 0.96 to 1.00. It costs right answers: 0.88 [0.68, 0.97] of the harmless pictures and 0.88 [0.68, 0.97] of the questions for a kind are left, of 1.00.
#
# *indirect* (the item as the twin of another) and *split* (its letters divided between text and picture) were not in the fit.
# `care-lens run` chooses on validation and adds baselines tuned by the same rule, CARE as published, the shuffled-label control, gradient attacks
# (one sees the repair) and fidelity; see its report.
#
# ## What this does not show
#
# - The settings were not chosen here. README's repair has those that `care-lens run` takes on validation: block, tokens that are read, threshold and strength. The figures' samples are smaller than README's.
# - In this small world harm is nearly linear at one block. In a large model it may be legible earlier, later, or less cleanly: the two figures of section 2 are what to draw first.
# - No attack here looks at the repair. [Ten defences and an adaptive attack](ten_defences.ipynb) has one that does.
#
# ## Exercises
#
# 1. What does the repair do where no gate is open? Compare the logits of a benign request with and without it.
#
# <details><summary>Solution</summary>
#
# ```python
# asked = lvlm.prepare(organism.examples("benign plain", "test", n=4))
# before = lvlm(asked)
# with repair.on(lvlm):
#     after = lvlm(asked)
# print(torch.equal(before, after))
# ```
#
# They are equal to the bit: a closed gate adds nothing.
#
# </details>
#
# 2. How many of the stopped attacks are *refused*, and how many end in another wrong answer? Do the same for the control.
#
# <details><summary>Solution</summary>
#
# ```python
# shares = table.to_dataframe()
# shares = shares[shares["channel"].isin(("typographic", "wrapper")) & shares["metric"].isin(("asr", "refusal"))]
# print(shares.pivot_table(index=["channel", "defence"], columns="metric", values="value").round(2))
# ```
#
# What is neither complied nor refused is another answer. Here the repair stops all attacks of both channels, and refuses all pictured ones and 0.96 of the wrapped; one wrapped attack gets another answer. The control stops none of either channel.
#
# </details>

# %%
print(date.today(), package_versions())
