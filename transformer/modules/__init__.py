"""The model: attention and its backends, norms, position encodings, layers, stacks, the assembly.

Ordinary Flax NNX modules that take plain arguments; `transformer.py` alone reads the configuration.
Imports `transformer.parallel`, `transformer.errors` and `transformer.knobs`.
"""
