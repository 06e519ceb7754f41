"""Training of the bundled model from nothing: `python -m care_lens.organism.train --out DIR`.

Four stages, each saved when it ends so that a stopped run resumes: the vision tower learns to read and what words mean, and, beside it, the
language model learns its world from text; then projector and language model learn to be helpful in everything, pictures and forbidden
items included; then a short safety tuning teaches blocks 1 to 3 refusal of plain text requests only, with a penalty for leaving the
model before it. On two cores the helpful stage alone takes about three hours; on an H100 all stages take about eight minutes.
"""
