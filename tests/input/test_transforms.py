"""Resizing, flipping and mask crops, held against published values, NumPy and full-size masks."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from sephjax.input import transforms
from sephjax.input.sources import open_source

# pycocotools converts its results in a way that NumPy 2 frowns upon.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.mark.parametrize(
    ("h", "w", "short", "long", "expected"),
    [
        (480, 640, 576, 800, (576, 768)),
        (480, 640, 640, 800, (640, 800)),
        (427, 640, 576, 800, (576, 800)),
        (640, 427, 608, 800, (800, 608)),
        (427, 640, 896, 1333, (896, 1333)),
    ],
)
def test_series_resize_has_the_published_check_values(h, w, short, long, expected):
    assert transforms.resized_shape(h, w, short, long, "series") == expected


@pytest.mark.parametrize(
    ("h", "w", "short", "long", "expected"),
    [
        (480, 640, 800, 1333, (800, 1067)),
        (640, 480, 800, 1333, (1067, 800)),
        (427, 640, 800, 1333, (800, 1199)),
        (300, 640, 800, 1333, (625, 1333)),  # the long side binds
        (100, 100, 64, 96, (64, 64)),
        (1, 5000, 800, 1333, (1, 1333)),  # never below one pixel
    ],
)
def test_keep_aspect_resize_rounds_half_up_and_caps_the_long_side(h, w, short, long, expected):
    assert transforms.resized_shape(h, w, short, long, "keep_aspect") == expected


def test_resized_shapes_of_arrays_are_those_of_their_elements():
    h, w = np.asarray([480, 427, 1, 700]), np.asarray([640, 640, 5000, 300])
    for mode in ("keep_aspect", "series"):
        together = transforms.resized_shape(h, w, 640, 800, mode)
        alone = [transforms.resized_shape(*size, 640, 800, mode) for size in zip(h, w, strict=True)]
        assert list(zip(*(side.tolist() for side in together), strict=True)) == alone


def test_boxes_follow_each_axis_by_its_own_ratio_and_a_flip():
    boxes = np.asarray([[10.0, 20.0, 30.0, 60.0]])
    scaled = transforms.scale_boxes(boxes, (100, 50), (150, 100))
    np.testing.assert_allclose(scaled, [[20.0, 30.0, 60.0, 90.0]])
    np.testing.assert_allclose(transforms.flip_boxes(scaled, 100), [[40.0, 30.0, 80.0, 90.0]])


@pytest.mark.parametrize("size", [(20, 40), (10, 20)])
def test_a_picture_lies_top_left_on_its_canvas(size):
    image = np.full((10, 20, 3), 200, np.uint8)
    batch = np.zeros((2, 32, 64, 3), np.uint8)
    transforms.resize_onto(batch[1], image, *size)
    assert (batch[1, : size[0], : size[1]] == 200).all()
    assert batch.astype(int).sum() == size[0] * size[1] * 3 * 200


def test_resize_is_bilinear_with_half_pixel_centres():
    """The loop below is the definition; OpenCV's fixed point may be one off."""
    image = np.random.default_rng(0).integers(0, 256, (7, 9, 3), np.uint8)
    height, width = 13, 11
    y = np.clip((np.arange(height) + 0.5) * 7 / height - 0.5, 0, 6)
    x = np.clip((np.arange(width) + 0.5) * 9 / width - 0.5, 0, 8)
    y0, x0 = np.minimum(y.astype(int), 5), np.minimum(x.astype(int), 7)
    fy, fx = (y - y0)[:, None, None], (x - x0)[None, :, None]
    top = image[y0][:, x0] * (1 - fx) + image[y0][:, x0 + 1] * fx
    bottom = image[y0 + 1][:, x0] * (1 - fx) + image[y0 + 1][:, x0 + 1] * fx
    expected = top * (1 - fy) + bottom * fy
    canvas = np.zeros((16, 16, 3), np.uint8)
    transforms.resize_onto(canvas, image, height, width)
    assert np.abs(canvas[:height, :width] - expected).max() <= 1.0


def test_the_largest_objects_stay_in_their_order():
    area = np.asarray([5.0, 1.0, 9.0, 5.0])
    assert transforms.largest(area, 2).tolist() == [0, 2]
    assert transforms.largest(area, 3).tolist() == [0, 2, 3]
    assert transforms.largest(area, 9).tolist() == [0, 1, 2, 3]
    assert transforms.largest(np.zeros(0), 3).tolist() == []


def test_a_triangle_fills_the_lower_left_half_of_its_box():
    ring = np.asarray([10.0, 20.0, 10.0, 60.0, 50.0, 60.0])
    crop = transforms.crop_masks_to_boxes([[ring]], np.asarray([[10.0, 20.0, 50.0, 60.0]]), 80, 80)
    row, column = np.mgrid[:112, :112]
    surely_in, surely_out = row > column + 1, row < column - 1
    assert crop.dtype == np.uint8
    assert crop[0][surely_in].all()
    assert not crop[0][surely_out].any()


def test_rings_outside_the_box_and_degenerate_rings_are_cut_off():
    inside = np.asarray([0.0, 0.0, 200.0, 0.0, 200.0, 200.0, 0.0, 200.0])
    sliver = np.asarray([1.0, 1.0, 2.0, 2.0])  # pycocotools would take it for a box
    boxes = np.asarray([[50.0, 50.0, 60.0, 70.0]] * 3)
    crops = transforms.crop_masks_to_boxes([[inside, sliver], [sliver], None], boxes, 200, 200)
    assert crops[0].all()
    assert not crops[1].any()
    assert not crops[2].any()


def test_no_objects_give_no_crops():
    assert transforms.crop_masks_to_boxes([], np.zeros((0, 4)), 10, 10).shape == (0, 112, 112)


def test_an_rle_crop_is_the_mask_enlarged():
    mask = np.zeros((40, 50), np.uint8)
    mask[10:20, 5:12] = 1
    mask[20:24, 5:33] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    crop = transforms.crop_masks_to_boxes([rle], np.asarray([[5.0, 10.0, 33.0, 24.0]]), 40, 50)[0]
    expected = np.kron(mask[10:24, 5:33], np.ones((8, 4), np.uint8))  # 112/14, 112/28
    different = np.argwhere(crop != expected)
    assert len(different) < 0.002 * crop.size  # bilinear sampling rounds the corners of the L
    corners = np.asarray([(0, 0), (0, 28), (80, 28), (80, 112), (112, 112), (112, 0)])
    assert (np.abs(different[:, None] - corners).max(axis=2).min(axis=1) <= 4).all()


@pytest.mark.data
def test_polygon_crops_agree_with_full_size_masks(tiny):
    """Oracle: pycocotools' mask of the whole image, sampled at the cells' centres.

    The full-size mask is itself rounded to pixels, so objects of at least 32 pixels a side are
    compared: there IoU is 0.95 or more on average, and 0.8 at least.
    """
    config = tiny(40)
    source = open_source(config, train=True)
    oracle = COCO()
    oracle.dataset = source.ground_truth()
    oracle.createIndex()
    ious = []
    for i in range(len(source)):
        example = source.example(i)
        wide = (example.boxes[:, 2:] - example.boxes[:, :2]).min(axis=1) >= 32
        rows = np.flatnonzero(wide)
        crops = transforms.crop_masks_to_boxes(
            [example.segmentations[row] for row in rows],
            example.boxes[rows],
            example.height,
            example.width,
        )
        annotations = [a for a in oracle.imgToAnns[example.image_id] if not a["iscrowd"]]
        assert len(annotations) == len(example.boxes)
        for crop, row in zip(crops, rows, strict=True):
            x1, y1, x2, y2 = example.boxes[row]
            cells = (np.arange(112) + 0.5) / 112
            x = np.minimum((x1 + cells * (x2 - x1)).astype(int), example.width - 1)
            y = np.minimum((y1 + cells * (y2 - y1)).astype(int), example.height - 1)
            full = oracle.annToMask(annotations[row])[y][:, x]
            ious.append((crop & full).sum() / max((crop | full).sum(), 1))
    assert len(ious) > 80
    assert np.mean(ious) > 0.95
    assert np.min(ious) > 0.8
