"""Real pictures with their truth, as a batch of ours and as torchvision takes them."""

from typing import Any

import jax
import numpy as np
import pytest

from sephjax.input import batches, coco, views
from sephjax.ops import masks as mask_ops
from sephjax.types import Batch

ROWS = (5, 29, 24)  # of the training view of coco_tiny val: landscape, portrait, nearly square
SHORT, LONG = 160, 214  # pixels; every picture keeps its shape and has this short side
CANVAS = (224, 224)
OBJECTS = 8  # room for the objects of a picture
CLASSES = 90
torch = pytest.importorskip("torch")


def batch(folder, rows=ROWS) -> Batch:
    """The pictures `rows` of coco_tiny val on one canvas, which none of them fills."""
    images, annotations = folder / "coco_tiny/val", folder / "coco_tiny/annotations"
    source = coco.open_coco(str(annotations / "instances_val.json"), str(images), train=True)
    frame = batches.Frame((SHORT,), LONG, "keep_aspect", 0.0, OBJECTS, masks=True)
    arrays = batches.blank(len(rows), CANVAS, OBJECTS, masks=True)
    for slot, row in enumerate(rows):
        example = source.example(row)
        file = (example.height, example.width)
        view = views.draw(np.random.default_rng(0), file, CANVAS, frame)
        batches.place_image(arrays, slot, example.image, SHORT, frame)
        batches.place_objects(arrays, slot, (views.seen(example, view)[0],), frame)
        arrays["index"][slot] = row
    return batches.to_batch(arrays)


def unpadded(batch: Batch) -> list[np.ndarray]:
    """The pictures without their padding, uint8 [h, w, 3]."""
    pairs = zip(batch.image, batch.size, strict=True)
    return [image[:height, :width] for image, (height, width) in pairs]


def tensors(batch: Batch) -> list[Any]:
    """The pictures as torchvision takes them."""
    from benchmarks import peer

    return [peer.tensor(image) for image in unpadded(batch)]


def targets(batch: Batch) -> list[dict[str, Any]]:
    """The truth of each picture, background first; masks are crops in the frames of their boxes."""
    found, truth = [], batch.truth
    for row, valid in enumerate(truth.valid):
        boxes, labels, crops = (x[row][valid] for x in (truth.boxes, truth.labels, truth.masks))
        label = torch.from_numpy(labels.astype(np.int64) + 1)
        found.append(
            {"boxes": torch.from_numpy(boxes), "labels": label, "masks": torch.from_numpy(crops)}
        )
    return found


def projection(batch: Batch):
    """A `project_masks_on_boxes` that reads the crops of `targets`, image by image, in order.

    torchvision resamples masks of the whole picture, and half a pixel aside. Ours are stored in the
    frame of their box, so the two targets differ at outlines; here both sides get ours, which
    tests/ops/test_masks.py holds against references.
    """
    boxes = iter(target["boxes"].numpy() for target in targets(batch))
    crop = jax.jit(mask_ops.crop_masks, static_argnames="output_size")

    def project(masks, rois, matched, side):
        index = matched.numpy().astype(np.int32)
        crops = crop(masks.numpy(), next(boxes), rois.detach().numpy(), index, output_size=side)
        return torch.from_numpy(np.array(crops))

    return project
