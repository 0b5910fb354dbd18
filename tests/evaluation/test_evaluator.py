"""The evaluation loop, with a prediction step that returns what it is told to."""

import dataclasses
import json
import types

import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from sephjax.errors import RunError
from sephjax.evaluation import coco, evaluator
from sephjax.input import pipeline, sources, transforms
from sephjax.types import Batch, Detections, Truth

IDS = (4, 9, 11, 20, 25)
SIDE = 40


class Drawn:
    """Five pictures of 80x80 with one object each, the last one with none."""

    ids = np.array(IDS)
    categories = types.SimpleNamespace(ids=(3, 8), names=("cat", "dog"))

    def box(self, position):
        return [4.0 * position, 5.0, SIDE, SIDE]

    def ground_truth(self):
        square = [[0, 0, SIDE, 0, SIDE, SIDE, 0, SIDE]]
        annotations = []
        for position, image_id in enumerate(IDS[:-1]):
            x, y, _, _ = self.box(position)
            shape = [[a + (x, y)[i % 2] for i, a in enumerate(square[0])]]
            annotations.append(
                {
                    "id": position + 1,
                    "image_id": image_id,
                    "category_id": self.categories.ids[position % 2],
                    "bbox": self.box(position),
                    "area": SIDE * SIDE,
                    "iscrowd": 0,
                    "segmentation": shape,
                }
            )
        return {
            "images": [{"id": i, "height": 80, "width": 80} for i in IDS],
            "annotations": annotations,
            "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}],
        }


def batch_of(positions, rows=2):
    index = np.zeros(rows, np.int32)
    index[: len(positions)] = positions
    none = Truth(np.zeros((rows, 0, 4)), np.zeros((rows, 0)), np.zeros((rows, 0), bool), None)
    valid = np.arange(rows) < len(positions)
    return Batch(
        image=np.zeros((rows, 160, 160, 3), np.uint8),
        size=np.where(valid[:, None], np.int32([160, 160]), 0),  # twice the file
        original=np.where(valid[:, None], np.int32([80, 80]), 0),
        index=index,
        valid=valid,
        truth=none,
    )


def perfect(batch, masks=True):
    """The true box of each picture, at the canvas' scale; the second slot is not valid."""
    rows = len(batch.index)
    x, y, width, height = np.array([Drawn().box(i) for i in batch.index], np.float32).T * 2
    boxes = np.stack([x, y, x + width, y + height], 1)
    boxes = np.stack([boxes, np.zeros_like(boxes)], 1)
    here = batch.index < 4
    return Detections(
        boxes=jnp.asarray(boxes),
        scores=jnp.full((rows, 2), 0.75),
        labels=jnp.asarray(np.stack([batch.index % 2, batch.index % 2], 1)),
        valid=jnp.asarray(np.stack([here, np.zeros(rows, bool)], 1)),
        masks=jnp.ones((rows, 2, 28, 28)) if masks else None,
    )


BATCHES = [batch_of([0, 1]), batch_of([2, 3]), batch_of([4])]


@pytest.fixture
def report(tmp_path):
    return evaluator.Report(tmp_path / "eval" / "7", step=7, name="sephv14")


def test_perfect_detections_score_one_and_are_written_and_printed(report, capsys):
    metrics = evaluator.evaluate(perfect, BATCHES, Drawn(), report)
    assert metrics["bbox"]["AP"] == metrics["segm"]["AP"] == pytest.approx(1.0)
    assert (metrics["step"], metrics["images"]) == (7, 5)
    assert metrics["per_class"]["dog"] == {"bbox": pytest.approx(1.0), "segm": pytest.approx(1.0)}
    assert json.loads((report.directory / "metrics.json").read_text()) == metrics
    rows = json.loads((report.directory / "detections.json").read_text())
    assert [row["image_id"] for row in rows] == list(IDS[:4])
    assert rows[1]["bbox"] == [4, 5, SIDE, SIDE]
    assert sorted(path.name for path in report.directory.iterdir()) == [
        "detections.json",
        "metrics.json",
    ]
    lines = capsys.readouterr().out.splitlines()
    assert sum("@[ IoU=" in line for line in lines) == 24
    assert coco.log_row("sephv14", metrics) in lines
    assert coco.log_row("sephv14 segm", metrics, "segm") in lines


def test_the_written_detections_score_the_same_again(report):
    metrics = evaluator.evaluate(perfect, BATCHES, Drawn(), report)
    rows = json.loads((report.directory / "detections.json").read_text())
    again = coco.score(Drawn().ground_truth(), rows, "segm")
    assert {key: again[key] for key in coco.METRICS} == metrics["segm"]


def test_batch_size_and_order_do_not_change_the_files(report, tmp_path):
    other = dataclasses.replace(report, directory=tmp_path / "other")
    evaluator.evaluate(perfect, BATCHES, Drawn(), report)
    evaluator.evaluate(perfect, [batch_of([4, 3, 2, 0], 4), batch_of([1], 4)], Drawn(), other)
    for name in ("detections.json", "metrics.json"):
        assert (other.directory / name).read_bytes() == (report.directory / name).read_bytes()


def test_boxes_alone_are_scored_without_masks(report):
    report = dataclasses.replace(report, masks=False, backend="faster")
    metrics = evaluator.evaluate(
        lambda batch: perfect(batch, masks=False), BATCHES, Drawn(), report
    )
    assert metrics["bbox"]["AP"] == pytest.approx(1.0)
    assert "segm" not in metrics
    assert metrics["per_class"] == {
        "cat": {"bbox": pytest.approx(1.0)},
        "dog": {"bbox": pytest.approx(1.0)},
    }


def test_the_logs_metric_is_beside_cocos_and_changes_nothing_else(report, tmp_path, capsys):
    other = dataclasses.replace(
        report, directory=tmp_path / "log", input_size=lambda h, w: (2 * h, 2 * w)
    )
    plain = evaluator.evaluate(perfect, BATCHES, Drawn(), report)
    assert "reference" not in capsys.readouterr().out
    metrics = evaluator.evaluate(perfect, BATCHES, Drawn(), other)
    beside = metrics.pop("reference")
    assert metrics == plain
    assert (other.directory / "detections.json").read_bytes() == (
        report.directory / "detections.json"
    ).read_bytes()
    assert (beside["images"], beside["objects"]) == (4, 4)  # the fifth picture is empty
    # 40x40 of 80x80: 256x256 in the 512 frame, 80x80 in the input's.
    assert beside["512"]["bbox"]["APl"] == beside["input"]["bbox"]["APm"] == pytest.approx(1.0)
    assert beside["512"]["bbox"]["APm"] == beside["input"]["bbox"]["APl"] == -1
    assert beside["512"]["segm"]["AP50"] == pytest.approx(1.0)
    rows = [line for line in capsys.readouterr().out.splitlines() if "reference" in line]
    assert rows == evaluator.reference.log_rows("sephv14", beside)


def test_boxes_alone_have_boxes_alone_in_the_logs_metric(report):
    report = dataclasses.replace(report, masks=False, input_size=lambda h, w: (h, w))
    boxes = lambda batch: perfect(batch, masks=False)
    metrics = evaluator.evaluate(boxes, BATCHES, Drawn(), report)
    assert metrics["reference"]["512"].keys() == metrics["reference"]["input"].keys() == {"bbox"}


def test_nothing_found_scores_zero(report):
    def blind(batch):
        return dataclasses.replace(perfect(batch), valid=jnp.zeros((2, 2), bool))

    metrics = evaluator.evaluate(blind, BATCHES, Drawn(), report)
    assert metrics["bbox"]["AP"] == metrics["segm"]["AR100"] == 0.0


@pytest.mark.parametrize(
    "batches",
    [
        [batch_of([0, 1]), batch_of([2, 3])],
        [*BATCHES, batch_of([2])],
        [*BATCHES[:2], batch_of([5])],
    ],
    ids=["missing", "twice", "unknown"],
)
def test_an_image_that_does_not_come_exactly_once_is_an_error(report, batches):
    class More(Drawn):
        ids = np.array([*IDS, 99])

    source = More() if batches[-1].index[0] == 5 else Drawn()
    with pytest.raises(RunError, match="each image of the source once"):
        evaluator.evaluate(perfect, batches, source, report)
    assert not report.directory.exists()


def test_masks_of_a_model_without_a_mask_head_are_an_error(report):
    with pytest.raises(RunError, match=r"mask\.enabled"):
        evaluator.evaluate(lambda batch: perfect(batch, masks=False), BATCHES, Drawn(), report)


def test_a_failure_in_the_host_threads_is_not_swallowed(report):
    source = Drawn()
    source.categories = types.SimpleNamespace(ids=())
    with pytest.raises(IndexError):
        evaluator.evaluate(perfect, BATCHES, source, report)


@pytest.mark.data
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools
def test_ground_truth_handed_back_through_the_real_batches_scores_one(shared_data, report):
    folder = shared_data / "coco_tiny"
    data = base.get_config().data.unlock()
    data.eval.annotations = str(folder / "annotations" / "instances_val.json")
    data.eval.images, data.eval.limit = str(folder / "val"), 18
    data.eval.short_sides, data.eval.long_side = (160,), 240
    source = sources.open_source(data, train=False)

    def oracle(batch):
        rows, most = len(batch.index), 100
        found = Detections(
            boxes=np.zeros((rows, most, 4), np.float32),
            scores=np.full((rows, most), 0.9, np.float32),
            labels=np.zeros((rows, most), np.int32),
            valid=np.zeros((rows, most), bool),
            masks=np.zeros((rows, most, 28, 28), np.float32),
        )
        for row in np.flatnonzero(batch.valid):
            example = source.example(int(batch.index[row]))
            kept = np.flatnonzero(~example.crowd)
            shapes = [example.segmentations[at] for at in kept]
            ratio = batch.size[row] / batch.original[row]
            boxes, count = example.boxes[kept], len(kept)
            found.boxes[row, :count] = boxes * np.tile(ratio[::-1], 2)
            found.labels[row, :count] = example.labels[kept]
            found.valid[row, :count] = True
            crops = transforms.crop_masks_to_boxes(shapes, boxes, example.height, example.width)
            crops = np.asarray(crops, np.float32).reshape(-1, 28, 4, 28, 4)
            found.masks[row, :count] = crops.mean(axis=(2, 4))
        return found

    batches = pipeline.eval_batches(source, data, batch=4)
    metrics = evaluator.evaluate(oracle, batches, source, report)
    assert metrics["images"] == 18
    assert metrics["bbox"]["AP"] == pytest.approx(1.0)
    assert metrics["segm"]["AP75"] == pytest.approx(1.0)
    assert metrics["segm"]["AP"] > 0.95  # what a 28x28 mask can say of a polygon
