"""Encoders: models that read a text whole and give its embedding, or the score of a pair. No cache, no steps."""
