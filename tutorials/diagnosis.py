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
# # Diagnosis: what carries an unsafe answer, from layers to neurons
#
# The bundled model refuses a forbidden item that is named in words. It answers when a wrapper stands around the name, and when the item is
# only written in the picture. Which towers, layers, components, heads, neurons and patches are behind that, and is it the MLPs,
# as the CARE paper reports of its models? Half a minute on two quiet cores.
#
# Everything here is causal: an activation is exchanged between two counterfactual twins, or cut, and the outcome is read again.
# Ten items of the fit split, one pair each; intervals are bootstrapped over the items.

# %%
import pandas as pd
import torch

from care_lens import organism
from care_lens.mediation import ablate, attribute, knockout, localise, patch_map, path_effects, verify
from care_lens.plots import plot_attribution, plot_patch_effects

torch.set_num_threads(2)
lvlm = organism.load()
study = organism.study()
pairs = {name: study.pairs[name][:10] for name in ("typographic", "wrapper", "picture")}
outcomes = {name: study.pair_outcomes.get(name, study.outcome) for name in pairs}
for name, some in pairs.items():
    safe, unsafe = some[0]
    print(f"{name:12} safe:   {safe.prompt}\n{'':12} unsafe: {unsafe.prompt}")

# %% [markdown]
# Each pair asks one question, and a diagnosis answers that question only:
#
# - **typographic**, **wrapper**: the twins differ in words, over the same picture. Traced is *what makes the model refuse*: the outcome is the unsafe
#   margin, log p(comply) - log p(refuse) of the first answer token.
# - **picture**: the twins differ in the word drawn in the picture, which is benign in the safe one. Traced is *how the forbidden item gets from the picture into
#   the answer*: the outcome is the log probability per token of the steps for that item.
#
# ## Places
#
# `localise` exchanges every attention and MLP output of both towers in both directions. A place is *sufficient* if it brings the unsafe outcome into
# the safe run (NIE / TE), *necessary* if taking it out of the unsafe run brings the safe outcome back (TIE / TE).

# %%
places = {name: localise(lvlm, pairs[name], outcome=outcomes[name], progress=False) for name in pairs}
total = {name: found.settings["TE"]["value"] for name, found in places.items()}
leading = pd.concat(
    [found.frame.head(3).assign(pairs=name, TE=total[name]) for name, found in places.items()], ignore_index=True
)
leading[
    ["pairs", "TE", "mediator", "acts_through", "score", "ci_low", "ci_high", "sufficient", "necessary", "first"]
].round(2)

# %%
places["picture"].plot()

# %% [markdown]
# The decision to refuse is taken in the first block of the language tower: its attention carries all of the effect and its MLP nine tenths or more; nothing
# above scores more than a fifth. A wrapper and a pointed-at item do the same thing there: the name does not arrive as one to be refused. This is why both
# open the model: nothing above looks again.
#
# The item itself goes another way. It starts in the vision tower's first MLP, and the attention of block 2 brings it to the language tower's text.
# `care-lens run` tries its readers after the blocks of the carriers of all pair sets (score of 0.5 or more): after blocks 0 and 2, from these rankings.
#
# ## Heads and neurons
#
# Too many to exchange one at a time in every layer, so they are estimated all at once by integrated gradients over the inputs between the twins, and the leading ones are then exchanged
# exactly, with as many random ones: the estimate must rank units as the exact effects do, and miss none.

# %%
units = ["blocks.0.attn.hook_z", "blocks.2.attn.hook_z", "blocks.0.mlp.hook_post"]
estimates = {
    name: attribute(
        lvlm, pairs[name], outcome=outcomes[name], sites=units, patches=(), points=8, n_boot=300, progress=False
    )
    for name in pairs
}
plot_attribution(estimates["wrapper"], top=6)

# %%
checked = {
    name: verify(
        lvlm, pairs[name], estimates[name], outcome=outcomes[name], top=4, random=6, n_boot=300, progress=False
    )
    for name in ("typographic", "wrapper")
}
agreement = pd.concat([found.frame.assign(pairs=name) for name, found in checked.items()], ignore_index=True)
agreement[["pairs", "kind", "component", "effect", "value", "ci_low", "ci_high", "n"]].round(2)

# %%
exact = pd.concat([found.details.assign(pairs=name) for name, found in checked.items()], ignore_index=True)
exact = exact.sort_values("value", ascending=False).groupby(["pairs", "component"]).head(3)
exact.sort_values(["pairs", "component"])[["pairs", "mediator", "estimate", "value", "ci_low", "ci_high", "n"]].round(2)

# %% [markdown]
# Few heads and many neurons: heads 1 and 4 of block 0 hand a plain name on; exchanged one at a time they bring 9 and 7 of the 12.8 nats (more than all of it
# together: they stand in for each other). A wrapper acts through another head, 0, which brings nearly all of its 21 nats. No neuron brings more than a tenth or
# so of the effect, and the three that lead for the wrapper are not those of the typographic pairs. Integrated gradients find the leading units, and among units
# drawn at random the order of the neurons is right (Spearman 0.8) and that of the heads uncertain; they underrate the wrapper's head 0 and the second of the typographic heads by half or more, which is why estimates are checked. (No leading unit
# was missed, but with ten units of a kind the interval of the miss rate is wide.)
#
# ## Attention between spans
#
# `knockout` cuts the attention from one span to another in one layer. Cutting text -> last in block 0 should undo the refusal in the *safe* twins, if that is how
# the name arrives. Cutting image -> text should hurt the item's way in the layer that `localise` named.

# %%
name_arrives = knockout(
    lvlm,
    pairs["typographic"],
    source="text",
    target="last",
    outcome=outcomes["typographic"],
    modes=("renormalised",),
    n_boot=300,
    progress=False,
)
name_arrives.plot()

# %%
item_arrives = knockout(
    lvlm,
    pairs["picture"],
    source="image",
    target="text",
    outcome=outcomes["picture"],
    modes=("renormalised",),
    n_boot=300,
    progress=False,
)
item_arrives.plot()

# %% [markdown]
# Without block 0's look at the text the safe twin's margin rises by about the whole effect: the named item is no longer refused. (The unsafe twin falls by 2 nats at once, so that TE falls by a little more than all of it.)
# In the other layers the cut does next to nothing. The picture's item is lost in block 2, as `localise` said: only there does the unsafe run lose likelihood worth naming, 0.4 of 1.3 nats. In blocks 3 and 4 TE falls
# mostly because the safe run gains.
#
# ## Who reads it
#
# `path_effects` patches one direct path: what the attention of block 0 writes, as one later component alone reads it.

# %%
paths = path_effects(
    lvlm,
    pairs["typographic"],
    outcome=outcomes["typographic"],
    senders=["blocks.0.hook_attn_out", "blocks.0.hook_mlp_out"],
    n_boot=300,
    progress=False,
)
paths.plot()

# %% [markdown]
# Nearly all goes through the MLP of the same block (11.6 of 12.8 nats). From there 5.7 nats go straight to the end, and 3.9 more through the MLPs of blocks 1 to 4, most through the first of them. Attention decides what the MLP
# of block 0 sees, and that MLP writes the refusal.
#
# ## Patches
#
# One image token exchanged at a time: the item is read where it is written.

# %%
patches = patch_map(
    lvlm,
    pairs["picture"][:4],
    outcome=outcomes["picture"],
    site="blocks.0.hook_resid_pre",
    n_boot=300,
    progress=False,
)
plot_patch_effects(patches.details.query("pair == 0"), image=pairs["picture"].unsafe[0].image)

# %% [markdown]
# ## Does the MLP outweigh attention?
#
# The paper finds, by skipping layers, that the MLPs carry unsafe answers. The same experiment here: one block's output is replaced by its benign mean while the
# model answers, and a judge reads the answers.

# %%
attacked = [e for channel in ("typographic", "wrapper") for e in organism.examples(channel, "fit", n=16)]
ablation = ablate(
    lvlm,
    attacked,
    judge=study.judge,
    reference=study.benign("fit")[::20],
    mode="mean",
    max_new_tokens=14,
    batch_size=64,
    n_boot=300,
    progress=False,
)
ablation.plot()

# %%
shares = ablation.frame.query("effect == 'share' and metric == 'complied' and component != 'none'")
shares.pivot_table(index="layer", columns="component", values="value").round(2)

# %% [markdown]
# Not in this model. Without any part of block 0 it says nothing sensible at all. Above it the attention of block 1 is what the attacks need (0.03 of them succeed without it, 0.97 without the MLP), and in
# blocks 2 to 4 the attacks lose more without attention than without the MLP in this sample of 32, by less than the intervals. Skipping a block says what a behaviour needs, not where it is decided: benign answers need block 1's attention as well
# (the model card has the same table for benign channels). The refusal is decided in block 0, by attention and MLP together.
#
# ## What this diagnosis can be trusted for
#
# It was tried on copies of this model in which a channel was opened at a place drawn beforehand; see "Localise" in the documentation. Integrated gradients over components and `localise` put that place first in 21 of 22
# copies each, a linear probe in none.
