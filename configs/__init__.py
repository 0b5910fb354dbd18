"""Experiments as differences from their parents; importable without JAX."""
