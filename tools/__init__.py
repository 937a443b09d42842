"""Command-line verbs: each file here is a script and a `nibble` verb."""
