"""The work of a detector counted by hand: each kernel times the places where it is applied.

It knows nothing of JAX's tracing or of a compiler, so that a compiled program can be held against
it. Convolutions and matrix products only; a multiply-add counts two.
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from sephjax import recipe
from sephjax.nets.backbone.resnet import DEPTHS, LAYOUTS, Layout
from sephjax.nets.proposal import select
from sephjax.train import optimizer
from sephjax.types import Params

STAGES = ("stem", "stage1", "stage2", "stage3", "stage4")
CELLS = 7  # a side of what a box head reads


class Sides(NamedTuple):
    """What the number of places follows from."""

    canvas: tuple[int, int]
    rois: int  # an image
    mask_rois: int
    mask_cells: int  # a side, before the deconvolution
    rpn_levels: tuple[str, ...]
    depth: int
    layout: Layout


def countable(config: ConfigDict) -> bool:
    """Whether the detector has only parts that are counted here."""
    fpn, roi = config.fpn, config.roi
    plain = fpn.before == fpn.after == "none" and not roi.cascade.ious
    return plain and roi.head.name != "res5" and roi.pooler.name != "multi_scale"


def predict_flops(config: ConfigDict, params: Params, canvas: tuple[int, int]) -> dict[str, float]:
    """FLOPs of prediction an image, by part; every proposal and every detection is computed."""
    return _summed(_forward(params, _sides(config, canvas, train=False)))


def train_flops(config: ConfigDict, params: Params, canvas: tuple[int, int]) -> dict[str, float]:
    """FLOPs of a train step an image, by part.

    A trained kernel is applied three times: forward, for its own gradient and for that of what it
    reads, except where nothing trained lies before it. Masks count as if every ROI that may be
    positive is.
    """
    sides = _sides(config, canvas, train=True)
    names = optimizer.parameter_names(params)
    held = [re.compile(rule) for rule in config.optimizer.freeze]
    fixed = {name for name in names if any(rule.search(name) for rule in held)}
    first = _first_trained(names, fixed)
    taps = _tapped_stage(sides.layout)
    forward = _forward(params, sides)
    times = {
        name: 1 + _reads_trained(name, first, taps) + (name not in fixed)
        if _stage(name) >= first
        else 1
        for name in forward
    }
    return _summed({name: times[name] * flops for name, flops in forward.items()})


def _sides(config: ConfigDict, canvas: tuple[int, int], *, train: bool) -> Sides:
    rules, proposals = recipe.recipe(config, 1), config.rpn.proposals
    kept = proposals.get("test_post")
    if proposals.name == "per_level":
        kept = sum(select.quotas(proposals.post, proposals.shrink, len(rules.rpn_levels)))
    return Sides(
        canvas,
        config.roi.samples if train else kept,
        rules.mask_rois if train else config.test.detections,
        config.mask.pool,
        rules.rpn_levels,
        config.backbone.depth,
        LAYOUTS[config.backbone.layout],
    )


def _summed(flops: Mapping[str, float]) -> dict[str, float]:
    parts: dict[str, float] = {}
    for name, number in flops.items():
        part = name.partition("/")[0]
        parts[part] = parts.get(part, 0.0) + number
    return parts


def _forward(params: Params, sides: Sides) -> dict[str, float]:
    """FLOPs of every kernel in one forward pass."""
    flops = {}
    for name, leaf in zip(optimizer.parameter_names(params), _leaves(params), strict=True):
        if name.endswith("/kernel"):
            flops[name] = 2.0 * _size(name, leaf.shape) * _places(name, leaf.shape, sides)
    return flops


def _size(name: str, shape: tuple[int, ...]) -> int:
    """Numbers of a kernel that are applied at a place: of the mask predictor one class."""
    return math.prod(shape[:-1] if name == "mask_head/predictor/kernel" else shape)


def _leaves(params: Any) -> list[Any]:
    if not isinstance(params, Mapping):
        return [params]
    return [leaf for key in sorted(params) for leaf in _leaves(params[key])]


def _places(name: str, shape: tuple[int, ...], sides: Sides) -> int:
    """How often a kernel is applied an image."""
    part, *rest = name.split("/")
    cells = functools.partial(_cells, sides.canvas)
    if part == "backbone":
        return cells(_unit_stride(rest, sides))
    if part == "fpn":
        return cells(64 if rest[0] == "extra" else 2 ** int(rest[0][-1]))
    if part == "rpn":
        return sum(cells(2 ** int(level[1:])) for level in sides.rpn_levels)
    if part == "box_head":
        return sides.rois * (CELLS**2 if len(shape) == 4 else 1)
    if part == "mask_head":
        grown = 2 if rest[0] == "predictor" else 1
        return sides.mask_rois * (grown * sides.mask_cells) ** 2
    raise ValueError(f"{name} is not counted by hand")


def _cells(canvas: tuple[int, int], stride: int) -> int:
    return -(-canvas[0] // stride) * -(-canvas[1] // stride)


def _unit_stride(path: list[str], sides: Sides) -> int:
    """Pixels to a place at which a kernel of the backbone is applied."""
    if path[0] == "stem":
        return 2
    stage, block = int(path[0][-1]), int(path[1][len("block") :])
    layout, units = sides.layout, DEPTHS[sides.depth][stage - 1]
    late = layout.stride_in_last_unit
    strided = block == (units - 1 if late else 0) and stage != (4 if late else 1)
    before = 4 * 2 ** (stage - 1) if late else 4 * 2 ** max(stage - 2, 0)
    if not late and block > 0:
        before = 4 * 2 ** (stage - 1)
    if not strided:
        return before
    if path[2] == "shortcut_conv":
        return 2 * before
    first = layout.stride_in_first_conv or sides.depth < 50
    return 2 * before if int(path[2][len("conv")]) > (0 if first else 1) else before


def _stage(name: str) -> int:
    """The stage of a backbone's kernel, as an index of `STAGES`; the other parts come after it."""
    part, second = name.split("/")[:2]
    return STAGES.index(second) if part == "backbone" else len(STAGES)


def _first_trained(names: list[str], fixed: set[str]) -> int:
    """The first stage with a trained kernel, as an index of `STAGES`."""
    for i, stage in enumerate(STAGES):
        kernels = [n for n in names if n.startswith(f"backbone/{stage}/") and n.endswith("/kernel")]
        if any(name not in fixed for name in kernels):
            return i
    return len(STAGES)


def _tapped_stage(layout: Layout) -> dict[str, int]:
    """The stage that each level of the pyramid reads, as an index of `STAGES`."""
    stages = (1, 1, 2, 4) if layout.stride_in_last_unit else (1, 2, 3, 4)
    return dict(zip("2345", stages, strict=True))


def _reads_trained(name: str, first: int, taps: Mapping[str, int]) -> bool:
    """Whether a gradient of what the kernel reads is needed."""
    part, second, *rest = name.split("/")
    if part == "backbone":
        reads_stage = STAGES.index(second) == first
        return not (reads_stage and _is_entry(second, rest))
    if part == "fpn" and second.startswith("lateral"):
        return taps[second[-1]] >= first
    return True


def _is_entry(stage: str, rest: list[str]) -> bool:
    return stage == "stem" or (rest[0] == "block0" and rest[1] in ("conv1", "shortcut_conv"))
