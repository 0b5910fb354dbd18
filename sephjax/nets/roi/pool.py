"""Pools ROIs from the pyramid: which level, which kernel."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int, Num

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
            maximum, `{"name": "crop_max", "bins"}`.
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
        maps = [pyramid[name] for name in self.levels]
        index = self.assign(boxes)
        options = {key: value for key, value in self.kind.items() if key != "name"}
        crop = self.kind["name"] == "crop_max"
        pool = roi_align.crop_and_max_pool if crop else roi_align.roi_align
        return pool(
            maps,
            boxes,
            index,
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
