"""Stitch: positions of pixels, boxes and labels worked by hand."""

import numpy as np
import pytest

from sephjax.input.batches import blank
from sephjax.input.stitch import layout, stitch


def made(sizes, objects, canvas=(8, 16), room=4, masks=True):
    """A batch of plain pictures: row i has the value 10 (i + 1); `objects` by row: boxes."""
    arrays = blank(len(sizes), canvas, room, masks=masks)
    for row, ((h, w), boxes) in enumerate(zip(sizes, objects, strict=True)):
        arrays["image"][row, :h, :w] = 10 * (row + 1)
        arrays["size"][row] = h, w
        arrays["original"][row] = 100 + row, 200
        arrays["index"][row] = 50 + row
        arrays["valid"][row] = True
        m = len(boxes)
        arrays["boxes"][row, :m] = np.reshape(boxes, (-1, 4))
        arrays["labels"][row, :m] = 10 * row + np.arange(m)
        arrays["object_valid"][row, :m] = True
        if masks:
            arrays["masks"][row, :m, : 20 * (row + 1)] = 1
    return arrays


@pytest.mark.parametrize(
    ("canvas", "sizes", "places"),
    [
        # Halves 4x16 use 4x8 + 4x8 = 64, halves 8x8 use 4x8 + 4x8 = 64: stacked on a tie.
        ((8, 16), ((8, 16), (8, 16)), ((0, 0, 4, 8), (4, 0, 4, 8))),
        # 8x8 pictures: side by side they fill all, stacked half.
        ((8, 16), ((8, 8), (8, 8)), ((0, 0, 8, 8), (0, 8, 8, 8))),
        # 2x16 strips: stacked at their size use 64, side by side 1x8 each.
        ((8, 16), ((2, 16), (2, 16)), ((0, 0, 2, 16), (4, 0, 2, 16))),
        # A small picture is enlarged to fit its half.
        ((8, 16), ((8, 8), (4, 4)), ((0, 0, 8, 8), (0, 8, 8, 8))),
        # Portrait canvas: 16x8 pictures stacked are 8x4 each; beside each other 8x4 each: a tie.
        ((16, 8), ((16, 8), (16, 8)), ((0, 0, 8, 4), (8, 0, 8, 4))),
    ],
)
def test_the_layout_leaves_less_unused(canvas, sizes, places):
    assert layout(canvas, sizes) == places


def test_a_composite_has_both_pictures_where_they_belong():
    """16x8 canvas side by side: row 0 (8x8) in the left half, row 1 (4x8 of 40) in the right."""
    arrays = made([(8, 8), (4, 8)], [[[1, 2, 5, 6]], [[0, 0, 8, 4], [2, 1, 4, 3]]])
    before = {name: values[1].copy() for name, values in arrays.items()}
    assert stitch(arrays, 0, arrays, 1) == 0
    for name, values in before.items():
        np.testing.assert_array_equal(arrays[name][1], values)  # b stays
    image = arrays["image"][0]
    assert (image[:, :8] == 10).all()
    assert (image[:4, 8:] == 20).all()
    assert (image[4:, 8:] == 0).all()
    assert arrays["size"][0].tolist() == [8, 16]
    assert arrays["original"][0].tolist() == [100, 200]
    assert arrays["index"][0] == 50
    expected = [[1, 2, 5, 6], [8, 0, 16, 4], [10, 1, 12, 3], [0, 0, 0, 0]]
    np.testing.assert_allclose(arrays["boxes"][0], expected)
    assert arrays["labels"][0].tolist() == [0, 10, 11, 0]
    assert arrays["object_valid"][0].tolist() == [True, True, True, False]
    assert (arrays["masks"][0, 0, :20] == 1).all()
    assert (arrays["masks"][0, 0, 20:] == 0).all()
    assert (arrays["masks"][0, 1:3, :40] == 1).all()
    assert not arrays["masks"][0, 3].any()


def test_stacked_halves_scale_each_box_by_its_pictures_own_ratio():
    # 2x16 and 8x16: stacked 2x16 and 4x8 (64 pixels), side by side 1x8 and 4x8 (40).
    arrays = made([(2, 16), (8, 16)], [[[0, 0, 16, 2]], [[4, 2, 8, 8]]])
    stitch(arrays, 0, arrays, 1)
    np.testing.assert_allclose(arrays["boxes"][0, :2], [[0, 0, 16, 2], [2, 5, 4, 8]])
    assert (arrays["image"][0, :2] == 10).all()
    assert (arrays["image"][0, 2:4] == 0).all()
    assert (arrays["image"][0, 4:, :8] == 20).all()
    assert (arrays["image"][0, 4:, 8:] == 0).all()
    assert arrays["size"][0].tolist() == [8, 16]


def test_the_valid_part_is_the_smallest_rectangle_around_both():
    # Both 6x12 in halves 4x16: 4x8 and 4x8; side by side 4x8 and 4x8. Stacked: 8 rows, 8 columns.
    arrays = made([(6, 12), (6, 12)], [[], []])
    stitch(arrays, 0, arrays, 1)
    assert arrays["size"][0].tolist() == [8, 8]
    assert not arrays["image"][0, :, 8:].any()
    assert arrays["image"][0, :, :8].all()


def test_only_the_valid_part_of_a_picture_is_used():
    arrays = made([(8, 8), (8, 8)], [[], []])
    arrays["image"][1, :, 8:] = 255  # padding that must not be seen
    stitch(arrays, 0, arrays, 1)
    assert set(np.unique(arrays["image"][0])) == {10, 20}


@pytest.mark.parametrize("masks", [True, False])
def test_the_smallest_objects_over_the_cap_are_left_out_and_counted(masks):
    objects = [
        [[0, 0, 8, 8], [0, 0, 1, 1], [0, 0, 4, 4]],
        [[0, 0, 2, 2], [0, 0, 8, 6], [1, 1, 7, 7]],
    ]
    arrays = made([(8, 8), (8, 8)], objects, masks=masks)
    assert stitch(arrays, 0, arrays, 1) == 2
    # With masks row 0 covers 20/112 of each box and row 1 40/112, which keeps the order here.
    assert arrays["labels"][0].tolist() == [0, 2, 11, 12]
    assert arrays["object_valid"][0].all()


def test_a_composite_of_pictures_without_objects_has_none():
    arrays = made([(8, 8), (8, 8)], [[], []])
    assert stitch(arrays, 0, arrays, 1) == 0
    assert not arrays["object_valid"][0].any()
