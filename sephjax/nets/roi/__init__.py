"""Heads on pooled regions."""
