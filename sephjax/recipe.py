"""From a config to what the detector does between its networks: targets, proposals, pooling."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from configs._chain import plain
from sephjax.choices import bind, choose
from sephjax.errors import UserError
from sephjax.losses import roi as roi_losses
from sephjax.nets.backbone import resnet
from sephjax.nets.detector import Recipe
from sephjax.nets.neck import hooks
from sephjax.nets.proposal import select
from sephjax.nets.roi.cascade import Cascade
from sephjax.nets.roi.pool import Pooler
from sephjax.ops import anchors as anchor_ops
from sephjax.ops import matchers, sampling
from sephjax.targets import cascade as cascade_targets
from sephjax.targets import roi as roi_targets
from sephjax.targets import rpn as rpn_targets

MATCHERS = {"max_iou": matchers.max_iou, "atss": matchers.atss, "atss_v1": matchers.atss_v1}
POOLERS = ("roi_align", "crop_max", "multi_scale")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def recipe(config: ConfigDict, classes: int) -> Recipe:
    """What the detector of a config does between its networks."""
    roi, mask = config.roi, config.mask
    few = roi.sampler.fill == "none" and not roi.positive_iou  # positives keep to their share
    most = int(roi.samples * roi.positive_fraction) if few else roi.samples
    dtype = choose(DTYPES, config.compute_dtype, "compute_dtype")
    return Recipe(
        normalize=functools.partial(
            resnet.normalize_image, layout=config.backbone.layout, dtype=dtype
        ),
        anchors=anchors_of(config),
        rpn_levels=rpn_levels_of(config),
        rpn_targets=rpn_targets_of(config),
        propose=functools.partial(_propose, plain(config.rpn.proposals)),
        pre_nms=functools.partial(_pre_nms, plain(config.rpn.proposals)),
        rpn_weights=tuple(config.rpn.weights),
        rpn_min_size=config.rpn.min_size,
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
            positive_iou=roi.positive_iou,
        ),
        cascade=cascade_of(config, classes),
        pooler=pooler_of(config),
        roi_tiers=tuple(roi.tiers),
        mask_pool=mask.pool,
        mask_reads_head=mask.input == "head",
        mask_rois=most,
        mask_tiers=tuple(mask.tiers),
        mask_binary=mask.binary_target,
        mask_loss=roi_losses.mask_loss,
        mask_padding=config.mask_padding,
    )


def levels_of(config: ConfigDict) -> tuple[str, ...]:
    """Names of the pyramid's levels, fine to coarse: p6 comes from `fpn.extra`."""
    return (*(f"p{name[1:]}" for name in config.fpn.inputs), "p6")


def rpn_levels_of(config: ConfigDict) -> tuple[str, ...]:
    """Names of the levels with anchors, fine to coarse: `rpn.levels`, or all if it is empty."""
    levels = levels_of(config)
    chosen = tuple(config.rpn.levels) or levels
    if chosen != tuple(name for name in levels if name in chosen):
        raise UserError(
            f"rpn.levels is {', '.join(chosen)}; name levels of {', '.join(levels)} in that order."
        )
    return chosen


def anchors_of(config: ConfigDict) -> Callable[..., tuple[Any, ...]]:
    """(canvas, shapes of the maps with anchors) -> anchors of every level."""
    values, levels = config.anchors, rpn_levels_of(config)
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


def rpn_targets_of(config: ConfigDict) -> Callable[..., Any]:
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


def stage_weights(config: ConfigDict) -> tuple[tuple[float, float, float, float], ...]:
    """Weights of the deltas of every stage of the box head."""
    return plain(config.roi.cascade.weights) or (tuple(config.roi.weights),)


def cascade_of(config: ConfigDict, classes: int) -> Cascade:
    """What happens between the stages of the box head; nothing if there is one."""
    rule, weights = config.roi.cascade, stage_weights(config)
    if len(weights) == 1:
        return Cascade(weights)
    matcher = bind(MATCHERS, config.roi.matcher, "roi.matcher")
    rematch = tuple(
        functools.partial(
            cascade_targets.next_rois,
            matcher=functools.partial(matcher, low=iou, high=iou),
            append=rule.append,
            classes=classes,
        )
        for iou in rule.ious[1:]
    )
    return Cascade(weights, rematch, rule.gradient_scale)


def _widths(config: ConfigDict) -> dict[str, int]:
    """Channels of every map that ROIs may be pooled from."""
    levels = levels_of(config)
    widths = dict.fromkeys(levels, int(config.fpn.channels))
    if config.fpn.after == "fusion":
        widths[hooks.fused_level(levels[0])] = 2 * config.fpn.channels
    return widths


def roi_channels(config: ConfigDict) -> int:
    """Channels of the pooled features; the maps of `roi.levels` must agree on them."""
    levels, widths = tuple(config.roi.levels), _widths(config)
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


def pooler_of(config: ConfigDict) -> Pooler:
    """The pooler of both heads."""
    roi_channels(config)  # refuses what cannot be pooled together
    choose(dict.fromkeys(POOLERS), config.roi.pooler.name, "roi.pooler.name")
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
    if rule["name"] == "retinanet" and not train:
        return select.above(
            ranked, score=rule["test_score"], nms=rule["test_nms"], count=rule["test_post"]
        )
    exactly = train or rule["test_exactly"]
    return select.per_level(
        ranked,
        nms=rule["nms"],
        counts=select.quotas(rule["post"], rule["shrink"], len(ranked)),
        exactly=exactly,
        logit_floor=None if exactly else rule["logit_floor"],
    )


def _pre_nms(rule: dict[str, Any], levels: int, train: bool) -> tuple[int, ...]:  # noqa: FBT001
    if rule["name"] == "joint":
        return (rule["train_pre" if train else "test_pre"],) * levels
    if rule["name"] == "retinanet" and not train:
        return (rule["test_pre"],) * levels
    if rule["name"] in ("per_level", "retinanet"):
        return select.quotas(rule["pre"], rule["shrink"], levels)
    raise UserError(
        f"rpn.proposals.name is {rule['name']!r}; use 'joint', 'per_level' or 'retinanet'."
    )
