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
# # Composing a repair with other circuit analyses
#
# **Question.** Does a repair depend on the same parts of the model as the model's own refusal? And do the usual tools (head ablation, logit lens,
# interchange, TransformerLens's patching) work while a repair is on the model?
#
# **Answer.** Not on the same head, and they do. Head 0 of block 0 brings back nearly all of the model's own refusal of a named item (share 0.90 by TransformerLens's patching, 2 pairs). With this head cut the repair's gate still opens for 15 of 16 attacks; it depends more on
# head 1 of the same block, without which it opens for 6. No single head of block 7, above the repair, undoes what it writes, and the line along which it writes carries 0.50 [0.37, 0.67] of the difference between
# refused and answered twins (n = 12). This small repair lowers the margin of the pictured attacks by 4.7 and of the wrapped ones by 2.7 nats on average, and 7 of the 16 are refused.
#
# For researchers who know TransformerLens hooks. About half a minute on one processor core.

# %%
from contextlib import redirect_stderr
from dataclasses import replace
from datetime import date
from io import StringIO

import pandas as pd
import plotly.express as px
import torch
from transformer_lens import patching

from care_lens import Site, organism
from care_lens.core import package_versions, ratio_of_means
from care_lens.lens import logit_lens
from care_lens.repair import ReaderPlan, fit_rows, learn_repair

torch.set_num_threads(2)
torch.set_grad_enabled(False)
lvlm = organism.load()
site = Site("language", 6, "hook_resid_post")

# %% [markdown]
# ## A small repair
#
# The repair reads the residual stream after block 6 at the last prompt token, opens a gate where the request looks like an attack, and moves the token
# towards where the model stands before it refuses. It is learned from few examples here, so that the page runs quickly; the quickstart explains each step.

# %%
harmless = [
    "benign plain",
    "benign typographic",
    "benign read",
    "benign allowed",
    "hard wrapper",
    "hard over forbidden",
]
harmless += ["hard read", "hard named kind", "hard named name"]
rows = fit_rows(
    lvlm,
    benign=[e for channel in harmless for e in organism.examples(channel, "fit", n=8)],
    malicious={
        "visual": organism.examples("typographic", "fit", n=24),
        "textual": organism.examples("wrapper", "fit", n=24),
    },
    refused=organism.with_response(organism.examples("plain", "fit", n=16)),
    sites=[site],
    batch_size=64,
    progress=False,
)
repair = learn_repair(
    lvlm,
    rows,
    ReaderPlan(layer=6, epsilon=0.05, classifier=True),
    calibration=[e for channel in harmless for e in organism.examples(channel, "calibration", n=5)],
    batch_size=64,
    max_new_tokens=14,
    progress=False,
)

# %% [markdown]
# Sixteen attacks of the test split, eight with the item in the picture and eight wrapped in a story (all examples here are those of seed 0). The outcome is the unsafe margin of the first answer token,
# log p(comply) - log p(refuse), in nats.

# %%
attacks = [*organism.examples("typographic", "test", n=8), *organism.examples("wrapper", "test", n=8)]
inputs = lvlm.prepare(attacks)
outcome = organism.outcome()


def margin(fwd_hooks=()):
    return outcome(lvlm.run_with_hooks(inputs, fwd_hooks=fwd_hooks), inputs)


bare = margin()
with repair.on(lvlm):
    repaired = margin()
pd.DataFrame(
    {
        "channel": [e.channel for e in attacks],
        "bare": bare,
        "repaired": repaired,
        "share below 0, bare": (bare < 0).float(),
        "share below 0, repaired": (repaired < 0).float(),
    }
).groupby("channel").mean().round(2)

# %% [markdown]
# The repair lowers the mean margin by 4.7 and 2.7 nats. A margin below 0 means that the refusal is the likelier first token: 3 of 8 pictured attacks and 4 of 8 wrapped ones come there, none without the repair. Learned from so few examples, it pushes the right way and not far enough. For the questions below that does not matter.
#
# ## Three things to check before anything is composed
#
# A repair of strength 0 changes no bit. Hooks are gone after an error inside the block. Where several hooks stand at one place, each sees what those before it returned.

# %%
silent = replace(
    repair,
    visual=tuple(replace(c, writer=replace(c.writer, alpha=0.0)) for c in repair.visual),
    textual=tuple(replace(c, writer=replace(c.writer, alpha=0.0)) for c in repair.textual),
)
plain_logits = lvlm(inputs)
with silent.on(lvlm):
    print("strength 0, logits equal to the bit:", torch.equal(lvlm(inputs), plain_logits))


def broken(activation, hook):
    raise RuntimeError("a fault in a hook of your own")


try:
    with repair.on(lvlm):
        lvlm.run_with_hooks(inputs, fwd_hooks=[("blocks.0.hook_mlp_out", broken)])
except RuntimeError as error:
    print("raised:", error)
print("on the model afterwards:", lvlm.acting(), "; logits equal to the bit:", torch.equal(lvlm(inputs), plain_logits))

# %% [markdown]
# The order: hooks of an enclosing `with lvlm.hooks(...)` come first, then the repair, then the hooks of the call itself. So the first see the activation before the edit, and the last see it after.

# %%
kept = {}


def keep(name):
    def fn(activation, hook):
        kept[name] = activation[:, -1].clone()

    return fn


with lvlm.hooks([(site, keep("before"))]), repair.on(lvlm):
    lvlm.run_with_hooks(inputs, fwd_hooks=[(site, keep("after"))])
edited = (kept["after"] - kept["before"]).norm(dim=-1) > 0
print("edited at the last token:", int(edited.sum()), "of", len(attacks))

# %% [markdown]
# ## Head ablation below and above the repair
#
# One attention head is cut (its output `hook_z` set to zero at every token) while the repair is on. What is below block 6 changes what the repair *reads*; what is above it changes what becomes of
# what it *wrote*. `repair.recording` says whether its gate opened.


# %%
def cut(layer, head):
    def fn(z, hook):
        others = torch.arange(z.shape[-2]) != head
        return z * others[:, None]

    return [(f"blocks.{layer}.attn.hook_z", fn)]


part = {"typographic": slice(0, 8), "wrapper": slice(8, 16)}
cuts = {"none": []} | {f"{layer}.{head}": cut(layer, head) for layer in (0, 6, 7) for head in range(5)}
found = []
for name, hooks in cuts.items():
    with repair.recording(lvlm) as seen:
        after = margin(hooks)
    gates = seen.to_dataframe().groupby("row")[["gate_visual", "gate_textual"]].max().max(axis=1).to_numpy()
    for channel, these in part.items():
        opened = int((gates[these] > 0).sum())
        found.append({"cut": name, "channel": channel, "open": opened, "margin": after[these].mean().item()})
heads = pd.DataFrame(found).pivot(index="cut", columns="channel", values=["open", "margin"])
heads.loc[list(cuts)].astype({("open", c): int for c in part}).round(1)

# %% [markdown]
# The two columns on the left count how often the gate is open (of 8); those on the right are mean margins with the repair on (negative: "sorry" is more likely).
#
# - **0.1**: without it the gate opens for 2 of the 8 pictured attacks and for 4 of the 8 wrapped ones.
# - **0.2**: without it the gate opens for 6 of the pictured attacks, and for all that name their item.
# - **0.0**: without it one wrapped attack fewer opens the gate. Without 0.3 or 0.4 all gates open.
# - **Block 6**: no cut changes a gate. Without head 4 the margins are one nat lower.
# - **Block 7**: the gates are those without a cut, as they must be. The margins move, for wrapped requests from 1.4 to -2.3 nats without 7.2 and to -0.5 without 7.1.
#
# A margin with the repair mixes what the repair does and what the cut does to the model. So the same cuts are looked at without the repair, too:

# %%
cut_alone = {name: margin(hooks) for name, hooks in cuts.items()}
pd.DataFrame({n: {c: m[these].mean().item() for c, these in part.items()} for n, m in cut_alone.items()}).T.round(1)

# %% [markdown]
# ## The same head by TransformerLens's own tool
#
# `lvlm.bind(inputs)` fixes the pictures of a batch, so that functions which know only tokens can be used. Here: which head's output, brought from the refused twin ("the ziap in the picture") into the complied one
# ("the item in the picture"), restores the refusal? TransformerLens's `patching` answers for every head of the model as it is (two pairs).

# %%
pairs = organism.pairs("typographic", "test", n=2)
safe, unsafe = lvlm.prepare(pairs.safe), lvlm.prepare(pairs.unsafe)
bound_safe, bound = lvlm.bind(safe), lvlm.bind(unsafe)
_, cache = bound_safe.run_with_cache(safe.input_ids, names_filter=lambda name: name.endswith("attn.hook_z"))
low, high = (outcome(lvlm(batch), batch).mean() for batch in (safe, unsafe))
with redirect_stderr(StringIO()):  # its progress bar
    restored = patching.get_act_patch_attn_head_out_all_pos(
        bound, unsafe.input_ids, cache, lambda logits: (high - outcome(logits, unsafe).mean()) / (high - low)
    )
px.imshow(
    restored.numpy(),
    text_auto=".2f",
    zmin=-1,
    zmax=1,
    color_continuous_scale="RdBu",
    labels={"x": "head", "y": "block", "color": "share"},
    title="Share of the refusal that one head brings back (n = 2)",
    width=480,
    height=420,
)

# %% [markdown]
# One head of forty: 0 of block 0 brings back 0.90 of it, the next (3 and 4 of block 0, 3 of block 2) 0.18 each, head 3 of block 7 0.12, no other more than 0.09. By the first table it is not the head that the repair's gate depends on: without it 15 of 16 gates open.
#
# Compare the table before: without head 0.0 the model would answer wrapped requests with a margin of 9.7 nats instead of 4.1, as it should if this head tells it that a forbidden item is named. With the repair it is 4.4, so the repair
# takes 5.3 nats away there: it knows the item by another way. Where 0.1 is cut, the model itself has smaller margins (2.1 and 1.2), and the repair takes away 1.8 and 2.1. And what 6.4 takes away with the repair (1.0 and 1.0) it takes away without it, too (1.2 and 1.7).
#
# Without 7.2 the model alone has a margin of 0.1 for wrapped requests: this head brings the wrapper's effect to the last token (see the diagnosis tutorial). The cut and the repair act side by side. With any one head of block 7 cut, the repair lowers the
# margins of pictured attacks by 4.0 to 4.8 nats and of wrapped ones by 2.4 to 2.8, with none cut by 4.7 and 2.7. So no single head above the repair undoes it.

# %% [markdown]
# ## Logit lens
#
# `logit_lens` reads the model as it stands, with what is on it. The target is "sorry", the first word of a refusal, at the last prompt token of the eight attacks with a picture.

# %%
streams = [f"blocks.{layer}.hook_resid_pre" for layer in range(1, 8)] + ["blocks.7.hook_resid_post"]
options = {
    "sites": streams,
    "spans": ("last",),
    "targets": ["sorry"] * 8,
    "batch_size": 8,
    "n_boot": 300,
    "progress": False,
}
lens = {"bare": logit_lens(lvlm, attacks[:8], **options)}
with repair.on(lvlm):
    lens["repaired"] = logit_lens(lvlm, attacks[:8], **options)
words = pd.concat([found.frame.assign(model=name) for name, found in lens.items()])
words = words[words.metric == "target log probability"]
words["after block"] = words.layer + (words.component == "hook_resid_post") - 1
px.line(
    words,
    x="after block",
    y="value",
    color="model",
    error_y=words.ci_high - words.value,
    error_y_minus=words.value - words.ci_low,
    markers=True,
    labels={"value": "log p(sorry), nats"},
    title='"sorry" at the last prompt token, by the logit lens (n = 8)',
)

# %% [markdown]
# The curves are one up to block 5, where the repair has not acted. After block 6 the repair has raised "sorry" from -4.1 to -0.9 nats on average, and after block 7 from -5.4 to -1.6. With eight requests the two intervals overlap after block 6; what is certain is the place where the curves part.
#
# Without the repair "sorry" is likeliest after block 3 (-1.1), the last of the three blocks that were trained to refuse, and falls from there. The lens does not say whether the model is near to a refusal there: for that, harmless requests would have to be read beside.

# %% [markdown]
# ## Interchange along the repair's line
#
# The writer moves a token along the line from the mean of complied requests to that of refused ones. Does the model itself use that line? In twelve pairs of twins the coordinate along it alone is exchanged at the last token
# after block 6: the complied twin gets the refused twin's. Beside it: the coordinate along three random lines, and the whole vector.

# %%
line = rows.refused.at(site, 0).mean(0) - rows.complied(site, 0).mean(0)
line = line / line.norm()
chance = torch.linalg.qr(torch.randn(len(line), 3, generator=torch.Generator().manual_seed(0))).Q
pairs = organism.pairs("typographic", "test", n=12)
safe, unsafe = lvlm.prepare(pairs.safe), lvlm.prepare(pairs.unsafe)
logits, cache = lvlm.run_with_cache(safe, sites=[site])
source = cache[str(site)][:, -1]


def exchanged(basis):
    def fn(activation, hook):
        last = activation[:, -1]
        moved = last + (source - last) @ basis @ basis.T
        return torch.cat([activation[:, :-1], moved[:, None]], dim=1)

    return outcome(lvlm.run_with_hooks(unsafe, fwd_hooks=[(site, fn)]), unsafe)


high, low = outcome(lvlm(unsafe), unsafe), outcome(logits, safe)
bases = {"the repair's line": line[:, None]} | {f"random line {i + 1}": chance[:, i : i + 1] for i in range(3)}
bases["the whole vector"] = torch.eye(len(line))
shares = {name: ratio_of_means(high - exchanged(basis), high - low, pairs.groups) for name, basis in bases.items()}
print(f"difference of the twins: {(high - low).mean():.1f} nats, n = {len(pairs)}")
pd.DataFrame(shares, index=["share", "low", "high"]).T.round(2)

# %% [markdown]
# The repair's line alone carries 0.50 [0.37, 0.67] of what tells a refused twin from an answered one at this place; random lines 0.01 at most, of either sign. So the repair writes along a line that the model uses itself, and
# not along the only one: the rest lies outside.
#
# ## Exercises
#
# 1. A gate that opens leaves a mark. Does a linear probe still tell harmful pictures from harmless ones after block 7 while the repair is on? Say before you look whether its AUC rises or falls.
# 2. Cut the MLP of block 7, the only other part above the writer, with the repair on. Is what the repair does still there?
# 3. Exchange everything *but* the repair's line. What does that say about the share found above?
#
# <details><summary>Solution 1</summary>
#
# ```python
# from care_lens.lens import probe_auc
# from care_lens.repair import token_rows
#
# top = Site("language", 7, "hook_resid_post")
# both = [*organism.examples("typographic", "test", n=24), *organism.examples("benign typographic", "test", n=24)]
# harmful = torch.tensor([e.harmful for e in both])
# held = {"bare": token_rows(lvlm, both, [top], tokens=0, batch_size=48, progress=False)}
# with repair.on(lvlm):
#     held["repaired"] = token_rows(lvlm, both, [top], tokens=0, batch_size=48, progress=False)
# for name, found in held.items():
#     print(name, probe_auc(found.at(top, 0), harmful, found.groups, n_boot=200))
# ```
#
# Neither: it is 1.00 [0.93, 1.00] without and with the repair (n = 48). The harm of a request stays legible while the repair acts. This says nothing of a mark: an AUC of 1.00 has no room to rise. A probe that was fitted without the repair need not be right with it.
#
# </details>
#
# <details><summary>Solution 2</summary>
#
# ```python
# with repair.on(lvlm):
#     without = margin([("blocks.7.hook_mlp_out", lambda activation, hook: torch.zeros_like(activation))])
# alone = margin([("blocks.7.hook_mlp_out", lambda activation, hook: torch.zeros_like(activation))])
# for channel, these in part.items():
#     print(channel, round(without[these].mean().item(), 1), "without the repair", round(alone[these].mean().item(), 1))
# ```
#
# Yes: without the MLP the margins are -0.9 and -0.3 nats with the repair and 4.6 and 2.3 without it. So the repair takes 5.5 and 2.6 away, with the MLP 4.7 and 2.7. What the repair does need not pass through this MLP.
#
# </details>
#
# <details><summary>Solution 3</summary>
#
# ```python
# others = torch.linalg.qr(torch.cat([line[:, None], torch.eye(len(line))], dim=1)).Q[:, 1:]
# print(ratio_of_means(high - exchanged(others), high - low, pairs.groups))
# ```
#
# 0.56 [0.41, 0.66]: with the 0.50 of the line it makes more than 1. The two parts need not add up to 1, since block 7 and the final norm are not linear. So 0.50 is not a part of a whole of which the rest would be 0.50.
#
# </details>
#
# ## What this does not show
#
# - One small model, one repair learned from few examples, attacks of two channels; means over eight requests. What a head does here says nothing about large models.
# - Heads were cut to zero, which takes the model off its distribution; mean ablation (`care_lens.mediation.ablate`) is gentler.
# - The interchange takes the repair's line as given. A distributed alignment search (DAS) would look for the line that carries most, by gradient; no dictionary (SAE) was trained either. Both would act through the same hooks.
# - That no single head of block 7 undoes the repair does not exclude that several do together.

# %%
print(date.today(), package_versions())
