"""A row at a size that compiles in seconds, with every mechanism it has."""

from collections.abc import Mapping
from typing import Any

from configs._chain import plain
from tests.configs.families import read

SIDE = 192  # pixels; pictures are at most this long, on one square canvas
PROPOSALS = {  # of each kind of `rpn.proposals`, where the row has the key
    "train_pre": 100, "train_post": 40, "test_pre": 100, "test_post": 20, "pre": 200, "post": 90,
}  # fmt: skip
VALUES = {
    "init.format": "none",
    "init.backbone_only": False,
    "backbone.depth": 18,
    "backbone.width": 8,
    "fpn.channels": 32,
    "rpn.samples": 256,
    "roi.samples": 32,
    "roi.canonical.size": 56.0,
    "roi.tiers": (),
    "mask.convs": 1,
    "mask.dim": 32,
    "mask.tiers": (),
    "test.detections": 10,
    "test.score_threshold": 0.0,
    "test.candidates": 60,
    "optimizer.weight_decay": 0.0,  # a gradient of nothing must not hide behind it
    "schedule.warmup_steps": 0,
    "train.batch": 4,
    "train.steps": 10,
    "eval.batch": 2,
    "data.size_multiple": SIDE,
    "data.max_objects": 8,
    "data.prefetch": 1,
}


def shrunk(family: str, row: str, folder: Any) -> Any:
    """The config of a row on pictures of coco_tiny in `folder`; the row's own kinds stay."""
    config = read(family, row)
    changes = VALUES | {f"rpn.proposals.{k}": v for k, v in PROPOSALS.items()}
    changes["anchors.sizes"] = _divided(plain(config.anchors.sizes))
    changes |= {f"roi.head.{k}": v for k, v in _narrow(config.roi.head).items()}
    changes["train.batch"] -= changes["train.batch"] % config.rpn.sample_group
    if config.backbone.layout == "msra":  # pixels of +-128 into random weights: steps overshoot
        changes["optimizer.lr"] = 1e-4
    if config.data.jitter.crop:
        changes["data.jitter.crop"] = SIDE
    if config.data.stitch:
        changes["data.stitch"] = 1.0
    if config.rpn.samples == 0:  # all anchors
        del changes["rpn.samples"]
    for part, name in (("train", "train"), ("eval", "val")):
        changes |= {
            f"data.{part}.annotations": f"{folder}/annotations/instances_{name}.json",
            f"data.{part}.images": f"{folder}/{name}",
            f"data.{part}.limit": 12 if part == "train" else 3,
            f"data.{part}.short_sides": (SIDE,),
            f"data.{part}.long_side": SIDE,
            f"data.{part}.aspects": (),
        }
    changes["data.source"] = "coco"
    known = {path: value for path, value in changes.items() if _has(config, path)}
    config.update_from_flattened_dict(known)
    return config


def _has(config: Any, path: str) -> bool:
    for name in path.split("."):
        if name not in config:
            return False
        config = config[name]
    return True


def _divided(sizes: Any) -> Any:
    if isinstance(sizes, tuple):
        return tuple(_divided(size) for size in sizes)
    return type(sizes)(max(sizes // 4, 8))


def _narrow(head: Mapping[str, Any]) -> dict[str, Any]:
    """Widths of a box head: every number over 16, alone or in a row, becomes 32."""
    wide = lambda value: isinstance(value, int) and value > 16
    rows = {k: (32,) * len(v) for k, v in plain(head).items() if isinstance(v, tuple) and v}
    return rows | {k: 32 for k, v in plain(head).items() if wide(v)}
