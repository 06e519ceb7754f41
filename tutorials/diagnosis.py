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
# **Answer.** For a plain name one head: head 0 of block 0 alone brings 4.93 nats [3.35, 7.12] of the 5.88 that the name does to the answer. For the wrapper no single head is enough, but two are needed: taken out of the wrapped request, head 2 of block 7 costs 4.18 nats [3.71, 4.81] of 6.45
# and head 1 of that block 2.62 [2.03, 3.57], while put into the refused request neither of them brings anything that can be told from 0. None of the leading neurons brings more than 0.34 [0.10, 0.92] for a name, and for the wrapper none brings what can be told from 0.
# Gradients find these heads. They do not say which of them are enough.
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
from care_lens.mediation import ablate, attribute, heads, knockout, localise, mediate, path_effects, verify
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
# `localise` exchanges attention and MLP outputs in both directions. A place is *sufficient* if it brings the unsafe outcome into the safe run (NIE / TE), *necessary* if taking it out of the unsafe run brings the safe outcome back (TIE / TE); the score is the mean of the two. We try blocks 0, 1 and 7. Without `sites=` it takes all of both towers; that run puts the attention of block 7 third for the wrapper, after the two parts of block 0, and no other place above 0.32.

# %%
outputs = [f"blocks.{layer}.hook_{part}_out" for layer in (0, 1, 7) for part in ("attn", "mlp")]
places = {name: localise(lvlm, some, sites=outputs, **quick) for name, some in pairs.items()}
leading = pd.concat([found.frame.head(3).assign(pairs=name) for name, found in places.items()], ignore_index=True)
print({name: round(found.settings["TE"]["value"], 2) for name, found in places.items()})
leading[["pairs", "mediator", "acts_through", "score", "ci_low", "ci_high", "sufficient", "necessary", "first"]].round(
    2
)

# %%
places["wrapper"].plot()

# %% [markdown]
# A name is recognised in block 0: its attention carries all of the effect at the last token (the interval of the score is 0 to 1, since with these eight pairs neither share has a bounded one), and its MLP brings 0.69 of it and takes 0.87 away. A wrapper acts in two places: in block 0 at the words of the text, and in block 7, whose attention brings to the last token that this is a wrapped request
# (score 0.66 [0.39, 0.72]: it brings a third of the effect and takes all of it away).
#
# ## 2. Heads and neurons
#
# There are too many to exchange one at a time, so `attribute` estimates all of them at once by integrated gradients between the twins. With four points the estimates are rough, and it warns of that.

# %%
units = ["blocks.0.attn.hook_z", "blocks.7.attn.hook_z", "blocks.0.mlp.hook_post"]
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
# For the name the leading heads hold: head 0 of block 0 is estimated at 4.48 nats and brings 4.93 [3.35, 7.12]. The leading neuron, 347, does not: estimated at 0.47, it brings 0.27 [-0.62, 0.50]; the two after it bring 0.34 and 0.25, with intervals above 0. For the wrapper no leading unit holds: head 2 of block 7 is estimated at 2.35 nats and
# brings 0.36 [-1.61, 1.04], and the interval of the neuron 311 (3.70 [-2.60, 5.74]) includes 0 as well.

# %%
agreement = pd.concat([found.frame.assign(pairs=name) for name, found in checked.items()], ignore_index=True)
agreement[["pairs", "kind", "effect", "value", "ci_low", "ci_high", "n"]].round(2)

# %% [markdown]
# Seven units of a kind say little about the order of all: for a name the rank correlations of all units exclude 0, for the wrapper all of them include it, and the miss rates (the share of large effects that were not ranked at the top) are wide. What can be said is what was exchanged exactly.
#
# `verify` exchanges in one direction: it puts a unit of the unsafe run into the safe one (NIE). A unit that is needed and not enough has no effect there. So the heads of block 7 are exchanged in both directions (TIE: taken out of the unsafe run), for the wrapper:

# %%
each = mediate(lvlm, pairs["wrapper"], sites=heads(lvlm, layers=[7]), positions=("all",), **quick)
both = each.frame.query("effect in ('NIE', 'TIE')")
both[["mediator", "effect", "value", "ci_low", "ci_high", "n"]].round(2)

# %% [markdown]
# Heads 2 and 1 of block 7 are needed, and neither is enough: without the first the wrapped request loses 4.18 nats [3.71, 4.81] of 6.45, without the second 2.62 [2.03, 3.57]. Their estimates, 2.35 and 1.29, lie in the middle between NIE and TIE, since integrated gradients go from one twin to the other. An estimate alone does not tell the two apart.
#
# ## 3. Attention cut
#
# `knockout` cuts the attention from one span to another. If a name reaches the last token in block 0, cutting text -> last there must take away what tells the twins apart.

# %%
cut = knockout(
    lvlm, pairs["typographic"], source="text", target="last", layers=(0, 1, 7), modes=("renormalised",), **quick
)
cut.plot()

# %% [markdown]
# It does: with that cut in block 0 the total effect falls by 5.27 nats [3.65, 8.68] of 5.88. Which of the twins moves is less clear: the margin of the safe ones rises by 1.85 [-2.05, 3.71] and that of the unsafe ones falls by 3.42 [-1.64, 5.32], and both intervals include 0. In block 1 the cut makes the total effect larger (by 1.63 [1.03, 4.05]),
# in block 7 it takes 0.82 [0.40, 1.65] of it away.
#
# ## 4. Paths
#
# `path_effects` patches one direct path: what the attention of block 0 writes, as one later component alone reads it. The five largest:

# %%
paths = path_effects(lvlm, pairs["typographic"], senders=["blocks.0.hook_attn_out"], **quick)
top = paths.frame.assign(size=paths.frame["value"].abs()).nlargest(5, "size")
top[["sender", "receiver", "value", "ci_low", "ci_high", "n"]].round(2)

# %% [markdown]
# Most goes through the MLP of the same block, 4.04 nats [2.69, 5.61] of 5.88. That is where the name becomes a reason to refuse; each direct way to a later block or to the end brings 0.12 or less.
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
    layers=(0, 1, 7),
    max_new_tokens=14,
    batch_size=64,
    n_boot=300,
    progress=False,
)
shares = ablation.frame.query("effect == 'share' and metric == 'complied'")
shares[["layer", "component", "value", "ci_low", "ci_high", "n"]].round(2)

# %% [markdown]
# Without either part of block 0 the model answers none of the attacks (0.00 [0.00, 0.17]). Above it, the attention of block 7, which reads the wrapper, costs nearly half of the answers (0.50 [0.29, 0.71] are left of 0.96 [0.69, 1.00] without ablation); the MLP of block 7 and both parts of block 1 cost none. With 24 attacks the intervals are wide. That attention matters here is shown;
# that MLPs carry unsafe answers and attention does not is not what these blocks show.

# %% [markdown]
# ## Exercises
#
# **1.** Which heads of block 0 does the wrapper act through? Exchange each of them in both directions.
#
# <details><summary>Solution</summary>
#
# ```python
# first = mediate(lvlm, pairs["wrapper"], sites=heads(lvlm, layers=[0]), positions=("all",), **quick)
# first.frame.query("effect in ('NIE', 'TIE')")[["mediator", "effect", "value", "ci_low", "ci_high", "n"]].round(2)
# ```
#
# Through head 1, if through one: taken out it costs 3.50 nats [0.99, 13.54], put in it brings 1.91 [-0.36, 9.43]. The intervals are wide. The four others move the margin by half a nat at most, in either direction.
#
# </details>
#
# **2.** Does the last token read the wrapper in block 7? Cut the attention from the text to the last token there, in the unsafe twins.
#
# <details><summary>Solution</summary>
#
# ```python
# wrapped = knockout(
#     lvlm, pairs["wrapper"], source="text", target="last", layers=(1, 7), modes=("renormalised",), **quick
# )
# wrapped.frame[["layers", "effect", "value", "ci_low", "ci_high", "n"]].round(2)
# ```
#
# In the unsafe twins the cut in block 7 takes 6.03 nats [5.23, 7.42] away; in block 1 nothing that can be told from 0 (1.15 [-0.67, 1.61]). The safe twins change little (-0.62 [-0.85, -0.19] in block 7). So the wrapper is read there, by the last token.
#
# </details>
#
# ## What this does not show
#
# - One small model and eight items of two kinds of twins. Which heads carry a refusal in another model is found by running this there, not by their numbers here.
# - Twins that differ in a name say what a name does. They say nothing of items that are pictured or spelled.
# - A unit that carries an effect between twins need not be where training put the behaviour, nor where it is best repaired. This was tried with a known answer: in ten copies of this model a channel was opened at one place drawn beforehand. In the eight of them in which it took,
#   the planted place came first by `localise` in 4, by the NIE alone in 8, by gradients in 7 (`benchmarks/measured/localise.csv`; see *Mediation* in the documentation). `localise` puts block 0 first where it misses, since everything that differs between twins passes there. Read the NIE beside its score.
# - Single units hide those that stand in for each other; exchange groups before you call a unit unnecessary.
# - Ablation says what a behaviour needs, not where it is decided.

# %%
print(date.today(), package_versions())
