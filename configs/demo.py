"""The embedded default: a small Mask R-CNN that learns drawn shapes from nothing in minutes on a laptop.

Every part of the full detector is there (ResNet, FPN P2..P6, RPN, box and mask heads), only narrow, with
EvoNorm-S0 in place of frozen batch norm, so that it trains from random weights at batch 8.
"""

from ml_collections import ConfigDict

from configs import base
from configs._chain import Row, resolve

SIDES = {
    "short_sides": (128,),
    "long_side": 160,
    "aspects": (),
    "annotations": "",
    "images": "",
    "limit": 0,
}
DATA = {
    "data.source": "shapes",
    "data.train": {"split": "train", **SIDES},
    "data.eval": {"split": "validation", **SIDES},
    "data.max_objects": 8,
}
MODEL = {
    "backbone.depth": 18,
    "backbone.width": 32,
    "backbone.norm": "evonorm_s0",
    "fpn.channels": 64,
    "anchors.sizes": (16, 32, 64, 128, 256),
    "rpn.proposals": {
        "name": "joint",
        "nms": 0.7,
        "train_pre": 300,
        "train_post": 150,
        "test_pre": 300,
        "test_post": 100,
    },
    "roi.canonical.size": 112.0,
    "roi.samples": 64,
    "roi.head.fc_dims": (256, 256),
    "roi.tiers": (),
    "mask.convs": 2,
    "mask.dim": 64,
    "mask.tiers": (),
}
SOLVER = {
    "optimizer.freeze": (),
    "optimizer.clip": 10.0,
    "schedule.name": "cosine",
    "schedule.warmup_steps": 100,
    "train.steps": 900,
    "train.batch": 8,
    "eval.every": 0,
    "eval.batch": 16,
    "checkpoint.every": 300,
}
ROWS = {"": Row(None, "does everything work, on a laptop, in minutes?", DATA | MODEL | SOLVER)}


def get_config(row: str = "") -> ConfigDict:
    return resolve(base.get_config(), "demo", ROWS, row)
