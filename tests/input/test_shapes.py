"""The drawn set: deterministic, disjoint, its truth on its pixels."""

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from sephjax.errors import UserError
from sephjax.input import shapes
from sephjax.input.shapes import open_shapes

# pycocotools converts its results in a way that NumPy 2 frowns upon.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def drawn():
    return open_shapes(60, 128, 160, 4, train=True)


def test_pictures_depend_on_seed_split_and_number_only(drawn):
    again = open_shapes(60, 128, 160, 4, train=True)
    np.testing.assert_array_equal(again.example(7).image, drawn.example(7).image)
    assert (again.example(7).image != drawn.example(8 - 2).image).any()
    for other in (
        open_shapes(60, 128, 160, 4, train=False),
        open_shapes(60, 128, 160, 4, seed=1, train=True),
    ):
        assert (other.example(7).image != drawn.example(7).image).any()


def test_a_third_of_the_pictures_is_portrait(drawn):
    assert (drawn.sizes[:, 0] > drawn.sizes[:, 1]).sum() == 20
    for i in range(4):
        assert drawn.example(i).image.shape == (*drawn.sizes[i].tolist(), 3)


def test_boxes_are_tight_masks_are_apart_and_every_picture_has_an_object(drawn):
    labels = set()
    for i in range(60):
        example, drawing = drawn.example(i), drawn.drawing(i)
        assert 1 <= len(example.boxes) <= 4
        assert drawing.masks.sum(axis=0).max() <= 1
        for box, mask, rle, area in zip(
            example.boxes, drawing.masks, example.segmentations, example.area, strict=True
        ):
            y, x = np.nonzero(mask)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert area == mask.sum()
            np.testing.assert_array_equal(coco_mask.decode(rle).astype(bool), mask)
        labels |= set(example.labels.tolist())
    assert labels == {0, 1, 2}


def test_a_label_says_what_was_drawn(drawn):
    """Oracle: how much of its smallest enclosing circle and rectangle a shape fills."""
    checked = 0
    for i in range(60):
        drawing, (h, w) = drawn.drawing(i), drawn.sizes[i]
        if len(drawing.labels) > 1:
            continue
        mask = drawing.masks[0].astype(np.uint8)
        y, x = np.nonzero(mask)
        if min(x.min(), y.min()) == 0 or x.max() == w - 1 or y.max() == h - 1 or len(x) < 400:
            continue
        (outline,), _ = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        fills_circle = len(x) / (np.pi * (cv2.minEnclosingCircle(outline)[1] + 0.5) ** 2)
        width, height = cv2.minAreaRect(outline)[1]
        fills_rectangle = len(x) / ((width + 1) * (height + 1))
        guess = 0 if fills_circle > 0.85 else (1 if fills_rectangle > 0.85 else 2)
        assert guess == drawing.labels[0]
        checked += 1
    assert checked >= 5


def test_the_hard_set_has_eight_shapes_of_sizes_one_to_eight_and_occlusion():
    source = open_shapes(120, 128, 192, 8, kind="hard", train=True)
    labels, sides, counts = set(), [], []
    for i in range(120):
        example = source.example(i)
        labels |= set(example.labels.tolist())
        sides += np.maximum(*(example.boxes[:, 2:] - example.boxes[:, :2]).T).tolist()
        counts.append(len(example.boxes))
    assert source.categories.names[sorted(labels)[-1]] == "half"
    assert labels == set(range(8))
    assert np.quantile(sides, 0.98) / np.quantile(sides, 0.02) > 6
    assert max(counts) == 8


@pytest.mark.parametrize(("name", "fill"), [("ring", np.pi * (1 - 0.55**2)), ("bar", 2.6 * 0.8)])
def test_a_drawn_outline_has_the_area_of_its_shape(name, fill):
    random = np.random.default_rng(0)
    coverage = shapes._coverage(random, name, (0.5, 0.5), 512, 512)
    assert coverage.sum() == pytest.approx(fill * 128**2, rel=0.02)


def test_an_unknown_set_is_refused():
    with pytest.raises(UserError, match=r"data\.shapes\.set is 'easy': choose one of plain, hard"):
        open_shapes(4, 128, 160, 4, kind="easy", train=True)


def test_the_ground_truth_loads_into_pycocotools():
    source = open_shapes(9, 128, 160, 4, train=False)
    truth = COCO()
    truth.dataset = source.ground_truth()
    truth.createIndex()
    assert truth.getImgIds() == list(range(1, 10))
    assert [c["name"] for c in truth.loadCats([1, 2, 3])] == ["circle", "square", "triangle"]
    for annotation in truth.dataset["annotations"]:
        assert truth.annToMask(annotation).sum() == annotation["area"]


def test_the_limit_takes_the_first_pictures(data):
    from sephjax.input.sources import open_source

    data.source, data.train.limit = "shapes", 5
    limited = open_source(data, train=True)
    data.train.limit = 0
    whole = open_source(data, train=True)
    assert (len(limited), len(whole)) == (5, 4096)
    np.testing.assert_array_equal(limited.example(4).image, whole.example(4).image)


def test_what_cannot_be_drawn_is_a_sentence():
    with pytest.raises(UserError, match="cannot draw 0 pictures"):
        open_shapes(0, 128, 160, 4, train=True)
