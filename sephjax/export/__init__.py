"""Models taken out of sephjax."""
