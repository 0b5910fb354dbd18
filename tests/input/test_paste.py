"""Copy-paste against a brute force over full-size masks, and by hand."""

import numpy as np
import pytest

from sephjax.input import paste, views
from tests.input.test_views import example_of, rectangle

SIZE = (32, 48)


def whole(file=SIZE, flip=False):
    return views.View(file, file, (0, 0), file, flip)


def picture(value, canvas=SIZE):
    return np.full((*canvas, 3), value, np.uint8)


def layer_of(boxes, segmentations=None, **view):
    segmentations = segmentations or [rectangle(*box) for box in boxes]
    layer, _ = views.seen(example_of(segmentations, boxes, view.get("file", SIZE)), whole(**view))
    return layer


def test_pixels_boxes_and_masks_of_a_paste_by_hand():
    below = layer_of(
        [
            [10, 4, 30, 20],  # its right half goes under
            [22, 8, 28, 16],  # goes under whole
            [2, 22, 8, 30],  # free
            [16, 6, 24, 10],  # loses x 20..24
        ]
    )
    above = layer_of([[20, 0, 40, 24]])
    canvas = picture(50)
    done = paste.paste(canvas, SIZE, below, picture(200), above)
    assert (canvas[:24, 20:40] == 200).all()
    assert (canvas == 200).sum() == 24 * 20 * 3
    assert done.covered == 1
    assert done.size == SIZE
    assert done.below.positions.tolist() == [0, 2, 3]
    expected = [[10, 4, 20, 20], [2, 22, 8, 30], [16, 6, 20, 10]]
    np.testing.assert_allclose(done.below.boxes, expected)
    np.testing.assert_allclose(done.below.area, [160, 48, 16])
    np.testing.assert_allclose(done.above.boxes, [[20, 0, 40, 24]])
    assert views.crops(done.below).all()
    assert views.crops(done.above).all()


def test_a_bite_is_taken_out_of_a_mask_whose_box_stays():
    below, above = layer_of([[8, 8, 40, 24]]), layer_of([[20, 12, 28, 20]])
    done = paste.paste(picture(0), SIZE, below, picture(9), above)
    np.testing.assert_allclose(done.below.boxes, [[8, 8, 40, 24]])
    crop = views.crops(done.below)[0]
    expected = np.ones((112, 112), np.uint8)
    expected[28:84, 42:70] = 0  # 3.5 columns and 7 rows of the crop a pixel
    assert (crop != expected).sum() <= 8  # bilinear corners, two cells each
    assert done.below.area[0] == pytest.approx(32 * 16 - 64)


def test_the_valid_part_grows_around_what_is_pasted_beside_the_picture():
    small = (10, 12)
    below = layer_of([[1, 1, 5, 5]], file=small)
    above = layer_of([[20, 4, 30, 26]])
    canvas = picture(0)
    canvas[:10, :12] = 50
    done = paste.paste(canvas, small, below, picture(200), above)
    assert done.size == (26, 30)
    assert (canvas[4:26, 20:30] == 200).all()
    assert done.covered == 0


def test_an_object_without_a_pixel_is_not_pasted_and_one_below_goes_with_its_pixel():
    below = layer_of([[10.2, 10.2, 10.6, 10.6], [30.2, 10.2, 30.6, 10.6]], [None, None])
    above = layer_of([[8, 8, 14, 14], [40.4, 3.0, 40.5, 3.1]], [rectangle(8, 8, 14, 14), None])
    done = paste.paste(picture(0), SIZE, below, picture(9), above)
    assert done.covered == 1
    assert done.below.positions.tolist() == [1]
    assert done.above.positions.tolist() == [0]


@pytest.mark.parametrize("flip", [False, True])
def test_random_outlines_agree_with_full_size_masks(flip):
    """Oracle: all masks as whole pictures, laid over each other by NumPy."""
    rng = np.random.default_rng(0)
    bites = 0
    for _ in range(20):
        layers = []
        for _ in range(2):
            points = rng.uniform(2, 30, (4, 3, 2)) * [1.5, 1.0]
            boxes = np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1)
            layers.append(layer_of(boxes, [[p.ravel()] for p in points], flip=flip))
        full = [
            np.stack([views.pixels(layer, i, np.asarray([0, 0, 48, 32])) for i in range(4)])
            for layer in layers
        ]
        hidden = full[1].any(axis=0)
        rest = full[0].astype(bool) & ~hidden
        done = paste.paste(picture(0), SIZE, layers[0], picture(9), layers[1])
        sliver = ~full[0].any(axis=(1, 2))  # no pixel of its own: another test
        alive = np.flatnonzero(rest.any(axis=(1, 2)))
        found = done.below.positions
        assert found[~sliver[found]].tolist() == alive.tolist()
        crops = views.crops(done.below)
        for row, i in enumerate(done.below.positions):
            if not (full[0][i] & hidden).any():
                np.testing.assert_allclose(done.below.boxes[row], layers[0].boxes[i])
                continue
            bites += 1
            y, x = np.nonzero(rest[i])
            tight = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            np.testing.assert_array_equal(done.below.boxes[row], tight)
            x1, y1, x2, y2 = done.below.boxes[row]
            cells = (np.arange(112) + 0.5) / 112
            sampled = rest[i][(y1 + cells * (y2 - y1)).astype(int)][
                :, (x1 + cells * (x2 - x1)).astype(int)
            ]
            if rest[i].sum() >= 100:  # the oracle is rounded to pixels, the crop is not
                assert (crops[row] & sampled).sum() / (crops[row] | sampled).sum() > 0.8
    assert bites > 20


def test_every_size_of_subset_is_as_likely():
    chosen = [paste.choose(np.random.default_rng(i), 4) for i in range(4000)]
    counts = np.bincount([len(one) for one in chosen], minlength=5)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 1000).max() < 130  # standard deviation 27
    members = np.bincount(np.concatenate(chosen), minlength=4)
    assert np.abs(members - 2500).max() < 130
    assert all((np.diff(one) > 0).all() for one in chosen)
    assert paste.choose(np.random.default_rng(0), 0).tolist() == []
