"""sephv16: sephv14 with uniform sampling (EXPERIMENTS 7.2, row 22)."""

from ml_collections import ConfigDict

from configs import sephv14
from configs._chain import Row, resolve

ROWS = {
    "": Row(
        None,
        "what does balanced sampling give? (row 22)",
        {"roi.sampler.balance_positives": False, "roi.sampler.balance_negatives": False},
        "box 31.1 (high confidence: yaml at 869210b)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(sephv14.get_config("r128"), "sephv16", ROWS, row)
