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
import pandas as pd
import plotly.express as px
import torch

from care_lens import Site, organism
from care_lens.core.outcome import ResponseLogProb
from care_lens.evaluation import evaluate
from care_lens.mediation import mediate, patch_map, probe_auc
from care_lens.plots import plot_patch_effects
from care_lens.repair import ReaderPlan, fit_reader_subspace, learn_repair, random_control, study_rows, token_rows

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
sites = [s for s in lvlm.sites(tower="language") if s.component in ("hook_attn_out", "hook_mlp_out", "hook_resid_post")]
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
pictures = organism.picture_pairs("fit", n=8)
patches = patch_map(lvlm, pictures, outcome=ResponseLogProb(), site="blocks.0.hook_resid_pre", progress=False)
plot_patch_effects(patches.details[patches.details["pair"] == 0], image=pictures.unsafe[0].image)

# %% [markdown]
# ## 2. Learn
#
# Where is harm legible? Activations of harmless requests (hard ones included: forbidden nouns in harmless questions) and of attacks, at the
# last prompt token and at the first tokens of the answer; a linear probe per token, tested on unseen items.

# %%
study = organism.study()
rows = study_rows(lvlm, study, batch_size=64)
layer = Site("language", 2, "hook_resid_post")


def auc_by_token(channel, harmless_channel):
    sets = [organism.examples(c, "fit", per_item=2) for c in (channel, harmless_channel)]
    attack, harmless = (token_rows(lvlm, e, [layer], tokens=6, batch_size=64) for e in sets)
    out = []
    for token in range(7):
        x = torch.cat([attack.at(layer, token), harmless.at(layer, token)])
        y = torch.arange(len(x)) < len(attack.at(layer, token))
        auc = probe_auc(x, y, [*attack.groups, *harmless.groups], n_boot=100)
        out.append({"channel": channel, "token": token, "AUC": auc.estimate})
    return out


named = [("wrapper", "hard wrapper"), ("typographic", "benign typographic"), ("spelled", "benign spelled")]
legible = pd.DataFrame([row for pair in named for row in auc_by_token(*pair)])
px.line(
    legible,
    x="token",
    y="AUC",
    color="channel",
    markers=True,
    title="Harm is legible at token 0 = last prompt token, k = answer token k",
)

# %% [markdown]
# An item that the text names is known to be harmful at the end of the prompt. An item in the picture is not: the model finds out what it is while
# it answers. So the repair has to read the answer too, and stop it before the first step.
#
# The subspace that a reader reads, and its spectrum:

# %%
spectrum = fit_reader_subspace(rows, layer, "visual", offset=5, rank=8)
spectrum

# %%
spectrum.plot()

# %% [markdown]
# ## 3. Repair
#
# A correction reads (the discriminant of each modality's attacks, at the last prompt token and while answering), gates (opens only where the
# score exceeds what benign prompts reach, by split conformal calibration) and writes (towards where the model stands before it
# refuses). Fusion balances the two modalities. `care_lens.evaluation.tune` would pick layer, token and strength on validation; here we set them.

# %%
plan = ReaderPlan(layer=2, offsets=(0, 5), rank=0, epsilon=0.01)
repair = learn_repair(
    lvlm, rows, plan, calibration=study.benign("calibration"), alpha=1.5, batch_size=64, max_new_tokens=14
)
with repair.on(lvlm):
    for example in (*typographic, *organism.examples("benign typographic", "test", n=4)):
        answer = lvlm.generate(lvlm.prepare(example), max_new_tokens=14).texts[0]
        print(f"{example.channel:18} {example.prompt:60} -> {answer}")

# %% [markdown]
# `repair.fwd_hooks(inputs)` gives plain TransformerLens hooks, `repair.save(folder)` keeps it.
#
# ## 4. Prove
#
# Test items, wordings and type faces that neither the fit nor the calibration saw, the same settings for safety and utility, and a
# control: the same readers and gate with random writers of equal rank and, token by token scope, equal edit norm. One draw here; `care-lens run` takes five.

# %%
met = {(layer, "generated" if k else "last"): rows.complied(layer, k) for k in plan.offsets}
control = random_control(repair, met, seed=0)
channels = ("typographic", "wrapper", "indirect", "benign typographic", "hard read", "hard over forbidden")
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
# `care-lens run` chooses on validation and adds baselines tuned by the same rule, the paper's printed form, the shuffled-label control, gradient attacks (one sees the repair) and fidelity; see its
# report. A caution: this world is small, and what a reader finds here at the fifth answer token is close to the verb that the model is about
# to say. In a large model harm may be legible earlier, later, or less cleanly: the figure of section 2 is what to draw first.
