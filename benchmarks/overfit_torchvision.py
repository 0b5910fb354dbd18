"""Seconds a step of torchvision's Mask R-CNN on the recipe `mask_rcnn:overfit`.

`python -m benchmarks.overfit_torchvision ANNOTATIONS IMAGES [--steps N]`: the first 16 pictures by
id that have an object, short side 320, long side at most 480, batch 2, SGD 0.01, momentum 0.9,
decay 1e-4, clip 32, stem and layer1 frozen. The weights are random, which is enough for time, and
the learning rate is that of the recipe's first step, so that random weights do not run away. Files
are read and resized before the clock starts; torchvision's normalising and padding is inside.
"""

import argparse
import itertools
import os
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
from pycocotools.coco import COCO

from benchmarks import peer

PICTURES, BATCH, SHORT, LONG = 16, 2, 320, 480
LR, WARMUP_FROM, MOMENTUM, DECAY, CLIP = 0.01, 0.001, 0.9, 1e-4, 32.0
SKIPPED = 2  # first steps, which warm up

Sample = tuple[torch.Tensor, dict[str, torch.Tensor]]


def samples(annotations: pathlib.Path, images: pathlib.Path) -> list[Sample]:
    """The pictures of the recipe at the network's size, with full-size masks."""
    coco = COCO(str(annotations))
    labels = {category: i + 1 for i, category in enumerate(sorted(coco.getCatIds()))}
    found = []
    for image_id in sorted(coco.getImgIds()):
        objects = coco.loadAnns(coco.getAnnIds(image_id, iscrowd=False))
        objects = [o for o in objects if min(o["bbox"][2:]) > 1]
        if objects and len(found) < PICTURES:
            name = coco.loadImgs(image_id)[0]["file_name"]
            found.append(_sample(coco, images / name, objects, labels))
    return found


def _sample(coco: COCO, path: pathlib.Path, objects: list[Any], labels: dict[int, int]) -> Sample:
    pixels = cv2.imread(str(path))
    if pixels is None:
        raise SystemExit(f"{path} cannot be read as a picture.")
    height, width = pixels.shape[:2]
    scale = min(SHORT / min(height, width), LONG / max(height, width))
    shape = (round(width * scale), round(height * scale))
    image = cv2.resize(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB), shape)
    nearest = cv2.INTER_NEAREST
    masks = np.stack([cv2.resize(coco.annToMask(o), shape, interpolation=nearest) for o in objects])
    ratio = np.array([shape[0] / width, shape[1] / height] * 2)
    corners = [[x, y, x + w, y + h] for x, y, w, h in (o["bbox"] for o in objects)]
    target = {
        "boxes": torch.from_numpy((np.array(corners) * ratio).astype(np.float32)),
        "labels": torch.tensor([labels[o["category_id"]] for o in objects]),
        "masks": torch.from_numpy(masks),
    }
    return peer.tensor(image), target


def step_seconds(data: Sequence[Sample], steps: int) -> list[float]:
    """Wall seconds of every step but the first `SKIPPED`."""
    model = peer.mask_rcnn(SHORT, LONG).train()
    parts: Any = model
    parts.transform._skip_resize = True  # noqa: SLF001, the pictures have their size
    trained = [p for p in model.parameters() if p.requires_grad]
    sgd = torch.optim.SGD(trained, LR * WARMUP_FROM, momentum=MOMENTUM, weight_decay=DECAY)
    order, seconds = itertools.cycle(data), []
    for _ in range(steps):
        images, targets = zip(*itertools.islice(order, BATCH), strict=True)
        began = time.perf_counter()
        losses = model(list(images), list(targets))
        sgd.zero_grad(set_to_none=True)
        torch.stack([*losses.values()]).sum().backward()
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        sgd.step()
        seconds.append(time.perf_counter() - began)
    return seconds[SKIPPED:]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="torchvision's step time on mask_rcnn:overfit")
    parser.add_argument("annotations", type=pathlib.Path, help="COCO JSON")
    parser.add_argument("images", type=pathlib.Path, help="folder of its pictures")
    parser.add_argument("--steps", type=int, default=8, help=f"the first {SKIPPED} do not count")
    options = parser.parse_args(arguments)
    if options.steps <= SKIPPED:
        parser.error(f"--steps must be above {SKIPPED}")
    data = samples(options.annotations, options.images)
    load = os.getloadavg()[0]
    seconds = step_seconds(data, options.steps)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, load {load:.1f} before; "
        f"{len(data)} pictures, {sum(len(t['labels']) for _, t in data)} objects"
    )
    print(
        f"{statistics.median(seconds):.2f} s a step (median of {len(seconds)}; "
        f"{min(seconds):.2f} to {max(seconds):.2f})"
    )


if __name__ == "__main__":
    main()
