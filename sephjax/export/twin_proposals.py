"""From RPN outputs to proposals in the PyTorch twin, as at test time; one function a rule."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sephjax.export import twin_ops as ops

Level = tuple[torch.Tensor, torch.Tensor]  # boxes [n, 4] and logits [n], best first


def anchors_of(
    config: Any, canvas: Sequence[int], shapes: Mapping[str, Sequence[int]], device: torch.device
) -> dict[str, torch.Tensor]:
    """Anchors of every level, [n, 4]; `config` is `config.anchors`."""
    strides = ops.strides_of(config.stride, canvas, shapes)
    levels = {}
    for size, (name, shape) in zip(config.sizes, shapes.items(), strict=True):
        cells = ops.cell_anchors(size, config.ratios, config.ratio_is, config.rounded).to(device)
        levels[name] = ops.grid_anchors(cells, shape, strides[name], config.offset)
    return levels


def quotas(first: int, shrink: int, count: int) -> list[int]:
    """`first`, then each time a `shrink`-th of it, rounded down from the first."""
    return [first // shrink**i for i in range(count)]


def joint(levels: Sequence[Level], rule: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """NMS by level, then the best of all levels (detectron2, torchvision)."""
    boxes, scores = (torch.cat(part) for part in zip(*levels, strict=True))
    counts = torch.tensor([len(level[1]) for level in levels], device=boxes.device)
    groups = torch.arange(len(levels), device=boxes.device).repeat_interleave(counts)
    kept = ops.nms(boxes, scores, rule["nms"], groups=groups)[: rule["test_post"]]
    return {"boxes": boxes[kept], "scores": scores[kept]}


def per_level(levels: Sequence[Level], rule: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A quota for every level, in the order of the levels (the series).

    With `test_exactly` the quota is filled with suppressed boxes; else low logits go, but the best
    box of a level stays whatever its logit.
    """
    kept_boxes, kept_scores = [], []
    counts = quotas(rule["post"], rule["shrink"], len(levels))
    for (boxes, scores), count in zip(levels, counts, strict=True):
        if rule["test_exactly"]:
            kept = ops.nms_exactly_k(boxes, scores, rule["nms"], count)
        else:
            kept = ops.nms(boxes, scores, rule["nms"], inclusive=True)[:count]
            high = scores[kept] > rule["logit_floor"]
            high[:1] = True
            kept = kept[high]
        kept_boxes.append(boxes[kept])
        kept_scores.append(scores[kept])
    return {"boxes": torch.cat(kept_boxes), "scores": torch.cat(kept_scores)}


def above(levels: Sequence[Level], rule: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Boxes of all levels over a probability, NMS over all of them (RetinaNet's detections)."""
    boxes, scores = (torch.cat(part) for part in zip(*levels, strict=True))
    high = torch.sigmoid(scores) > rule["test_score"]
    boxes, scores = boxes[high], scores[high]
    kept = ops.nms(boxes, scores, rule["test_nms"], inclusive=True)[: rule["test_post"]]
    return {"boxes": boxes[kept], "scores": scores[kept]}


RULES: dict[str, Callable[..., dict[str, torch.Tensor]]] = {
    "joint": joint,
    "per_level": per_level,
    "retinanet": above,
}


def propose(
    logits: Sequence[torch.Tensor],
    deltas: Sequence[torch.Tensor],
    anchors: Sequence[torch.Tensor],
    size: tuple[int, int],
    *,
    rule: Mapping[str, Any],
    weights: Sequence[float],
    min_size: float,
    inside_only: bool,
) -> dict[str, torch.Tensor]:
    """Proposals of one picture.

    Args:
        logits: [n] of each level.
        deltas: [n, 4] of each level.
        anchors: [n, 4] of each level.
        size: Height and width of the picture; boxes are cut at its edge.
        rule: `config.rpn.proposals`.
        weights: Of the deltas.
        min_size: Of a side of a proposal, pixels.
        inside_only: Anchors whose centre is beyond the picture are not looked at.

    Returns:
        `boxes` [p, 4] and `scores` (logits) [p].
    """
    if rule["name"] in ("joint", "retinanet"):
        counts = [rule["test_pre"]] * len(logits)
    else:
        counts = quotas(rule["pre"], rule["shrink"], len(logits))
    levels = []
    for scores, moves, boxes, count in zip(logits, deltas, anchors, counts, strict=True):
        if inside_only:
            centres = 0.5 * (boxes[:, :2] + boxes[:, 2:])
            inside = (centres < centres.new_tensor([size[1], size[0]])).all(dim=1)
            scores, moves, boxes = scores[inside], moves[inside], boxes[inside]
        best = ops.best_first(scores, count)
        boxes = ops.decode(boxes[best], moves[best], weights, size)
        there = ops.nonempty(boxes, min_size)
        levels.append((boxes[there], scores[best][there]))
    return RULES[rule["name"]](levels, rule)
