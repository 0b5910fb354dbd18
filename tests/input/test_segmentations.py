"""Segmentations that pycocotools would read past, or crash on, are found when a file is opened."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sephjax.errors import UserError
from sephjax.input import segmentations
from sephjax.input.coco import open_coco
from sephjax.input.sources import require_masks

SQUARE = [10.0, 8.0, 30.0, 8.0, 30.0, 24.0, 10.0, 24.0]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_runs_are_those_that_pycocotools_packed(share):
    rng = np.random.default_rng(round(100 * share))
    for shape in ((1, 1), (7, 5), (333, 500), (2000, 3000)):
        mask = rng.uniform(size=shape) < share
        rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        flat = mask.T.ravel()
        edges = np.flatnonzero(np.diff(flat)) + 1
        wanted = np.diff(np.concatenate([[0], edges, [flat.size]]))
        wanted = [0, *wanted] if flat[0] else wanted  # the first run is of 0s
        np.testing.assert_array_equal(segmentations.runs(rle["counts"].decode()), wanted)


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        ({"size": [40, 60], "counts": [10, 20]}, "whose runs are not those of 40x60 pixels"),
        ({"size": [40, 60], "counts": []}, "whose runs are not"),
        ({"size": [40, 60], "counts": ""}, "whose runs are not"),
        ({"size": [40, 60], "counts": "no RLE"}, "whose runs are not"),
        ({"size": [40, 60], "counts": [2500, -100]}, "whose runs are not"),
        ({"size": [60, 40], "counts": [2400]}, r"with size \[60, 40\] in an image of \[40, 60\]"),
        ({"size": [40, 60]}, "an RLE without counts"),
        ([[*SQUARE[:-1], float("nan")]], "a polygon with the coordinate nan"),
        ([[*SQUARE[:-1], float("inf")]], "a polygon with the coordinate inf"),
        ([SQUARE, [*SQUARE[:-1], 1e12]], "a polygon with the coordinate 1000000000000.0"),
        (SQUARE, "a polygon that is not a list of rings"),
        ("square", "the segmentation 'square'"),
        (5, "the segmentation 5"),
    ],
)
def test_a_broken_segmentation_is_refused_by_name(coco, segmentation, said):
    for number in (1, 2):
        coco.image(number)
        coco.object(number)
    coco.object(2, segmentation=segmentation)
    for train in (True, False):
        with pytest.raises(UserError, match=said) as error:
            open_coco(*coco.write(), train=train)
        assert ": annotation 3 of image 2 has " in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("rings", [[[]], [[5, 5]], [[5, 5, 9, 9]], [SQUARE[:5]], [SQUARE[:7]]])
def test_rings_that_enclose_nothing_are_left_out_and_counted(coco, rings):
    coco.image(1)
    coco.object(1, segmentation=[*rings, SQUARE])
    for train in (True, False):
        source = open_coco(*coco.write(), train=train)
        assert source.notes == {"rings_of_polygons_without_area_dropped": 1}
        require_masks(source)
        ((ring,),) = source.example(0).segmentations
        assert ring.tolist() == SQUARE
    assert source.ground_truth()["annotations"][0]["segmentation"] == [SQUARE]
    coco.object(1, segmentation=rings)
    source = open_coco(*coco.write(), train=True)
    assert source.notes["objects_without_mask"] == 1
    with pytest.raises(UserError, match="objects without a segmentation"):
        require_masks(source)


def test_an_evaluation_of_masks_needs_those_of_crowds_too(coco):
    coco.image(1)
    coco.object(1)
    coco.object(1, iscrowd=1, segmentation=None)
    require_masks(open_coco(*coco.write(), train=True))
    with pytest.raises(UserError, match="objects without a segmentation"):
        require_masks(open_coco(*coco.write(), train=False))


def test_ids_in_quotes_are_numbers(coco):
    for number in range(1, 13):
        coco.image(number)
        coco.object(number, category_id="7", iscrowd="0")
    for entry in (*coco.content["images"], *coco.content["categories"]):
        entry["id"] = str(entry["id"])
    for annotation in coco.content["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
    coco.content["categories"].append({"id": "12", "name": "bird"})
    source = open_coco(*coco.write(), train=True)
    assert source.ids.tolist() == list(range(1, 13))
    assert source.categories.ids == (3, 7, 12)
    assert source.categories.names == ("cat", "dog", "bird")
    assert source.notes == {}
    assert [source.example(i).labels.tolist() for i in range(12)] == [[1]] * 12
    assert not any(source.example(i).crowd.any() for i in range(12))


@pytest.mark.parametrize(
    ("where", "value"),
    [("image_id", 1.5), ("image_id", "one"), ("category_id", 7.5), ("image_id", 10**30)],
)
def test_ids_that_are_no_whole_numbers_are_refused(coco, where, value):
    coco.image(1)
    coco.object(1, **{where: value})
    with pytest.raises(UserError, match="a value of the wrong kind") as error:
        open_coco(*coco.write(), train=True)
    assert "\n" not in str(error.value)
