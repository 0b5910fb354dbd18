"""Pure functions on boxes, masks and features: one image, static shapes, no state."""
