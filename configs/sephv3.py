"""sephv3, "3)" in the log: P2 alone for ROIs, GIoU weighted by IoU, low matching, an IoU branch (EXPERIMENTS 7.2, row 15).

Ambiguous (EXPERIMENTS 8.4, item 5) is the state of the code, 3da3e9c or 8dbb200; the row is 3da3e9c, the only commit
with the linear class weight. Flipped by keys: 8dbb200's sampler is `roi.sampler.positive_groups` "truth", with as many
bins of negatives; the score of d4f8f1a is `test.iou_score` "none"; a weight of the IoU branch's backgrounds of 0.3
(item 3) is `roi.iou_branch.negative_weight`. `rpn.matcher` repeats the original's wrong level offsets and its distances in
shares of the canvas (EXPERIMENTS 8.3): for this row alone, `legacy_offsets` and `relative_distance` False put them right.
"""

from ml_collections import ConfigDict

from configs import fpn3
from configs._chain import Row, resolve

ROWS = {
    "": Row(
        None,
        "do boxes of low overlap help, from one fine map and ranked by a predicted IoU? (row 15)",
        {
            "mask.enabled": False,
            "mask.norm": "none",  # of a head that is not there
            "mask.deconv_norm": "none",
            "fpn.inputs": ("c2", "c3", "c4", "c5"),
            "rpn.levels": ("p3", "p4", "p5", "p6"),
            "rpn.matcher": {
                "name": "atss_v1",
                "top_k": 27,
                "min_iou": 0.1,
                "legacy_offsets": True,
                "relative_distance": True,
            },
            "roi.levels": ("p2",),
            "roi.pooler.bins": (1, 1),
            "roi.matcher.low": 0.3,
            "roi.matcher.high": 0.3,
            "roi.positive_iou": 0.5,
            "roi.sampler.balance_positives": True,
            "roi.sampler.balance_negatives": True,
            "roi.sampler.positive_groups": "iou",
            "roi.sampler.bins": 7,
            "roi.class_agnostic": True,
            "roi.class_weight": "linear",
            "roi.box_loss": {"name": "weighted_giou"},
            "roi.box_loss_scale": 6.0,
            "roi.iou_branch": {"name": "v1", "negative_weight": 0.5},
            "test.iou_score": "product",
        },
        "box 30.6 (medium confidence: yaml at 3da3e9c, the code within two commits)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(fpn3.get_config("sephv2"), "sephv3", ROWS, row)
