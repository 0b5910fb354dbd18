"""Cascade R-CNN on sephv14: three box heads, each refines the boxes of the one before (EXPERIMENTS 7.2, row 33)."""

from ml_collections import ConfigDict

from configs import sephv14
from configs._chain import Row, resolve

STAGES = {
    "roi.class_agnostic": True,
    "roi.cascade.ious": (0.5, 0.6, 0.7),
    "roi.cascade.weights": (
        (10.0, 10.0, 5.0, 5.0),
        (20.0, 20.0, 10.0, 10.0),
        (30.0, 30.0, 15.0, 15.0),
    ),
}
ROWS = {
    "": Row(
        None,
        "do three stages at rising IoU help? (row 33)",
        STAGES,
        "box 33.8 (high confidence: yaml at 869210b)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(sephv14.get_config("r128"), "cascade", ROWS, row)
