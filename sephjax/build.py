"""From a config to a model and its pure functions: the one place that reads the model's keys.

A component's dict names it (`name`); the rest are its arguments, so the signature is the schema.
The whole menu is the tables of this page.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from configs._chain import plain
from sephjax import predict
from sephjax.errors import UserError
from sephjax.losses import elementwise, total
from sephjax.losses import roi as roi_losses
from sephjax.nets import norms
from sephjax.nets.backbone import resnet
from sephjax.nets.detector import Detector, Recipe
from sephjax.nets.functional import Functional, functional
from sephjax.nets.neck import hooks
from sephjax.nets.neck.fpn import FPN
from sephjax.nets.proposal import select
from sephjax.nets.proposal.rpn import RPNHead
from sephjax.nets.roi import box_head
from sephjax.nets.roi.mask_head import MaskHead
from sephjax.nets.roi.pool import Pooler
from sephjax.ops import anchors as anchor_ops
from sephjax.ops import matchers, sampling
from sephjax.targets import roi as roi_targets
from sephjax.targets import rpn as rpn_targets

MATCHERS = {"max_iou": matchers.max_iou, "atss": matchers.atss, "atss_v1": matchers.atss_v1}
BOX_HEADS = {
    "fast_rcnn_conv_fc": box_head.FastRCNNConvFC,
    "separate": box_head.SeparateFastRCNNConvFCHead,
    "separate_v2": box_head.SeparateFastRCNNConvFCHeadV2,
}
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
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def choose(table: Mapping[str, Any], name: str, key: str) -> Any:
    """The entry `name` of a table of components, or a sentence that lists them."""
    if name not in table:
        raise UserError(f"{key} is {name!r}; use one of {', '.join(map(repr, table))}.")
    return table[name]


def bind(
    table: Mapping[str, Callable[..., Any]], choice: ConfigDict, key: str
) -> Callable[..., Any]:
    """A component with its arguments bound; an argument that it does not know is an error."""
    options = plain(choice)
    function = choose(table, options.pop("name"), f"{key}.name")
    signature = inspect.signature(function.__init__ if isinstance(function, type) else function)
    known = set(signature.parameters) - {"self"}
    if unknown := sorted(set(options) - known):
        raise UserError(
            f"{key}.{unknown[0]} is no argument of {choice.name!r}; "
            f"it knows {', '.join(sorted(known))}."
        )
    return functools.partial(function, **options)


def model(config: ConfigDict, classes: int) -> Functional:
    """The detector of a config for a number of classes, as pure functions."""
    recipe = _recipe(config, classes)
    return functional(lambda rngs: Detector(_networks(config, classes, rngs), recipe))


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
    rpn = RPNHead(
        neck.channels,
        len(config.anchors.ratios),
        convs=config.rpn.convs,
        norm=config.rpn.norm,
        init=inits["rpn"],
        rngs=rngs,
    )
    predictors = box_head.Predictors(
        classes, config.roi.class_agnostic, inits["logits"], inits["deltas"]
    )
    head, channels = bind(BOX_HEADS, config.roi.head, "roi.head"), _roi_channels(config)
    networks: dict[str, nnx.Module | None] = {
        "backbone": backbone,
        "fpn_before": before and before(inputs, init=inits["fpn"], rngs=rngs),
        "fpn": fpn,
        "fpn_after": after and after(neck.channels, init=inits["fpn"], rngs=rngs),
        "rpn": rpn,
        "box_head": head((7, 7, channels), predictors, init=inits["box_head"], rngs=rngs),
        "mask_head": None,
    }
    if config.mask.enabled:
        networks["mask_head"] = MaskHead(
            channels,
            classes,
            convs=config.mask.convs,
            dim=config.mask.dim,
            norm=config.mask.norm,
            deconv_norm=config.mask.deconv_norm,
            init=inits["mask_head"],
            predictor_init=inits["mask"],
            rngs=rngs,
        )
    return networks


def _recipe(config: ConfigDict, classes: int) -> Recipe:
    roi, mask = config.roi, config.mask
    most = roi.samples if roi.sampler.fill == "repeat" else int(roi.samples * roi.positive_fraction)
    dtype = choose(DTYPES, config.compute_dtype, "compute_dtype")
    return Recipe(
        normalize=functools.partial(
            resnet.normalize_image, layout=config.backbone.layout, dtype=dtype
        ),
        anchors=_anchors(config),
        rpn_targets=_rpn_targets(config),
        propose=functools.partial(_propose, plain(config.rpn.proposals)),
        pre_nms=functools.partial(_pre_nms, plain(config.rpn.proposals)),
        rpn_weights=tuple(config.rpn.weights),
        roi_targets=functools.partial(
            roi_targets.sample_rois,
            matcher=bind(MATCHERS, roi.matcher, "roi.matcher"),
            sampler=functools.partial(
                sampling.sample_rois,
                count=roi.samples,
                positive_fraction=roi.positive_fraction,
                **plain(roi.sampler),
            ),
            append=roi.append_truth,
            classes=classes,
        ),
        pooler=_pooler(config),
        roi_tiers=tuple(roi.tiers),
        mask_pool=mask.pool,
        mask_rois=most,
        mask_tiers=tuple(mask.tiers),
        mask_binary=mask.binary_target,
        mask_loss=roi_losses.mask_loss,
        mask_padding=config.mask_padding,
    )


def _levels(config: ConfigDict) -> tuple[str, ...]:
    """Names of the pyramid's levels, fine to coarse: p6 comes from `fpn.extra`."""
    return (*(f"p{name[1:]}" for name in config.fpn.inputs), "p6")


def _anchors(config: ConfigDict) -> Callable[..., tuple[Any, ...]]:
    values, levels = config.anchors, _levels(config)
    if len(values.sizes) != len(levels):
        raise UserError(
            f"anchors.sizes has {len(values.sizes)} sizes for the {len(levels)} levels "
            f"{', '.join(levels)}; give one a level."
        )
    cells = tuple(
        anchor_ops.cell_anchors(
            size=size, ratios=tuple(values.ratios), ratio_is=values.ratio_is, rounded=values.rounded
        )
        for size in values.sizes
    )
    nominal = tuple(2 ** int(name[1:]) for name in levels)
    menu = {"nominal": nominal, "feature": "feature", "feature_floor": "feature_floor"}
    strides = choose(menu, values.stride, "anchors.stride")

    def pyramid(canvas: tuple[int, int], shapes: tuple[tuple[int, int], ...]) -> tuple[Any, ...]:
        return anchor_ops.pyramid_anchors(
            canvas=canvas, shapes=shapes, cells=cells, strides=strides, offset=values.offset
        )

    return pyramid


def _rpn_targets(config: ConfigDict) -> Callable[..., Any]:
    """(keys, anchors of every level, inside, truth, canvas) -> RpnTargets."""
    matcher = bind(MATCHERS, config.rpn.matcher, "rpn.matcher")
    by_level = config.rpn.matcher.name == "atss_v1"

    def targets(keys: Any, levels: Any, inside: Any, truth: Any, canvas: tuple[int, int]) -> Any:
        rule = matcher
        if by_level:  # the one rule that looks at which level an anchor is of
            counts = tuple(level.shape[0] for level in levels)
            rule = functools.partial(matcher, counts=counts, canvas=canvas)
        return rpn_targets.rpn_targets(
            keys,
            jnp.concatenate(levels),
            inside,
            truth,
            matcher=rule,
            samples=config.rpn.samples,
            positive_fraction=config.rpn.positive_fraction,
            group=config.rpn.sample_group,
        )

    return targets


def _roi_widths(config: ConfigDict) -> dict[str, int]:
    """Channels of every map that ROIs may be pooled from."""
    levels = _levels(config)
    widths = dict.fromkeys(levels, int(config.fpn.channels))
    if config.fpn.after == "fusion":
        widths[hooks.fused_level(levels[0])] = 2 * config.fpn.channels
    return widths


def _roi_channels(config: ConfigDict) -> int:
    """Channels of the pooled features; the maps of `roi.levels` must agree on them."""
    levels, widths = tuple(config.roi.levels), _roi_widths(config)
    if unknown := sorted(set(levels) - set(widths)):
        raise UserError(
            f"roi.levels names {unknown[0]!r}, which the pyramid does not have; "
            f"it has {', '.join(widths)}."
        )
    if len({widths[name] for name in levels}) != 1:
        listed = ", ".join(f"{name} ({widths[name]})" for name in levels)
        raise UserError(
            f"roi.levels names maps of different widths, {listed}; name the fused map alone "
            "or leave it out."
        )
    return widths[levels[0]]


def _pooler(config: ConfigDict) -> Pooler:
    _roi_channels(config)  # refuses what cannot be pooled together
    levels = tuple(config.roi.levels)
    numbers = [int(name[1:]) for name in levels]
    return Pooler(
        levels=levels,
        strides=tuple(float(2**number) for number in numbers),
        canonical=plain(config.roi.canonical),
        lowest=numbers[0],
        kind=plain(config.roi.pooler),
    )


def _propose(rule: dict[str, Any], ranked: Any, train: bool) -> Any:  # noqa: FBT001
    if rule["name"] == "joint":
        return select.joint(
            ranked, nms=rule["nms"], count=rule["train_post" if train else "test_post"]
        )
    return select.per_level(
        ranked,
        nms=rule["nms"],
        counts=select.quotas(rule["post"], rule["shrink"], len(ranked)),
        exactly=train,
        logit_floor=None if train else rule["logit_floor"],
    )


def _pre_nms(rule: dict[str, Any], levels: int, train: bool) -> tuple[int, ...]:  # noqa: FBT001
    if rule["name"] == "joint":
        return (rule["train_pre" if train else "test_pre"],) * levels
    if rule["name"] == "per_level":
        return select.quotas(rule["pre"], rule["shrink"], levels)
    raise UserError(f"rpn.proposals.name is {rule['name']!r}; use 'joint' or 'per_level'.")


def losses(config: ConfigDict) -> Callable[..., dict[str, Any]]:
    """(outputs, size) -> `loss` and its terms."""
    rpn, roi = config.rpn, config.roi
    for key, choice in (("rpn.box_loss", rpn.box_loss), ("roi.box_loss", roi.box_loss)):
        choose({"smooth_l1": None, **elementwise.OVERLAP}, choice.name, f"{key}.name")
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
        },
        scales={
            "rpn_cls": rpn.class_loss_scale,
            "rpn_box": rpn.box_loss_scale,
            "roi_cls": roi.class_loss_scale,
            "roi_box": roi.box_loss_scale,
            "mask": config.mask.loss_scale,
        },
    )


def classify(config: ConfigDict) -> Callable[..., Any]:
    """(box outputs, proposals, size) -> Detections of one image, masks not yet."""
    return functools.partial(
        predict.detections, weights=tuple(config.roi.weights), **plain(config.test)
    )
