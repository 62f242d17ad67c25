"""Discrepancy-constrained reinforcement learning of language models in JAX. Import the module you
mean.
"""

__version__ = "0.2.0"
