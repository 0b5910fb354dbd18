"""The series in small: its questions on drawn shapes (docs/RESULTS.md, the study).

The base is `sephv14:r128` divided by four: pictures of 128x128 (one canvas) instead of 512..640, anchors 16..128, 32 ROIs, a narrow
ResNet-18. Where the series starts from an ImageNet backbone, all rows start from that of `pretrain`, a plain
detector of the same shapes without norms in its heads. Each row flips one thing that the log drew a conclusion from.
"""

from ml_collections import ConfigDict

from configs import cascade, sephv14
from configs._chain import Row, resolve

SIDES = {
    "short_sides": (128,),
    "long_side": 128,
    "aspects": (),
    "annotations": "",
    "images": "",
    "limit": 0,
}
SMALL = {
    "init.format": "sephjax",  # init.path: the workdir of `pretrain`
    "init.backbone_only": True,
    "data.source": "shapes",
    "data.train": {"split": "train", **SIDES},
    "data.eval": {"split": "validation", **SIDES},
    "data.shapes": {
        "set": "hard",
        "train_images": 16_384,
        "eval_images": 256,
        "height": 128,
        "width": 128,
        "max_objects": 8,
    },
    "data.max_objects": 8,
    "backbone.depth": 18,
    "backbone.width": 16,
    "backbone.norm": "evonorm_s0",
    "backbone.trainable_affine": False,
    "fpn.channels": 32,
    "anchors.sizes": (16, 32, 64, 128),
    "rpn.proposals.pre": 1_500,
    "rpn.proposals.post": 250,
    "roi.canonical.size": 56.0,
    "roi.samples": 32,
    "roi.append_truth": 4,
    "roi.head.fc_dims": (128, 128),
    "roi.head.conv_dims": (32, 32, 32, 32),
    "roi.tiers": (),
    "heads_bn": {"eps": 1e-5, "decay": 0.9},  # 0.997 would not forget its start in so few steps
    "mask.dim": 32,
    "mask.tiers": (),
    "schedule.warmup_steps": 100,
    "train.steps": 600,
    "train.batch": 8,
    "eval.every": 0,
    "eval.batch": 16,
    "checkpoint.every": 600,
    "checkpoint.keep": 1,
}
MASKS = {"mask.enabled": True, "mask.norm": "evonorm_s0", "mask.deconv_norm": "evonorm_s0"}
ROWS = {
    "": Row(None, "the parent of all rows of the study", SMALL),
    "pretrain": Row(
        "",
        "the backbone that all other rows start from",
        {
            "init.format": "none",
            "init.backbone_only": False,
            "roi.head": {"name": "fast_rcnn_conv_fc", "fc_dims": (128, 128)},
            "optimizer.lr": 0.04,
            "optimizer.clip": 10.0,
            "train.steps": 5_000,
        },
    ),
    "bn": Row("", "EvoNorm or batch norm in the box head?", {"roi.head.norm": "bn"}),
    "gn": Row("", "EvoNorm or group norm in the box head?", {"roi.head.norm": "gn"}),
    "step": Row(
        "",
        "cosine or step schedule?",
        {"schedule.name": "step", "schedule.milestones": (400, 500)},
    ),
    "r128": Row("", "four times as many ROIs (512 for 128 in the log)?", {"roi.samples": 128}),
    "giou": Row("", "GIoU for smooth L1?", {"roi.box_loss": {"name": "giou"}}),
    "giou8": Row("giou", "GIoU times 8?", {"roi.box_loss_scale": 8.0}),
    "plain": Row(
        "",
        "plain sampling for balanced?",
        {"roi.sampler.balance_positives": False, "roi.sampler.balance_negatives": False},
    ),
    "iou": Row(
        "",
        "plain IoU matching for ATSS in the RPN?",
        {
            "rpn.matcher": {
                "name": "max_iou",
                "low": 0.4,
                "high": 0.5,
                "low_quality": "single",
                "min_iou": 0.0625,
            }
        },
    ),
    "cascade": Row(
        "",
        "three stages at rising IoU for one?",
        {
            **cascade.STAGES,
            "roi.cascade.append": 2,  # 8 of 128 ROIs in the series
        },
    ),
    "masks": Row("", "EvoNorm or batch norm in the mask head?", MASKS),
    "masks_bn": Row(
        "masks",
        "the other arm of `masks`: batch norm in the mask head",
        {"mask.norm": "bn", "mask.deconv_norm": "bn"},
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(sephv14.get_config("r128"), "study", ROWS, row)
