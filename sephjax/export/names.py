"""Table of the PyTorch twin: our paths, its names and how kernels are laid out; no torch here."""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from configs._chain import plain
from sephjax.errors import UserError
from sephjax.weights import table

Rules = list[table.Rule]
POOLED = table.fc_after_pool(7, 7)  # of a box head's first dense layer


def _layer(ours: str, theirs: str, kernel: table.Transform) -> Rules:
    return [
        table.Rule(f"{ours}/kernel", f"{theirs}.weight", kernel),
        table.Rule(f"{ours}/bias", f"{theirs}.bias"),
    ]


def _norm(ours: str, theirs: str) -> Rules:
    kinds = {
        "gamma": "weight",
        "beta": "bias",
        "v": "v",
        "mean": "running_mean",
        "variance": "running_var",
    }
    return [table.Rule(f"{ours}/{a}", f"{theirs}.{b}") for a, b in kinds.items()]


def _conv_tower(ours: str, theirs: str) -> Rules:
    return [
        *_layer(ours + "/conv{i}", theirs + ".{i}.conv", table.CONV),
        *_norm(ours + "/norm{i}", theirs + ".{i}.norm"),
    ]


def _rpn_tower(ours: str, theirs: str) -> Rules:
    """Convolutions that all levels share, norms that they do not."""
    return [
        *_layer(ours + "/conv{i}", theirs + ".{i}.conv", table.CONV),
        *_norm(ours + "/norm{i}_p{l}", theirs + ".{i}.norms.p{l}"),
    ]


def _fc_tower(ours: str, theirs: str, count: int) -> Rules:
    """`count` dense layers, the first on a pooled map."""
    rules = _norm(ours + "/norm{i}", theirs + ".{i}.norm")
    for i in range(count):
        kernel = table.LINEAR if i else POOLED
        rules += _layer(f"{ours}/fc{i}", f"{theirs}.{i}.fc", kernel)
    return rules


def _block(ours: str, theirs: str) -> Rules:
    """A residual unit."""
    return [
        *_layer(ours + "/conv{c}", theirs + ".conv{c}", table.CONV),
        *_norm(ours + "/norm{c}", theirs + ".norm{c}"),
        *_layer(ours + "/shortcut_conv", theirs + ".shortcut_conv", table.CONV),
        *_norm(ours + "/shortcut_norm", theirs + ".shortcut_norm"),
    ]


BACKBONE = [
    *_layer("backbone/stem/conv", "backbone.stem.conv", table.CONV),
    *_norm("backbone/stem/norm", "backbone.stem.norm"),
    *_block("backbone/stage{s}/block{b}", "backbone.layer{s}.{b}"),
]
FPN = [
    *_layer("fpn/lateral{l}", "fpn.lateral.{l}", table.CONV),
    *_norm("fpn/lateral_norm{l}", "fpn.lateral_norm.{l}"),
    *_layer("fpn/output{l}", "fpn.output.{l}.conv", table.CONV),
    *_norm("fpn/output_norm{l}", "fpn.output.{l}.norm"),
    *_layer("fpn/extra", "fpn.extra.conv", table.CONV),
    *_norm("fpn/extra_norm", "fpn.extra.norm"),
]
_ATTENTION, _THEIR_ATTENTION = "fpn_before/c{l}", "fpn_before.c{l}"
HOOKS = {
    "none": [],
    "non_local": [
        *(
            rule
            for part in ("query", "key", "value", "project")
            for rule in _layer(f"{_ATTENTION}/{part}", f"{_THEIR_ATTENTION}.{part}", table.CONV)
        ),
        *_norm(f"{_ATTENTION}/norm", f"{_THEIR_ATTENTION}.norm"),
        table.Rule(f"{_ATTENTION}/gain", f"{_THEIR_ATTENTION}.gain"),
    ],
    "fusion": [
        *_layer("fpn_after/conv", "fpn_after.conv", table.CONV),
        *_norm("fpn_after/norm", "fpn_after.norm"),
    ],
}
HOOKS["balance"] = HOOKS["fusion"]

_RPN_PREDICTORS = [
    *_layer("rpn/logits", "rpn.logits", table.CONV),
    *_layer("rpn/deltas", "rpn.deltas", table.CONV),
]
RPNS = {
    "rpn": [*_rpn_tower("rpn", "rpn.convs"), *_RPN_PREDICTORS],
    "retinanet": [
        *_rpn_tower("rpn/classify", "rpn.classify"),
        *_rpn_tower("rpn/refine", "rpn.refine"),
        *_RPN_PREDICTORS,
    ],
}
MASK = [
    *_conv_tower("mask_head", "mask_head.tower"),
    *_layer("mask_head/deconv", "mask_head.deconv", table.CONV_TRANSPOSE),
    *_norm("mask_head/deconv_norm", "mask_head.deconv_norm"),
    *_layer("mask_head/predictor", "mask_head.predictor", table.CONV),
]


def _predictors(logits: table.Transform, deltas: table.Transform) -> Rules:
    return [
        *_layer("box_head/logits", "box_head.logits", logits),
        *_layer("box_head/deltas", "box_head.deltas", deltas),
        *_layer("box_head/iou", "box_head.iou", deltas),  # of the IoU branch
    ]


def _fast_rcnn_conv_fc(options: Mapping[str, Any]) -> Rules:
    fcs = len(options.get("fc_dims", (1024, 1024)))
    last = table.LINEAR if fcs else POOLED
    return [
        *_conv_tower("box_head/tower", "box_head.tower"),
        *_fc_tower("box_head/dense", "box_head.dense", fcs),
        *_predictors(last, last),
    ]


def _separate(options: Mapping[str, Any]) -> Rules:
    del options
    return [
        *_conv_tower("box_head/classify", "box_head.classify"),
        *_conv_tower("box_head/refine", "box_head.refine"),
        *_predictors(POOLED, POOLED),
    ]


def _separate_v2(options: Mapping[str, Any]) -> Rules:
    fcs = len(options.get("fc_dims", (1024, 1024)))
    return [
        *_fc_tower("box_head/classify", "box_head.classify", fcs),
        *_conv_tower("box_head/refine", "box_head.refine"),
        *_conv_tower("box_head/overlap", "box_head.overlap"),
        *_predictors(table.LINEAR, POOLED),
    ]


def _shared_conv(options: Mapping[str, Any]) -> Rules:
    del options
    smaller = table.fc_after_pool(5, 5)
    return [
        *_conv_tower("box_head/tower", "box_head.tower"),
        *_conv_tower("box_head/classify", "box_head.classify"),
        *_conv_tower("box_head/refine", "box_head.refine"),
        *_predictors(smaller, smaller),
    ]


def _res5(options: Mapping[str, Any]) -> Rules:
    del options
    return [
        *_block("box_head/block{b}", "box_head.blocks.{b}"),
        *_predictors(table.LINEAR, table.LINEAR),
    ]


BOX_HEADS: dict[str, Callable[[Mapping[str, Any]], Rules]] = {
    "fast_rcnn_conv_fc": _fast_rcnn_conv_fc,
    "separate": _separate,
    "separate_v2": _separate_v2,
    "shared_conv": _shared_conv,
    "res5": _res5,
}


def _of_stages(rule: table.Rule) -> table.Rule:
    """A rule of the box head for those of all stages."""
    return rule._replace(
        ours=rule.ours.replace("box_head/", "box_head/stage{s}/", 1),
        theirs=rule.theirs.replace("box_head.", "box_head.{s}.", 1),
    )


def rules(config: ConfigDict) -> Rules:
    """The table of a config's model. A head's option that is left out is the head's default.

    Raises:
        UserError: the twin does not have a component of the config.
    """
    options = plain(config.roi.head)
    chosen = {
        "fpn.before": (config.fpn.before, tuple(HOOKS)),
        "fpn.after": (config.fpn.after, tuple(HOOKS)),
        "rpn.name": (config.rpn.name, tuple(RPNS)),
        "roi.head.name": (options["name"], tuple(BOX_HEADS)),
    }
    for key, (name, known) in chosen.items():
        if name not in known:
            raise UserError(
                f"{key} is {name!r}, which the PyTorch twin does not have; "
                f"it has {', '.join(map(repr, known))}."
            )
    head = BOX_HEADS[options["name"]](options)
    if config.roi.cascade.ious:
        head = [_of_stages(rule) for rule in head]
    hooks = [*HOOKS[config.fpn.before], *HOOKS[config.fpn.after]]
    return [*BACKBONE, *FPN, *hooks, *RPNS[config.rpn.name], *head, *MASK]
