"""Training of the bundled model from nothing: `python -m care_lens.organism.train --out DIR`.

Three stages, each saved when it ends so that a stopped run resumes: the vision tower learns to read, the whole learns to be helpful
in everything (forbidden items included), then short safety tuning teaches it to refuse plain text requests only.
"""
