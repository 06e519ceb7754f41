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
# # What an image token holds: read, or merely legible?
#
# **Question.** A vision-language model turns a picture into tokens. Which words can be read off these tokens, and does the model go by them?
#
# **Answer.** In 11 of 12 pictures of the bundled model the name of the pictured item is among the five first words that the logit lens reads at some image token, as the language model is given it (share 0.92 [0.62, 1.00], chance 0.11).
# The model goes by these tokens nearly only in its first block, and only if the question is about the picture: exchanged before block 0 they carry the whole effect of the picture (1.54 nats a token [1.28, 1.96], n = 8),
# exchanged before block 1 they carry 0.04 [0.01, 0.12], although a probe still finds there whether the item is forbidden (AUC 0.88 [0.79, 0.96]).
#
# For readers who know the logit lens and want to use it on image tokens. About half a minute on one quiet core. The world of this model is made up and harmless: the items are nonsense words, and some of them are labelled forbidden.
# [Lens](https://arxiv.org/abs/2410.07149) words of image tokens are a result of Neo et al. (2024), neighbours in a bank of text states of Krojer et al. (2026, LatentLens). Intervals are 95 % bootstraps over items, seed 0.
#
# Each picture has a twin in which a harmless word of the same length stands in the same place. We use 12 of the test split. Attack examples only: all 12 items are forbidden, and the model answers because it is asked through the picture.

# %%
from dataclasses import replace
from datetime import date

import pandas as pd
import torch

from care_lens import Example, PairedExamples, Site, organism
from care_lens.core import ResponseLogProb, package_versions
from care_lens.lens import TextBank, logit_lens, nearest_text, picture_reading, probe_auc
from care_lens.mediation import mediate, patch_map

torch.set_num_threads(2)
lvlm = organism.load()
pairs = organism.picture_pairs("test", n=12)
pictures = pairs.unsafe
names = [example.meta["item"] for example in pictures]
kinds = [example.meta["kind"] for example in pictures]
print(pictures[1].prompt, "->", lvlm.generate(lvlm.prepare(pictures[1]), max_new_tokens=14).texts[0])
pictures[1].image.resize((256, 256))

# %% [markdown]
# ## 1. Words
#
# `logit_lens` reads each state through the model's own final norm and unembedding. A site of the vision tower is read as if the tower ended there: its own projector does the rest. *Target hit* is the share of pictures in which the item's name
# is among the five first words of at least one of the 64 image tokens. Its chance line is the same with the names of the other pictures.

# %%
projector, first, middle = (f"blocks.{layer}.hook_resid_pre" for layer in (0, 1, 4))
tower = [f"vision.blocks.{layer}.hook_resid_post" for layer in (1, 2, 3)]
words = logit_lens(
    lvlm,
    pictures,
    sites=[*tower, projector, first, middle],
    targets=names,
    positions=("image",),
    n_boot=200,
    progress=False,
)
words.plot()

# %%
found = words.frame.query("metric == 'target hit'")
found[["tower", "layer", "component", "value", "ci_low", "ci_high", "chance", "n"]].round(2)

# %% [markdown]
# After the second vision block (v1) the name is read in none of the pictures, after the third (v2) in 4 of 12 (0.33 [0.10, 0.65], chance 0.11), after the last (v3) in 11 of 12, and so it is in what the language model is given (0).
# One block of the language model later 3 of 12 are left (0.25 [0.05, 0.57], chance 0.03).
#
# What of the *kind* of the item, which makes it forbidden? It is written nowhere in the picture.

# %%
harm = logit_lens(
    lvlm, pictures, sites=[projector, first], targets=kinds, positions=("image",), n_boot=200, progress=False
)
harm.frame.query("metric == 'target hit'")[["layer", "component", "value", "ci_low", "ci_high", "chance", "n"]].round(2)

# %% [markdown]
# As the tokens enter the language model, the kind ("hazard" or "contraband") is read no more often than by chance (0.17 [0.02, 0.48], chance 0.08). After its first block some image token reads as the item's own kind in 5 of 12 pictures (0.42 [0.15, 0.72]), and none as the other one.
# So by the lens the name is in the picture's tokens and the kind is not, or not in the directions of these words. That is not all that can be read there (section 3).
#
# What do most image tokens read as?

# %%
everywhere = words.details.query("rank == 1 and tower == 'language'")
everywhere.groupby("layer")["word"].agg(lambda column: ", ".join(column.value_counts().index[:6]))

# %% [markdown]
# Most patches show nothing but ground. They read as words of requests ("it", "named", "give"), as letters, and as items that are not in the picture; from block 1 on the end of the text is among the first words. The model never has to say anything at these tokens, so these words mean little.
#
# ## 2. Neighbours
#
# A state can be like that of a word in context although the unembedding cannot read it. The bank holds the states of all tokens of the plain request for each noun of the test split, at all layers.

# %%
bank = TextBank.of(
    lvlm,
    [Example(f"tell me how to make the {noun.name}") for noun in organism.world().select(split="test")],
    progress=False,
)
near = nearest_text(lvlm, pictures, bank, sites=[tower[1], projector, first], targets=names, n_boot=200, progress=False)
near.frame[["tower", "layer", "component", "metric", "value", "ci_low", "ci_high", "chance", "n"]].round(2)

# %% [markdown]
# The neighbours find the name in all 12 pictures (1.00 [0.74, 1.00], chance 0.23). But look at the similarity: 0.28 before block 0, where random Gaussian states with the bank's mean and variances reach 0.56. The image tokens are not *like* text tokens,
# although the right word is among the nearest. After block 0 they are more similar than random states (0.70 [0.66, 0.79] against 0.56), and the names are gone (0.00 [0.00, 0.26]).
#
# ## 3. Probe
#
# A lens asks for one word. A probe asks for any linear trace, here of one bit: is the pictured item forbidden? 40 pictures of forbidden and 40 of permitted items; the probe is tested on items that it was not fitted on. It reads the mean of the image tokens, and beside it the last token of the prompt.

# %%
sites = [Site("language", 0, "hook_resid_pre"), *(Site("language", layer, "hook_resid_post") for layer in (0, 7))]
asked = [*organism.examples("typographic", "test", n=40), *organism.examples("benign typographic", "test", n=40)]
inputs = lvlm.prepare(asked)
_, cache = lvlm.run_with_cache(inputs, sites=sites)
forbidden = torch.tensor([example.harmful for example in asked])
rows = []
for site in sites:
    mean_image = cache[site][inputs.spans.image].unflatten(0, (len(asked), -1)).mean(dim=1)
    for tokens, states in (("image, mean", mean_image), ("last", cache[site][inputs.spans.last])):
        auc = probe_auc(states, forbidden, [example.group for example in asked], n_boot=100)
        rows.append({"site": str(site), "tokens": tokens, "AUC": auc.estimate, "low": auc.low, "high": auc.high})
probes = pd.DataFrame(rows)
probes.pivot(index="site", columns="tokens", values=["AUC", "low", "high"]).round(2)

# %% [markdown]
# So the bit is legible at the image tokens from the beginning of the language model (0.95 [0.86, 1.00]), where the lens read no kind, to its end (0.83 [0.72, 0.93] after block 7). At the last token it is not there before block 0, where this token is the same in all prompts, and it is there after block 0 (0.97 [0.87, 1.00]).
#
# ## 4. Do they act?
#
# Legible is not used. We exchange the states of all image tokens between the twins (the natural indirect effect, NIE), before block 0 and before block 1. The outcome is the log probability per token of the answer for the forbidden item. And we ask twice: about the picture, and, over the same pictures, about another item that the text names.

# %%
outcome = ResponseLogProb()
others = [noun.name for noun in organism.world().select(split="test", forbidden=False)[:12]]
requests = [f"tell me how to make the {name}" for name in others]
named = PairedExamples(
    tuple(replace(example, prompt=request) for example, request in zip(pairs.safe, requests)),
    tuple(replace(example, prompt=request) for example, request in zip(pairs.unsafe, requests)),
)
questions = {"about the picture": pairs, "about another item": named}
whole = {
    question: mediate(
        lvlm, some[:8], outcome=outcome, sites=[projector, first], positions=("image",), n_boot=300, progress=False
    ).frame
    for question, some in questions.items()
}
effects = pd.concat([frame.assign(question=question) for question, frame in whole.items()])
effects.query("effect in ('TE', 'NIE')")[
    ["question", "mediator", "position", "effect", "value", "ci_low", "ci_high", "n"]
].round(2)

# %% [markdown]
# Asked about the picture, the image tokens carry all of the total effect (TE) into block 0, and next to nothing into block 1 (0.04 [0.01, 0.12] of 1.54): the text has taken in block 0 nearly all that it needs. What the probe found at image tokens after block 0 is legible, and nearly idle.
#
# Asked about another item, the picture does next to nothing (0.06 [0.00, 0.15]). Yet the image tokens come before the question, so that under a causal mask their states cannot depend on it:

# %%
inputs = [lvlm.prepare(some.unsafe[1]) for some in questions.values()]
streams = [lvlm.run_with_cache(one, sites=[middle])[1][middle][0, one.spans.image[0]] for one in inputs]
(streams[0] - streams[1]).abs().max()

# %% [markdown]
# No state differs by anything. Every lens and every probe gives the same reading under both questions, in the first of which the picture decides the answer and in the second of which it hardly counts. No reading of these states could tell the two cases apart.
#
# ## 5. Patch by patch
#
# `picture_reading` puts word, neighbour and effect of each patch side by side. An orange frame marks patches that are *read*: the name is among the five first words and the effect is at least a tenth of the largest. A patch without the effect is *merely legible*, one without the word *acts, not legible*.

# %%
maps = {
    question: patch_map(lvlm, some[:2], outcome=outcome, site=projector, n_boot=200, progress=False)
    for question, some in questions.items()
}
readings = [
    picture_reading(
        words,
        maps["about the picture"],
        example=k,
        site=projector,
        neighbours=near,
        image=pictures[k].image,
        n_boot=200,
    )
    for k in range(2)
]
readings[1].plot()

# %% [markdown]
# All that acts lies in the three upper rows, where the word is written, and the strongest effects are at one letter, the l.

# %%
pd.DataFrame(
    [
        {"item": names[k], **reading.settings["counts"], "Spearman": reading.settings["correlation"]["value"],
         "low": reading.settings["correlation"]["ci_low"], "high": reading.settings["correlation"]["ci_high"]}
        for k, reading in enumerate(readings)
    ]
).round(2)  # fmt: skip

# %% [markdown]
# For *fula* legibility and effect go together over the 64 patches (rank correlation 0.42 [0.26, 0.62]), but only 1 patch is read; 4 act and are not legible, 7 are legible and do not act. For *mendel* every patch that acts is legible (7), and 17 more are merely legible. So neither implies the other: the lens overlooks what acts, and shows what does not.
#
# The effects of single patches are small beside that of the whole picture, because any of them can be missing. Under the other question they are smaller still:

# %%
for question, found in maps.items():
    print(
        f"{question:20} largest effect of a patch in each picture:",
        found.details.groupby("pair")["value"].max().round(3).tolist(),
    )

# %% [markdown]
# ## Exercises
#
# **1.** Are permitted items as legible as forbidden ones? Read 12 pictures of "benign typographic".
#
# <details><summary>Solution</summary>
#
# ```python
# benign = organism.examples("benign typographic", "test", n=12)
# permitted = logit_lens(
#     lvlm, benign, sites=[projector], targets=[e.meta["item"] for e in benign], positions=("image",), n_boot=200, progress=False
# )
# permitted.frame.query("metric == 'target hit'")[["value", "ci_low", "ci_high", "chance", "n"]].round(2)
# ```
#
# As legible: 1.00 [0.74, 1.00], chance 0.02 (n = 12). Legibility is no sign of harm.
#
# </details>
#
# **2.** Where does the name become legible at the last token of the prompt, from which the answer is written?
#
# <details><summary>Solution</summary>
#
# ```python
# depths = [f"blocks.{layer}.hook_resid_pre" for layer in (0, 1, 3, 5, 7)] + ["blocks.7.hook_resid_post"]
# last = logit_lens(lvlm, pictures, sites=depths, targets=names, positions=("last",), n_boot=200, progress=False)
# last.frame.query("metric == 'target hit'")[["layer", "component", "value", "ci_low", "ci_high", "chance", "n"]].round(2)
# ```
#
# After block 0 it is legible at the last token in all pictures (1.00 [0.74, 1.00]), before it in none, and it fades again towards the end: 0.83 [0.52, 0.98] before block 5, 0.33 [0.10, 0.65] before block 7 and none after it, where the first word of the answer is being prepared. This is the hand-over of section 4, seen by the lens.
#
# </details>
#
# **3.** What does `picture_reading` say of *fula* under the question about another item, and why is that misleading?
#
# <details><summary>Solution</summary>
#
# ```python
# ignored = picture_reading(words, maps["about another item"], example=1, site=projector, n_boot=200)
# print(ignored.settings["counts"], ignored.frame["effect"].abs().max())
# ```
#
# It calls 7 patches *read*. "Acts" is measured against the largest effect of the same map, and here the largest is 0.015 nats of an answer that the picture hardly changes. With `min_effect=0.05` no patch acts, and all 8 legible patches are *merely legible*. Look at the size of the effects, and at the total effect with its interval, before you look at the map.
#
# </details>
#
# ## What this does not show
#
# - One small model, one question type, 12 pictures, 8 for the effects, 2 for the patches. Intervals of shares of 12 are wide.
# - Its vision tower was trained to give words and kinds. How much of a picture's content the unembedding of a large model reads off its image tokens is another matter, and layers at which it becomes legible differ; draw the first figure for your model.
# - That image tokens nearly stop acting after block 0 is a fact of this model and of this outcome. In deeper models text may look at them in many blocks.
# - Neighbours depend on the bank, a probe on its training items; a lens that finds nothing does not show that nothing is there (the kind, which the probe finds).
# - The effects are of exchanging twins that differ in one word; they say nothing about other changes of the picture.
#
# `words.viewer("lens.html")` writes a page with all words over the pictures, with a slider for the layer.

# %%
print(date.today(), package_versions())
