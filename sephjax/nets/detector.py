"""Mask R-CNN (He et al., 2017): pyramid, proposals, ROI heads, in the order they run."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from sephjax.nets import functional, layers
from sephjax.nets.proposal import select
from sephjax.nets.roi.cascade import Cascade, Run, heads_of
from sephjax.nets.roi.pool import Pooler
from sephjax.ops import masks as mask_ops
from sephjax.ops import tiers
from sephjax.types import (
    Batch,
    BoxOutputs,
    Proposals,
    Rois,
    RpnOutputs,
    RpnTargets,
    TrainOutputs,
    Truth,
)

Pyramid = Mapping[str, Float[Array, "b _ _ _"]]  # a fused map is wider than the others


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the detector does between its networks; everything is bound by `build`."""

    normalize: Callable[[Array], Array]  # uint8 image -> network input
    anchors: Callable[..., tuple[Array, ...]]  # (canvas, shapes) -> anchors of every level
    rpn_levels: tuple[str, ...]  # the maps that the RPN reads, fine to coarse
    rpn_targets: Callable[..., RpnTargets]  # (keys, levels of anchors, inside, truth, canvas)
    propose: Callable[..., Proposals]  # (ranked levels of one image, train) -> proposals
    pre_nms: Callable[[int, bool], tuple[int, ...]]  # (levels, train) -> boxes ranked a level
    rpn_weights: tuple[float, float, float, float]
    rpn_min_size: float  # pixels of a proposal's shorter side
    roi_targets: Callable[..., Rois]
    cascade: Cascade  # of one stage, unless the config has more
    pooler: Pooler
    roi_tiers: tuple[float, ...]
    mask_pool: int  # cells a side of a pooled mask ROI
    mask_reads_head: bool  # the box head's map, not the pooled features
    mask_rois: int  # most positives an image
    mask_tiers: tuple[float, ...]
    mask_binary: bool  # threshold mask targets at 0.5
    mask_loss: Callable[..., Array]  # (logits, targets, positive) -> sum over positives
    mask_padding: bool


class Detector(nnx.Module):
    """Backbone, neck, RPN, box head (or a cascade of them) and, if there is one, mask head."""

    def __init__(self, networks: Mapping[str, Any], recipe: Recipe):
        self.backbone = networks["backbone"]
        self.fpn = networks["fpn"]
        self.rpn = networks["rpn"]
        self.box_head = networks["box_head"]
        if networks["fpn_before"] is not None:
            self.fpn_before = networks["fpn_before"]
        if networks["fpn_after"] is not None:
            self.fpn_after = networks["fpn_after"]
        if networks["mask_head"] is not None:
            self.mask_head = networks["mask_head"]
        self.recipe = recipe

    def pyramid(self, batch: Batch, train: bool = False) -> dict[str, Float[Array, "b _ _ _"]]:  # noqa: FBT001, FBT002
        """Feature maps p2... of a batch, each [b, h_l, w_l, c]; one more with a `Fusion` neck."""
        size = batch.size if self.recipe.mask_padding else None
        features = self.backbone(self.normalize(batch.image, batch.size), size, train=train)
        if hasattr(self, "fpn_before"):
            features = self.fpn_before(features, size)
        pyramid = self.fpn(features, size, train=train)
        return self.fpn_after(pyramid, size) if hasattr(self, "fpn_after") else pyramid

    def normalize(
        self, image: UInt8[Array, "b h w 3"], size: Int[Array, "b 2"]
    ) -> Float[Array, "b h w 3"]:
        """What the backbone reads: normalised pixels, 0 beyond each picture's `size`.

        Black pixels are no zeros once normalised: torchvision and detectron2 pad after that.
        """
        x = self.recipe.normalize(image)
        return layers.blank(x, layers.valid_mask(size, (x.shape[1], x.shape[2]), 1))

    def score(
        self, batch: Batch, pyramid: Pyramid, *, train: bool = False
    ) -> tuple[RpnOutputs, tuple[Array, ...], Array]:
        """The RPN's outputs, the anchors of every level, which of them each image may use.

        It reads the recipe's levels; a fused map is for the ROI heads alone (EXPERIMENTS 2.4).
        """
        maps = {name: pyramid[name] for name in self.recipe.rpn_levels}
        levels, inside = self._anchors(batch)
        size = batch.size if self.recipe.mask_padding else None
        return self.rpn(maps, size, train=train), levels, inside

    def extent(self, image: UInt8[Array, "b h w 3"], size: Int[Array, "b 2"]) -> Int[Array, "b 2"]:
        """Height and width in pixels with which each image's maps end for the ROIs."""
        if self.recipe.mask_padding:
            return size
        return jnp.broadcast_to(jnp.asarray(image.shape[1:3], size.dtype), size.shape)

    def _anchors(self, batch: Batch) -> tuple[tuple[Array, ...], Array]:
        """Anchors of every level, and which of all of them each image may use, [b, n].

        A map has a cell for each stride of the canvas and one for what is left.
        """
        canvas = batch.image.shape[1:3]
        strides = [2 ** int(name[1:]) for name in self.recipe.rpn_levels]
        shapes = tuple((-(-canvas[0] // s), -(-canvas[1] // s)) for s in strides)
        levels = self.recipe.anchors(canvas, shapes)
        return levels, self.usable(jnp.concatenate(levels), batch.size)

    def rpn_targets(self, batch: Batch, keys: Array) -> RpnTargets:
        """What the RPN should say; `keys` as in `training`. It needs no features, but all images of
        a group, which `training` on one device's images does not have."""
        levels, inside = self._anchors(batch)
        keys = jax.vmap(jax.random.split)(keys)[:, 0]
        return self.recipe.rpn_targets(keys, levels, inside, batch.truth, batch.image.shape[1:3])

    def usable(self, anchors: Float[Array, "n 4"], size: Int[Array, "b 2"]) -> Bool[Array, "b n"]:
        """Which anchors each image may use: with `mask_padding` those whose centre lies in it."""
        if not self.recipe.mask_padding:
            return jnp.ones((size.shape[0], anchors.shape[0]), bool)
        centres = 0.5 * (anchors[:, :2] + anchors[:, 2:])
        edge = size[:, ::-1].astype(jnp.float32)
        return jnp.all(centres[None] < edge[:, None], axis=-1)

    def propose(
        self,
        outputs: RpnOutputs,
        levels: tuple[Array, ...],
        inside: Array,
        size: Array,
        *,
        train: bool,
    ) -> Proposals:
        """Proposals of every image from raw outputs, the anchors of each level and `usable`."""
        cuts = [sum(level.shape[0] for level in levels[:i]) for i in range(1, len(levels))]
        counts = self.recipe.pre_nms(len(levels), train)

        def one(logits, deltas, usable, extent):
            ranked = select.rank_levels(
                jnp.split(logits, cuts),
                jnp.split(deltas, cuts),
                levels,
                jnp.split(usable, cuts),
                extent,
                counts=counts,
                weights=self.recipe.rpn_weights,
                min_size=self.recipe.rpn_min_size,
            )
            return self.recipe.propose(ranked, train)

        found = jax.vmap(one)(outputs.logits, outputs.deltas, inside, size.astype(jnp.float32))
        return jax.lax.stop_gradient(found)

    def training(
        self, batch: Batch, keys: Array, rpn_targets: RpnTargets | None = None
    ) -> TrainOutputs:
        """Everything up to the losses.

        Args:
            batch: images and truth.
            keys: one PRNG key an image, [b].
            rpn_targets: of these images; None: made here.
        """
        pyramid = self.pyramid(batch, train=True)
        outputs, levels, inside = self.score(batch, pyramid, train=True)
        pairs = jax.vmap(jax.random.split)(keys)
        anchors = jnp.concatenate(levels)
        if rpn_targets is None:
            rpn_targets = self.rpn_targets(batch, keys)
        proposals = self.propose(outputs, levels, inside, batch.size, train=True)
        rois = self.recipe.roi_targets(pairs[:, 1], proposals, batch.truth)
        extent = self.extent(batch.image, batch.size)
        cascade, sides = self.recipe.cascade, batch.size.astype(jnp.float32)
        run = self._heads(cascade.maps(pyramid), extent, train=True)
        heads = heads_of(self.box_head)
        (_, boxes), *later = cascade.train(heads, run, rois, batch.truth, keys, sides)
        mask_sum = (
            self._mask_sum(pyramid, rois, boxes.features, batch.truth, extent)
            if hasattr(self, "mask_head")
            else None
        )
        boxes = dataclasses.replace(boxes, features=None)
        return TrainOutputs(anchors, outputs, rpn_targets, rois, boxes, mask_sum, tuple(later))

    def _heads(self, maps: Pyramid, extent: Int[Array, "b 2"], *, train: bool) -> Run:
        """What a box head says of boxes, pooled from `maps`."""

        def run(head, boxes, valid):
            views = self.recipe.pooler.views(maps, boxes, valid, side=7, extent=extent)
            images, count = valid.shape
            near, *wide = (x.reshape(images * count, *x.shape[2:]) for x in views)
            rows = head(near, valid.reshape(-1), *wide, train=train)
            return jax.tree.map(lambda leaf: leaf.reshape(images, count, *leaf.shape[1:]), rows)

        return run

    def _mask_sum(
        self,
        pyramid: Pyramid,
        rois: Rois,
        features: Float[Array, "b r _h _w _c"] | None,
        truth: Truth,
        extent: Int[Array, "b 2"],
    ) -> Float[Array, ""]:
        recipe = self.recipe
        first = lambda leaf: leaf[:, : recipe.mask_rois]
        boxes, labels, positive = first(rois.boxes), first(rois.labels), first(rois.positive)
        if recipe.mask_reads_head:
            pooled = first(features)
        else:
            pooled = recipe.pooler(pyramid, boxes, positive, side=recipe.mask_pool, extent=extent)
        crop = lambda m, gt, b, i: mask_ops.crop_masks(
            m, gt, b, i, output_size=2 * recipe.mask_pool
        )
        targets = jax.vmap(crop)(truth.masks, truth.boxes, boxes, first(rois.matched))
        if recipe.mask_binary:
            targets = (targets >= 0.5).astype(jnp.float32)
        head, params, frozen = functional.detach(self.mask_head)

        def loss(params, pooled, rest, frozen):
            labels, targets, positive = rest
            logits, moved = head(params, frozen, pooled[0], labels[0], positive[0], train=True)
            return recipe.mask_loss(logits[None], targets, positive), moved

        pooled, rest = tiers.pack((pooled, (labels, targets, positive)), positive)
        count = jnp.sum(positive, dtype=jnp.int32)
        total, moved = tiers.tiered_sum(
            loss, params, pooled, rest, count, recipe.mask_tiers, (frozen,)
        )
        functional.attach(self.mask_head, moved)
        return total

    def candidates(self, batch: Batch) -> tuple[dict[str, Array], Proposals, BoxOutputs]:
        """Pyramid, test-time proposals (valid ones first) and the box head's outputs of them.

        With a cascade: the boxes that its last stage reads, and what `Cascade.test` says of them.
        """
        pyramid, extent = self.pyramid(batch), self.extent(batch.image, batch.size)
        outputs, levels, inside = self.score(batch, pyramid)
        proposals = self.propose(outputs, levels, inside, batch.size, train=False)
        proposals = jax.vmap(select.valid_first)(proposals)

        sides, heads = batch.size.astype(jnp.float32), heads_of(self.box_head)

        def run(rows: Proposals) -> tuple[Proposals, BoxOutputs]:
            call = self._heads(pyramid, extent, train=False)
            return self.recipe.cascade.test(heads, call, rows, sides)

        most = jnp.max(jnp.sum(proposals.valid, axis=1, dtype=jnp.int32))
        return pyramid, *tiers.by_tier(run, proposals, most, self.recipe.roi_tiers)

    def masks(
        self,
        batch: Batch,
        pyramid: Pyramid,
        boxes: Float[Array, "b d 4"],
        labels: Int[Array, "b d"],
        valid: Bool[Array, "b d"],
    ) -> Float[Array, "b d s s"]:
        """Mask probabilities of the detections, each in the frame of its box; else 0."""
        extent = self.extent(batch.image, batch.size)

        def run(rows):
            boxes, labels, valid = rows
            pooled = self.recipe.pooler(
                pyramid, boxes, valid, side=self.recipe.mask_pool, extent=extent
            )
            flat = pooled.reshape(-1, *pooled.shape[2:])
            if self.recipe.mask_reads_head:
                flat = self.box_head.features(flat)
            logits = self.mask_head(flat, labels.reshape(-1))
            return jax.nn.sigmoid(logits).reshape(*boxes.shape[:2], *logits.shape[1:])

        most = jnp.max(jnp.sum(valid, axis=1, dtype=jnp.int32))
        found = tiers.by_tier(run, (boxes, labels, valid), most, self.recipe.mask_tiers)
        return jnp.where(valid[:, :, None, None], found, 0.0)
