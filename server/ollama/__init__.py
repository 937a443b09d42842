"""Ollama's API, for editors and tools that were written for it: one model, streams of JSON lines."""
