"""Weights of other libraries, in by table."""
