"""The PyTorch twin: the configured detector in plain PyTorch, for comparison and for PyTorch users.

It is written from the model's definition and on torch's own operators, so that it checks sephjax
instead of repeating it. It infers only, in float32 whatever `compute_dtype` says. To add a
component: its class, an entry in the menu where its kind is chosen, its rules in `names.py`.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import nn

from configs._chain import plain
from sephjax.export import twin_neck, twin_proposals
from sephjax.export import twin_ops as ops
from sephjax.export.twin_backbone import FPN, ResNet
from sephjax.export.twin_heads import BOX_HEADS, RPNS, SIDE, MaskHead
from sephjax.export.twin_layers import Extents, Norm

Pyramid = Mapping[str, torch.Tensor]
Rows = dict[str, torch.Tensor]


class Twin(nn.Module):
    """Backbone, neck, RPN, box head and, if the config has one, mask head.

    Attributes:
        config: What it was built from.
        classes: Number of classes, without background.
    """

    def __init__(self, config: ConfigDict, classes: int):
        super().__init__()
        self.config, self.classes = config, classes
        back, neck, rpn, roi, mask = (
            config.backbone, config.fpn, config.rpn, config.roi, config.mask,
        )  # fmt: skip
        self.backbone = ResNet(back.depth, back.layout, back.norm, back.norm_eps, back.width)
        inputs = {name: self.backbone.channels[name] for name in neck.inputs}
        self.fpn = FPN(inputs, neck.channels, neck.norm, neck.lateral_norm, neck.extra)
        before, after = twin_neck.BEFORE[neck.before], twin_neck.AFTER[neck.after]
        self.fpn_before = before and before(inputs)
        self.fpn_after = after and after(neck.channels)
        levels = plain(rpn.levels) or (*(f"p{name[1:]}" for name in neck.inputs), "p6")
        make, anchors = RPNS[rpn.name], len(config.anchors.ratios)
        self.rpn = make(neck.channels, anchors, levels, rpn.convs, rpn.norm)
        options = plain(roi.head)
        head = BOX_HEADS[options.pop("name")]
        if roi.head.name != "res5":  # which has an eps of its own
            options |= {key: self._norm(x) for key, x in options.items() if "norm" in key}
        wide = neck.channels * (2 if roi.levels[0].startswith("f") else 1)
        make = functools.partial(head, wide, classes, roi.class_agnostic, **options)
        self.weights = plain(roi.cascade.weights) or (tuple(roi.weights),)  # of each stage
        heads = [make() for _ in self.weights]
        if roi.iou_branch.name != "none":
            for one in heads:
                one.add_iou()
        self.box_head = nn.ModuleList(heads) if roi.cascade.weights else heads[0]
        self.mask_head = None
        if mask.enabled:
            norm, deconv_norm = self._norm(mask.norm), self._norm(mask.deconv_norm)
            wide = int(heads[0].channels) if mask.input == "head" else wide
            self.mask_head = MaskHead(wide, classes, mask.convs, mask.dim, norm, deconv_norm)

    def _norm(self, name: str) -> Norm:
        """A norm of the heads."""
        return (name, self.config.heads_bn.eps) if name == "bn" else name

    @torch.no_grad()
    def forward(self, images: torch.Tensor, size: torch.Tensor) -> dict[str, Any]:
        """Every stage on a batch.

        Args:
            images: uint8 RGB, [b, h, w, 3]; each picture lies top-left on the canvas.
            size: Height and width of each picture, [b, 2].

        Returns:
            `pyramid`: {level: [b, c, h, w]}; `rpn_logits` [b, n], `rpn_deltas` [b, n, 4];
            `proposals`: a list with `boxes` [p, 4] and `scores` [p] of each picture; `box_logits`
            and `box_deltas`: lists of [p, k + 1] and [p, k, 4], with an IoU branch `box_iou`: a
            list of logits [p] (of a cascade, these are what `cascade` gives); `detections`: a list
            with `boxes` [d, 4], `scores` [d], `labels` [d] and, with a mask head, `masks` [d, s, s]
            (probabilities in the frame of the box), best first.
        """
        canvas = images.shape[1:3]
        pyramid = self.pyramid(images, size)
        rpn_logits, rpn_deltas = self.score(pyramid, size)
        proposals = self.propose(pyramid, rpn_logits, rpn_deltas, size, canvas)
        extents = self.extents(size, canvas)
        proposals, logits, deltas, iou = self.cascade(pyramid, proposals, extents, size)
        boxes = [rows["boxes"] for rows in proposals]
        detections = self.detect(logits, deltas, iou, boxes, size)
        if self.mask_head is not None:
            masks = self.masks(pyramid, detections, extents)
            detections = [
                rows | {"masks": part} for rows, part in zip(detections, masks, strict=True)
            ]
        found = {
            "pyramid": pyramid,
            "rpn_logits": rpn_logits,
            "rpn_deltas": rpn_deltas,
            "proposals": proposals,
            "box_logits": logits,
            "box_deltas": deltas,
            "detections": detections,
        }
        branch = self.config.roi.iou_branch.name != "none"
        return found | {"box_iou": iou} if branch else found

    def pyramid(self, images: torch.Tensor, size: torch.Tensor) -> dict[str, torch.Tensor]:
        """Feature maps p2 or p3 to p6, and with a `fusion` neck one more."""
        x, sizes = self.backbone.normalize(images, pictures(size)), self._sizes(size)
        features = self.backbone(x, sizes)
        if self.fpn_before is not None:
            features = self.fpn_before(features, sizes)
        maps = self.fpn(features, sizes)
        return maps if self.fpn_after is None else self.fpn_after(maps, sizes)

    def score(self, pyramid: Pyramid, size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """RPN logits and deltas of all anchors."""
        return self.rpn(self._anchored(pyramid), self._sizes(size))

    def _anchored(self, pyramid: Pyramid) -> dict[str, torch.Tensor]:
        """The levels with anchors: a fused map is for the ROIs alone."""
        chosen = self.config.rpn.levels or [name for name in pyramid if name.startswith("p")]
        return {name: pyramid[name] for name in chosen}

    def _sizes(self, size: torch.Tensor) -> Extents:
        """What padding is kept from; None if the config lets it act."""
        return pictures(size) if self.config.mask_padding else None

    def propose(
        self,
        pyramid: Pyramid,
        logits: torch.Tensor,
        deltas: torch.Tensor,
        size: torch.Tensor,
        canvas: Sequence[int],
    ) -> list[Rows]:
        """Proposals of every picture."""
        shapes = {name: maps.shape[2:] for name, maps in self._anchored(pyramid).items()}
        anchors = twin_proposals.anchors_of(self.config.anchors, canvas, shapes, logits.device)
        levels = list(anchors.values())
        counts = [len(level) for level in levels]
        return [
            twin_proposals.propose(
                logits[i].split(counts),
                deltas[i].split(counts),
                levels,
                picture,
                rule=plain(self.config.rpn.proposals),
                weights=self.config.rpn.weights,
                min_size=self.config.rpn.min_size,
                inside_only=self.config.mask_padding,
            )
            for i, picture in enumerate(pictures(size))
        ]

    def extents(self, size: torch.Tensor, canvas: Sequence[int]) -> list[tuple[int, int]]:
        """Height and width in pixels with which each picture's maps end for its ROIs."""
        padded = self.config.mask_padding
        return [picture if padded else (canvas[0], canvas[1]) for picture in pictures(size)]

    def pool(
        self,
        pyramid: Pyramid,
        boxes: Sequence[torch.Tensor],
        extents: Sequence[tuple[int, int]],
        side: int,
        scale: float = 1.0,
    ) -> torch.Tensor:
        """Features of the ROIs of all pictures in one row, [n, c, side, side].

        `scale` enlarges each ROI about its centre.
        """
        roi, levels = self.config.roi, list(self.config.roi.levels)
        options: Any = plain(roi.pooler)
        kind, level_of = options.pop("name"), options.pop("level_of", "box")
        if kind == "multi_scale":
            kind, options = "crop_max", {"bins": (1, 1)}
        pooled = []
        for i, rows in enumerate(boxes):
            scaled = ops.scaled(rows, scale)
            by = rows if level_of == "box" else scaled
            index = ops.levels_of(by, plain(roi.canonical), levels)
            rows = scaled
            found = rows.new_zeros(len(rows), pyramid[levels[0]].shape[1], side, side)
            for j, name in enumerate(levels):
                stride = 2 ** int(name[1:])
                height, width = (-(-pixels // stride) for pixels in extents[i])
                here, maps = rows[index == j], pyramid[name][i][:, :height, :width]
                if kind == "crop_max":
                    found[index == j] = ops.crop_max(maps, here, extents[i], side, **options)
                else:
                    found[index == j] = ops.roi_align(maps, here, stride, side, **options)
            pooled.append(found)
        return torch.cat(pooled)

    def classify(
        self,
        pyramid: Pyramid,
        boxes: Sequence[torch.Tensor],
        extents: Sequence[tuple[int, int]],
        stage: int = 0,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]:
        """Class logits, box deltas and IoU logits (or None) of the boxes, by one stage's head."""
        head = self.box_head
        if isinstance(head, nn.ModuleList):
            head = head[stage]
        views = [self.pool(pyramid, boxes, extents, SIDE)]
        if self.config.roi.pooler.name == "multi_scale":
            views.append(self.pool(pyramid, boxes, extents, SIDE, self.config.roi.pooler.scale))
        logits, deltas, iou = head(*views)
        counts = [len(rows) for rows in boxes]
        ious = [None] * len(boxes) if iou is None else iou.split(counts)
        return list(logits.split(counts)), list(deltas.split(counts)), list(ious)

    def cascade(
        self,
        pyramid: Pyramid,
        proposals: Sequence[Rows],
        extents: Sequence[tuple[int, int]],
        size: torch.Tensor,
    ) -> tuple[list[Rows], list[torch.Tensor], list[torch.Tensor], list[torch.Tensor | None]]:
        """What the last stage reads, the logits of all stages, deltas and IoU logits of the last.

        The logits' softmax is the mean of the stages' probabilities.
        """
        first = [rows["boxes"] for rows in proposals]
        logits, deltas, iou = self.classify(pyramid, first, extents)
        found = [logits]
        for stage in range(1, len(self.weights)):
            proposals = self.moved(proposals, deltas, size, stage - 1)
            boxes = [rows["boxes"] for rows in proposals]
            logits, deltas, iou = self.classify(pyramid, boxes, extents, stage)
            found.append(logits)
        if len(found) > 1:
            logits = [
                torch.stack([part.softmax(dim=1) for part in parts]).mean(dim=0).log()
                for parts in zip(*found, strict=True)
            ]
        return list(proposals), logits, deltas, iou

    def moved(
        self,
        proposals: Sequence[Rows],
        deltas: Sequence[torch.Tensor],
        size: torch.Tensor,
        stage: int,
    ) -> list[Rows]:
        """Proposals as a stage moves them."""
        return [
            rows | {"boxes": ops.decode(rows["boxes"], moves[:, 0], self.weights[stage], picture)}
            for rows, moves, picture in zip(proposals, deltas, pictures(size), strict=True)
        ]

    def detect(
        self,
        logits: Sequence[torch.Tensor],
        deltas: Sequence[torch.Tensor],
        iou: Sequence[torch.Tensor | None],
        boxes: Sequence[torch.Tensor],
        size: torch.Tensor,
    ) -> list[Rows]:
        """Detections of every picture, best first, without masks."""
        parts = zip(logits, deltas, iou, boxes, pictures(size), strict=True)
        return [detections(*part, self.weights[-1], self.config.test) for part in parts]

    def masks(
        self, pyramid: Pyramid, found: Sequence[Rows], extents: Sequence[tuple[int, int]]
    ) -> list[torch.Tensor]:
        """Mask probabilities of the detections of every picture."""
        assert self.mask_head is not None
        boxes = [rows["boxes"] for rows in found]
        pooled = self.pool(pyramid, boxes, extents, self.config.mask.pool)
        if self.config.mask.input == "head":
            head: Any = self.box_head
            pooled = head.map(pooled)
        masks = self.mask_head(pooled, torch.cat([rows["labels"] for rows in found]))
        return list(torch.sigmoid(masks).split([len(rows) for rows in boxes]))


def pictures(size: torch.Tensor) -> list[tuple[int, int]]:
    """`size` [b, 2] as numbers."""
    return [(int(height), int(width)) for height, width in size]


def detections(
    logits: torch.Tensor,
    deltas: torch.Tensor,
    iou: torch.Tensor | None,
    proposals: torch.Tensor,
    size: tuple[int, int],
    weights: Sequence[float],
    test: Any,
) -> Rows:
    """Detections of one picture, as `config.test` has it: threshold, decode, NMS by class."""
    scores = logits.softmax(dim=1)[:, :-1]
    if test.iou_score == "product":
        assert iou is not None
        scores = scores * torch.sigmoid(iou)[:, None]
    usable = scores > test.score_threshold
    if test.one_class_per_box and len(scores):
        best = torch.zeros_like(usable).scatter_(1, scores.argmax(dim=1, keepdim=True), 1)
        usable &= best
    rows, labels = torch.where(usable)
    scores = rank = scores[rows, labels]
    if test.iou_score == "order":
        assert iou is not None
        rank = torch.sigmoid(iou)[rows]
    order = ops.best_first(rank, test.candidates)
    rows, labels, scores, rank = rows[order], labels[order], scores[order], rank[order]
    moves = deltas[rows, labels if deltas.shape[1] > 1 else torch.zeros_like(labels)]
    boxes = ops.decode(proposals[rows], moves, weights, size)
    there = ops.nonempty(boxes, test.min_size)
    boxes, labels, scores, rank = boxes[there], labels[there], scores[there], rank[there]
    kept = ops.nms(boxes, rank, test.nms, groups=labels, inclusive=test.nms_inclusive)
    kept = kept[: test.detections]
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}
