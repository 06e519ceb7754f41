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
# # The geometry of safety subspaces, and when the published form fails
#
# **Question.** CARE (Fu et al., 2026) learns the directions along which malicious activations have most energy relative to benign ones. Do these directions tell a single attack from a harmless request?
#
# **Answer.** Less well than a classifier of the same rows. After block 6, at a threshold set so that 5 % of benign requests may exceed it, the energy of the eight leading directions exceeds it for 25 % of the spelled attacks on unseen items (95 % interval 10 to 47 %), the discriminant
# for as many and a classifier for 71 % (49 to 87). For pictured and for wrapped attacks the intervals of the three overlap. The discriminant lies within 2 degrees of the eight directions. A classifier that reads nothing but these eight finds 42 % (22 to 63) of the spelled attacks.
#
# For researchers who fit, compare or criticise subspaces of activations. About half a minute on two cores. The formulas are on the page "Safety subspaces" of the documentation.

# %%
import pandas as pd
import torch

from care_lens import SafetySubspace, Site, organism
from care_lens.capture import capture
from care_lens.core import clustered_rate, package_versions
from care_lens.defences import PublishedCARE
from care_lens.plots import plot_principal_angles
from care_lens.repair import ConformalGate
from care_lens.subspace import classifier_direction

torch.set_num_threads(2)
lvlm, study = organism.load(), organism.study()
sites = [Site("language", block, "hook_resid_post") for block in (2, 4, 6)]


def rows_of(examples):
    return capture(lvlm, examples, sites, positions=("last",), batch_size=64, progress=False)


benign = rows_of(study.benign("fit")[::14])
visual = rows_of(organism.examples("typographic", "fit", n=40))
textual = rows_of([e for channel in ("wrapper", "spelled") for e in organism.examples(channel, "fit", n=20)])
calibration = rows_of(study.benign("calibration")[::7])
unseen = {c: rows_of(organism.examples(c, "validation", n=24)) for c in ("typographic", "wrapper", "spelled")}
site = sites[2]
b, v, t = (activations.rows(site, "last") for activations in (benign, visual, textual))
print(
    len(b),
    "benign rows from 24 channels,",
    len(v),
    "visual attacks,",
    len(t),
    "textual attacks;",
    b.shape[1],
    "dimensions",
)

# %% [markdown]
# A row is the residual stream at the last prompt token. Benign rows hold hard cases: harmless questions that name a forbidden item. There are fewer benign rows than dimensions, as there nearly always are in large models.
#
# ## The spectrum, and how many directions
#
# The generalised eigenproblem $C_m u = \lambda C_b u$ ranks directions by malicious over benign energy. With 160 dimensions and 40 attacks, some directions look malicious by chance. How many are real is a question for a null.

# %%
rules = {}
for name, malicious in (("visual", visual), ("textual", textual)):
    for rank in ("auto", "permutation", "energy"):
        rules[name, rank] = SafetySubspace.fit(
            b, malicious.rows(site, "last"), rank=rank, groups=(benign.groups, malicious.groups), site=site
        )
pd.DataFrame(
    [
        {
            "attacks": name,
            "rule": rank,
            "rank": one.rank,
            "largest eigenvalues": ", ".join(f"{float(x):.1f}" for x in one.eigenvalues[:3]),
            "first, held out": one.diagnostics["auto_rank"]["heldout_ratios"][0] if rank == "auto" else None,
            "benign against benign": one.diagnostics["auto_rank"]["threshold"] if rank == "auto" else None,
        }
        for (name, rank), one in rules.items()
    ]
).round(1)

# %%
rules["visual", "auto"].plot()

# %% [markdown]
# The rules disagree. The energy rule looks at the fit alone and keeps 13 and 17 directions; permuted labels keep two and one. Held-out items ("auto") keep one in each modality, but only because a subspace has at least one: the first visual direction has 44 times the benign energy in the fit
# and 16 times on held-out items, fewer than the 18 that benign rows reach against benign rows (dashed in the figure), and the first textual one has 30 times in the fit and 7 times on held-out items, fewer than 9. The rule warns of that. So by this rule no direction of energy is established in 126 benign rows. With few rows an eigenvalue is largely fitted noise, and only the evidence that the fit did not see counts.
#
# ## Angles between modalities and blocks
#
# The two leading directions for each modality, after three blocks. The figure has the smallest principal angle of each pair; a dot marks pairs that are closer than 95 % of random subspaces.

# %%
pairs = {
    f"{name}, block {at.layer}": SafetySubspace.fit(
        benign.rows(at, "last"), malicious.rows(at, "last"), rank=2, site=at
    )
    for name, malicious in (("visual", visual), ("textual", textual))
    for at in sites
}
plot_principal_angles(pairs)

# %%
pd.DataFrame(
    [
        {
            "block": at.layer,
            "angles, degrees": found.angles.rad2deg().round().tolist(),
            "overlap": found.normalized,
            "chance": found.chance,
        }
        for at in sites
        for found in [pairs[f"visual, block {at.layer}"].compare(pairs[f"textual, block {at.layer}"])]
    ]
).round(2)

# %% [markdown]
# All pairs are closer than chance. Neighbouring blocks of one modality share a direction best (33 to 47 degrees). The visual and the textual subspace of one block are 43 to 61 degrees apart at the smallest angle, and 66 to 77 at the other; they are nearest in block 6. So there is one
# partly shared direction, and no common subspace. By the rank rules above the second direction is hardly established, and by the strictest not even the first, so that the larger angle says little. These are single fits; `subspace.uncertainty` gives intervals.
#
# ## Energy is a poor detector
#
# Four readers are fitted on the same rows (all attacks against all benign rows). Each gives a score, and each has its threshold set on other benign requests, so that about 5 % of them exceed it. How many attacks on unseen items do?

# %%
m = torch.cat([v, t])
wide, narrow = (SafetySubspace.fit(b, m, rank=rank, site=site) for rank in (8, 1))
discriminant = SafetySubspace.fit(b, m, contrast="mean", rank=1, site=site)
direction = classifier_direction(b, m)
readers = {
    "energy, rank 8": wide.energy,
    "energy, rank 1": narrow.energy,
    "discriminant": lambda x: discriminant.coordinates(x)[:, 0],
    "classifier": lambda x: x @ direction,
}
opened = []
for name, read in readers.items():
    gate = ConformalGate.calibrate(read(calibration.rows(site, "last")), epsilon=0.05)
    for channel, held in unseen.items():
        over = read(held.rows(site, "last")) > gate.threshold
        opened.append(
            {"reader": name, "channel": channel, **clustered_rate(over.numpy(), held.groups)._asdict(), "n": len(over)}
        )
opened = pd.DataFrame(opened).round(2)
opened["share"] = [f"{row.estimate:.2f} [{row.low:.2f}, {row.high:.2f}]" for row in opened.itertuples()]
opened.pivot(index="reader", columns="channel", values="share").loc[list(readers)]

# %%
inside = discriminant.compare(wide)
print(f"angle between the discriminant and the eight directions: {float(inside.angles[0].rad2deg()):.0f} degrees")

# %% [markdown]
# With one direction, energy finds none of the spelled attacks and about half of the others. With eight it finds a quarter of the spelled ones, as many as the discriminant, and as many of the wrapped ones; of the pictured ones it finds fewer (0.62 against 0.92), but the intervals overlap. The classifier finds 0.71 [0.49, 0.87] of the spelled attacks, and for these
# its interval does not overlap with those of energy and of the discriminant; for the other channels all three overlap. The discriminant is 2 degrees from the span, so that what it reads is there. How much of what the classifier has beyond it is in the span, exercise 2 asks. Two dozen attacks a channel, one split.
#
# ## What the published form adds to this
#
# The code that came with the paper differs from a sound fit in six ways; `PublishedCARE` keeps them all, each as a switch (`CAREFaults`). Three of them can be seen on one site.
#
# **Each class is centred about its own mean.** A shift between the means is then not seen. Share of the squared shift that lies in the eight leading directions (random directions: 8 / 160 = 0.05):

# %%
shares = []
for contrast in ("second_moment", "covariance"):
    for name, malicious in (("visual", v), ("textual", t)):
        span = SafetySubspace.fit(b, malicious, rank=8, contrast=contrast, site=site)
        shift = malicious.double().mean(0) - b.double().mean(0)
        inside = (span.basis.double().T @ shift).square().sum() / shift.square().sum()
        shares.append({"contrast": contrast, "attacks": name, "share of the shift": float(inside)})
pd.DataFrame(shares).round(2)

# %% [markdown]
# Centred by class, as published, the eight directions hold no more of the shift than eight random ones would (0.03 and 0.01); about the benign mean they hold three to five times as much as those (0.23 and 0.15).
#
# **A ridge of 1e-6 instead of shrinkage.** With fewer benign rows than dimensions there are directions in which no benign row varies, and there the ratio of energies is limited by the ridge alone. A shrinkage of weight 1e-8 stands for the ridge here (the published code puts it on the benign covariance alone). Eigenvalue of the fit beside the same
# ratio on rows that the fit did not see (attacks of the validation split over benign requests of the calibration split):

# %%
late = torch.cat([held.rows(site, "last") for held in unseen.values()])
kept = []
for name, shrinkage in (("Ledoit-Wolf", "ledoit-wolf"), ("weight 1e-8", 1e-8)):
    fitted = SafetySubspace.fit(b, m, rank=8, shrinkage=shrinkage, site=site)
    ratio = fitted.energy(late).mean() / fitted.energy(calibration.rows(site, "last")).mean()
    kept.append(
        {
            "shrinkage": name,
            "1st eigenvalue": f"{float(fitted.eigenvalues[0]):.3g}",
            "8th eigenvalue": f"{float(fitted.eigenvalues[7]):.3g}",
            "unseen rows, all 8": f"{float(ratio):.3g}",
        }
    )
pd.DataFrame(kept)

# %% [markdown]
# With next to no shrinkage the eigenvalues are 25 to 103 millions, and on unseen rows the same directions have 1.5 times as much malicious as benign energy. With Ledoit and Wolf's shrinkage the first eigenvalue is 30.5, and the ratio on unseen rows 3.2. A huge eigenvalue is a warning
# and no finding.
#
# **Fitted at one place, applied at another.** The published code fits on the outputs of blocks and edits the outputs of MLPs. At block 4, on 16 benign requests and 16 attacks:

# %%
harmless = [e for channel in ("benign typographic", "hard read") for e in organism.examples(channel, "fit", n=16)]
attacks = organism.examples("typographic", "fit", n=32)
options = {"benign": harmless, "malicious": attacks, "refusals": [study.refusal], "layers": [4], "rank": 8}
published = PublishedCARE.fit(lvlm, **options, batch_size=64, progress=False)
sound = PublishedCARE.sound(lvlm, **options, batch_size=64, progress=False)
mlp = Site("language", 4, "hook_mlp_out")
states = {
    name: capture(lvlm, some[:16], [mlp], positions=("last",), progress=False).rows(mlp, "last")
    for name, some in (("benign", harmless), ("attacks", attacks))
}
pd.DataFrame(
    [
        {
            "form": form.name,
            "fitted at": form.provenance["fitted_at"],
            "largest eigenvalue": f"{float(form.visual[4].eigenvalues[0]):.3g}",
            "length of the benign mean": float(form.visual[4].mean.norm()),
            **{
                f"edit / state, {name}": float((form.edit(h, 4).norm(dim=1) / h.norm(dim=1)).mean())
                for name, h in states.items()
            },
        }
        for form in (published, sound)
    ]
).round(2)

# %% [markdown]
# The published form edits by 1.8 and 2.3 times the length of what it edits (strengths of 4, as published), towards a mean of length 122, which is that of another place; at the place itself the benign mean has length 4. So it does not remove a coordinate, it overwrites the MLP's output. The sound form's
# edit is 0.8 of the state for benign requests and 0.9 for attacks.
#
# Does the fault help? On the bundled model with its earlier weights the published form left 69 % [58, 79] of the seen attacks, fitted where it is applied 86 % [76, 93], in the sound form 89 % [80, 95], and the undefended model 87 % [77, 94] (quoted from the earlier run in `docs/results/defences.md`, n = 84; in the main run of that page no form of it stops an attack within the budget, and these weights, too, are not the present ones). What the published form
# stops there comes from the fault, and in the sound form nothing that it stops can be seen.
#
# ## What this does not show
#
# - One small model, one token, one seed, 24 attacks a channel. In a large model harm may be spread over more directions, and less cleanly.
# - Nothing was generated here. Whether an edit stops attacks is another question: see the results page "Defences on the bundled model", from which the figures on published CARE above are quoted.
# - That a reader finds attacks does not make its direction a good one to write along. See the page "Repair".
# - The threshold holds for benign requests like those of the calibration set, on average over such sets.
#
# ## Exercises
#
# **1.** What is called benign decides what can be told apart. Fit and calibrate the readers again, against two easy harmless channels alone. Which reader gains most?
#
# <details><summary>Solution</summary>
#
# ```python
# easy = ("benign plain", "benign typographic")
# easy_rows, easy_calibration = (
#     rows_of([e for c in easy for e in organism.examples(c, split, n=20)]).rows(site, "last")
#     for split in ("fit", "calibration")
# )
# for rank in (1, 8):
#     again = SafetySubspace.fit(easy_rows, m, rank=rank, site=site)
#     gate = ConformalGate.calibrate(again.energy(easy_calibration), epsilon=0.05)
#     for channel, held in unseen.items():
#         print(rank, channel, round(float((again.energy(held.rows(site, "last")) > gate.threshold).float().mean()), 2))
# ```
#
# Everything opens, for energy of rank 1 and of rank 8, in all three channels: against easy benign requests an energy is as good as any reader. The hard ones (harmless questions that name a forbidden item) make the difference. A detector that was tested on easy benign requests was hardly tested.
#
# </details>
#
# **2.** The discriminant lies almost inside the eight directions. Read the eight coordinates with a classifier instead of adding up their energy. How much of the full classifier's reach comes back?
#
# <details><summary>Solution</summary>
#
# ```python
# weights = classifier_direction(wide.coordinates(b), wide.coordinates(m))
# gate = ConformalGate.calibrate(wide.coordinates(calibration.rows(site, "last")) @ weights, epsilon=0.05)
# for channel, held in unseen.items():
#     over = wide.coordinates(held.rows(site, "last")) @ weights > gate.threshold
#     print(channel, [round(x, 2) for x in clustered_rate(over.numpy(), held.groups)])
# ```
#
# A part: 0.75 [0.53, 0.90] of the typographic attacks, 0.79 [0.58, 0.93] of the wrapped and 0.42 [0.22, 0.63] of the spelled ones, where the classifier on all 160 dimensions opens for 0.96, 0.96 and 0.71. Against the energy of the same eight directions (0.62, 0.88 and 0.25) no difference can be told from 0: all these intervals overlap.
# By the point estimates the span, which leaves out a part of what the classifier reads, is more at fault than the energy as a reader; two dozen attacks do not settle it.
#
# </details>
#
# **3.** The fit's second eigenvalue of the textual attacks is large. Is it still large on rows that the fit did not see?
#
# <details><summary>Solution</summary>
#
# ```python
# choice = rules["textual", "auto"].diagnostics["auto_rank"]
# print([round(x, 1) for x in SafetySubspace.fit(b, t, rank=4).eigenvalues.tolist()])
# print([round(x, 1) for x in choice["heldout_ratios"][:4]])
# ```
#
# 30.4, 15.2, 12.7 and 8.2 in the fit; 7.4, 3.7, 7.6 and 1.5 on held-out items. The second shrinks to a quarter. The third is then twice as large as the second: the order of the fit is not that of held-out items.
#
# </details>

# %%
print(pd.Timestamp.today().date(), package_versions())
