"""The plain backend, in torch's operators: the oracle of the others."""
