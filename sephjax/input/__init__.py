"""COCO-like sources, host transforms and the Grain pipeline."""
