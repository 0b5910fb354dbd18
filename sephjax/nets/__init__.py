"""Flax NNX modules; the only package that imports flax."""
