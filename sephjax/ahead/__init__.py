"""Compilation for accelerators that are not here, and what it tells of memory and work."""
