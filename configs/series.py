"""What every row of the series shares: its conventions, EXPERIMENTS 8.1, each a visible key.

Numbers in comments are the items of EXPERIMENTS 8.1. Item 14 (padding) is kept only in part: canvases are
multiples of 64, so that a feature cell is a whole number of pixels, and features are masked outside
the picture (`mask_padding`), so that a picture's detections do not depend on its canvas.

Choices where the original is ambiguous (EXPERIMENTS 8.2, 8.4): a picture keeps its proportions where its long side is at
the limit (`data.resize`; the original's resizing may have stretched it); an anchor or ROI of an IoU under 0.0625 has none
(item 9: a constant of a later operator); the mean over GPUs of what each GPU divided by its own count of positives (masks,
IoU branch, RetinaNet) is one division by the global count; instances reaching beyond the picture, which the original
dropped in training too, are clipped; published numbers are taken to be of the last checkpoint (item 8).
"""

from ml_collections import ConfigDict

from configs import base
from configs._chain import apply

INPUT = {
    "data.train.short_sides": (512, 544, 576, 608, 640),  # 15
    "data.train.long_side": 800,
    "data.eval.short_sides": (576,),
    "data.size_multiple": 64,
}
BACKBONE = {
    "backbone.layout": "slim",  # 1: stride in the last unit, taps c3 = block1 ...
    "backbone.trainable_affine": True,  # 2: statistics frozen, scale and offset trained
    "optimizer.freeze": (),  # 2: from the first convolution on
    "initializers": "xavier",  # slim's default: uniform weights, zero biases
    "fpn.inputs": ("c3", "c4", "c5"),
    "fpn.norm": "evonorm_s0",
    "fpn.extra": "conv_c5",  # 10
}
PROPOSALS = {
    "anchors.sizes": (64, 128, 256, 512),
    "anchors.ratio_is": "width_over_height",
    "anchors.offset": 0.5,
    "anchors.stride": "feature",  # 14
    "rpn.matcher": {
        "name": "max_iou",
        "low": 0.4,
        "high": 0.5,
        "low_quality": "single",
        "min_iou": 0.0625,
    },
    "rpn.sample_group": 4,  # 4: 256 anchors a GPU's batch of 4, not an image
    "rpn.weights": (10.0, 10.0, 5.0, 5.0),  # 3
    "rpn.box_loss": {"name": "giou"},
    "rpn.proposals": {  # 6: quotas by level, no joint ranking
        "name": "per_level",
        "nms": 0.7,
        "pre": 6_000,
        "post": 1_000,
        "shrink": 3,
        "test_exactly": False,  # True: a test picks as training does, exactly k a level, no floor
        "logit_floor": 0.005,  # at test time, on logits (EXPERIMENTS 8.2)
    },
}
ROI = {
    "roi.levels": ("p3", "p4", "p5", "p6"),
    "roi.canonical": {
        "size": 224.0,
        "level": 4,
        "eps": 1e-6,
        "eps_inside_log": True,
    },  # 8: 224 px -> p4
    "roi.pooler": {"name": "crop_max", "bins": (2, 2)},  # 8
    "roi.append_truth": 16,  # 7
    "roi.matcher": {
        "name": "max_iou",
        "low": 0.5,
        "high": 0.5,
        "low_quality": "none",
        "min_iou": 0.0625,
    },
    "roi.samples": 128,
    "roi.sampler.fill": "repeat",  # 7
    "roi.head": {
        "name": "fast_rcnn_conv_fc",
        "conv_dims": (),
        "fc_dims": (1024, 1024),
        "conv_norm": "none",
        "fc_norm": "gn",
    },  # 9
    "roi.box_loss": {"name": "smooth_l1", "beta": 1.0},
    "mask.binary_target": False,
    "heads_bn": {"eps": 1e-4, "decay": 0.997},  # slim's
}
TEST = {
    "test.one_class_per_box": True,  # 11
    "test.nms_inclusive": True,
    "test.candidates": 1_493,  # every proposal, with its best class, enters the last NMS
}
SOLVER = {
    "optimizer.decay": (r"^backbone/.*conv\d?/kernel$", r"^fpn/output"),  # 9
    "optimizer.clip": 32.0,  # 13
    "schedule": {
        "name": "step",
        "warmup_steps": 1_000,
        "warmup_from": 0.0,
        "milestones": (80_000, 100_000),
        "factor": 0.1,
        "floor": 1e-6,
    },  # 13
    "train.steps": 120_000,
    "train.batch": 12,  # 4 images on each of 3 GPUs
}


def get_config() -> ConfigDict:
    config = base.get_config()
    for part in (INPUT, BACKBONE, PROPOSALS, ROI, TEST, SOLVER):
        apply(config, part, "series")
    config.lineage = (*config.lineage, "series")
    config.name = "series"
    return config
