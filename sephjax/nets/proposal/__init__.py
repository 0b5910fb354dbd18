"""Region proposals."""
