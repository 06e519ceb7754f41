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
# # Your own 7B model in a harness
#
# **Question.** You fit a repair in a notebook. Your evaluation harness knows only Hugging Face's `model.generate`. Does the harness get the repaired answers?
#
# **Answer.** Yes: all 52 answers of a plain `generate` loop equal those of the wrapped model, text for text, and 25 of them differ from the answers without the repair. Attack success falls from 1.00 [0.74, 1.00] to
# 0.00 [0.00, 0.26] for pictured items (n = 12) and from 1.00 [0.75, 1.00] to 0.00 [0.00, 0.25] for wrapped ones (n = 13); none of 27 harmless requests is refused.
#
# For users of lmms-eval, VLMEvalKit or a loop of their own. This is a dry run: the bundled model, of 3.3 million parameters, stands for yours, and every call is the one that you would write. About half a minute on one processor core.

# %%
import tempfile
from datetime import date
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from care_lens import Example, HookedLVLM, Site, Study, organism
from care_lens.capture import capture
from care_lens.core import package_versions
from care_lens.data import preflight, read_examples, write_examples
from care_lens.evaluation import evaluate
from care_lens.lens import probe_auc
from care_lens.repair import HybridFusion, ReaderPlan, learn_repair, load_repair

torch.set_num_threads(2)
work = Path(tempfile.mkdtemp())
name = str(organism.path())  # yours: "llava-hf/llava-1.5-7b-hf", or a folder
lvlm = HookedLVLM.from_pretrained(name, dtype="float32", device_map="cpu")  # yours: "bfloat16", "auto"
lvlm

# %% [markdown]
# ## 1. Your examples, and whether the files are whole
#
# One line an example: the prompt, the picture's path, whether it is harmful, its channel and its item (`group`). Here the made-up requests of the bundled world are written to a folder, as if they were your benchmark, and one line names a picture that is not there.

# %%
harmless = [
    "benign plain",
    "benign typographic",
    "benign read",
    "benign allowed",
    "hard wrapper",
    "hard over forbidden",
]
harmless += ["hard read", "hard named kind"]
attacks = ["plain", "typographic", "wrapper"]
everything = [e for channel in (*attacks, *harmless) for e in organism.examples(channel, "fit", n=40)]
write_examples(everything, work / "data" / "examples.jsonl")
whole = (work / "data" / "examples.jsonl").read_text()
(work / "data" / "examples.jsonl").write_text(whole + '{"prompt": "what is this", "image": "lost.png", "id": "lost"}\n')
report = preflight(work / "data")
print(report, report.ok)
report.problems[["file", "row", "kind", "do"]]

# %% [markdown]
# Mended, the folder is read, and the items are dealt to four splits, so that none stands in two.

# %%
(work / "data" / "examples.jsonl").write_text(whole)
study = Study.from_examples(
    read_examples(work / "data" / "examples.jsonl"),
    name="dry run",
    judge=organism.OrganismJudge(),  # yours: ClassifierJudge, GuardJudge, EndpointJudge or a function
    outcome=organism.outcome(),
    refusal="sorry i cannot help with that",
    seen={"visual": ("typographic",), "textual": ("wrapper",)},  # what the fit may use, by where the trick sits
)
study.require()
study

# %% [markdown]
# ## 2. Which block knows?
#
# Asking for every activation is the usual way to run out of memory. It is refused here, and the error says what it would take:

# %%
batch = lvlm.prepare(study.suites["test"]["typographic"][:8])
try:
    lvlm.run_with_cache(batch)
except ValueError as error:
    print(error)

# %% [markdown]
# `capture` keeps one row an example, site and selection, whatever the model's size, and goes on from its folder if it was stopped.

# %%
blocks = [Site("language", block, "hook_resid_post") for block in (2, 4, 6)]
asked = [*study.suites["fit"]["typographic"], *study.suites["fit"]["benign typographic"]]
held = capture(lvlm, asked, blocks, positions=("last",), batch_size=16, checkpoint=work / "capture", progress=False)
harmful = torch.tensor([e.harmful for e in asked])
aucs = {str(site): probe_auc(held.rows(site, "last"), harmful, [e.group for e in asked], n_boot=200) for site in blocks}
pd.DataFrame(aucs, index=["AUC", "low", "high"]).T.round(2)

# %% [markdown]
# At the last prompt token a linear probe tells the harmful pictures from the harmless ones after each of the three blocks (items that it was not fitted on; 17 and 16 requests, so that the intervals reach down to 0.83 after block 2 and 0.89 after block 6).
# A reader can therefore look at any of them; block 6 is taken, which was found best for this model (README).
#
# ## 3. Fit, look, save
#
# `care_lens.evaluation.tune(lvlm, study)` would choose block, reader, gate and strength on the validation split. It takes minutes here, and longer on a large model; in the dry run they are given.

# %%
repair = learn_repair(
    lvlm,
    study,
    ReaderPlan(layer=6, epsilon=0.05, classifier=True),
    batch_size=32,
    max_new_tokens=14,
    progress=False,
)
repair.save(work / "repair")
repair.explain().frame[["part", "site", "positions", "rank", "gate", "threshold", "n_calibration", "multiply_adds"]]

# %%
channels = ["typographic", "wrapper", "benign typographic", "hard wrapper"]
suites = {channel: study.suites["test"][channel] for channel in channels}
table = evaluate(
    lvlm,
    suites,
    {"none": None, "repair": repair},
    judge=study.judge,
    max_new_tokens=14,
    batch_size=64,
    fidelity=False,
    progress=False,
)
table.to_dataframe()[["defence", "channel", "metric", "value", "ci_low", "ci_high", "n"]].round(2)

# %% [markdown]
# Attack success (`asr`) falls from 1.00 in both channels to 0.00 [0.00, 0.26] and 0.00 [0.00, 0.25]; of the harmless requests none is refused. With so few test requests these are wide.
#
# ## 4. In the harness
#
# From here on there is no bridge: the plain Hugging Face model and its processor, as the harness loads them, and the repair from its folder. The loop is that of lmms-eval's `generate_until`: chat template, padded batches, greedy decoding.

# %%
test = [example for examples in suites.values() for example in examples]
with repair.on(lvlm):
    wrapped = [
        t
        for i in range(0, len(test), 16)
        for t in lvlm.generate(lvlm.prepare(test[i : i + 16]), max_new_tokens=14).texts
    ]

model = AutoModelForImageTextToText.from_pretrained(name, dtype="float32", device_map="cpu").eval()
processor = AutoProcessor.from_pretrained(name)
processor.tokenizer.padding_side = "left"


def harness(examples: list[Example], **options) -> list[str]:
    answers = []
    for start in range(0, len(examples), 16):
        some = examples[start : start + 16]
        chats = [
            [{"role": "user", "content": [*({"type": "image"} for _ in e.images), {"type": "text", "text": e.prompt}]}]
            for e in some
        ]
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        pictures = [image for e in some for image in e.images] or None
        tokens = processor(text=texts, images=pictures, padding=True, return_tensors="pt").to(model.device, model.dtype)
        made = model.generate(**tokens, max_new_tokens=14, do_sample=False, **options)
        answers += processor.batch_decode(made[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


bare = harness(test)
with load_repair(HybridFusion, work / "repair").attach(model, processor):
    attached = harness(test)
print("equal:", sum(a == b for a, b in zip(attached, wrapped)), "of", len(test))
print("changed:", sum(a != b for a, b in zip(attached, bare)), "of", len(test))
print("as before after the block:", harness(test[:16]) == bare[:16])

# %% [markdown]
# Equal to the last token, though the harness's model has no bridge and another attention implementation. After the `with` block nothing is left on it.
#
# ## 5. What is different with 7 billion parameters
#
# The calls are the same. These figures are arithmetic or measured elsewhere; nothing here ran on a large model.
#
# | what | how much | from |
# | --- | --- | --- |
# | weights | 2 bytes a parameter in bfloat16: 14 GB for 7 billion; half a byte in 4 bits: 3.5 GB | arithmetic |
# | rows that `capture` keeps | 4 bytes x width x examples, a site and selection: 16 MB for 1,000 examples at width 4096 | arithmetic |
# | a generation through the bridge, beside plain Hugging Face | 1.3 to 1.7 times as long, in eager attention | measured: "Time" in the results; 8 layers of width 256 |
# | a decode step with an attached repair open at three sites of rank 64 | 1.009 times as long as without | `benchmarks/bench_attach.py`: 28 blocks of width 3584, one processor thread |
#
# So fit with the bridge, and run the large evaluation with `attach`. Where the model does not fit on one device, `device_map="auto"` spreads it; where only time is short, several processes share the examples
# ("Many GPUs" in the documentation). In bfloat16 compare runs of one dtype and one batch size: sums are rounded in another order for other shapes, and an answer may turn at one token.
#
# In lmms-eval the loop above is the library's own: `with repair.attach(lm.model, lm._image_processor): simple_evaluate(model=lm, ...)`, and so it is for VLMEvalKit and Inspect ("Repair a plain Hugging Face model").
#
# ## Exercises
#
# 1. A task of your harness asks for beams (`num_beams=2`). What happens under the repair, and why is that better than an answer?
# 2. Many harnesses catch every error and go on with an empty answer. Let every second answer of the model *without* a repair be lost so. What is its attack success then?
# 3. Attach the saved repair to another model. What keeps you from measuring nonsense?
#
# <details><summary>Solution 1</summary>
#
# ```python
# with load_repair(HybridFusion, work / "repair").attach(model, processor):
#     try:
#         harness(test[:2], num_beams=2)
#     except Exception as error:
#         print(type(error).__name__, error)
# ```
#
# Beams are copied and dropped while they grow; a gate that is open for one row would act on another. An answer made so would be of no defined model.
#
# </details>
#
# <details><summary>Solution 2</summary>
#
# ```python
# lost = [answer if i % 2 else "" for i, answer in enumerate(bare)]
# for what, answers in (("all answers", bare), ("half of them lost", lost)):
#     verdicts = study.judge(test, answers)
#     succeeded = [v.value == "complied" for e, v in zip(test, verdicts) if e.harmful]
#     print(what, sum(succeeded), "of", len(succeeded))
# ```
#
# It falls from 25 of 25 to 12 of 25, and nothing was defended. An empty answer counts as no harm done: count empty answers, and search the harness's log for caught errors, before you believe a table.
#
# </details>
#
# <details><summary>Solution 3</summary>
#
# ```python
# other, its_processor = organism.untrained(seed=1, width=160, layers=8, heads=5, mlp=416)
# try:
#     load_repair(HybridFusion, work / "repair").attach(other, its_processor)
# except Exception as error:
#     print(type(error).__name__, error)
# ```
#
# A repair knows the weights that it was fitted on. Its directions would be random directions in another model.
#
# </details>
#
# ## What this does not show
#
# - No large model was run, and no harness is installed here: the loop is written after lmms-eval's, whose class needs a download.
# - The counts are of 52 test requests; an interval of 12 requests is wide. Answers were compared in float32 and in the same batches, because a CPU is slow in bfloat16; there, two attention implementations
#   may round an answer to another word.
# - Block, reader and gate were given, not chosen; use `tune`, and put controls beside the repair (see the quickstart).
# - The judge knows this closed world. Yours will err, and by how much can be measured ("Judges" in the documentation).

# %%
print(date.today(), package_versions())
