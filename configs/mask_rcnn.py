"""Mask R-CNN with today's conventions (detectron2's), R50-FPN.

Published for the 1x recipe (detectron2 model zoo; 90,000 steps at batch 16, from the MSRA weights of row `caffe`): box AP
38.6, mask AP 35.2. Not run here in full; `overfit` is measured in docs/RESULTS.md.
"""

from ml_collections import ConfigDict

from configs import base
from configs._chain import Row, plain, resolve

SIXTEEN = {  # trained on and evaluated on
    "annotations": "",
    "images": "",
    "split": "train",
    "limit": 16,
    "short_sides": (320,),
    "long_side": 480,
    "aspects": (),
}
BASE = plain(base.get_config())
ROWS = {
    "": Row(
        None,
        "Mask R-CNN R50-FPN 1x",
        {},
        "box 38.6, mask 35.2 (detectron2 model zoo, with the weights of `caffe`)",
    ),
    "box_only": Row(
        "",
        "Faster R-CNN: what do boxes give alone?",
        {"mask.enabled": False},
        "box 37.9 (detectron2 model zoo)",
    ),
    "caffe": Row(
        "",
        "MSRA weights: stride in the first 1x1, BGR",
        {
            "backbone.layout": "msra",
            "init.format": "keras",
        },
    ),
    "torchvision": Row(
        "",
        "does the model agree with torchvision's maskrcnn_resnet50_fpn number for number?",
        {
            "mask_padding": False,
            "anchors": {**BASE["anchors"], "rounded": True, "stride": "feature_floor"},
            "rpn": {  # normalizer, beta and the numbers of proposals differ
                "name": "rpn",
                "levels": (),
                "convs": 1,
                "norm": "none",
                "matcher": {
                    "name": "max_iou",
                    "low": 0.3,
                    "high": 0.7,
                    "low_quality": "all",
                    "min_iou": 0.0,
                },
                "samples": 256,
                "positive_fraction": 0.5,
                "sample_group": 1,
                "weights": (1.0, 1.0, 1.0, 1.0),
                "min_size": 1e-3,
                "box_loss": {"name": "smooth_l1", "beta": 1 / 9},
                "class_loss": {"name": "sigmoid"},
                "class_loss_scale": 1.0,
                "box_loss_scale": 1.0,
                "normalizer": "sampled",
                "proposals": {
                    "name": "joint",
                    "nms": 0.7,
                    "train_pre": 2_000,
                    "train_post": 2_000,
                    "test_pre": 1_000,
                    "test_post": 1_000,
                },
            },
            "roi.canonical": {"size": 224.0, "level": 4, "eps": 1e-6, "eps_inside_log": False},
            "roi.pooler.aligned": False,
            "roi.box_loss.beta": 1 / 9,
            "mask.binary_target": False,
            # All pairs over the threshold: of the classes of a proposal at most 19 are over 0.05.
            "test": {**BASE["test"], "min_size": 1e-2, "candidates": 19_000},
        },
        "box 37.9, mask 34.6 (torchvision, COCO_V1)",
    ),
    "box_only_torchvision": Row(
        "torchvision",
        "does the model agree with torchvision's fasterrcnn_resnet50_fpn number for number?",
        {"mask.enabled": False},
        "box 37.0 (torchvision, COCO_V1)",
    ),
    "torchvision_v2": Row(
        "torchvision",
        "does the model agree with torchvision's maskrcnn_resnet50_fpn_v2 number for number?",
        {
            "backbone.norm": "bn",
            "fpn.norm": "bn",
            "fpn.lateral_norm": "bn",
            "rpn.convs": 2,
            "roi.head": {
                "name": "fast_rcnn_conv_fc",
                "conv_dims": (256, 256, 256, 256),
                "fc_dims": (1024,),
                "conv_norm": "bn",
                "fc_norm": "none",
            },
            "mask.norm": "bn",
        },
        "box 47.4, mask 41.8 (torchvision, COCO_V1 of v2: a longer recipe than this family's)",
    ),
    "torchvision_msra": Row(
        "torchvision",
        "torchvision's losses and initial weights on an MSRA backbone",
        {
            "initializers": "torchvision",
            "mask_padding": True,
            "backbone.layout": "msra",
            "init.format": "keras",
        },
    ),
    "overfit": Row(
        "torchvision_msra",
        "can it learn 16 real pictures by heart in 500 steps?",
        {
            "data.train": SIXTEEN,
            "data.eval": SIXTEEN,
            "train": {**BASE["train"], "steps": 500, "batch": 2, "log_every": 10},
            "eval": {**BASE["eval"], "every": 100, "batch": 2},
            "checkpoint": {"every": 100, "keep": 1},
            "optimizer.lr": 0.01,
            "optimizer.clip": 32.0,
            "schedule": {
                "name": "step",
                "warmup_steps": 50,
                "warmup_from": 0.001,
                "milestones": (350,),
                "factor": 0.1,
                "floor": 0.0,
            },
        },
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(base.get_config(), "mask_rcnn", ROWS, row)
