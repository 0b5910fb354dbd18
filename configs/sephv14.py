"""sephv14: separate EvoNorm-S0 box and class towers over ATSS proposals, boxes only (EXPERIMENTS 0.1, 7.3)."""

from ml_collections import ConfigDict

from configs import series
from configs._chain import Row, resolve

ROWS = {
    "": Row(
        None,
        "do 512 ROIs an image help? (row 18)",
        {
            "mask.enabled": False,
            "rpn.matcher": {
                "name": "atss",
                "low": 0.4,
                "high": 0.5,
                "ignore_band": True,
                "min_iou": 0.1,
            },
            "roi.samples": 512,
            "roi.sampler": {"balance_positives": True, "balance_negatives": True, "fill": "repeat"},
            "roi.head": {
                "name": "separate_v2",
                "fc_dims": (1024, 1024),
                "conv_dims": (256,) * 4,
                "norm": "evonorm_s0",
            },
            "roi.class_weight": "quadratic",
            "schedule.name": "cosine",
        },
        "box 33.1 (high confidence: yaml at e85c996)",
    ),
    "r128": Row(
        "",
        "the same with 128 ROIs (row 17)",
        {"roi.samples": 128},
        "box 31.5 (high confidence: yaml at 869210b)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(series.get_config(), "sephv14", ROWS, row)
