"""The results log's metric: numbers by hand, TensorFlow's resampling, COCO's where equal."""

import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sephjax.evaluation import coco, paste, reference

HALF = 51 / 101  # AP of one ground truth in two found, first: 51 of the 101 steps of recall
WHOLE = ("AP", "AP50", "AP75", "AR1", "AR10", "AR100")


def same(height, width):
    return height, width


def twice(height, width):
    return 2 * height, 2 * width


def square(image_id, x, y, width, height, **more):
    corners = [[x, y, x + width, y, x + width, y + height, x, y + height]]
    row = {"image_id": image_id, "category_id": 1, "bbox": [x, y, width, height]}
    return {**row, "segmentation": corners, **more}


def found(image_id, *box, score=0.5):
    return {"image_id": image_id, "category_id": 1, "bbox": list(box), "score": score}


def truth_of(*annotations, sizes):
    images = [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(sizes, start=1)]
    return {
        "images": images,
        "annotations": [
            {"id": at, "iscrowd": 0, "area": 9.0, **row}
            for at, row in enumerate(annotations, start=1)
        ],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    }


def shapes_of(*masks):
    return paste.shapes_to_rle(np.array(masks))


# A square's shape: the outermost points of a box lie half outside and read less than 0.9.
FULL = np.pad(np.ones((26, 26)), 1)


def corner(side):
    mask = np.zeros((28, 28))
    mask[:side, :side] = 1
    return mask


def test_boxes_on_the_edge_of_a_bucket_of_the_512_frame_are_in_both():
    # 512 frame: x by 1, y by 2: 32x32 and 96x96. Input frame: 64x32 and 192x96.
    rows = square(1, 10, 10, 32, 16), square(1, 200, 100, 96, 48)
    truth = truth_of(*rows, sizes=[(256, 512)])
    hit = [found(1, 10, 10, 32, 16)]
    numbers = reference.score(truth, hit, twice)
    assert (numbers["images"], numbers["objects"]) == (1, 2)
    expected = {"AP": HALF, "APs": 1, "APm": HALF, "APl": 0, "ARs": 1, "ARm": 0.5, "ARl": 0}
    bbox = numbers["512"]["bbox"]
    assert {key: bbox[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    expected = {"AP": HALF, "APs": -1, "APm": 1, "APl": 0, "ARs": -1, "ARm": 1, "ARl": 0}
    bbox = numbers["input"]["bbox"]
    assert {key: bbox[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    official = coco.score(truth, hit, "bbox")  # area 9: all small
    assert (official["APs"], official["APm"]) == (pytest.approx(HALF), -1)


def test_a_crowd_is_a_ground_truth_like_any_other():
    crowd = square(1, 100, 100, 80, 80, iscrowd=1)
    truth = truth_of(square(1, 0, 0, 40, 40), crowd, sizes=[(256, 256)])
    hit = [found(1, 100, 100, 80, 80)]
    assert reference.score(truth, hit, same)["512"]["bbox"]["AP"] == pytest.approx(HALF)
    assert coco.score(truth, hit, "bbox")["AP"] == 0


def test_what_is_detected_where_there_is_no_ground_truth_does_not_count():
    truth = truth_of(square(1, 0, 0, 40, 40), sizes=[(64, 64), (64, 64)])
    rows = [found(1, 0, 0, 40, 40, score=0.5), found(2, 0, 0, 40, 40, score=0.9)]
    numbers = reference.score(truth, rows, same)
    assert numbers["images"] == 1
    assert numbers["512"]["bbox"]["AP"] == pytest.approx(1.0)
    assert coco.score(truth, rows, "bbox")["AP"] == pytest.approx(0.5)


def test_boxes_without_area_or_beyond_the_picture_are_left_out():
    # The last one ends exactly at the corner.
    boxes = [(0, 0, 40, 0), (30, 0, 34.01, 9), (0, 60, 9, 4.5), (60, 60, 4, 4)]
    truth = truth_of(*(square(1, *box) for box in boxes), sizes=[(64, 64)])
    numbers = reference.score(truth, [found(1, 60, 60, 4, 4)], same)
    assert numbers["objects"] == 1
    assert numbers["512"]["bbox"]["AP"] == pytest.approx(1.0)


def test_only_the_chosen_images_count_and_without_any_all_is_minus_one():
    truth = truth_of(square(1, 0, 0, 9, 9), square(2, 0, 0, 9, 9), sizes=[(64, 64)] * 3)
    rows = [found(1, 0, 0, 9, 9)]
    numbers = reference.score(truth, rows, same, image_ids=[2, 3], shapes=shapes_of(corner(1)))
    assert (numbers["images"], numbers["512"]["bbox"]["AP"]) == (1, 0)
    numbers = reference.score(truth, [], same, image_ids=[3], shapes=[])
    assert numbers["images"] == 0
    for frame in reference.FRAMES:
        for kind in ("bbox", "segm"):
            assert numbers[frame][kind] == dict.fromkeys(coco.METRICS, -1.0)


def test_masks_are_compared_without_position():
    truth = truth_of(square(1, 100, 100, 40, 40), sizes=[(256, 256)])
    far = [found(1, 0, 0, 20, 20)]
    numbers = reference.score(truth, far, same, shapes=shapes_of(FULL))["512"]
    assert numbers["segm"]["AP"] == pytest.approx(1.0)
    assert numbers["bbox"]["AP"] == 0
    other = [{**far[0], "category_id": 2}]  # of another class it is no match
    assert reference.score(truth, other, same, shapes=shapes_of(FULL))["512"]["segm"]["AP"] == 0


def test_ap_is_ar_in_the_larger_buckets_of_segm():
    # 80x80 is medium in the 512 frame; the first detection is wrong (IoU 0.24) and not medium.
    first = square(1, 100, 100, 40, 40)
    boxes = [found(1, 0, 0, 20, 20, score=0.9), found(1, 0, 0, 20, 20, score=0.8)]
    shapes = shapes_of(corner(14), FULL)
    truth = truth_of(first, sizes=[(256, 256)])
    segm = reference.score(truth, boxes, same, shapes=shapes)["512"]["segm"]
    assert segm["AP"] == pytest.approx(0.5)  # among all sizes the wrong one counts
    assert (segm["APm"], segm["ARm"]) == pytest.approx((1.0, 1.0))
    assert segm["APs"] == segm["APl"] == -1
    both = truth_of(first, square(1, 150, 150, 60, 60), sizes=[(256, 256)])
    segm = reference.score(both, boxes, same, shapes=shapes)
    medium, large = segm["512"]["segm"], segm["input"]["segm"]
    assert (medium["APm"], medium["ARm"]) == pytest.approx((1.0, 1.0))
    # Without position the one detection is right for either, where the other is ignored.
    assert (medium["APl"], medium["ARl"]) == pytest.approx((1.0, 1.0))
    assert (large["APm"], large["ARm"]) == pytest.approx((HALF, 0.5))


def test_a_shape_is_what_the_points_of_its_box_read():
    mask = np.zeros((8, 8), np.uint8)
    mask[:, :4] = 1
    rle = coco_mask.encode(np.asfortranarray(mask))
    columns = lambda size_of: coco_mask.decode(
        reference.truth_shape(rle, (0, 0, 8, 8), (8, 8), size_of, 8)
    )
    assert columns(same).tolist() == [[1] * 4 + [0] * 4] * 8  # point i is pixel i
    # Twice as large: point 3 lies at 6.43 between cells that read pixels 3.0 and 3.5: 0.79.
    assert columns(twice).tolist() == [[1] * 3 + [0] * 5] * 8


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorFlow's imports
def test_a_shape_agrees_with_tensorflows_resize_and_crop():
    tf = pytest.importorskip("tensorflow")
    rng = np.random.default_rng(0)
    for size, large in (((48, 64), (72, 96)), ((90, 70), (64, 50)), ((33, 47), (33, 47))):
        coarse = rng.integers(0, 2, (1 + size[0] // 12, 1 + size[1] // 12))
        mask = np.kron(coarse, np.ones((12, 12), int))[: size[0], : size[1]].astype(np.uint8)
        box = (3.25, 7.5, size[1] - 8.75, size[0] - 7.5)
        x, y, width, height = box
        corners = np.array([y, x, y + height, x + width]) / np.tile(size, 2)
        whole = tf.compat.v1.image.resize_bilinear(mask[None, :, :, None], large)
        theirs = tf.image.crop_and_resize(whole, corners[None].astype(np.float32), [0], (28, 28))
        theirs = theirs.numpy()[0, :, :, 0]
        rle = coco_mask.encode(np.asfortranarray(mask))
        ours = coco_mask.decode(reference.truth_shape(rle, box, size, lambda *_, s=large: s, 28))
        sure = np.abs(theirs - 0.9) > 1e-4  # rounding may decide the others
        assert sure.mean() > 0.99
        np.testing.assert_array_equal(ours[sure], (theirs >= 0.9)[sure])


@pytest.fixture(scope="module")
def tiny(shared_data):
    """coco_tiny val without crowds and boxes beyond the picture, and made-up detections."""
    folder = shared_data / "coco_tiny" / "annotations"
    truth = json.loads((folder / "instances_val.json").read_text())
    made_up = shared_data / "coco_eval_fixture" / "synthetic_on_coco_tiny_val"
    rows = json.loads((made_up / "detections.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    truth["annotations"] = [
        a
        for a in truth["annotations"]
        if not a["iscrowd"] and reference._in_the_records(a["bbox"], sizes[a["image_id"]])
    ]
    ids = sorted({a["image_id"] for a in truth["annotations"]})
    return truth, rows, ids


@pytest.mark.data
@pytest.mark.parametrize("backend", ["pycocotools", "faster"])
def test_overall_box_ap_is_cocos_where_nothing_differs_but_the_frame(tiny, backend):
    truth, rows, ids = tiny
    if backend == "faster":
        pytest.importorskip("faster_coco_eval")
    official = coco.score(truth, rows, "bbox", backend=backend, image_ids=ids)
    numbers = reference.score(truth, rows, same, image_ids=ids, backend=backend)
    assert numbers["images"] == len(ids) > 100
    for key in WHOLE:
        assert numbers["512"]["bbox"][key] == pytest.approx(official[key], abs=1e-9)
        assert official[key] > 0.1


@pytest.mark.data
def test_in_the_frame_of_the_file_all_twelve_are_cocos_of_box_areas(tiny):
    truth, rows, ids = tiny
    areas = [a["bbox"][2] * a["bbox"][3] for a in truth["annotations"]]
    boxed = [{**a, "area": s} for a, s in zip(truth["annotations"], areas, strict=True)]
    official = coco.score({**truth, "annotations": boxed}, rows, "bbox", image_ids=ids)
    numbers = reference.score(truth, rows, same, image_ids=ids)["input"]["bbox"]
    assert numbers == {key: official[key] for key in coco.METRICS}


def test_the_rows_are_those_of_the_log():
    truth = truth_of(square(1, 0, 0, 40, 40), sizes=[(64, 64)])
    numbers = reference.score(truth, [found(1, 0, 0, 40, 40)], same, shapes=shapes_of(FULL))
    rows = reference.log_rows("v2", numbers)
    assert [row.split("|")[1] for row in rows] == [
        "v2 reference 512 bbox",
        "v2 reference 512 segm",
        "v2 reference input bbox",
        "v2 reference input segm",
    ]
    assert rows[0].split("|")[2:-1] == [f"{numbers['512']['bbox'][k]:.3f}" for k in coco.METRICS]
