"""Pools ROIs from the pyramid: which level, which kernel."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int, Num

from sephjax.ops import boxes as box_ops
from sephjax.ops import roi_align


@dataclasses.dataclass(frozen=True)
class Pooler:
    """ROI features from the level that fits each ROI's size (FPN, section 4.2).

    Attributes:
        levels: names of the maps it reads, fine to coarse; with one there is no assignment.
        strides: pixels a cell of each.
        canonical: size (pixels) and level of a standard ROI, and where the rule's eps stands.
        lowest: number of the finest level (2 for p2).
        kind: `{"name": "roi_align", "sampling_ratio", "aligned"}`, or the series' crop with a 2x2
            maximum, `{"name": "crop_max", "bins"}`, or its crop without one for which the box
            branch sees more, `{"name": "multi_scale", "scale", "level_of"}` (`views`).
    """

    levels: tuple[str, ...]
    strides: tuple[float, ...]
    canonical: Mapping[str, Any]
    lowest: int
    kind: Mapping[str, Any]

    def __call__(
        self,
        pyramid: Mapping[str, Float[Array, "b _ _ _c"]],
        boxes: Float[Array, "b n 4"],
        valid: Bool[Array, "b n"],
        *,
        side: int,
        extent: Num[Array, "b 2"],
    ) -> Float[Array, "b n s s c"]:
        """Features of every ROI, `side` cells a side; zeros for invalid ROIs.

        `extent` is the height and width in pixels with which the maps of each image end.
        """
        return self._pool(pyramid, boxes, self.assign(boxes), valid, side, extent)

    def views(
        self,
        pyramid: Mapping[str, Float[Array, "b _ _ _c"]],
        boxes: Float[Array, "b n 4"],
        valid: Bool[Array, "b n"],
        *,
        side: int,
        extent: Num[Array, "b 2"],
    ) -> tuple[Float[Array, "b n s s c"], ...]:
        """What a box head reads: the features of each ROI; with `multi_scale` two of them.

        The second, for the box branch, are those of the box `scale` times as large about its
        centre, not cut at the picture's edge: points beyond it read 0. They come from the level of
        the box itself (`level_of: "box"`) or from that of the larger box (`"view"`).
        """
        own = self.assign(boxes)
        near = self._pool(pyramid, boxes, own, valid, side, extent)
        if self.kind["name"] != "multi_scale":
            return (near,)
        wide = box_ops.scale(boxes, self.kind["scale"])
        level = own if self.kind["level_of"] == "box" else self.assign(wide)
        return near, self._pool(pyramid, wide, level, valid, side, extent)

    def _pool(
        self,
        pyramid: Mapping[str, Array],
        boxes: Float[Array, "b n 4"],
        levels: Int[Array, "b n"],
        valid: Bool[Array, "b n"],
        side: int,
        extent: Num[Array, "b 2"],
    ) -> Float[Array, "b n s s c"]:
        maps = [pyramid[name] for name in self.levels]
        options: Any = {key: value for key, value in self.kind.items() if key != "name"}
        if self.kind["name"] == "multi_scale":
            options = {"bins": (1, 1)}
        align = self.kind["name"] == "roi_align"
        pool = roi_align.roi_align if align else roi_align.crop_and_max_pool
        return pool(
            maps,
            boxes,
            levels,
            valid,
            strides=self.strides,
            extent=extent,
            output_size=(side, side),
            **options,
        )

    def assign(self, boxes: Float[Array, "b n 4"]) -> Int[Array, "b n"]:
        """Position in `levels` of the map that each ROI is pooled from."""
        rule = self.canonical
        assign = lambda one: roi_align.assign_levels(
            one,
            canonical_size=rule["size"],
            canonical_level=rule["level"],
            min_level=self.lowest,
            max_level=self.lowest + len(self.levels) - 1,
            eps=rule["eps"],
            eps_inside_log=rule["eps_inside_log"],
        )
        return jax.vmap(assign)(boxes)
