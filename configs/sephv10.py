"""sephv10: sephv2 without masks whose class and box share four convolutions (EXPERIMENTS 7.2, row 13).

The log calls its heads standard, its file names Res5ROIHeads; without masks both mean the same (EXPERIMENTS 4.4).
"""

from ml_collections import ConfigDict

from configs import fpn3
from configs._chain import Row, resolve

ROWS = {
    "": Row(
        None,
        "do class and box need layers of their own from the start? (row 13)",
        {
            "mask.enabled": False,
            "mask.norm": "none",  # of a head that is not there
            "mask.deconv_norm": "none",
            "rpn.proposals.test_exactly": False,  # the log's block is of 848414a or later
            "roi.sampler.balance_positives": True,
            "roi.sampler.balance_negatives": True,
            "roi.head": {
                "name": "shared_conv",
                "conv_dims": (384,) * 4,
                "branch_dim": 256,
                "norm": "evonorm_s0",
            },
        },
        "box 30.4 (high confidence: yaml at 869210b)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(fpn3.get_config("sephv2"), "sephv10", ROWS, row)
