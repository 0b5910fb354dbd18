"""The 12 numbers, against what cocoapi and others published for fixed detections."""

import copy
import json
import re
import sys

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sephjax.errors import UserError
from sephjax.evaluation import coco

BACKENDS = ("pycocotools", "faster")


def load(path):
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def fixture(shared_data):
    return shared_data / "coco_eval_fixture"


@pytest.fixture(scope="module")
def tiny_val(shared_data):
    return load(shared_data / "coco_tiny" / "annotations" / "instances_val.json")


def published_lines(fixture, kind):
    text = (fixture / "val2014_fake_eval_res.txt").read_text()
    part = text.split(f"type={kind}\n")[1].split("-----")[0]
    # Later versions of pycocotools print one more space before the bracket.
    return [line.replace(" (A", "  (A") for line in part.splitlines() if " @[ IoU=" in line]


def square(image_id=1, category_id=1, side=40.0, **more):
    return {"image_id": image_id, "category_id": category_id, "bbox": [0, 0, side, side], **more}


def small_truth():
    return {
        "images": [{"id": 1, "height": 64, "width": 64}, {"id": 2, "height": 64, "width": 64}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}],
        "annotations": [square(id=0, iscrowd=0, area=1600.0)],
    }


@pytest.mark.data
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_24_numbers_that_cocoapi_publishes_are_printed_line_by_line(fixture, kind, backend):
    results = load(fixture / f"instances_val2014_fake{kind}100_results.json")
    truth = fixture / "instances_val2014_100.json"
    metrics = {kind: coco.score(truth, results, kind, backend=backend)}
    assert coco.coco_lines(metrics, kind).splitlines() == published_lines(fixture, kind)


@pytest.mark.data
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_12_numbers_of_padilla_hold_to_6_digits(fixture, backend):
    # Source: object_detection_metrics, tests/test_coco_evaluator.py.
    published = (0.503647, 0.696973, 0.571667, 0.593252, 0.557991, 0.489363)
    published += (0.386813, 0.593680, 0.595353, 0.654764, 0.603130, 0.553744)
    results = load(fixture / "padilla" / "sampled_bbox_results.json")["annotations"]
    truth = fixture / "padilla" / "sampled_gts_bbox_area.json"
    metrics = coco.score(truth, results, "bbox", backend=backend)
    np.testing.assert_allclose([metrics[k] for k in coco.METRICS], published, atol=1e-6, rtol=0)


@pytest.mark.data
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_made_up_detections_on_coco_tiny_score_to_full_precision(fixture, tiny_val, kind):
    results = load(fixture / "synthetic_on_coco_tiny_val" / "detections.json")
    expected = load(fixture / "synthetic_on_coco_tiny_val" / "pycocotools_stats.json")[kind]
    metrics = coco.score(tiny_val, results, kind)
    found = [metrics[key] for key in coco.METRICS]
    np.testing.assert_allclose(found, expected["stats"], atol=1e-12, rtol=0)
    assert metrics["per_class"].keys() == {c["name"] for c in tiny_val["categories"]}
    for name, ap in expected["per_category_AP"].items():
        value = -1.0 if ap is None or ap != ap else ap
        assert metrics["per_class"][name] == pytest.approx(value, abs=1e-12)


@pytest.mark.data
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_faster_backend_gives_the_same_numbers(fixture, tiny_val, kind):
    results = load(fixture / "synthetic_on_coco_tiny_val" / "detections.json")
    ids = [image["id"] for image in tiny_val["images"]][:60]
    slow, fast = (
        coco.score(tiny_val, results, kind, backend=backend, image_ids=ids) for backend in BACKENDS
    )
    assert slow["per_class"] == pytest.approx(fast["per_class"], abs=1e-6)
    for key in coco.METRICS:
        assert slow[key] == pytest.approx(fast[key], abs=1e-6)


@pytest.mark.data
def test_perfect_detections_of_coco_tiny_have_ap_one(tiny_val):
    keys = ("image_id", "category_id", "bbox")
    results = [
        {key: annotation[key] for key in keys} | {"score": 0.9}
        for annotation in tiny_val["annotations"]
        if not annotation["iscrowd"]
    ]
    metrics = coco.score(tiny_val, results, "bbox")
    assert metrics["AP"] == metrics["AP50"] == metrics["AR100"] == pytest.approx(1.0)


@pytest.mark.data
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_the_lines_are_those_that_pycocotools_prints(fixture, capsys, kind):
    truth = fixture / "instances_val2014_100.json"
    results = fixture / f"instances_val2014_fake{kind}100_results.json"
    reference = COCO(str(truth))
    evaluator = COCOeval(reference, reference.loadRes(str(results)), kind)
    evaluator.evaluate()
    evaluator.accumulate()
    capsys.readouterr()
    evaluator.summarize()
    metrics = {kind: coco.score(truth, load(results), kind)}
    assert coco.coco_lines(metrics, kind) + "\n" == capsys.readouterr().out


@pytest.mark.data
def test_scoring_leaves_its_arguments_alone_and_prints_nothing(fixture, tiny_val, capsys):
    results = load(fixture / "synthetic_on_coco_tiny_val" / "detections.json")[:50]
    before = copy.deepcopy((tiny_val, results))
    coco.score(tiny_val, results, "segm")
    assert (tiny_val, results) == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_detections_score_zero_where_there_is_ground_truth_and_minus_one_elsewhere(backend):
    metrics = coco.score(small_truth(), [], "bbox", backend=backend)
    assert metrics["AP"] == metrics["APm"] == metrics["AR100"] == 0.0
    assert metrics["APs"] == metrics["APl"] == metrics["ARs"] == -1.0
    assert metrics["per_class"] == {"cat": 0.0, "dog": -1.0}


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_annotation_of_id_zero_can_be_matched(backend):
    metrics = coco.score(small_truth(), [square(score=0.5)], "bbox", backend=backend)
    assert metrics["AP"] == metrics["APm"] == pytest.approx(1.0)


def test_missing_area_and_crowd_flags_are_filled_in():
    truth = small_truth()
    truth["annotations"] = [square()]
    metrics = coco.score(truth, [square(score=0.5)], "bbox")
    assert (metrics["APm"], metrics["APs"]) == (pytest.approx(1.0), -1.0)


def test_only_the_chosen_images_count():
    truth = small_truth()
    truth["annotations"].append(square(image_id=2, id=2, iscrowd=0, area=1600.0))
    results = [square(score=0.5)]
    assert coco.score(truth, results, "bbox", image_ids=[1])["AR100"] == 1.0
    assert coco.score(truth, results, "bbox")["AR100"] == 0.5


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (square(image_id=7, score=1.0), "image ids of the detections are not in the ground truth"),
        (square(category_id=2, score=1.0), "category ids of the detections"),
    ],
)
def test_detections_of_another_data_set_are_an_error(row, words):
    with pytest.raises(UserError, match=words):
        coco.score(small_truth(), [row], "bbox")


def test_other_mistakes_are_explained(tmp_path):
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UserError, match="give a COCO JSON"):
        coco.score(tmp_path / "list.json", [], "bbox")
    with pytest.raises(UserError, match="not a readable annotation JSON"):
        coco.score(tmp_path / "absent.json", [], "bbox")
    with pytest.raises(UserError, match=r"of the ground truth have no segmentation, .* image 1"):
        coco.score(small_truth(), [], "segm")
    with pytest.raises(UserError, match="choose pycocotools or faster"):
        coco.score(small_truth(), [], "bbox", backend="slow")


def test_an_absent_backend_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match="pip install faster-coco-eval"):
        coco.score(small_truth(), [], "bbox", backend="faster")


def test_a_log_row_has_the_twelve_numbers_in_order():
    metrics = {"bbox": {key: at / 100 for at, key in enumerate(coco.METRICS)}}
    row = coco.log_row("sephv14", metrics)
    assert row == (
        "|sephv14|0.000|0.010|0.020|0.030|0.040|0.050|0.060|0.070|0.080|0.090|0.100|0.110|"
    )
    assert re.fullmatch(r"\|[^|]+(\|-?\d\.\d{3}){12}\|", row)


def test_classes_of_one_name_are_told_apart():
    categories = [{"id": 1, "name": "cup"}, {"id": 2, "name": "cup"}, {"id": 3, "name": "cat"}]
    assert coco.class_names(categories) == {1: "cup (1)", 2: "cup (2)", 3: "cat"}
