"""What a config must satisfy before anything is opened or compiled; each fault is one sentence."""

import math
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from configs._chain import flat
from sephjax.errors import UserError
from sephjax.input import buckets
from sephjax.weights.formats import FORMATS

_NORMS = ("none", "evonorm_s0", "gn", "frozen_bn", "bn")
_CHOICES: dict[str, tuple[Any, ...]] = {
    "init.format": ("none", *FORMATS),
    "data.source": ("coco", "tfds", "shapes"),
    "data.resize": ("keep_aspect", "series"),
    "backbone.depth": (18, 34, 50, 101),
    "backbone.norm": _NORMS,
    "fpn.norm": _NORMS,
    "fpn.extra": ("max_pool", "conv_c5"),
    "fpn.before": ("none", "non_local"),
    "fpn.after": ("none", "fusion", "balance"),
    "rpn.name": ("rpn", "retinanet"),
    "rpn.norm": _NORMS,
    "roi.sampler.fill": ("none", "repeat"),
    "roi.sampler.positive_groups": ("truth", "iou"),
    "test.iou_score": ("none", "product", "order"),
    "rpn.normalizer": ("images_times_samples", "sampled", "positives"),
    "mask.input": ("pooled", "head"),
    "mask.norm": _NORMS,
    "mask.deconv_norm": _NORMS,
    "schedule.name": ("step", "cosine"),
    "train.remat": ("none", "stage"),
    "eval.backend": ("pycocotools", "faster"),
}
_POSITIVE = (
    "train.steps", "train.batch", "train.accumulate", "train.log_every", "eval.batch",
    "checkpoint.keep", "rpn.sample_group", "roi.samples", "roi.sampler.bins",
    "roi.sampler.positive_bins", "data.max_objects", "data.size_multiple", "test.detections",
    "test.candidates",
)  # fmt: skip
_NOT_NEGATIVE = (
    "eval.every", "checkpoint.every", "data.train.limit", "data.eval.limit", "data.workers",
    "data.jitter.crop", "rpn.samples", "roi.cascade.append", "roi.positive_iou", "optimizer.lr",
    "schedule.warmup_steps", "schedule.factor", "optimizer.clip", "optimizer.weight_decay",
    "parity.tolerance",
)  # fmt: skip
_PROBABILITIES = (
    "data.flip", "data.stitch", "data.copy_paste", "test.nms", "test.score_threshold",
    "predict.score_threshold",
)  # fmt: skip


def check(config: ConfigDict) -> None:
    """Checks names that stand for something, ranges, and what must divide what.

    Raises:
        UserError: something does not do; it names the key.
    """
    values = dict(flat(config))
    for key, choices in _CHOICES.items():
        if values[key] not in choices:
            raise UserError(f"{key} is {values[key]!r}; use {_either(map(repr, choices))}.")
    for keys, least, words in ((_POSITIVE, 1, "at least 1"), (_NOT_NEGATIVE, 0, "0 or more")):
        for key in keys:
            if values[key] < least:
                raise UserError(f"{key} is {values[key]}; it must be {words}.")
    if len(config.data.eval.short_sides) != 1:
        raise UserError(
            f"data.eval.short_sides is {config.data.eval.short_sides}; an evaluation has exactly "
            "one."
        )
    _check_sizes(config)
    _check_data(config, values)
    _check_rpn(config)
    _check_cascade(config)
    _check_iou_branch(config)
    _check_pooler(config)
    _check_mask(config)
    group = min(config.rpn.sample_group, config.train.batch)
    if config.train.batch % group:
        raise UserError(
            f"train.batch is {config.train.batch}, which groups of rpn.sample_group={group} images "
            "do not divide; change one of them."
        )


def _check_sizes(config: ConfigDict) -> None:
    for part in ("train", "eval"):
        view = config.data[part]
        sides = (*view.short_sides, view.long_side, *view.aspects)
        if not all(0 < side < math.inf for side in sides):
            raise UserError(
                f"data.{part} has a side or an aspect among {sides} that is no size; all must be "
                "above 0."
            )


def _check_data(config: ConfigDict, values: dict[str, Any]) -> None:
    for key in _PROBABILITIES:
        if not 0 <= values[key] <= 1:
            raise UserError(f"{key} is {values[key]}; it must be from 0 to 1.")
    if not 0 <= config.train.ema < 1:
        raise UserError(f"train.ema is {config.train.ema}; it is a decay, 0 or more and below 1.")
    jitter = config.data.jitter
    if not 0 < jitter.low <= jitter.high:
        raise UserError(
            f"data.jitter.low={jitter.low} and data.jitter.high={jitter.high} are no range of "
            "scales; they must be above 0, the lower one first."
        )
    if not jitter.crop and (jitter.low, jitter.high) != (1.0, 1.0):
        raise UserError(
            "data.jitter.low and data.jitter.high do nothing while data.jitter.crop is 0; set it "
            "to the side of the crop, or them to 1."
        )
    if config.data.stitch and config.train.batch < 2:
        raise UserError(
            f"data.stitch={config.data.stitch} needs two images a step and train.batch is "
            f"{config.train.batch}; change one of them."
        )
    buckets.training(config.data)


def _check_rpn(config: ConfigDict) -> None:
    if config.rpn.samples == 0 and config.rpn.normalizer == "images_times_samples":
        raise UserError(
            "rpn.samples is 0, which rpn.normalizer='images_times_samples' would divide by; use "
            "'positives' or 'sampled'."
        )
    proposals, levels = config.rpn.proposals, len(config.anchors.sizes)
    if "shrink" not in proposals:
        return
    for key in ("pre", "post"):
        if proposals[key] < (least := proposals.shrink ** (levels - 1)):
            raise UserError(
                f"rpn.proposals.{key} is {proposals[key]}, of which the last of {levels} levels "
                f"gets none; raise it to {least} or more."
            )


def _check_cascade(config: ConfigDict) -> None:
    roi, rule = config.roi, config.roi.cascade
    if len(rule.ious) != len(rule.weights):
        raise UserError(
            f"roi.cascade.ious has {len(rule.ious)} stages and roi.cascade.weights "
            f"{len(rule.weights)}; give both for every stage."
        )
    if not rule.ious:
        return
    if not roi.class_agnostic:
        raise UserError(
            "roi.class_agnostic is False, but a stage of roi.cascade moves one box for all "
            "classes; set it to True."
        )
    first = tuple(rule.weights[0])
    if tuple(roi.weights) != first:
        raise UserError(
            f"roi.weights is {tuple(roi.weights)} and roi.cascade.weights starts with {first}; "
            "make them equal."
        )
    bounds = (roi.matcher.get("low"), roi.matcher.get("high"))
    if roi.matcher.name != "max_iou" or bounds != (rule.ious[0],) * 2:
        raise UserError(
            f"roi.cascade.ious starts with {rule.ious[0]}, but roi.matcher is "
            f"{roi.matcher.name!r} with low and high {bounds}; use 'max_iou' with that value for "
            "both."
        )


def _check_iou_branch(config: ConfigDict) -> None:
    if config.test.iou_score != "none" and config.roi.iou_branch.name == "none":
        raise UserError(
            f"test.iou_score is {config.test.iou_score!r}, but roi.iou_branch.name is 'none'; "
            "choose 'v0' or 'v1' for it, or leave test.iou_score at 'none'."
        )


def _check_pooler(config: ConfigDict) -> None:
    pooler = config.roi.pooler
    if pooler.name != "multi_scale":
        return
    heads = ("separate", "separate_v2")
    if config.roi.head.name not in heads:
        raise UserError(
            f"roi.pooler is 'multi_scale', whose two crops roi.head.name={config.roi.head.name!r} "
            f"cannot read apart; use {_either(map(repr, heads))}."
        )
    if pooler.get("level_of") not in ("box", "view"):
        raise UserError(
            f"roi.pooler.level_of is {pooler.get('level_of')!r}; use 'box' (the level of the box "
            "itself) or 'view' (that of the larger one)."
        )


def _check_mask(config: ConfigDict) -> None:
    if not config.mask.enabled or config.mask.input != "head":
        return
    if config.roi.head.name != "res5" or config.roi.cascade.ious:
        raise UserError(
            f"mask.input is 'head', but roi.head.name={config.roi.head.name!r}"
            f"{' in a cascade' if config.roi.cascade.ious else ''} has no map for a mask head; use "
            "'res5' without a cascade, or mask.input='pooled'."
        )
    if config.mask.pool != 7:
        raise UserError(
            f"mask.pool is {config.mask.pool}, but with mask.input='head' the mask head reads the "
            "box head's map of 7 cells a side; set it to 7."
        )


def _either(words: Iterable[str]) -> str:
    *rest, last = words
    return f"{', '.join(rest)} or {last}"
