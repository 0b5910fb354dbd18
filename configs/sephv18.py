"""sephv18: sephv14 with half of the balanced sampling (EXPERIMENTS 7.2, rows 23 and 24)."""

from ml_collections import ConfigDict

from configs import sephv14
from configs._chain import Row, resolve

ROWS = {
    "": Row(
        None,
        "what does balancing the negatives give? (row 23)",
        {"roi.sampler.balance_negatives": False},
        "box 31.4 (high confidence: yaml at 869210b)",
    ),
    "1": Row(
        None,
        "what does balancing the positives give? (row 24)",
        {"roi.sampler.balance_positives": False},
        "box 31.5 (high confidence: yaml at 869210b)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(sephv14.get_config("r128"), "sephv18", ROWS, row)
