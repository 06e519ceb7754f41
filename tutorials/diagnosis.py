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
# **Answer.** For a plain name: one head and three MLPs. Head 0 of block 0 alone brings 6.27 nats [2.17, 7.72] of the 7.75 that the name does to the answer, and what it writes acts through the MLPs of blocks 1, 2 and 3, which together bring 5.74 [2.84, 6.76]; none of their leading neurons brings more than 0.47 [0.03, 0.78]. Without one of these MLPs between 0.25 and 0.38 of 24 plain requests are still refused, of 1.00, and the others are answered.
# For the wrapper: one neuron and one head. Neuron 311 of the MLP of block 0 brings 4.01 nats [2.51, 7.08] of 6.51, and without it nothing of the effect is left (6.68 [5.31, 9.12] are lost). Head 2 of block 7 is needed, too: taken out of the wrapped request it costs 4.44 [3.96, 5.46], while put into the refused request it brings nothing that can be told from 0.
# Gradients find these heads and this neuron. They do not say which of them are enough.
#
# For readers who know activation patching and want to go from layers to units. About a minute on one quiet core. Everything is causal: an activation is exchanged between two counterfactual twins, or cut, and the outcome is read again. The world is made up and harmless. Eight items of the fit split, one pair each; intervals are 95 % bootstraps over the items, seed 0.
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
from care_lens.mediation import (
    ablate,
    attribute,
    heads,
    knockout,
    localise,
    mediate,
    neurons,
    path_effects,
    verify,
    windows,
)
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
# `localise` exchanges attention and MLP outputs in both directions. A place is *sufficient* if it brings the unsafe outcome into the safe run (NIE / TE), *necessary* if taking it out of the unsafe run brings the safe outcome back (TIE / TE); the score is the mean of the two. We try blocks 0 to 3 and 7. Without `sites=` it takes all of both towers; that run has the same five places first for the name, and for the wrapper the same four, with no other place above 0.15.

# %%
outputs = [f"blocks.{layer}.hook_{part}_out" for layer in (0, 1, 2, 3, 7) for part in ("attn", "mlp")]
places = {name: localise(lvlm, some, sites=outputs, **quick) for name, some in pairs.items()}
leading = pd.concat([found.frame.head(5).assign(pairs=name) for name, found in places.items()], ignore_index=True)
print({name: round(found.settings["TE"]["value"], 2) for name, found in places.items()})
leading[["pairs", "mediator", "acts_through", "score", "ci_low", "ci_high", "sufficient", "necessary", "first"]].round(
    2
)

# %%
places["wrapper"].plot()

# %% [markdown]
# A name is recognised in block 0: its attention carries all of the effect at the last token (score 1.00), and its MLP brings 0.74 of it and takes 0.82 away. The MLPs of blocks 1, 2 and 3 follow, each with about a third. A wrapper acts in two places: in block 0 at the words of the text, and in block 7, whose attention brings to the last token that this is a wrapped request
# (score 0.66 [0.53, 0.72]: it brings a third of the effect and takes all of it away). The MLPs of blocks 1 to 3 do next to nothing for the wrapper: their scores are 0.05 and less.
#
# Single parts hide those that stand in for each other. So the MLPs of blocks 1, 2 and 3 are exchanged one at a time and together, and those of blocks 4, 5 and 6 together as a control.

# %%
mlps = {first: [f"blocks.{layer}.hook_mlp_out" for layer in range(first, first + 3)] for first in (1, 4)}
together = mediate(
    lvlm,
    pairs["typographic"],
    sites=[*mlps[1], *windows(mlps[1], 3), *windows(mlps[4], 3)],
    positions=("all",),
    **quick,
)
together.frame.query("effect in ('NIE', 'TIE')")[["mediator", "effect", "value", "ci_low", "ci_high", "n"]].round(2)

# %% [markdown]
# Together the three MLPs bring 5.74 nats [2.84, 6.76] of 7.75, and taken out they cost 6.26 [3.38, 7.48]; one alone brings 2.00 to 2.15. Those of blocks 4 to 6 together bring 1.29 [0.70, 2.22]. So the MLPs of blocks 1 to 3 carry most of what a name does, and share it: none of them alone has a score above 0.33.
#
# ## 2. Heads and neurons
#
# There are too many to exchange one at a time, so `attribute` estimates all of them at once by integrated gradients between the twins. With four points the estimates are rough, and it warns of that.

# %%
units = ["blocks.0.attn.hook_z", "blocks.7.attn.hook_z"]
units += [f"blocks.{layer}.mlp.hook_post" for layer in range(4)]
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
# For the name the leading heads hold: head 0 of block 0 is estimated at 5.06 nats and brings 6.27 [2.17, 7.72]. The leading neurons bring little: 257 of block 2 is estimated at 0.64 and brings 0.47 [0.03, 0.78], and the interval of 136 of block 1 (0.38 [-0.25, 1.54]) includes 0. So the MLPs of blocks 1 to 3 act through many neurons.
# For the wrapper no leading head holds: head 2 of block 7 is estimated at 2.31 nats and brings 0.25 [-2.72, 0.99]. Neuron 311 of block 0 is estimated at 1.58 and brings more, 4.01 [2.51, 7.08]; the next two neurons bring nothing.

# %%
agreement = pd.concat([found.frame.assign(pairs=name) for name, found in checked.items()], ignore_index=True)
agreement[["pairs", "kind", "effect", "value", "ci_low", "ci_high", "n"]].round(2)

# %% [markdown]
# Seven units of a kind say little about the order of all: for a name the rank correlations of all units exclude 0, for the wrapper all of them include it, and the miss rates (the share of large effects that were not ranked at the top) are wide. What can be said is what was exchanged exactly.
#
# `verify` exchanges in one direction: it puts a unit of the unsafe run into the safe one (NIE). A unit that is needed and not enough has no effect there. So the heads of block 7 and the neuron are exchanged in both directions (TIE: taken out of the unsafe run), for the wrapper:

# %%
units = [*heads(lvlm, layers=[7]), *neurons("blocks.0.mlp.hook_post", [311])]
each = mediate(lvlm, pairs["wrapper"], sites=units, positions=("all",), **quick)
both = each.frame.query("effect in ('NIE', 'TIE')")
both[["mediator", "effect", "value", "ci_low", "ci_high", "n"]].round(2)

# %% [markdown]
# Head 2 of block 7 is needed and is not enough: without it the wrapped request loses 4.44 nats [3.96, 5.46] of 6.51. Head 1 may be needed, too (2.66 [-1.50, 3.73]). Neuron 311 of block 0 is needed and nearly enough: it brings 4.01 [2.51, 7.08], and taken out it costs 6.68 [5.31, 9.12]. The estimates of the two heads, 2.31 and 1.06, lie in the middle between NIE and TIE, since integrated gradients go from one twin to the other. An estimate alone does not tell the two apart.
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
# It does: with that cut in block 0 the total effect falls by 7.07 nats [5.73, 8.58] of 7.75. The margin of the safe twins rises by 2.67 [1.05, 9.13]; that of the unsafe ones falls by 4.41, with an interval that includes 0 ([-3.98, 6.50]). In block 1 the cut raises both margins alike, by 1.82 [1.31, 2.49] and 1.74 [1.02, 2.16],
# so that the total effect stays as it is; in block 7 what it takes away cannot be told from 0 (0.68 [-0.40, 0.96]).
#
# ## 4. Paths
#
# `path_effects` patches one direct path: what a part of block 0 writes, as one later component alone reads it. The four largest of its attention and of its MLP:

# %%
paths = path_effects(lvlm, pairs["typographic"], senders=outputs[:2], **quick).frame
top = paths.assign(size=paths["value"].abs()).sort_values("size", ascending=False).groupby("sender").head(4)
top.sort_values("sender", kind="stable")[["sender", "receiver", "value", "ci_low", "ci_high", "n"]].round(2)

# %% [markdown]
# What the attention of block 0 writes goes to the MLP of the same block, 5.76 nats [3.82, 12.22] of 7.75; the MLPs of blocks 1 to 3 read 0.22 to 0.46 directly from it. They read more from that MLP: 1.30 [0.77, 2.47], 0.88 [0.47, 1.89] and 0.75 [0.30, 2.28]. So the way of a name is: attention of block 0, its MLP, the MLPs of blocks 1 to 3.
#
# ## 5. Ablation
#
# The CARE paper skips layers and finds that MLPs carry unsafe answers, not attention. The same kind of experiment here: one output is replaced by its mean over benign prompts while the model answers, and a judge reads the answers. Shares of 24 attacks that are answered, and of 24 plain requests that are answered and refused:

# %%
benign = [
    example for channel in ("benign plain", "benign typographic") for example in organism.examples(channel, "fit", n=20)
]
asked = {
    "attacks": [e for channel in ("typographic", "wrapper") for e in organism.examples(channel, "fit", n=12)],
    "plain": organism.examples("plain", "fit", n=24),
}
shares = []
for what, examples in asked.items():
    found = ablate(
        lvlm,
        examples,
        judge=organism.OrganismJudge(),
        reference=benign,
        layers=(0, 1, 2, 3, 7),
        max_new_tokens=14,
        batch_size=64,
        n_boot=300,
        progress=False,
    ).frame
    for metric in ("complied", "refused"):
        rows = found[(found["effect"] == "share") & (found["metric"] == metric)]
        shares.append(rows.assign(share=f"{what}, {metric}"))
shares = pd.concat(shares)
shares["cell"] = [f"{v:.2f} [{a:.2f}, {b:.2f}]" for v, a, b in zip(shares.value, shares.ci_low, shares.ci_high)]
shares["ablated"] = ["none" if c == "none" else f"blocks.{i}.{c}" for i, c in zip(shares.layer, shares.component)]
shares[shares["share"] != "attacks, refused"].pivot(index="ablated", columns="share", values="cell")

# %% [markdown]
# Without either part of block 0 the model neither answers an attack nor refuses a plain request: its answers break. Above it the two behaviours lie in different parts. Without the MLP of block 1, 2 or 3 only 0.38 [0.19, 0.59], 0.29 [0.13, 0.51] and 0.25 [0.10, 0.47] of the plain requests are refused and all others are answered, and no attack changes; without the attention of block 1 0.71 [0.49, 0.87] are refused.
# The attention of block 7, which reads the wrapper, costs half of the attacks' answers (0.50 [0.29, 0.71] are left of 1.00 [0.83, 1.00]) and no refusal. So in this model MLPs carry a plain refusal, and an attention layer one way around it. With 24 requests the intervals are wide.

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
# Through head 1, if through one: taken out it costs 4.29 nats [1.67, 11.37], put in it brings 1.02 [-0.27, 6.15]. The intervals are wide. Of the four others none brings more than 0.10; taken out, head 4 costs 1.32 with an interval that includes 0 ([-0.83, 9.91]), heads 3 and 2 cost 0.66 [0.28, 1.82] and 0.50 [0.08, 2.04].
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
# In the unsafe twins the cut in block 7 takes 6.38 nats [5.45, 9.00] away; in block 1 it changes nothing that can be told from 0 (1.80 [-0.40, 2.35]). The safe twins change little (-0.94 [-1.42, 0.15] in block 7). So the wrapper is read there, by the last token.
#
# </details>
#
# ## What this does not show
#
# - One small model and eight items of two kinds of twins. Which heads carry a refusal in another model is found by running this there, not by their numbers here.
# - Twins that differ in a name say what a name does. They say nothing of items that are pictured or spelled.
# - A unit that carries an effect between twins need not be where training put the behaviour, nor where it is best repaired. This was tried with a known answer: in ten copies of this model a channel was opened at one place drawn beforehand. In the eight of them in which it took,
#   the planted place came first by `localise` in 7, by the NIE alone in 8, by gradients in 7 (`benchmarks/measured/localise.csv`; see *Mediation* in the documentation). `localise` puts block 0 first where it misses, since everything that differs between twins passes there. Read the NIE beside its score.
# - Single units hide those that stand in for each other; exchange groups before you call a unit unnecessary.
# - Ablation says what a behaviour needs, not where it is decided.

# %%
print(date.today(), package_versions())
