"""COCO rows from detections, by hand."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sephjax.evaluation import results
from sephjax.types import Detections


def detections(boxes, *, scores=None, labels=None, valid=None, masks=None):
    boxes = np.asarray(boxes, np.float32)
    shape = boxes.shape[:2]
    return Detections(
        boxes=boxes,
        scores=np.full(shape, 0.5, np.float32) if scores is None else np.float32(scores),
        labels=np.zeros(shape, np.int32) if labels is None else np.int32(labels),
        valid=np.ones(shape, bool) if valid is None else np.asarray(valid),
        masks=masks,
    )


def rows_of(found, sizes, originals, **more):
    ids = more.pop("image_ids", range(10, 10 + len(sizes)))
    return results.to_results(
        found,
        sizes=np.asarray(sizes),
        originals=np.asarray(originals),
        image_ids=ids,
        category_ids=(1, 7, 90),
        **more,
    )


def test_the_resize_is_undone_by_the_ratio_of_each_axis():
    # 100x300 was stretched to 200x400: x by 4/3, y by 2.
    found = detections([[[40, 20, 80, 60]]], scores=[[0.25]], labels=[[2]])
    (row,) = rows_of(found, [[200, 400]], [[100, 300]])
    assert row == {"image_id": 10, "category_id": 90, "bbox": [30, 10, 30, 20], "score": 0.25}


def test_invalid_and_empty_boxes_and_absent_images_give_no_rows():
    boxes = [[[0, 0, 4, 4], [0, 0, 5, 5], [7, 7, 7, 9]], [[0, 0, 4, 4]] * 3]
    found = detections(boxes, valid=[[True, False, True], [True, True, True]])
    present = np.array([True, False])
    rows = rows_of(found, [[8, 8], [0, 0]], [[8, 8], [0, 0]], present=present)
    assert [row["bbox"] for row in rows] == [[0, 0, 4, 4]]
    nothing = detections(np.zeros((1, 0, 4)), masks=np.zeros((1, 0, 28, 28), np.float32))
    assert rows_of(nothing, [[8, 8]], [[8, 8]]) == []


def test_boxes_end_at_the_picture():
    (row,) = rows_of(detections([[[-3, 2, 20, 30]]]), [[16, 16]], [[16, 16]])
    assert row["bbox"] == [0, 2, 16, 14]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools
def test_masks_are_pasted_into_the_original_frame():
    masks = np.zeros((1, 2, 28, 28), np.float32)
    masks[0, 0] = 1.0
    masks[0, 1, :, 14:] = 1.0
    found = detections([[[10, 10, 30, 30], [0, 0, 40, 20]]], masks=masks)
    first, second = rows_of(found, [[50, 50]], [[100, 50]])
    assert first["segmentation"]["size"] == [100, 50]
    assert isinstance(first["segmentation"]["counts"], str)
    whole = np.zeros((100, 50), np.uint8)
    whole[20:60, 10:30] = 1
    half = np.zeros((100, 50), np.uint8)
    half[0:40, 20:40] = 1
    np.testing.assert_array_equal(coco_mask.decode(first["segmentation"]), whole)
    np.testing.assert_array_equal(coco_mask.decode(second["segmentation"]), half)


def test_shapes_are_masks_in_the_frame_of_their_boxes():
    masks = np.zeros((1, 2, 28, 28), np.float32)
    masks[0, 1, 3:, 5:] = 0.5
    found = detections([[[0, 0, 0, 8], [0, 0, 8, 8]]], masks=masks)  # the first is dropped
    (row,) = rows_of(found, [[8, 8]], [[8, 8]], shapes=True)
    np.testing.assert_array_equal(coco_mask.decode(row["shape"]), masks[0, 1] >= 0.5)
    assert "shape" not in rows_of(found, [[8, 8]], [[8, 8]])[0]
