"""Structured output: a request's text kept within a grammar, by llguidance.

structured_outputs.py   what a client asks for -> llguidance's grammar, as text     torch-free
compiler.py             text -> GrammarState, in threads of the engine process, within limits
state.py                the grammar of one request, moved along its output tokens
masking.py              which tokens may come next, for the rows of a batch
"""
