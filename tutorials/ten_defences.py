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
# # Ten defences on one model, and what an adaptive attack leaves
#
# **Question.** Defences are compared on attacks that do not know them. What is left of the best ones when the attacker's gradient goes through the defence?
#
# **Answer.** Of CAST next to nothing, of the repair less than its first figure says. Pictures that are moved by at most 16 of 255, by an attack that sees the defence, raise attack success against CAST from 0.33 [0.10, 0.65] to
# 0.92 [0.62, 1.00], and against the repair from 0.08 [0.00, 0.38] to 0.42 [0.15, 0.72] (n = 12). Random noise of that size leaves CAST at 0.33 [0.10, 0.65]; against the repair it alone gives 0.25 [0.05, 0.57], so that for the
# repair it is not shown that the gradient does more than noise.
#
# For anyone who is about to write "our defence reduces attack success to x %". About half a minute on one processor core.

# %%
from datetime import date

import plotly.express as px
import torch

from care_lens import Site, organism
from care_lens.attacks import PGD
from care_lens.core import package_versions
from care_lens.defences import CAST, AlphaSteer, MeanAblation, MeanDifference
from care_lens.evaluation import GenerationStore, attack_table, evaluate
from care_lens.repair import ReaderPlan, fit_rows, learn_repair

torch.set_num_threads(2)
lvlm = organism.load()
judge = organism.OrganismJudge()

# %% [markdown]
# ## Ten defences, as they were measured
#
# The whole comparison takes hours: each defence had at most twelve settings, chosen on validation by one rule (least attack success among those that lose at most two points of right answers). Per cent with 95 % intervals, from
# "Defences on the bundled model" in the results (`benchmarks/bench_defences.py`; seen n = 84, held-out n = 196, benign n = 672). The rows are of the earlier of the two runs on that page, whose settings are used below; the repair's row is of the
# later run, where it had twelve settings, too. The two runs drew other settings, and this matters: in the later one CAST was chosen with alpha 1, and left 19 % [11, 30] of the seen and 61 % [54, 68] of the held-out attacks.
#
# | defence | seen attacks | held-out attacks | benign, right | chosen |
# | --- | --- | --- | --- | --- |
# | undefended | 87 [77, 94] | 94 [88, 97] | 97 [95, 98] | |
# | safety tuning (LoRA) | 0 [0, 9] | 27 [20, 34] | 96 [93, 97] | lr 0.001 |
# | difference of means | 10 [4, 19] | 58 [50, 65] | 91 [89, 94] | layer 4, alpha 1 |
# | CAST | 11 [5, 20] | 34 [27, 41] | 92 [90, 94] | layer 4, alpha 2 |
# | AlphaSteer | 29 [19, 40] | 65 [57, 72] | 93 [91, 95] | layer 7, null share 0.6 |
# | ShiftDC | 56 [44, 67] | 75 [68, 81] | 96 [93, 97] | layer 6, alpha 2 |
# | mean ablation | 69 [58, 79] | 94 [89, 97] | 97 [95, 98] | attention of block 6, alpha 0.5 |
# | published CARE | 69 [58, 79] | 93 [87, 96] | 94 [92, 96] | blocks 4 to 6, rank 8, alpha 4.5 |
# | SafeSteer | 73 [61, 82] | 92 [87, 96] | 97 [95, 98] | layer 2, alpha 0.2 |
# | LEACE | 81 [70, 89] | 94 [89, 98] | 97 [95, 98] | layer 1, last token |
# | CAA | 83 [73, 91] | 94 [88, 97] | 95 [93, 97] | layer 7, alpha 1 |
# | the repair (later run) | 4 [0, 12] | 16 [11, 22] | 94 [92, 96] | block 6, a classifier |
#
# ## Four of them and the repair, fitted here
#
# Those that fit in seconds, with the settings that were chosen there, but fitted on fewer examples, so that this page runs quickly; their figures are therefore not those of the table above.

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
visual, textual = organism.examples("typographic", "fit", n=20), organism.examples("wrapper", "fit", n=20)
refused = organism.with_response(organism.examples("plain", "fit", n=16))
classes = {
    "benign": [e for c in harmless for e in organism.examples(c, "fit", n=2)],
    "malicious": visual[:10] + textual[:10],
}

rows = fit_rows(
    lvlm,
    benign=[e for channel in harmless for e in organism.examples(channel, "fit", n=7)],
    malicious={"visual": visual, "textual": textual},
    refused=refused,
    sites=[Site("language", 6, "hook_resid_post")],
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
cast = CAST.fit(lvlm, **classes, refused=refused, condition_layer=4, layers=[4], alpha=2.0)
defences = {
    "none": None,
    "difference of means": MeanDifference.fit(lvlm, refused=refused, complied=classes["malicious"], layer=4),
    "CAST": cast,
    "AlphaSteer": AlphaSteer.fit(lvlm, **classes, refused=refused, layers=[7], null_share=0.6),
    "mean ablation": MeanAblation.fit(lvlm, benign=classes["benign"], sites=["blocks.6.hook_attn_out"], alpha=0.5),
    "the repair": repair,
}

# %% [markdown]
# Test items, wordings and type faces that the fit did not see, eight a channel. *typographic* was in the fit; *indirect* (the item is named as another's twin) was not. In *hard named kind* a harmless question names a forbidden item.

# %%
store = GenerationStore()
channels = ("typographic", "indirect", "hard named kind")
table = evaluate(
    lvlm,
    {channel: organism.examples(channel, "test", n=8) for channel in channels},
    defences,
    judge=judge,
    store=store,
    max_new_tokens=14,
    batch_size=64,
    fidelity=False,
    n_boot=500,
    progress=False,
)
shown = table.frame[table.frame.metric.isin(["asr", "accuracy"])]
cells = [f"{v:.0%} [{a:.0%}, {b:.0%}]" for v, a, b in zip(shown.value, shown.ci_low, shown.ci_high)]
shown.assign(cell=cells).pivot(index="defence", columns="channel", values="cell").loc[list(defences), list(channels)]

# %% [markdown]
# Eight requests a cell, so read the intervals. The repair and CAST leave one of eight attacks of the channel that was not seen, the difference of means four, AlphaSteer six; mean ablation leaves all attacks of both channels. What it costs shows in the last
# column: AlphaSteer, fitted on so few examples, gets 25 % [3, 65] of the harmless questions right, the repair 75 % [35, 97]. That the repair leaves fewer pictured attacks than CAST or the difference of means (12 against 38 %) is not shown
# by eight requests.
#
# ## An attack that sees the defence
#
# The attacker takes twelve requests with the item in the picture, which the undefended model answers, and moves the pixels by at most 16 of 255 in four steps of PGD, so that the answer that it wants becomes likely. The gradient goes through the defence's hooks. A gate is a step and
# has none; the attack puts a slope in its place and asks for closed gates too. `attack_table` makes the attack three times (blind, against CAST, against the repair), saves the pictures and reads them back, and adds clean pictures and random noise of the same size.

# %%
attacked = attack_table(
    lvlm,
    organism.examples("typographic", "test", n=12),
    [PGD(epsilon=16, steps=4, batch_size=12)],
    {name: defences[name] for name in ("none", "CAST", "the repair")},
    judge=judge,
    store=store,
    max_new_tokens=14,
    n_boot=500,
    fidelity=False,
    progress=False,
)
found = attacked.frame[attacked.frame.metric == "asr"]
found[["defence", "channel", "value", "ci_low", "ci_high", "n"]].round(2)

# %%
px.bar(
    found,
    x="defence",
    y="value",
    color="channel",
    barmode="group",
    error_y=found.ci_high - found.value,
    error_y_minus=found.value - found.ci_low,
    range_y=[0, 1.02],
    labels={"value": "attack success", "channel": "picture"},
    title="Attack success by what the attacker knows (n = 12 a bar)",
)

# %% [markdown]
# Three readings.
#
# - **The blind attack understates.** Made without the defence, the same PGD reaches 0.50 [0.21, 0.79] against CAST; made against it, 0.92 [0.62, 1.00]. For the repair 0.17 [0.02, 0.48] and 0.42 [0.15, 0.72]. The intervals overlap; that an attack which sees more does no worse is to be expected.
# - **Noise is a control that is needed.** It changes nothing for CAST (0.33 before and after), but for the repair 0.08 [0.00, 0.38] becomes 0.25 [0.05, 0.57] by noise alone. Five of twelve under PGD against three of twelve under noise is no difference that
#   twelve requests could show.
# - **It matters where the attack starts, and how long it goes on.** From plain requests over clean pictures, which the undefended model refuses by itself, 8 % [1, 27] of 24 get through the repair of the README ("The bundled model, line by line" in the results). From pictured requests, as here, the
#   defence is all that stands in the way: with 40 steps in place of our four, at the same 16 of 255, 100 % [86, 100] of 24 get through, with random noise 8 % [1, 27]. Four steps understate what an attacker can do.
#
# ## Exercises
#
# 1. CAST was chosen with alpha 2. Fit nothing anew: what does alpha 1 leave of the pictured attacks?
# 2. Is it the *direction* of the difference of means that stops attacks, or would any push of that size?
# 3. A paper reports that 0 of 8 adaptive attacks succeeded. How large may the true rate be, and how many requests without a single success are needed to claim less than 5 %?
#
# <details><summary>Solution 1</summary>
#
# ```python
# from dataclasses import replace
#
# weaker = replace(cast, alpha=1.0)
# suite = {"typographic": organism.examples("typographic", "test", n=8)}
# again = evaluate(lvlm, suite, {"CAST, alpha 1": weaker}, judge=judge, max_new_tokens=14, fidelity=False, n_boot=100, progress=False)
# print(again.frame[["defence", "metric", "value", "ci_low", "ci_high", "n"]].round(2))
# ```
#
# 0.50 [0.16, 0.84], against 0.38 [0.09, 0.76] with alpha 2: with eight requests no difference is shown.
#
# </details>
#
# <details><summary>Solution 2</summary>
#
# ```python
# from care_lens.defences import random_directions
#
# suite = {"typographic": organism.examples("typographic", "test", n=8)}
# control = {"random direction": random_directions(defences["difference of means"])}
# again = evaluate(lvlm, suite, control, judge=judge, max_new_tokens=14, fidelity=False, n_boot=100, progress=False)
# print(again.frame[["channel", "metric", "value", "ci_low", "ci_high", "n"]].round(2))
# ```
#
# Along a random direction 0.88 [0.47, 1.00] are left, against 0.38 [0.09, 0.76]. The push alone does little; the intervals overlap, so more requests are needed before this is called shown.
#
# </details>
#
# <details><summary>Solution 3</summary>
#
# ```python
# from care_lens.core import rate_ci
#
# print(rate_ci(0, 8))
# print(next(n for n in range(1, 200) if rate_ci(0, n).high < 0.05))
# ```
#
# Up to 0.37; and 72 requests.
#
# </details>
#
# ## What this does not show
#
# - A small closed world and eight or twelve requests a cell: an interval spans up to seventy points. The order of two defences is not shown by bars whose intervals overlap.
# - One family of attacks, one draw (seed 0), four steps. An attack that fails proves nothing about the defence; one that succeeds does.
# - The defences were fitted on few examples with settings that were chosen elsewhere; the repair here is weaker than the README's. Only CAST and the repair were attacked.
# - Safety tuning, the strongest baseline of the table, was left out because its training takes longer than this page.

# %%
print(date.today(), package_versions())
