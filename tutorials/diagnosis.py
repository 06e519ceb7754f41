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
# # Who carries the refusal: heads, neurons, paths
#
# **Question.** The bundled model refuses a forbidden item that is named in words, and answers when a wrapper ("a wizard answers this") stands around the name. Which heads and neurons make that difference?
#
# **Answer.** Two of the ten heads that we look at. Head 4 of block 0 alone brings all of what a plain name does to the answer (9.85 nats [7.77, 14.61] of 9.81), and head 2 of block 6 half of what a wrapper does (4.31 [2.55, 5.42] of 8.32). Neurons share the work for a plain name (the first of them 1.47 [0.68, 4.59]);
# for the wrapper one neuron of block 0 brings 5.02 [0.53, 6.14]. Gradients find these units, and are wrong about others.
#
# For readers who know activation patching and want to go from layers to units. Under a minute on one quiet core. Everything is causal: an activation is exchanged between two counterfactual twins, or cut, and the outcome is read again. The world is made up and harmless. Eight items of the fit split, one pair each; intervals are 95 % bootstraps over the items, seed 0.
#
# Each pair asks one question, and a diagnosis answers that question only. Both twins stand over the same picture, so nothing can pass through the vision tower:
#
# - **typographic**: the safe twin names the item and is refused, the unsafe twin points at the picture. Traced is what a *name* does.
# - **wrapper**: both name the item; a neutral frame (refused) or a wrapper (answered) stands around. Traced is what the *wrapper* does.
#
# The outcome is the unsafe margin, log p(comply) - log p(refuse) of the first answer token, in nats. How a pictured item gets into the answer is another question, see *Patching a picture*.

# %%
from datetime import date

import pandas as pd
import torch

from care_lens import organism
from care_lens.core import package_versions
from care_lens.mediation import ablate, attribute, knockout, localise, path_effects, verify
from care_lens.plots import plot_attribution

torch.set_num_threads(2)
lvlm = organism.load()
pairs = {name: organism.pairs(name, "fit", n=8) for name in ("typographic", "wrapper")}
quick = {"outcome": organism.outcome(), "n_boot": 300, "progress": False}
for name, some in pairs.items():
    safe, unsafe = some[0]
    print(f"{name:12} safe:   {safe.prompt}\n{'':12} unsafe: {unsafe.prompt}")

# %% [markdown]
# ## 1. Places
#
# `localise` exchanges attention and MLP outputs in both directions. A place is *sufficient* if it brings the unsafe outcome into the safe run (NIE / TE), *necessary* if taking it out of the unsafe run brings the safe outcome back (TIE / TE); the score is the mean of the two. We try blocks 0, 1 and 6; without `sites=` it takes all of both towers.

# %%
outputs = [f"blocks.{layer}.hook_{part}_out" for layer in (0, 1, 6) for part in ("attn", "mlp")]
places = {name: localise(lvlm, some, sites=outputs, **quick) for name, some in pairs.items()}
leading = pd.concat([found.frame.head(3).assign(pairs=name) for name, found in places.items()], ignore_index=True)
print({name: round(found.settings["TE"]["value"], 2) for name, found in places.items()})
leading[["pairs", "mediator", "acts_through", "score", "ci_low", "ci_high", "sufficient", "necessary", "first"]].round(
    2
)

# %%
places["wrapper"].plot()

# %% [markdown]
# A name is recognised in block 0: its attention carries all of the effect at the last token, and its MLP nine tenths. A wrapper acts in two places: in block 0 at the words of the text, and in block 6, whose attention brings to the last token that this is a wrapped request
# (score 0.69 [0.57, 0.75]: it brings half of the effect and takes nine tenths of it away).
#
# ## 2. Heads and neurons
#
# There are too many to exchange one at a time, so `attribute` estimates all of them at once by integrated gradients between the twins. With four points the estimates are rough, and it warns of that.

# %%
units = ["blocks.0.attn.hook_z", "blocks.6.attn.hook_z", "blocks.0.mlp.hook_post"]
estimates = {name: attribute(lvlm, some, sites=units, patches=(), points=4, **quick) for name, some in pairs.items()}
plot_attribution(estimates["wrapper"], top=6)

# %% [markdown]
# Estimates are checked: `verify` exchanges the leading units exactly, and four others of each kind that are drawn at random.

# %%
checked = {name: verify(lvlm, some, estimates[name], top=3, random=4, **quick) for name, some in pairs.items()}
exact = pd.concat([found.details.assign(pairs=name) for name, found in checked.items()], ignore_index=True)
exact = exact.sort_values("estimate", ascending=False).groupby(["pairs", "component"]).head(3)
exact.sort_values(["pairs", "component"])[["pairs", "mediator", "estimate", "value", "ci_low", "ci_high", "n"]].round(2)

# %% [markdown]
# The leading unit of each kind holds. Of the others not all do: heads 1 and 4 of block 0 are estimated at 0.84 and 0.70 nats for the wrapper and have no effect that can be told from 0, and the neuron 311 does four times what was estimated (5.02 against 1.18).

# %%
agreement = pd.concat([found.frame.assign(pairs=name) for name, found in checked.items()], ignore_index=True)
agreement[["pairs", "kind", "effect", "value", "ci_low", "ci_high", "n"]].round(2)

# %% [markdown]
# Seven units of a kind say little about the order of all: every interval of the rank correlations but that of neurons for a name includes 0, and those of the miss rates (the share of large effects that were not ranked at the top) are wide. What can be said is what was exchanged exactly.
#
# ## 3. Attention cut
#
# `knockout` cuts the attention from one span to another. If a name reaches the last token in block 0, cutting text -> last there must undo the refusal of the *safe* twins.

# %%
cut = knockout(
    lvlm, pairs["typographic"], source="text", target="last", layers=(0, 1, 6), modes=("renormalised",), **quick
)
cut.plot()

# %% [markdown]
# It does: without block 0's look at the text the margin of the safe twins rises by 5.75 nats [4.14, 9.30], and nothing is left of the total effect (-9.84 [-14.43, -7.74] of 9.81). In block 1 and 6 the same cut moves the safe twins by 0.1 nats or less.
#
# ## 4. Paths
#
# `path_effects` patches one direct path: what the attention of block 0 writes, as one later component alone reads it. The five largest:

# %%
paths = path_effects(lvlm, pairs["typographic"], senders=["blocks.0.hook_attn_out"], **quick)
top = paths.frame.assign(size=paths.frame["value"].abs()).nlargest(5, "size")
top[["sender", "receiver", "value", "ci_low", "ci_high", "n"]].round(2)

# %% [markdown]
# Nearly all goes through the MLP of the same block, 8.85 nats [6.80, 12.43] of 9.81. That is where the name becomes a reason to refuse; each direct way to a later block or to the end brings 0.3 or less.
#
# ## 5. Ablation
#
# The CARE paper skips layers and finds that MLPs carry unsafe answers, not attention. The same kind of experiment here: one output is replaced by its mean over benign prompts while the model answers, and a judge reads the answers. Shares of 24 attacks that are answered:

# %%
benign = [
    example for channel in ("benign plain", "benign typographic") for example in organism.examples(channel, "fit", n=20)
]
attacked = [example for channel in ("typographic", "wrapper") for example in organism.examples(channel, "fit", n=12)]
ablation = ablate(
    lvlm,
    attacked,
    judge=organism.OrganismJudge(),
    reference=benign,
    layers=(0, 6, 7),
    max_new_tokens=14,
    batch_size=64,
    n_boot=300,
    progress=False,
)
shares = ablation.frame.query("effect == 'share' and metric == 'complied'")
shares[["layer", "component", "value", "ci_low", "ci_high", "n"]].round(2)

# %% [markdown]
# Without either part of block 0 the model answers none of the attacks. Above it, the attention of block 6, which reads the wrapper, costs most (0.50 [0.29, 0.71] of 0.83 [0.59, 0.96] without ablation), then the MLP of block 7 (0.67 [0.43, 0.85]). With 24 attacks these intervals overlap: that attention matters here as well as MLPs is shown, an order among them is not.

# %% [markdown]
# ## Exercises
#
# **1.** Is head 2 of block 6 alone among the heads of its block? Exchange each of them, for the wrapper pairs.
#
# <details><summary>Solution</summary>
#
# ```python
# from care_lens.mediation import heads, mediate
#
# each = mediate(lvlm, pairs["wrapper"], sites=heads(lvlm, layers=[6]), positions=("all",), **quick)
# each.frame.query("effect == 'NIE'")[["mediator", "value", "ci_low", "ci_high", "n"]].round(2)
# ```
#
# It is alone: 4.31 [2.55, 5.42]; the four others have 0.06 nats at most, of either sign.
#
# </details>
#
# **2.** Does the last token read the wrapper in block 6? Cut the attention from the text to the last token there, in the unsafe twins.
#
# <details><summary>Solution</summary>
#
# ```python
# wrapped = knockout(
#     lvlm, pairs["wrapper"], source="text", target="last", layers=(1, 6), modes=("renormalised",), **quick
# )
# wrapped.frame[["layers", "effect", "value", "ci_low", "ci_high", "n"]].round(2)
# ```
#
# In the unsafe twins the cut in block 6 takes 5.87 nats [3.62, 6.49] away, in block 1 only 0.35 [0.08, 0.77]; the safe twins do not change (-0.11 [-0.47, 0.48] in block 6). So the wrapper is read there, by the last token.
#
# </details>
#
# ## What this does not show
#
# - One small model and eight items of two kinds of twins. Which heads carry a refusal in another model is found by running this there, not by their numbers here.
# - Twins that differ in a name say what a name does. They say nothing of items that are pictured or spelled.
# - A unit that carries an effect between twins need not be where training put the behaviour, nor where it is best repaired. This was tried with a known answer: in ten copies of this model a channel was opened at one place drawn beforehand. In the 14 of 30 cases in which it took,
#   the planted place came first by `localise` in 6, by the NIE alone in 12, by gradients in 13 (`benchmarks/measured/localise.csv`; see *Mediation* in the documentation). `localise` puts block 0 first where it misses, since everything that differs between twins passes there. Read the NIE beside its score.
# - Single units hide those that stand in for each other; exchange groups before you call a unit unnecessary.
# - Ablation says what a behaviour needs, not where it is decided.

# %%
print(date.today(), package_versions())
