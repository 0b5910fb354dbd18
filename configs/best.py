"""What the series would look like today: its best ideas on today's Mask R-CNN, one row each, with today's recipe.

NOTHING OF IT WAS TRAINED, neither here nor elsewhere: the rows build and step, what they reach is unknown. What
is known of their parents: `mask_rcnn` has box 38.6, mask 35.2 (detectron2's 1x), and detectron2 has large-scale jitter
with 100 epochs (`new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ`, from scratch with SyncBN), whose rate, batch, steps, decay
and warm-up `long` takes over. In the log each idea is a row on older ground: ATSS4 (20), balanced sampling (22), the
weight by IoU (17), GIoU x8 (28), p2..p6 (1), EvoNorm (9, 11), the cascade (33).

Rows stand in order, each on the one before; the family's head is all of them, EMA being the last. `gn` and `frozen_bn`
are its twins. The backbone has frozen batch norm in all three, since only for it there are ImageNet weights of this
ResNet (give them with `init.format` and `init.path`); the rows differ in what normalises pyramid and heads.

The weight by IoU is centred at 0.5 in every stage of the cascade, as in the log, where EXPERIMENTS 8.3 takes it for
an oversight; there is no key for it.
"""

from ml_collections import ConfigDict

from configs import cascade, mask_rcnn
from configs._chain import Row, resolve

EVONORM_HEAD = {
    "name": "separate_v2",
    "fc_dims": (1024, 1024),
    "conv_dims": (256,) * 4,
    "norm": "evonorm_s0",
}


def normed(name: str) -> dict[str, str]:
    """The lines that give pyramid and heads another norm."""
    keys = ("fpn.norm", "roi.head.norm", "mask.norm", "mask.deconv_norm")
    return dict.fromkeys(keys, name)


ROWS = {
    "atss": Row(
        None,
        "do ATSS labels without an ignored band help the RPN?",
        {
            "rpn.matcher": {
                "name": "atss",
                "low": 0.4,
                "high": 0.5,
                "ignore_band": False,
                "min_iou": 0.1,
            }
        },
    ),
    "balanced": Row(
        "atss",
        "does it help to sample ROIs evenly over objects and over IoU?",
        {"roi.sampler.balance_positives": True, "roi.sampler.balance_negatives": True},
    ),
    "weight": Row(
        "balanced",
        "does it help to count ROIs near IoU 0.5 less in the class loss?",
        {"roi.class_weight": "quadratic"},
    ),
    "giou": Row(
        "weight",
        "does a GIoU box loss, eight times as heavy, help?",
        {"roi.box_loss": {"name": "giou"}, "roi.box_loss_scale": 8.0},
    ),
    "p6": Row(
        "giou",
        "do ROIs from p2..p6, each a level finer, with p6 from c5, help?",
        {
            "fpn.extra": "conv_c5",
            "data.size_multiple": 64,  # so that a p6 cell lies alike on every canvas
            "roi.levels": ("p2", "p3", "p4", "p5", "p6"),
            "roi.canonical.level": 3,
        },
    ),
    "evonorm": Row(
        "p6",
        "do EvoNorm and towers of their own for class and box help?",
        {
            "fpn.norm": "evonorm_s0",
            "roi.head": EVONORM_HEAD,
            "mask.norm": "evonorm_s0",
            "mask.deconv_norm": "evonorm_s0",
        },
    ),
    "cascade": Row(
        "evonorm",
        "do three stages at rising IoU help?",
        cascade.STAGES,
    ),
    "long": Row(
        "cascade",
        "do 100 epochs with a cosine help, without stronger augmentation?",
        {
            "train.steps": 184_375,
            "train.batch": 64,
            "optimizer.lr": 0.1,
            "optimizer.weight_decay": 4e-5,
            "optimizer.clip": 32.0,  # the series': GIoU x8 is steep at first
            "schedule.name": "cosine",
            "schedule.warmup_steps": 500,
            "schedule.warmup_from": 0.067,
        },
    ),
    "jitter": Row(
        "long",
        "does large-scale jitter (a tenth to twice of 1024 px) help?",
        {"data.jitter": {"low": 0.1, "high": 2.0, "crop": 1024}},
    ),
    "copy_paste": Row(
        "jitter",
        "do objects pasted from another picture onto every one help?",
        {"data.copy_paste": 1.0},
    ),
    "": Row(
        "copy_paste",
        "do averaged weights help? All ingredients together",
        {"train.ema": 0.9998},
    ),
    "gn": Row("", "EvoNorm or group norm with ReLU?", normed("gn")),
    "frozen_bn": Row(
        "",
        "EvoNorm or no norm at all beyond the backbone's frozen one, as detectron2 has it?",
        normed("none"),
    ),
}


def get_config(row: str = "") -> ConfigDict:
    return resolve(mask_rcnn.get_config(), "best", ROWS, row)
