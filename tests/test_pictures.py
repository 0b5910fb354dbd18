"""Annotated pictures and curves: what must be visible, and where."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sephjax import pictures


def grey(height=120, width=160):
    return np.full((height, width, 3), 128, np.uint8)


def changed(before, after):
    return (before != after).any(axis=-1)


def test_no_objects_give_an_equal_copy():
    image = grey()
    drawn = pictures.annotate(image, np.zeros((0, 4)), [], [], [])
    np.testing.assert_array_equal(drawn, image)
    assert drawn is not image


def test_the_given_picture_is_not_changed_and_the_form_stays():
    image = grey()
    drawn = pictures.annotate(image, [[20, 40, 90, 100]], ["cat"], [0.5])
    assert (image == 128).all()
    assert (drawn.shape, drawn.dtype) == (image.shape, np.uint8)
    assert drawn.flags.writeable


def test_an_outline_has_the_colour_of_its_class_on_the_box():
    drawn = pictures.annotate(grey(400, 400), [[100, 150, 300, 350]], ["cat"])
    colour = np.array(pictures.class_colour("cat"))
    for y, x in ((349, 200), (250, 100), (250, 299)):
        assert np.abs(drawn[y, x] - colour).max() < 40, (y, x)
    assert (drawn[250, 200] == 128).all()
    assert not changed(grey(400, 400), drawn)[360:].any()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools
def test_a_mask_tints_its_pixels_alone_and_an_rle_draws_the_same():
    mask = np.zeros((200, 200), bool)
    mask[60:140, 60:140] = True
    args = (grey(200, 200), [[50, 50, 150, 150]], ["dog"], None)
    drawn = pictures.annotate(*args, [mask])
    colour = np.array(pictures.class_colour("dog"))
    tint = np.rint(128 * (1 - pictures.MASK_OPACITY) + colour * pictures.MASK_OPACITY)
    np.testing.assert_array_equal(drawn[100, 100], tint)
    np.testing.assert_array_equal(drawn[54, 100], [128] * 3)
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    np.testing.assert_array_equal(pictures.annotate(*args, [rle]), drawn)
    rle["counts"] = rle["counts"].decode()
    np.testing.assert_array_equal(pictures.annotate(*args, [rle]), drawn)


def test_an_empty_mask_draws_the_box_alone():
    box = [[50, 50, 150, 150]]
    drawn = pictures.annotate(grey(200, 200), box, ["dog"], None, [np.zeros((200, 200), bool)])
    np.testing.assert_array_equal(drawn, pictures.annotate(grey(200, 200), box, ["dog"]))


@pytest.mark.parametrize("box", [[0, 0, 30, 30], [130, 90, 160, 120], [150, 0, 160, 5]])
def test_plates_at_the_edges_lie_inside_the_picture(box):
    plate = pictures._place(np.array(box), (60, 14), (160, 120), [])
    assert plate[0] >= 0
    assert plate[1] >= 0
    assert plate[2] <= 160
    assert plate[3] <= 120
    assert (plate[2] - plate[0], plate[3] - plate[1]) == (60, 14)


def test_plates_of_equal_boxes_do_not_overlap():
    taken = []
    for _ in range(6):
        plate = pictures._place(np.array([40, 60, 120, 160]), (50, 12), (300, 300), taken)
        assert all(pictures._overlap(plate, other) == 0 for other in taken)
        taken.append(plate)


def test_overlap_of_rectangles():
    assert pictures._overlap((0, 0, 4, 4), (2, 1, 9, 3)) == 4
    assert pictures._overlap((0, 0, 4, 4), (4, 0, 9, 3)) == 0


@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (24, 24)])
def test_tiny_pictures_and_odd_boxes_are_drawn_without_error(shape):
    boxes = [[-5, -5, 900, 900], [0, 0, 0, 0], [2, 2, 1, 1]]
    drawn = pictures.annotate(grey(*shape), boxes, ["a long class name"] * 3, [1, 0.5, 0])
    assert drawn.shape == (*shape, 3)


def test_class_colours_are_stable_and_differ():
    # Written down once: a colour must not change between versions.
    assert pictures.class_colour("person") == (217, 108, 54)
    assert len({pictures.class_colour(name) for name in ("person", "cat", "dog", "car")}) == 4


def test_letters_are_black_on_light_and_white_on_dark():
    assert pictures._ink((255, 255, 0)) == (0, 0, 0)
    assert pictures._ink((30, 0, 200)) == (255, 255, 255)


def test_a_curve_is_a_png_with_lines(tmp_path):
    path = tmp_path / "pictures" / "ap.png"
    series = {"bbox": [(100, 0.1), (200, 0.3)], "segm": [(100, 0.05), (200, 0.2)]}
    pictures.curve(path, series, "AP", "step", "AP")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(set(image.convert("RGB").tobytes())) > 10
    pictures.curve(path, {}, "nothing", "step", "AP")
