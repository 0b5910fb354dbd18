"""The FPN-3 table up to sephv2: base line, what is around the pyramid, which box head (EXPERIMENTS 7.2, rows 2-12).

Published numbers are mAP on val2017, not run here. These rows, the C3 table and sephv3 pick test proposals as in
training, exactly k a level and without a threshold on logits (EXPERIMENTS 3.6: before commit 848414a); the later rows'
way is `--config.rpn.proposals.test_exactly=False`. Batch norm in the heads takes the statistics of each device's own
images, as the original did of each GPU's 4.

Row 12 is ambiguous (EXPERIMENTS 8.4, item 3): backgrounds may have weighed 0, 0.3 or 0.5 in the loss of its IoU
branch. The row has 0.3, of the commit that logged it; the others are
`--config.roi.iou_branch.negative_weight=0.0` and `=0.5`.
"""

from ml_collections import ConfigDict

from configs import series
from configs._chain import Row, resolve

EVONORM_MASKS = {"mask.norm": "evonorm_s0", "mask.deconv_norm": "evonorm_s0"}
SEPARATE = {"name": "separate", "conv_dims": (256,) * 4, "norm": "bn"}
SEPARATE_V2 = {
    "name": "separate_v2",
    "fc_dims": (1024, 1024),
    "conv_dims": (256,) * 4,
    "norm": "bn",
}

ROWS = {
    "": Row(
        None,
        "the base line: what does Mask R-CNN give on p3..p6 of shallow taps? (row 2)",
        {"mask.norm": "bn", "mask.deconv_norm": "bn", "rpn.proposals.test_exactly": True},
        "box 26.7, mask 25.2 (high confidence: yaml at f42944f)",
    ),
    "evonorm_masks": Row(
        "",
        "do a cosine and an EvoNorm mask head help? (row 3)",
        {"schedule.name": "cosine", **EVONORM_MASKS},
        "box 28.5, mask 26.2 (high confidence: yaml at d18b4ff)",
    ),
    "p3": Row(
        "",
        "does the finest level alone do, under a cosine? (row 4)",
        {"schedule.name": "cosine", "roi.levels": ("p3",)},
        "box 28.3, mask 26.2 (high confidence: yaml at 911cd7b)",
    ),
    "hooks": Row(
        "",
        "self-attention before the pyramid, and ROIs from one map fused of all levels (row 5)",
        {
            "schedule.name": "cosine",
            "fpn.before": "non_local",
            "fpn.after": "fusion",
            "roi.levels": ("f3",),
        },
        "box 28.0, mask 26.0 (high confidence: yaml at 911cd7b, with 120 000 steps)",
    ),
    "hooks_x2": Row(
        "hooks",
        "the same for twice as long (row 6)",
        {"train.steps": 240_000},
        "box 28.5, mask 26.3 (high confidence: yaml at 911cd7b)",
    ),
    "balance": Row(
        "evonorm_masks",
        "does a refined mean of all levels, added to each, help? (row 7)",
        {"fpn.after": "balance"},
        "box 29.3, mask 26.9 (high confidence: yaml at 2af8bdc)",
    ),
    "seph_bn": Row(
        "",
        "do class and box want towers of their own, with batch norm? (row 8)",
        {"roi.head": SEPARATE},
        "box 7.0, mask 7.7 (low to medium confidence: no yaml; step schedule, ReLU, mask head's BN assumed)",
    ),
    "seph": Row(
        "seph_bn",
        "the same with EvoNorm in both heads and a cosine (row 9)",
        {"roi.head.norm": "evonorm_s0", **EVONORM_MASKS, "schedule.name": "cosine"},
        "box 29.6, mask 27.0 (high confidence: yaml at 911cd7b)",
    ),
    "sephv2_bn": Row(
        "",
        "does the class rather want dense layers, with batch norm? (row 10)",
        {"roi.head": SEPARATE_V2},
        "box 13.3, mask 13.6 (low to medium confidence: no yaml; step schedule, ReLU, mask head's BN assumed)",
    ),
    "sephv2": Row(
        "sephv2_bn",
        "the same with EvoNorm in both heads and a cosine (row 11, v2)",
        {"roi.head.norm": "evonorm_s0", **EVONORM_MASKS, "schedule.name": "cosine"},
        "box 30.0, mask 27.4 (high confidence: yaml at 911cd7b)",
    ),
    "pred_iou": Row(
        "sephv2",
        "does a score times a predicted IoU rank better? (row 12)",
        {
            "roi.iou_branch": {"name": "v1", "negative_weight": 0.3},
            "test.iou_score": "product",
        },
        "box 30.6, mask 28.1 (medium confidence: yaml of sephv4_1 at d4f8f1a, weight 0, 0.3 or 0.5)",
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(series.get_config(), "fpn3", ROWS, row)
