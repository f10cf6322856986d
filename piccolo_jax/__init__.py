"""Train one text-embedding model for every task: the Piccolo2 recipe in JAX."""

__version__ = "0.1.0"
