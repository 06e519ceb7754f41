"""`reproduce`: a published table out of a recipe."""
