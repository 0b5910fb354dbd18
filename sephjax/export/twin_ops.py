"""Boxes in the PyTorch twin: (x1, y1, x2, y2) in pixels of the network input, continuous edges."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torchvision.ops import box_iou, clip_boxes_to_image
from torchvision.ops import nms as torchvision_nms
from torchvision.ops import roi_align as torchvision_roi_align

DELTA_CLAMP = math.log(1000 / 16)  # of dw and dh: detectron2, torchvision
ROUNDING = 1e-3  # cells: a point on the border may be computed to lie this far beyond it


def cell_anchors(
    size: float,
    ratios: Sequence[float],
    ratio_is: str,
    rounded: bool,  # noqa: FBT001
) -> torch.Tensor:
    """Anchors of area `size` squared around 0, [a, 4]; a ratio is what `ratio_is` says."""
    rows = []
    for ratio in ratios:
        tall = ratio if ratio_is == "height_over_width" else 1 / ratio
        width, height = size / math.sqrt(tall), size * math.sqrt(tall)
        rows.append([-width / 2, -height / 2, width / 2, height / 2])
    cells = torch.tensor(rows, dtype=torch.float64)
    return (cells.round() if rounded else cells).float()


def grid_anchors(
    cells: torch.Tensor, shape: Sequence[int], stride: Sequence[float], offset: float
) -> torch.Tensor:
    """`cells` [a, 4] around every cell of a map of `shape`, row-major, [h * w * a, 4]."""
    y = (torch.arange(shape[0], device=cells.device) + offset) * stride[0]
    x = (torch.arange(shape[1], device=cells.device) + offset) * stride[1]
    y, x = torch.meshgrid(y, x, indexing="ij")
    centres = torch.stack([x, y, x, y], dim=-1).float()
    return (centres[:, :, None] + cells).reshape(-1, 4)


def strides_of(
    rule: str, canvas: Sequence[int], shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[float, float]]:
    """Pixels between two cells of each level, down and across.

    `nominal`: 4 for p2, 8 for p3; `feature`: canvas / map (the series); `feature_floor`: the same
    rounded down (torchvision).
    """
    if rule == "nominal":
        strides = {name: 2.0 ** int(name[1:]) for name in shapes}
        return {name: (stride, stride) for name, stride in strides.items()}
    if rule == "feature":
        return {name: (canvas[0] / h, canvas[1] / w) for name, (h, w) in shapes.items()}
    return {name: (canvas[0] // h, canvas[1] // w) for name, (h, w) in shapes.items()}


def decode(
    boxes: torch.Tensor, deltas: torch.Tensor, weights: Sequence[float], size: tuple[int, int]
) -> torch.Tensor:
    """Moves boxes [n, 4] by deltas [n, 4] and cuts them at the picture's edge; `size` is (h, w)."""
    d = deltas / deltas.new_tensor(list(weights))
    sides = boxes[:, 2:] - boxes[:, :2]
    centres = boxes[:, :2] + 0.5 * sides + d[:, :2] * sides
    half = 0.5 * sides * torch.exp(d[:, 2:].clamp(max=DELTA_CLAMP))
    return clip_boxes_to_image(torch.cat([centres - half, centres + half], dim=1), size)


def scaled(boxes: torch.Tensor, factor: float) -> torch.Tensor:
    """Boxes [n, 4] grown about their centres, not cut."""
    margin = 0.5 * (factor - 1) * (boxes[:, 2:] - boxes[:, :2])
    return boxes + torch.cat([-margin, margin], dim=1)


def nonempty(boxes: torch.Tensor, min_size: float) -> torch.Tensor:
    """Which boxes have an area and no side shorter than `min_size`."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return ((sides > 0) & (sides >= min_size)).all(dim=1)


def best_first(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` highest scores; of equal ones the earlier first."""
    return torch.sort(scores, descending=True, stable=True).indices[:count]


def nms(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    threshold: float,
    *,
    groups: torch.Tensor | None = None,
    inclusive: bool = False,
) -> torch.Tensor:
    """Indices that survive, by falling score.

    Args:
        boxes: [n, 4].
        scores: [n].
        threshold: IoU above which the lower score of two boxes goes.
        groups: Boxes of different groups leave each other alone, [n].
        inclusive: At an IoU equal to `threshold` it goes too.
    """
    if inclusive:  # "at least" is "more than the next float32 below"
        threshold = float(np.nextafter(np.float32(threshold), np.float32(-1)))
    if groups is None:
        return torchvision_nms(boxes, scores, threshold)
    kept = []
    for group in groups.unique():
        members = torch.where(groups == group)[0]
        kept.append(members[torchvision_nms(boxes[members], scores[members], threshold)])
    every = torch.cat(kept).sort().values if kept else groups.new_zeros(0, dtype=torch.long)
    return every[best_first(scores[every], len(every))]


def nms_exactly_k(
    boxes: torch.Tensor, scores: torch.Tensor, threshold: float, count: int
) -> torch.Tensor:
    """Indices of exactly `count` boxes, by falling score; of all, if there are fewer.

    Where fewer survive NMS, removed boxes come back: each has `score * prod(1 - IoU)` over the
    survivors ranked before it; again and again the highest comes back, and the scores of the rest
    are multiplied by `1 - IoU` with it.

    Args:
        boxes: [n, 4], by falling score.
        scores: [n]; logits.
        threshold: IoU at or above which the lower score of two boxes goes.
        count: Of boxes.
    """
    kept = nms(boxes, scores, threshold, inclusive=True)[:count]
    place = torch.arange(len(boxes), device=boxes.device)
    keep = torch.isin(place, kept)
    later = place[None] > kept[:, None]
    decay = torch.where(later, 1 - box_iou(boxes[kept], boxes), 1.0).prod(dim=0)
    while int(keep.sum()) < min(count, len(boxes)):
        left = (scores * decay).masked_fill(keep, -math.inf)
        best = torch.where(left == left.max())[0][:1]  # of equal ones the earlier
        decay = decay * (1 - box_iou(boxes[best], boxes)[0])
        keep[best] = True
    return torch.where(keep)[0]


def levels_of(
    boxes: torch.Tensor, canonical: Mapping[str, Any], levels: Sequence[str]
) -> torch.Tensor:
    """Index of the level in `levels` that each box is pooled from; FPN's equation 1."""
    eps, inside = canonical["eps"], canonical["eps_inside_log"]
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0)
    size = torch.sqrt(sides[:, 0] * sides[:, 1])
    ratio = size / canonical["size"]
    level = torch.log2(ratio + eps) if inside else torch.log2(ratio) + eps
    numbers = [int(name[1:]) for name in levels]
    level = torch.floor(canonical["level"] + level).clamp(numbers[0], numbers[-1])
    return level.long() - numbers[0]


def crop_max(
    x: torch.Tensor, boxes: torch.Tensor, extent: Sequence[int], side: int, bins: Sequence[int]
) -> torch.Tensor:
    """TensorFlow's `crop_and_resize` of one map, then a max-pool, as the published series has it.

    A box is sampled from edge to edge at `side * bins` points; a box as large as the picture goes
    from the first to the last cell. A point outside the map reads 0.

    Args:
        x: [c, h, w].
        boxes: [n, 4].
        extent: Height and width of the picture in pixels.
        side: Cells a side of the result.
        bins: Points under each of them, down and across.
    """
    y, y_in = _points(boxes[:, [1, 3]], extent[0], x.shape[1], side * bins[0])
    x_, x_in = _points(boxes[:, [0, 2]], extent[1], x.shape[2], side * bins[1])
    grid = torch.stack(torch.broadcast_tensors(x_[:, None, :], y[:, :, None]), dim=-1)
    crops = F.grid_sample(
        x.expand(len(boxes), *x.shape), grid, padding_mode="border", align_corners=True
    )
    crops = crops * (y_in[:, :, None] & x_in[:, None, :])[:, None]
    return F.max_pool2d(crops, tuple(bins))


def _points(
    edges: torch.Tensor, length: int, cells: int, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of an axis as `grid_sample` wants them (-1 to 1), and which lie in the map, [n, m]."""
    low, high = (edges / length * (cells - 1)).unbind(1)
    if count == 1:
        at = (0.5 * (low + high))[:, None]
    else:
        share = torch.linspace(0, 1, count, device=edges.device)
        at = torch.lerp(low[:, None], high[:, None], share)
    inside = (at >= -ROUNDING) & (at <= cells - 1 + ROUNDING)
    return at * (2 / max(cells - 1, 1)) - 1, inside


def roi_align(
    x: torch.Tensor,
    boxes: torch.Tensor,
    stride: int,
    side: int,
    *,
    sampling_ratio: int = 2,
    aligned: bool = True,
) -> torch.Tensor:
    """torchvision's ROIAlign of one picture's map [c, h, w], [n, c, side, side]."""
    return torchvision_roi_align(x[None], [boxes], side, 1 / stride, sampling_ratio, aligned)
