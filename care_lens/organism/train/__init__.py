"""Training of the bundled model from nothing: `python -m care_lens.organism.train --out DIR`.

Five stages, each saved when it ends so that a stopped run resumes: the vision tower learns to read, projector and language
model learn to be helpful in everything (forbidden items included), practise that, and practise recall in more than one hop, then short safety tuning teaches
refusal of plain text requests only.
"""
