"""Which tokens of which requests a step computes, and where their keys and values lie."""
