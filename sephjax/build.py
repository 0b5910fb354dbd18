"""From a config to a model and its pure functions; with `recipe` the one place that reads its keys.

A component's dict names it (`name`); the rest are its arguments, so the signature is the schema.
The whole menu is the tables of these two pages.
"""

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx
from ml_collections import ConfigDict

from configs._chain import plain
from sephjax import predict, recipe
from sephjax.choices import bind, choose
from sephjax.losses import elementwise, total
from sephjax.losses import roi as roi_losses
from sephjax.nets import norms
from sephjax.nets.backbone import resnet
from sephjax.nets.detector import Detector
from sephjax.nets.functional import Functional, functional
from sephjax.nets.neck import hooks
from sephjax.nets.neck.fpn import FPN
from sephjax.nets.proposal.retinanet import RetinaNetHead
from sephjax.nets.proposal.rpn import RPNHead
from sephjax.nets.roi import box_head
from sephjax.nets.roi.cascade import CascadeHeads
from sephjax.nets.roi.mask_head import MaskHead
from sephjax.nets.roi.res5 import Res5

BOX_HEADS = {
    "fast_rcnn_conv_fc": box_head.FastRCNNConvFC,
    "separate": box_head.SeparateFastRCNNConvFCHead,
    "separate_v2": box_head.SeparateFastRCNNConvFCHeadV2,
    "shared_conv": box_head.FastRCNNConvHead,
    "res5": Res5,
}
NORM_KEYS = ("norm", "conv_norm", "fc_norm")  # of the box heads that have `heads_bn`
RPNS = {"rpn": RPNHead, "retinanet": RetinaNetHead}
REMAT = {"none": False, "stage": True}
BEFORE_FPN = {"none": None, "non_local": hooks.NonLocalBefore}
AFTER_FPN = {"none": None, "fusion": hooks.Fusion, "balance": hooks.Balance}
INITIALIZERS = {  # of the neck, the RPN, the box head's towers and its predictors, the mask head
    "detectron2": {
        "fpn": "kaiming_uniform_a1",
        "rpn": ("normal", 0.01),
        "box_head": "kaiming_uniform_a1",
        "logits": ("normal", 0.01),
        "deltas": ("normal", 0.001),
        "mask_head": "msra",
        "mask": ("normal", 0.001),
    },
    "torchvision": {  # its linear layers draw their biases too, ours are zero
        "fpn": "kaiming_uniform_a1",
        "rpn": ("normal", 0.01),
        "box_head": "torch_linear",
        "logits": "torch_linear",
        "deltas": "torch_linear",
        "mask_head": "msra",
        "mask": "msra",
    },
    "xavier": dict.fromkeys(
        ("fpn", "rpn", "box_head", "logits", "deltas", "mask_head", "mask"), "xavier_uniform"
    ),
}


def model(config: ConfigDict, classes: int) -> Functional:
    """The detector of a config for a number of classes, as pure functions."""
    rules = recipe.recipe(config, classes)
    return functional(lambda rngs: Detector(_networks(config, classes, rngs), rules))


def _networks(config: ConfigDict, classes: int, rngs: nnx.Rngs) -> dict[str, nnx.Module | None]:
    inits = choose(INITIALIZERS, config.initializers, "initializers")
    back, neck = config.backbone, config.fpn
    layout = choose(resnet.LAYOUTS, back.layout, "backbone.layout")
    norm_options: dict[str, Any] = {"eps": back.norm_eps or layout.eps}
    if back.norm == "frozen_bn":
        norm_options["trainable_affine"] = back.trainable_affine
    backbone = resnet.ResNet(
        depth=back.depth,
        layout=back.layout,
        norm=norms.norm_factory(back.norm, **norm_options),
        width=back.width,
        remat=choose(REMAT, config.train.remat, "train.remat"),
        rngs=rngs,
    )
    inputs = {name: backbone.channels[name] for name in neck.inputs}
    fpn = FPN(
        in_channels=inputs,
        channels=neck.channels,
        norm=neck.norm,
        lateral_norm=neck.lateral_norm,
        extra=neck.extra,
        init=inits["fpn"],
        rngs=rngs,
    )
    before = choose(BEFORE_FPN, neck.before, "fpn.before")
    after = choose(AFTER_FPN, neck.after, "fpn.after")
    rpn = choose(RPNS, config.rpn.name, "rpn.name")(
        neck.channels,
        len(config.anchors.ratios),
        levels=recipe.rpn_levels_of(config),
        convs=config.rpn.convs,
        norm=config.rpn.norm,
        init=inits["rpn"],
        rngs=rngs,
    )
    networks: dict[str, nnx.Module | None] = {
        "backbone": backbone,
        "fpn_before": before and before(inputs, init=inits["fpn"], rngs=rngs),
        "fpn": fpn,
        "fpn_after": after and after(neck.channels, init=inits["fpn"], rngs=rngs),
        "rpn": rpn,
        "box_head": _box_head(config, classes, inits, rngs),
        "mask_head": None,
    }
    if config.mask.enabled:
        own: Any = networks["box_head"]
        networks["mask_head"] = MaskHead(
            own.channels if config.mask.input == "head" else recipe.roi_channels(config),
            classes,
            convs=config.mask.convs,
            dim=config.mask.dim,
            norm=_head_norm(config, config.mask.norm),
            deconv_norm=_head_norm(config, config.mask.deconv_norm),
            init=inits["mask_head"],
            predictor_init=inits["mask"],
            rngs=rngs,
        )
    return networks


def _box_head(config: ConfigDict, classes: int, inits: Any, rngs: nnx.Rngs) -> nnx.Module:
    """The box head, or a cascade of them."""
    roi = config.roi
    predictors = box_head.Predictors(
        classes,
        roi.class_agnostic,
        inits["logits"],
        inits["deltas"],
        iou=roi.iou_branch.name != "none",
    )
    pooled = (7, 7, recipe.roi_channels(config))
    one = bind(BOX_HEADS, roi.head, "roi.head")
    normed = {key: _head_norm(config, roi.head[key]) for key in NORM_KEYS if key in roi.head}
    if roi.head.name == "res5":  # has an eps and a decay of its own
        normed = {}
    head = functools.partial(one, pooled, predictors, init=inits["box_head"], **normed)
    stages = len(roi.cascade.ious)
    return CascadeHeads(head, stages, rngs=rngs) if stages else head(rngs=rngs)


def _head_norm(config: ConfigDict, name: str) -> str | norms.NormFactory:
    """A norm of the box or mask head: `bn` has an eps and a decay of its own."""
    return norms.norm_factory(name, **plain(config.heads_bn)) if name == "bn" else name


def losses(config: ConfigDict) -> Callable[..., dict[str, Any]]:
    """(outputs, size) -> `loss` and its terms."""
    rpn, roi = config.rpn, config.roi
    choose({"smooth_l1": None, **elementwise.OVERLAP}, rpn.box_loss.name, "rpn.box_loss.name")
    choose({"smooth_l1": None, **roi_losses.OVERLAP}, roi.box_loss.name, "roi.box_loss.name")
    choose({"sigmoid": None, "focal": None}, rpn.class_loss.name, "rpn.class_loss.name")
    choose({"none": None, "quadratic": None, "linear": None}, roi.class_weight, "roi.class_weight")
    return functools.partial(
        total.total_loss,
        rpn={
            "class_loss": plain(rpn.class_loss),
            "box_loss": plain(rpn.box_loss),
            "weights": tuple(rpn.weights),
            "samples": rpn.samples,
            "normalizer": rpn.normalizer,
        },
        roi={
            "box_loss": plain(roi.box_loss),
            "weights": tuple(roi.weights),
            "class_weighting": roi.class_weight,
            "positive_iou": roi.positive_iou,
            "iou_loss": _iou_loss(roi.iou_branch),
        },
        later=recipe.stage_weights(config)[1:],
        scales={
            "rpn_cls": rpn.class_loss_scale,
            "rpn_box": rpn.box_loss_scale,
            "roi_cls": roi.class_loss_scale,
            "roi_box": roi.box_loss_scale,
            "roi_iou": 1.0,
            "mask": config.mask.loss_scale,
        },
    )


def _iou_loss(branch: ConfigDict) -> Callable[..., Any] | None:
    """The loss of the IoU branch, or None without a branch."""
    choose({"none": None, **roi_losses.IOU_LOSSES}, branch.name, "roi.iou_branch.name")
    if branch.name == "none":
        return None
    return bind(roi_losses.IOU_LOSSES, branch, "roi.iou_branch")


def classify(config: ConfigDict) -> Callable[..., Any]:
    """(box outputs, proposals, size) -> Detections of one image, masks not yet."""
    return functools.partial(
        predict.detections, weights=recipe.stage_weights(config)[-1], **plain(config.test)
    )
