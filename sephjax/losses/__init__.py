"""Per-element losses and the named terms made of them."""
