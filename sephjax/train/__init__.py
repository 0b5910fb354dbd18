"""Optimizer, sharding, the train step and the loop around it."""
