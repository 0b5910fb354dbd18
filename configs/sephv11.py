"""sephv11, "4)" in the log: sephv2 without masks, with ATSS labels and balanced sampling (EXPERIMENTS 7.2, row 16)."""

from ml_collections import ConfigDict

from configs import fpn3
from configs._chain import Row, resolve

ROWS = {
    "": Row(
        None,
        "do ATSS labels and balanced sampling help? (row 16)",
        {
            "mask.enabled": False,
            "mask.norm": "none",  # of a head that is not there
            "mask.deconv_norm": "none",
            "rpn.proposals.test_exactly": False,  # the log's block is of 848414a or later
            "rpn.matcher": {
                "name": "atss",
                "low": 0.4,
                "high": 0.5,
                "ignore_band": True,
                "min_iou": 0.1,
            },
            "roi.sampler.balance_positives": True,
            "roi.sampler.balance_negatives": True,
        },
        "box 31.4 (high confidence: yaml at 869210b)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(fpn3.get_config("sephv2"), "sephv11", ROWS, row)
