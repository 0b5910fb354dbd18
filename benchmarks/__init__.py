"""Comparisons with peers on the same work: ratios taken back to back in one run."""
