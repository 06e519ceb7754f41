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
# A named item is recognised in the first block of the language tower: its attention carries all of the effect and its MLP nine tenths, at the last token; nothing
# above scores more than a quarter. A wrapper acts in two places: in block 0 at the words of the text, and in block 6, whose attention brings to the last token that
# this is a wrapped request (0.70: it brings half of the effect and takes nine tenths of it away).
#
# The item in the picture goes another way. All four blocks of the vision tower work on it (its first MLP most, and the attention of blocks 2 and 3), and block 0 of the language
# tower brings it to the text. `care-lens run` tries its readers after the blocks of the carriers of all pair sets (score of 0.5 or more): after blocks 0 and 6, from these rankings.
#
# ## Heads and neurons
#
# Too many to exchange one at a time in every layer, so they are estimated all at once by integrated gradients over the inputs between the twins, and the leading ones are then exchanged
# exactly, with as many random ones: the estimate must rank units as the exact effects do, and miss none.

# %%
units = ["blocks.0.attn.hook_z", "blocks.6.attn.hook_z", "blocks.0.mlp.hook_post"]
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
# Few heads: head 4 of block 0 hands a plain name on and brings all of its 9.2 nats; head 2 of block 6 brings half of the wrapper's 8.3 nats. Neurons share the work for a plain name
# (none brings more than a seventh), while one neuron of block 0's MLP brings more than half of the wrapper's effect. Integrated gradients find all of these units, and rate that neuron at
# less than half of what it does: estimates are checked. Among the wrapper's units most effects are near zero, so that their order says little (the Spearman interval spans everything);
# with ten units of a kind the interval of the miss rate is wide too.
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
# Without block 0's look at the text the safe twin's margin rises by 5 nats and the unsafe twin's falls by 4, so that nothing of the total effect of 9 is left. In the other layers the cut does little (block 6
# at most 0.6 nats, by less than its interval). The picture's item is lost in block 0 as well: there, and only there, the unsafe run loses likelihood worth naming, 0.9 of 1.3 nats.
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
# Nearly all goes through the MLP of the same block (8.2 of 9.2 nats). From there the work is spread: 1.9 nats through the MLP of block 1, 2.9 through those of blocks 2 to 7, about 1.7 through
# attention above, and 1.3 straight to the end. A harm feature that each block reads and writes on.
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
# Partly. Without any part of block 0 it says nothing sensible at all. Above it, the last two blocks matter: without the MLP of block 6 or 7 the attacks fall to 0.72 and 0.62, without the attention of block 6 to 0.50,
# and most of what is lost are refusals: these parts say that a request is one to be answered. In blocks 1 to 5 single MLPs cost at most 12 of 100 attacks and attention up to 34. So MLPs matter, late ones above all, and do not
# outweigh attention. Thirty-two attacks: differences below 0.2 are within the intervals. Skipping a block says what a behaviour needs, not where it is decided.
#
# ## What this diagnosis can be trusted for
#
# It was tried on copies of an earlier bundled model in which a channel was opened at a place drawn beforehand; see "Localise" in the documentation. Integrated gradients over components and `localise` put that place first in 21 of 22
# copies each, a linear probe in none. Copies of this model have not been made yet.
