import json
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from sephjax.evaluation import paste as paste_ops
from sephjax.ops import masks as mask_ops

SIZE = (37, 53)


def brute_paste(mask, box, size, threshold=0.5):
    """One bilinear look-up for each pixel of the image, zero outside the mask."""
    s = mask.shape[0]
    padded = np.pad(mask.astype(np.float64), 2)
    out = np.zeros(size, np.uint8)
    for y in range(size[0]):
        for x in range(size[1]):
            u = (x + 0.5 - box[0]) / (box[2] - box[0]) * s - 0.5
            v = (y + 0.5 - box[1]) / (box[3] - box[1]) * s - 0.5
            if not (-1 < u < s and -1 < v < s):
                continue
            u0, v0 = int(np.floor(u)), int(np.floor(v))
            patch = padded[v0 + 2 : v0 + 4, u0 + 2 : u0 + 4]
            value = np.array([1 - v + v0, v - v0]) @ patch @ np.array([1 - u + u0, u - u0])
            out[y, x] = value >= threshold
    return out


def whole(mask, box, size, threshold=0.5):
    region, (x, y) = paste_ops.paste(mask, box, size, threshold)
    out = np.zeros(size, np.uint8)
    out[y : y + region.shape[0], x : x + region.shape[1]] = region
    return out


BOXES = np.array(
    [
        [3.2, 4.7, 40.1, 30.3],
        [-10.5, -3.0, 20.0, 50.0],  # over the top, the left and the bottom
        [0.0, 0.0, 53.0, 37.0],
        [30.0, 20.0, 70.0, 60.0],
        [10.2, 10.2, 10.9, 10.9],
    ]
)


@pytest.mark.parametrize("box", BOXES)
def test_a_pasted_mask_agrees_with_a_loop(box):
    mask = np.random.default_rng(0).uniform(size=(7, 7)).astype(np.float32)
    np.testing.assert_array_equal(whole(mask, box, SIZE), brute_paste(mask, box, SIZE))


@pytest.mark.parametrize("box", [[60, 5, 90, 20], [5, 5, 5, 20], [-9, -9, -1, -1], [9, 9, 5, 5]])
def test_a_box_outside_or_without_area_gives_no_pixels(box):
    region, begin = paste_ops.paste(np.ones((28, 28), np.float32), np.array(box), SIZE)
    assert region.size == 0
    assert begin == (0, 0)
    (rle,) = paste_ops.paste_to_rle(np.ones((1, 28, 28), np.float32), np.array([box]), SIZE)
    assert rle == coco_mask.encode(np.zeros(SIZE, np.uint8, order="F"))


def test_a_full_mask_fills_its_box():
    region, begin = paste_ops.paste(np.ones((28, 28), np.float32), np.array([3, 4, 20, 30]), SIZE)
    assert begin == (3, 4)
    assert region.dtype == np.uint8
    np.testing.assert_array_equal(region, np.ones((26, 17)))


@given(st.integers(0, 2**31 - 1), st.booleans())
def test_run_lengths_equal_those_of_the_whole_image(seed, smooth):
    rng = np.random.default_rng(seed)
    masks = rng.uniform(size=(8, 5, 5)).astype(np.float32) ** (0.2 if smooth else 1.0)
    corner = rng.uniform(-20, 45, (8, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(0, 70, (8, 2))], axis=1)
    boxes[:2] = [0, 0, SIZE[1], SIZE[0]]  # runs that go on from one column to the next
    ours = paste_ops.paste_to_rle(masks, boxes, SIZE)
    for rle, mask, box in zip(ours, masks, boxes, strict=True):
        assert rle == coco_mask.encode(np.asfortranarray(whole(mask, box, SIZE)))


def test_no_masks_give_no_run_lengths():
    assert paste_ops.paste_to_rle(np.zeros((0, 28, 28)), np.zeros((0, 4)), SIZE) == []


def test_memory_is_that_of_one_box():
    masks, boxes = np.ones((50, 28, 28), np.float32), np.tile([100.0, 100, 200, 200], (50, 1))
    paste_ops.paste_to_rle(masks[:1], boxes[:1], (4000, 4000))
    tracemalloc.start()
    paste_ops.paste_to_rle(masks, boxes, (4000, 4000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2_000_000  # one mask of the whole image is 16 MB


def polygons(shared_data, least_side=0.0):
    """(size, polygons, xyxy box) of every instance of the training and validation part."""
    for part in ("train", "val"):
        path = shared_data / "coco_tiny" / "annotations" / f"instances_{part}.json"
        coco = json.loads(path.read_text())
        sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
        for annotation in coco["annotations"]:
            x, y, w, h = annotation["bbox"]
            if isinstance(annotation["segmentation"], list) and min(w, h) > least_side:
                box = np.array([x, y, x + w, y + h], np.float32)
                yield sizes[annotation["image_id"]], annotation["segmentation"], box


def rasterised(segmentation, size):
    rles = coco_mask.frPyObjects(segmentation, *size)
    return coco_mask.decode(coco_mask.merge(rles))


def crop_of(segmentation, box, side):
    """The polygons rasterised in the frame of their box."""
    scale = side / np.maximum(box[2:] - box[:2], 1e-3)
    moved = [
        ((np.reshape(part, (-1, 2)) - box[:2]) * scale).ravel().tolist() for part in segmentation
    ]
    return rasterised(moved, (side, side))


@pytest.mark.data
@pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools' own, in decode
@pytest.mark.parametrize(("jitter", "bar"), [(0.0, 0.95), (0.1, 0.94)])
def test_crop_then_paste_gives_the_mask_back(shared_data, jitter, bar):
    # detectron2 tests/layers/test_mask_ops.py asks for a mean IoU of .94 (polygons) and .95.
    found = list(polygons(shared_data))
    rng = np.random.default_rng(0)
    boxes = np.stack([box for _, _, box in found])
    masks = np.stack([crop_of(segmentation, box, 112) for _, segmentation, box in found])
    side = boxes[:, 2:] - boxes[:, :2]
    grow = rng.uniform(0, jitter, (len(found), 4)) * np.tile(side, 2)
    rois = (boxes + grow * np.array([-1, -1, 1, 1])).astype(np.float32)
    crops = mask_ops.crop_masks(
        *map(jnp.asarray, (masks, boxes, rois, np.arange(len(found)))), output_size=28
    )
    crops = (np.asarray(crops) >= 0.5).astype(np.float32)
    ious = []
    for (size, segmentation, _), crop, roi in zip(found, crops, rois, strict=True):
        (ours,) = paste_ops.paste_to_rle(crop[None], roi[None], size)
        truth = coco_mask.encode(np.asfortranarray(rasterised(segmentation, size)))
        ious.append(coco_mask.iou([ours], [truth], [0])[0, 0])
    assert np.mean(ious) > bar


@pytest.mark.torch
def test_a_pasted_mask_agrees_with_torchs_grid_sample():
    # detectron2's paste: grid_sample at the pixel centres, zero outside.
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] + 0.5
    for box in BOXES:
        mask = rng.uniform(size=(28, 28)).astype(np.float32)
        u = (x - box[0]) / (box[2] - box[0]) * 2 - 1
        v = (y - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.from_numpy(np.stack([u, v], axis=-1)[None].astype(np.float32))
        theirs = torch.nn.functional.grid_sample(
            torch.from_numpy(mask[None, None]), grid, align_corners=False
        )[0, 0].numpy()
        differ = whole(mask, box, SIZE) != (theirs >= 0.5)
        assert not (differ & (np.abs(theirs - 0.5) > 1e-4)).any()
