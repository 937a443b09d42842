"""Products with packed codes in Triton, for any format: a room hands in how a code becomes a number."""
