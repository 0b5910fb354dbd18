"""The parity report: our detector and a peer's with the same weights, layer by layer."""
