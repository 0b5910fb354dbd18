"""All numbers of `coco.score` beside a plain COCOeval of pycocotools on the same detections."""

import copy
import json

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sephjax.evaluation import coco

KINDS = ("bbox", "segm")
TOLERANCE = {"pycocotools": 1e-12, "faster": 1e-6}


def plain(truth, rows, kind):
    """The 12 numbers, and AP by category id, as pycocotools' own demo computes them.

    Its `loadRes` fails on an empty list, so a detection on a further picture that is not scored is
    always there.
    """
    further = max(image["id"] for image in truth["images"]) + 1
    truth = {**truth, "images": [*truth["images"], {"id": further, "height": 9, "width": 9}]}
    category = truth["categories"][0]["id"]
    extra = {"image_id": further, "category_id": category, "score": 0.5, "bbox": [0, 0, 4, 4]}
    extra["segmentation"] = coco_mask.encode(np.ones((9, 9), np.uint8, order="F"))
    # With a box in it, pycocotools takes the box's area for the mask's.
    unused = "segmentation" if kind == "bbox" else "bbox"
    rows = [{key: value for key, value in row.items() if key != unused} for row in [*rows, extra]]
    reference = COCO()
    reference.dataset = copy.deepcopy(truth)
    reference.createIndex()
    evaluator = COCOeval(reference, reference.loadRes(copy.deepcopy(rows)), kind)
    evaluator.params.imgIds = [image["id"] for image in truth["images"] if image["id"] != further]
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    per_class = {}
    for at, number in enumerate(evaluator.params.catIds):
        found = evaluator.eval["precision"][:, :, at, 0, 2]
        found = found[found > -1]
        per_class[number] = found.mean() if found.size else -1.0
    return evaluator.stats, per_class


def check(truth, rows, kind):
    stats, per_class = plain(truth, rows, kind)
    names = coco.class_names(truth["categories"])
    for backend, tolerance in TOLERANCE.items():
        found = coco.score(truth, rows, kind, backend=backend)
        numbers = [found[key] for key in coco.METRICS]
        np.testing.assert_allclose(numbers, stats, atol=tolerance, rtol=0, err_msg=backend)
        assert found["per_class"].keys() == set(names.values())
        for number, ap in per_class.items():
            assert found["per_class"][names[number]] == pytest.approx(ap, abs=tolerance)
    return dict(zip(coco.METRICS, stats, strict=True))


def load(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def tiny_val(shared_data):
    return load(shared_data / "coco_tiny" / "annotations" / "instances_val.json")


def perturbed(truth, seed=0):
    """Detections made of the truth: moved, doubled, left out, of another class, within crowds."""
    rng = np.random.default_rng(seed)
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    categories = [category["id"] for category in truth["categories"]]
    rows = []
    for annotation in truth["annotations"]:
        size, box = sizes[annotation["image_id"]], np.array(annotation["bbox"])
        mask = rle_of(annotation["segmentation"], size)
        # A crowd gets three detections, everything else none to two.
        for _ in range(3 if annotation["iscrowd"] else rng.integers(0, 3)):
            shift = np.round(rng.normal(0, 0.08, 2) * box[2:]).astype(int)
            other = rng.uniform() < 0.1
            rows.append(
                {
                    "image_id": annotation["image_id"],
                    "category_id": int(rng.choice(categories))
                    if other
                    else annotation["category_id"],
                    "score": float(np.round(rng.uniform(), 2)),  # with ties
                    "bbox": [*(box[:2] + shift), *(box[2:] * np.exp(rng.normal(0, 0.1, 2)))],
                    "segmentation": rolled(mask, shift),
                }
            )
    return rows


def rle_of(segmentation, size):
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    return coco_mask.frPyObjects(segmentation, *segmentation["size"])


def rolled(rle, shift):
    moved = np.roll(coco_mask.decode(rle), shift[::-1], axis=(0, 1))
    return coco_mask.encode(np.asfortranarray(moved))


@pytest.mark.data
@pytest.mark.parametrize("kind", KINDS)
def test_the_fixture_of_cocoapi(shared_data, kind):
    folder = shared_data / "coco_eval_fixture"
    rows = load(folder / f"instances_val2014_fake{kind}100_results.json")
    numbers = check(load(folder / "instances_val2014_100.json"), rows, kind)
    assert numbers["AP"] == pytest.approx({"bbox": 0.505, "segm": 0.320}[kind], abs=5e-4)


@pytest.mark.data
def test_the_fixture_of_padilla(shared_data):
    folder = shared_data / "coco_eval_fixture" / "padilla"
    rows = load(folder / "sampled_bbox_results.json")["annotations"]
    check(load(folder / "sampled_gts_bbox_area.json"), rows, "bbox")


@pytest.mark.data
@pytest.mark.parametrize("kind", KINDS)
def test_the_made_up_detections_of_the_fixture(shared_data, tiny_val, kind):
    path = shared_data / "coco_eval_fixture/synthetic_on_coco_tiny_val/detections.json"
    check(tiny_val, load(path), kind)


@pytest.mark.data
@pytest.mark.parametrize("kind", KINDS)
def test_perturbed_truth_with_crowds_in_every_area_range(tiny_val, kind):
    assert sum(annotation["iscrowd"] for annotation in tiny_val["annotations"]) > 5
    numbers = check(tiny_val, perturbed(tiny_val), kind)
    assert all(0.1 < value < 0.9 for value in numbers.values())


@pytest.mark.data
@pytest.mark.parametrize("kind", KINDS)
def test_no_detections_no_truth_and_pictures_without_annotations(tiny_val, kind):
    pictures = {image["id"] for image in tiny_val["images"][:50]}
    some = {
        **tiny_val,
        "images": tiny_val["images"][:50],
        "annotations": [a for a in tiny_val["annotations"] if a["image_id"] in pictures],
    }
    rows = perturbed(some)
    assert set(check(some, [], kind).values()) == {0.0}
    bare = {**some, "annotations": []}
    assert set(check(bare, rows, kind).values()) == {-1.0}
    assert set(check(bare, [], kind).values()) == {-1.0}
    # Half of the pictures lose their annotations: their detections are all wrong.
    emptied = {image["id"] for image in some["images"][::2]}
    kept = [a for a in some["annotations"] if a["image_id"] not in emptied]
    less = check({**some, "annotations": kept}, rows, kind)
    assert less["AP"] < check(some, rows, kind)["AP"]
    only_crowds = [a for a in some["annotations"] if a["iscrowd"]]
    assert only_crowds
    assert set(check({**some, "annotations": only_crowds}, rows, kind).values()) == {-1.0}


# detectron2 tests/data/test_coco_evaluation.py: COCO val2017 picture 139 and three detections.
DETECTIONS = [
    (
        [417.3332824707031, 159.27003479003906, 47.66064453125, 143.00193786621094],
        0.9949821829795837,
        "Tc`52W=3N0N4aNN^E7]:4XE1g:8kDMT;U100000001O1gE[Nk8h1dFiNY9Z1aFkN]9g2J3NdN`FlN`9S1cFRN07]9g1"
        "bFoM6;X9c1cFoM=8R9g1bFQN>3U9Y30O01OO1O001N2O1N1O4L4L5UNoE3V:CVF6Q:@YF9l9@ZF<k9[O`F=];HYnX2",
    ),
    (
        [383.5909118652344, 172.0777587890625, 17.959075927734375, 36.94813537597656],
        0.7685421705245972,
        "lZP5m0Z<300O100O100000001O00]OlC0T<OnCOT<OnCNX<JnC2bQT3",
    ),
    (
        [457.8359069824219, 158.88027954101562, 9.89764404296875, 8.771820068359375],
        0.07092753797769547,
        "bSo54T=2N2O1001O006ImiW2",
    ),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", ["full", "empty_dt", "empty_gt"])
def test_the_detections_of_detectron2s_test(case, kind):
    rows = [
        {
            "image_id": 139,
            "category_id": 1,
            "bbox": box,
            "score": score,
            "segmentation": {"size": [426, 640], "counts": counts},
        }
        for box, score, counts in DETECTIONS
    ]
    boxes = {230831: [412.8, 157.61, 53.05, 138.01], 233201: [384.43, 172.21, 15.12, 35.74]}
    areas = {230831: 2913.1103999999987, 233201: 435.1449499999997}
    # Boxes stand for the truth's polygons, which are long.
    annotations = [
        {
            "id": number,
            "image_id": 139,
            "category_id": 1,
            "iscrowd": 0,
            "area": areas[number],
            "bbox": box,
            "segmentation": [corners(box)],
        }
        for number, box in boxes.items()
    ]
    truth = {
        "images": [
            {"id": 285, "height": 640, "width": 586},
            {"id": 139, "height": 426, "width": 640},
        ],
        "categories": [{"id": 1, "name": "person"}, {"id": 65, "name": "bed"}],
        "annotations": [] if case == "empty_gt" else annotations,
    }
    check(truth, [] if case == "empty_dt" else rows, kind)


def corners(box):
    x, y, width, height = box
    return [x, y, x + width, y, x + width, y + height, x, y + height]
