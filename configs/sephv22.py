"""sephv22: sephv14 with ROIs from the finest level alone (EXPERIMENTS 7.2, row 32)."""

from ml_collections import ConfigDict

from configs import sephv14
from configs._chain import Row, resolve

ROWS = {
    "": Row(
        None,
        "does the finest level alone do? (row 32)",
        {"roi.levels": ("p3",)},
        "box 31.3 (high confidence: yaml at 869210b)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(sephv14.get_config("r128"), "sephv22", ROWS, row)
