"""Large-scale jitter: where pixels, boxes and masks go, against brute force and numbers by hand."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sephjax.input import transforms, views
from sephjax.input.example import Example

FRAME = views.Frame((64,), 96, "keep_aspect", 0.5, 20, masks=True, jitter=(0.1, 2.0), crop=64)


def rectangle(x1, y1, x2, y2):
    return [np.asarray([x1, y1, x2, y1, x2, y2, x1, y2], np.float64)]


def example_of(segmentations, boxes, size=(40, 60), image=None):
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    if image is None:
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    m = len(boxes)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    labels = np.arange(m, dtype=np.int32)
    return Example(1, "x", image, *size, boxes, labels, np.zeros(m, bool), area, segmentations)


def window(file=(40, 60), scale=2, offset=(10, 30), size=(64, 64), flip=False):
    return views.View(file, (file[0] * scale, file[1] * scale), offset, size, flip)


def test_the_scale_and_the_window_have_the_ranges_of_the_paper():
    """At factor f the longer side is f crops; the offset is even in 0..spare, axis by axis."""
    random = np.random.default_rng(5)
    drawn = [views.draw(random, (40, 60), (64, 64), FRAME) for _ in range(4000)]
    factors = np.asarray([view.resized[1] / 64 for view in drawn])
    assert 0.09 <= factors.min() < 0.12
    assert 1.98 < factors.max() <= 2.01
    # Thirds of the range are as likely: 1333 each, standard deviation 30.
    counts, _ = np.histogram(factors, np.linspace(0.1, 2.0, 4))
    assert np.abs(counts - 4000 / 3).max() < 120
    for view in drawn:
        spare = np.maximum(np.subtract(view.resized, 64), 0)
        assert view.size == tuple(np.minimum(view.resized, 64))
        assert (np.asarray(view.offset) <= spare).all()
        assert abs(view.resized[0] - view.resized[1] * 2 / 3) <= 0.84  # both sides are rounded
    large = [view for view in drawn if view.resized[0] > 74]
    places = np.asarray([np.divide(v.offset, np.subtract(v.resized, 64)) for v in large])
    assert np.abs(places.mean(axis=0) - 0.5).max() < 0.04  # three standard deviations of 550
    assert abs(np.corrcoef(places.T)[0, 1]) < 0.13
    assert abs(np.mean([view.flip for view in drawn]) - 0.5) < 0.04


def test_without_a_crop_a_view_is_the_whole_picture():
    frame = views.Frame((32, 48), 96, "keep_aspect", 0.5, 20, masks=True)
    for i in range(20):
        view = views.draw(np.random.default_rng(i), (40, 60), (64, 96), frame)
        assert view.whole
        assert view.offset == (0, 0)
        assert view.resized in ((32, 48), (48, 72))


@pytest.mark.parametrize("flip", [False, True])
def test_a_window_shows_the_pixels_it_says(flip):
    """Each pixel of the window by itself, bilinear with half-pixel centres."""
    example, view = example_of([], []), window(flip=flip)
    canvas = np.full((70, 70, 3), 7, np.uint8)
    views.show(canvas, example.image, view)
    assert (canvas[64:] == 7).all()
    assert (canvas[:, 64:] == 7).all()
    image = example.image[:, ::-1] if flip else example.image
    for y, x in np.random.default_rng(1).integers(0, 64, (60, 2)):
        sy, sx = (y + 10 + 0.5) / 2 - 0.5, (x + 30 + 0.5) / 2 - 0.5
        y0, x0 = int(sy), int(sx)
        fy, fx = sy - y0, sx - x0
        y1, x1 = min(y0 + 1, 39), min(x0 + 1, 59)
        corners = image[y0, x0] * (1 - fy) * (1 - fx) + image[y0, x1] * (1 - fy) * fx
        corners = corners + image[y1, x0] * fy * (1 - fx) + image[y1, x1] * fy * fx
        assert np.abs(canvas[y, x] - corners).max() <= 1.0


def test_boxes_go_where_a_calculation_by_hand_says():
    boxes = np.asarray([[10.0, 8.0, 30.0, 24.0]])
    plain, mirrored = window(), window(flip=True)
    np.testing.assert_allclose(plain.to_canvas(boxes), [[-10.0, 6.0, 30.0, 38.0]])
    # 120 - 60 - 30 and 120 - 20 - 30
    np.testing.assert_allclose(mirrored.to_canvas(boxes), [[30.0, 6.0, 70.0, 38.0]])
    for view in (plain, mirrored):
        np.testing.assert_allclose(view.to_file(view.to_canvas(boxes)), boxes)


def test_objects_are_cut_and_those_with_too_little_left_are_counted():
    """The window shows x 15..47 and y 5..37 of the file, twice enlarged."""
    boxes = [
        [10, 8, 30, 24],  # cut at the left: 0..30 of the canvas
        [20, 10, 30, 20],  # whole
        [0, 0, 14, 40],  # outside
        [40, 30, 47.4, 36],  # whole but for 0.8 pixels
        [46.6, 10, 60, 20],  # 0.8 pixels left
    ]
    example = example_of([rectangle(*box) for box in boxes], boxes)
    layer, lost = views.seen(example, window())
    assert lost == 2
    assert layer.positions.tolist() == [0, 1, 3]
    expected = [[0, 6, 30, 38], [10, 10, 30, 30], [50, 50, 64, 62]]
    np.testing.assert_allclose(layer.boxes, expected)
    np.testing.assert_allclose(layer.area[:2], [30 * 32, 20 * 20])
    assert views.crops(layer).all()


def test_nothing_of_a_mask_in_the_window_is_nothing_seen():
    # An L whose box reaches into the window but whose pixels do not.
    ell = [np.asarray([0, 0, 4, 0, 4, 36, 40, 36, 40, 40, 0, 40], np.float64)]
    layer, lost = views.seen(example_of([ell], [[0, 0, 40, 40]]), window(size=(40, 60)))
    assert (len(layer), lost) == (0, 1)


def test_a_cut_box_closes_around_what_is_left_of_the_mask():
    # Of this L the window (x 15..47, y 5..37) sees the foot only: y 30..37.
    ell = [np.asarray([0, 0, 6, 0, 6, 30, 40, 30, 40, 40, 0, 40], np.float64)]
    layer, lost = views.seen(example_of([ell], [[0, 0, 40, 40]]), window())
    assert lost == 0
    np.testing.assert_allclose(layer.boxes, [[0, 50, 50, 64]], atol=1.0)
    assert views.crops(layer).mean() > 0.98
    # Without an outline the box is cut and no more.
    layer, _ = views.seen(example_of([None], [[0, 0, 40, 40]]), window())
    np.testing.assert_allclose(layer.boxes, [[0, 0, 50, 64]])


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("rle", [False, True])
def test_a_cut_mask_is_the_full_mask_transformed_and_cut(flip, rle):
    """Oracle: the mask of the whole file, enlarged by repetition, mirrored, cut, read at cells."""
    points = np.asarray([5.0, 4.0, 55.0, 12.0, 40.0, 38.0, 12.0, 30.0])
    outline = coco_mask.frPyObjects([points.tolist()], 40, 60)[0]
    full = coco_mask.decode(outline)
    segmentation = {"size": [40, 60], "counts": outline["counts"].decode()} if rle else [points]
    view = window(flip=flip)
    layer, _ = views.seen(example_of([segmentation], [[5, 4, 55, 38]]), view)
    large = np.kron(full, np.ones((2, 2), np.uint8))
    large = (large[:, ::-1] if flip else large)[10:74, 30:94]
    rows, columns = np.flatnonzero(large.any(1)), np.flatnonzero(large.any(0))
    tight = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose(layer.boxes[0], tight, atol=2.0)  # one pixel of the file
    crop = views.crops(layer)[0]
    x1, y1, x2, y2 = layer.boxes[0]
    cells = (np.arange(112) + 0.5) / 112
    x = np.clip((x1 + cells * (x2 - x1)).astype(int), 0, 63)
    y = np.clip((y1 + cells * (y2 - y1)).astype(int), 0, 63)
    expected = large[y][:, x]
    assert (crop & expected).sum() / (crop | expected).sum() > 0.95


def test_the_outline_of_a_sliver_keeps_its_slope():
    """Vertices far outside of a thin cut are cut off along their edges, not moved."""
    triangle = [np.asarray([0.0, 0.0, 1000.0, 1000.0, 0.0, 1000.0])]  # below the diagonal
    box = np.asarray([500.0, 500.0, 501.0, 501.0])
    crop = transforms.crop_masks_to_boxes([triangle], box[None], 1000, 1000)[0]
    row, column = np.mgrid[:112, :112]
    assert crop[row > column + 1].all()
    assert not crop[row < column - 1].any()


def test_masks_at_any_resolution():
    mask = transforms.rasterize(
        rectangle(2, 3, 6, 9), np.asarray([0.0, 0, 8, 12]), (12, 8), (20, 20)
    )
    expected = np.zeros((12, 8))
    expected[3:9, 2:6] = 1
    np.testing.assert_array_equal(mask, expected)
    assert not transforms.rasterize(None, np.asarray([0.0, 0, 8, 12]), (12, 8), (20, 20)).any()


def test_a_picture_without_objects_has_an_empty_layer():
    layer, lost = views.seen(example_of([], []), window())
    assert (len(layer), lost) == (0, 0)
    assert views.crops(layer).shape == (0, 112, 112)
