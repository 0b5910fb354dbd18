"""Narrow configs that between them have every component in every place."""

from configs import base
from configs._chain import apply, plain

NORMS = ("none", "frozen_bn", "bn", "gn", "evonorm_s0")
NARROW = {
    "backbone.depth": 18,
    "backbone.width": 8,
    "fpn.channels": 16,
    "roi.canonical.size": 112.0,
    "roi.tiers": (),
    "mask.convs": 1,
    "mask.dim": 16,
    "mask.tiers": (),
    "test.detections": 20,
}
JOINT = {"name": "joint", "nms": 0.7, "train_pre": 9, "train_post": 9, "test_pre": 60}
PER_LEVEL = {"name": "per_level", "nms": 0.7, "pre": 90, "post": 30, "shrink": 3}
# A dense norm over two channels divides what nearly cancels: 256 give every group eight.
FC_DIMS = (256,)
SERIES = {  # the conventions of the published series
    "fpn.inputs": ("c3", "c4", "c5"),
    "fpn.extra": "conv_c5",
    "anchors.sizes": (32, 64, 96, 128),
    "anchors.ratio_is": "width_over_height",
    "anchors.offset": 0.5,
    "anchors.stride": "feature",
    "rpn.weights": (10.0, 10.0, 5.0, 5.0),
    "rpn.proposals": PER_LEVEL | {"test_exactly": False, "logit_floor": 0.005},
    "roi.levels": ("p3", "p4", "p5", "p6"),
    "roi.canonical": {"size": 112.0, "level": 4, "eps": 1e-6, "eps_inside_log": True},
    "roi.pooler": {"name": "crop_max", "bins": (2, 2)},
    "test.one_class_per_box": True,
    "test.nms_inclusive": True,
}
MODERN = {
    "anchors.sizes": (16, 32, 48, 64, 96),
    "rpn.proposals": JOINT | {"test_post": 25},
}
CASES = {
    "slim-evonorm-series-separate": SERIES
    | {
        "backbone.layout": "slim",
        "backbone.norm": "evonorm_s0",
        "fpn.norm": "evonorm_s0",
        "rpn.norm": "evonorm_s0",
        "roi.head": {"name": "separate", "conv_dims": (16, 16), "norm": "evonorm_s0"},
        "mask.norm": "evonorm_s0",
        "mask.deconv_norm": "evonorm_s0",
    },
    "msra-gn-modern-convolutions": MODERN
    | {
        "backbone.depth": 50,
        "backbone.width": 16,
        "backbone.layout": "msra",
        "backbone.norm": "gn",
        "fpn.norm": "gn",
        "fpn.lateral_norm": "gn",
        "rpn.convs": 2,
        "rpn.norm": "gn",
        "roi.head": {
            "name": "fast_rcnn_conv_fc",
            "conv_dims": (16,),
            "fc_dims": FC_DIMS,
            "conv_norm": "gn",
            "fc_norm": "gn",
        },
        "mask.norm": "gn",
        "mask.deconv_norm": "gn",
    },
    "torchvision-frozen-unaligned-unmasked": MODERN
    | {
        "mask_padding": False,
        "anchors.rounded": True,
        "anchors.stride": "feature_floor",
        "roi.canonical": {"size": 112.0, "level": 4, "eps": 1e-6, "eps_inside_log": False},
        "roi.pooler.aligned": False,
        "roi.class_agnostic": True,
        "roi.head.fc_dims": FC_DIMS,
    },
    "slim-frozen-conv_p6-separate_v2-boxes": MODERN
    | {
        "backbone.layout": "slim",
        "backbone.norm_eps": 1e-3,
        "fpn.norm": "frozen_bn",
        "fpn.extra": "conv_c5",
        "rpn.norm": "bn",
        "roi.head": {
            "name": "separate_v2",
            "fc_dims": FC_DIMS,
            "conv_dims": (16,),
            "norm": "bn",
        },
        "mask.enabled": False,
    },
}
RETINANET = {
    "rpn.name": "retinanet",
    "rpn.norm": "evonorm_s0",
    "rpn.weights": (1.0, 1.0, 1.0, 1.0),
    "rpn.proposals": {
        "name": "retinanet",
        "nms": 0.7,
        "pre": 90,
        "post": 30,
        "shrink": 3,
        "test_pre": 60,
        "test_score": 0.3,
        "test_nms": 0.5,
        "test_post": 25,
    },
}
CASCADE = {
    "roi.class_agnostic": True,
    "roi.cascade.ious": (0.5, 0.6, 0.7),
    "roi.cascade.weights": (
        (10.0, 10.0, 5.0, 5.0),
        (20.0, 20.0, 10.0, 10.0),
        (30.0, 30.0, 15.0, 15.0),
    ),
}
CASES |= {
    "slim-series-retinanet-boxes": SERIES
    | RETINANET
    | {"backbone.layout": "slim", "roi.head.fc_dims": FC_DIMS, "mask.enabled": False},
    "torchvision-cascade": MODERN
    | CASCADE
    | {"roi.head.fc_dims": FC_DIMS, "roi.head.fc_norm": "gn"},
    "series-cascade-separate_v2": SERIES
    | CASCADE
    | {
        "rpn.norm": "gn",
        "roi.head": {
            "name": "separate_v2",
            "fc_dims": FC_DIMS,
            "conv_dims": (16,),
            "norm": "evonorm_s0",
        },
        "mask.enabled": False,
    },
}
CASES |= {  # with an IoU branch
    # The conventions of row 15, sephv3.
    "series-low-iou-product": SERIES
    | {
        "fpn.inputs": ("c2", "c3", "c4", "c5"),
        "rpn.levels": ("p3", "p4", "p5", "p6"),
        "rpn.proposals": PER_LEVEL | {"test_exactly": True},
        "roi.levels": ("p2",),
        "roi.pooler": {"name": "crop_max", "bins": (1, 1)},
        "roi.class_agnostic": True,
        "roi.iou_branch": {"name": "v1", "negative_weight": 0.5},
        "roi.head": {
            "name": "separate_v2",
            "fc_dims": FC_DIMS,
            "conv_dims": (16, 16),
            "norm": "evonorm_s0",
        },
        "mask.enabled": False,
        "test.iou_score": "product",
    },
    "torchvision-iou-order": MODERN
    | {
        "roi.head.fc_dims": FC_DIMS,
        "roi.iou_branch": {"name": "v0"},
        "test.iou_score": "order",
    },
    "cascade-iou-order": MODERN
    | CASCADE
    | {
        "roi.head": {"name": "separate", "conv_dims": (16,), "norm": "gn"},
        "roi.iou_branch": {"name": "v0"},
        "mask.enabled": False,
        "test.iou_score": "order",
    },
}
CASES |= {
    "series-multi_scale-boxes": SERIES
    | {
        "roi.pooler": {"name": "multi_scale", "scale": 1.5, "level_of": "box"},
        "roi.head": {
            "name": "separate_v2",
            "fc_dims": FC_DIMS,
            "conv_dims": (16,),
            "norm": "evonorm_s0",
        },
        "mask.enabled": False,
    },
}
CASES |= {
    "series-hooks-bn": SERIES
    | {
        "heads_bn": {"eps": 1e-2, "decay": 0.5},
        "fpn.norm": "evonorm_s0",
        "fpn.before": "non_local",
        "fpn.after": "fusion",
        "roi.levels": ("f3",),
        "roi.head": {"name": "separate", "conv_dims": (16,), "norm": "bn"},
        "mask.norm": "bn",
        "mask.deconv_norm": "bn",
    },
    "modern-balance-unpadded": MODERN
    | {"mask_padding": False, "fpn.after": "balance", "roi.head.fc_dims": FC_DIMS},
}
CASES |= {
    "series-res5": SERIES
    | {
        "roi.levels": ("p3",),
        "roi.head": {"name": "res5", "blocks": 2, "width": 8, "norm": "bn", "eps": 1e-3},
        "mask.input": "head",
        "mask.pool": 7,
        "mask.convs": 0,
        "mask.norm": "bn",
        "mask.deconv_norm": "bn",
    },
}
HEADS = {  # with the keys that name a norm
    "fast_rcnn_conv_fc": (
        {"conv_dims": (16,), "fc_dims": FC_DIMS, "conv_norm": "", "fc_norm": ""},
        ("conv_norm", "fc_norm"),
    ),
    "separate": ({"conv_dims": (16, 16), "norm": ""}, ("norm",)),
    "separate_v2": ({"fc_dims": FC_DIMS * 2, "conv_dims": (16,), "norm": ""}, ("norm",)),
    "res5": ({"blocks": 2, "width": 8, "norm": ""}, ("norm",)),
    "shared_conv": ({"conv_dims": (16, 16), "branch_dim": 8, "norm": ""}, ("norm",)),
}


def config(changes):
    """The base config, narrow, with `changes`; values that are the base's already are left out."""
    made = base.get_config()
    for path, value in (NARROW | changes).items():
        node = made
        for name in path.split("."):
            node = node[name]
        if plain(node) != plain(value):
            apply(made, {path: value}, "a test")
    return made


def with_head(name, norm, more=()):
    """A config whose box head, RPN, FPN and mask head have one norm."""
    options, keys = HEADS[name]
    return config(
        {
            "roi.head": {"name": name} | options | dict.fromkeys(keys, norm),
            "rpn.norm": norm,
            "fpn.norm": norm,
            "fpn.lateral_norm": norm,
            "mask.norm": norm,
            "mask.deconv_norm": norm,
        }
        | dict(more)
    )
