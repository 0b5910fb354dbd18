"""Detections against a loop in NumPy over torchvision's `postprocess_detections`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax import predict
from sephjax.types import BoxOutputs, Proposals
from tests.ops.reference import greedy_nms

BOXES, CLASSES = 60, 4
SIZE = (60.0, 80.0)
WEIGHTS = (10.0, 10.0, 5.0, 5.0)
OPTIONS = {
    "weights": WEIGHTS,
    "score_threshold": 0.1,
    "nms": 0.5,
    "nms_inclusive": False,
    "detections": 100,
    "candidates": BOXES * CLASSES,
    "min_size": 0.0,
    "one_class_per_box": False,
}


def drawn(seed, kinds=CLASSES, branch=False):
    rng = np.random.default_rng(seed)
    corners = rng.uniform(-5, 60, (BOXES, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(5, 40, (BOXES, 2))], axis=1)
    proposals = Proposals(
        jnp.float32(boxes), jnp.zeros(BOXES), jnp.asarray(rng.uniform(size=BOXES) < 0.8)
    )
    logits = jnp.float32(1.5 * rng.normal(size=(BOXES, CLASSES + 1)))
    deltas = jnp.float32(rng.normal(size=(BOXES, kinds, 4)))
    iou = jnp.float32(rng.normal(size=BOXES)) if branch else None
    return BoxOutputs(logits, deltas, iou), proposals


@functools.partial(jax.jit, static_argnames=("changes",))
def run(outputs, proposals, changes=()):
    return predict.detections(outputs, proposals, jnp.float32(SIZE), **(OPTIONS | dict(changes)))


def decoded(box, deltas):
    """One clipped box in double precision."""
    w, h = box[2] - box[0], box[3] - box[1]
    x = (box[0] + box[2]) / 2 + deltas[0] / WEIGHTS[0] * w
    y = (box[1] + box[3]) / 2 + deltas[1] / WEIGHTS[1] * h
    w, h = w * np.exp(deltas[2] / WEIGHTS[2]), h * np.exp(deltas[3] / WEIGHTS[3])
    corners = np.array([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    return corners.clip(0, np.array([SIZE[1], SIZE[0]] * 2))


def reference(outputs, proposals, changes=()):
    """Rows (box, score, label), best first."""
    options = OPTIONS | dict(changes)
    logits, deltas = np.float64(outputs.logits), np.float64(outputs.deltas)
    scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    use = options.get("iou_score", "none")
    iou = np.zeros(BOXES) if use == "none" else 1 / (1 + np.exp(-np.float64(outputs.iou)))
    if use == "product":
        scores *= iou[:, None]
    rows, rank = [], []
    for i in range(BOXES):
        best = scores[i, :CLASSES].argmax()
        for label in range(CLASSES):
            if not proposals.valid[i] or scores[i, label] <= options["score_threshold"]:
                continue
            if options["one_class_per_box"] and label != best:
                continue
            box = decoded(
                np.float64(proposals.boxes[i]), deltas[i, min(label, deltas.shape[1] - 1)]
            )
            sides = box[2:] - box[:2]
            if sides.min() > 0 and sides.min() >= options["min_size"]:
                rows.append((box, scores[i, label], label))
                rank.append(iou[i] if use == "order" else scores[i, label])
    best = np.argsort(-np.array(rank), kind="stable")[: options["candidates"]]
    rows, rank = [rows[i] for i in best], [rank[i] for i in best]
    boxes, _, labels = zip(*rows, strict=True) if rows else ((), (), ())
    kept = greedy_nms(boxes, rank, options["nms"], labels, inclusive=options["nms_inclusive"])
    return [rows[i] for i in kept[: options["detections"]]]


def check(found, expected):
    count = len(expected)
    np.testing.assert_array_equal(found.valid, np.arange(found.valid.shape[0]) < count)
    if count:
        boxes, scores, labels = zip(*expected, strict=True)
        np.testing.assert_allclose(found.boxes[:count], np.stack(boxes), atol=1e-3)
        np.testing.assert_allclose(found.scores[:count], scores, rtol=1e-5)
        np.testing.assert_array_equal(found.labels[:count], labels)
    for leaf in (found.boxes, found.scores, found.labels):
        assert not np.any(leaf[count:])


@pytest.mark.parametrize("seed", range(4))
def test_detections_are_those_of_the_loop(seed):
    outputs, proposals = drawn(seed)
    expected = reference(outputs, proposals)
    assert 20 < len(expected) < 100
    check(run(outputs, proposals), expected)


@pytest.mark.parametrize("seed", range(2))
def test_one_class_per_box_keeps_the_best_foreground_class(seed):
    changes = (("one_class_per_box", True), ("nms_inclusive", True))
    outputs, proposals = drawn(seed)
    expected = reference(outputs, proposals, changes)
    assert len(expected) < len(reference(outputs, proposals))
    check(run(outputs, proposals, changes), expected)


@pytest.mark.parametrize("use", ["product", "order"])
@pytest.mark.parametrize("one", [False, True])
def test_a_predicted_iou_is_part_of_the_score_or_ranks(use, one):
    outputs, proposals = drawn(10, branch=True)
    changes = (("iou_score", use), ("one_class_per_box", one), ("detections", 8))
    found, expected = run(outputs, proposals, changes), reference(outputs, proposals, changes)
    check(found, expected)
    if use == "order":  # the best eight by IoU, whose scores are probabilities
        assert np.any(np.diff(found.scores) > 0)
    plain = run(outputs, proposals, changes[1:])
    assert np.any(plain.boxes != found.boxes)


def test_a_branch_that_nothing_reads_changes_nothing():
    outputs, proposals = drawn(11, branch=True)
    without = dataclasses.replace(outputs, iou=None)
    jax.tree.map(np.testing.assert_array_equal, run(outputs, proposals), run(without, proposals))


@pytest.mark.parametrize("use", ["product", "order"])
def test_a_certain_branch_leaves_the_scores(use):
    outputs, proposals = drawn(12, branch=True)
    sure = dataclasses.replace(outputs, iou=jnp.full(BOXES, 40.0))
    changes = (("iou_score", use),)
    if use == "product":
        check(run(sure, proposals, changes), reference(outputs, proposals))
    # No overlap predicted at all: nothing passes the threshold, or the order is that of the rows.
    none = dataclasses.replace(outputs, iou=jnp.full(BOXES, -200.0))
    count = int(np.sum(run(none, proposals, changes).valid))
    assert count == 0 if use == "product" else count > 5


def test_class_agnostic_deltas_serve_every_class():
    outputs, proposals = drawn(5, kinds=1)
    check(run(outputs, proposals), reference(outputs, proposals))


def test_only_the_best_are_returned_and_only_the_best_candidates_enter_nms():
    outputs, proposals = drawn(6)
    for changes in ((("detections", 5),), (("candidates", 30),)):
        expected = reference(outputs, proposals, changes)
        check(run(outputs, proposals, changes), expected)


@pytest.mark.parametrize("changes", [(("score_threshold", 0.6),), (("min_size", 12.0),)])
def test_a_higher_threshold_leaves_fewer(changes):
    outputs, proposals = drawn(7)
    expected = reference(outputs, proposals, changes)
    assert len(expected) < len(reference(outputs, proposals))
    check(run(outputs, proposals, changes), expected)


def test_without_a_valid_proposal_there_is_no_detection():
    outputs, proposals = drawn(8)
    nothing = Proposals(proposals.boxes, proposals.scores, jnp.zeros_like(proposals.valid))
    check(run(outputs, nothing), [])
    outputs, _ = drawn(8, branch=True)
    for use in ("product", "order"):
        check(run(outputs, nothing, (("iou_score", use),)), [])


@pytest.mark.torch
def test_detections_are_those_of_torchvision():
    torch = pytest.importorskip("torch")
    detection = pytest.importorskip("torchvision.models.detection")
    heads = detection.roi_heads.RoIHeads(
        None, None, None, 0.5, 0.5, 512, 0.25, WEIGHTS, 0.1, 0.5, 100
    )
    outputs, proposals = drawn(9)
    tensor = lambda leaf: torch.tensor(np.asarray(leaf)[np.asarray(proposals.valid)])
    # Background is torchvision's class 0 and our last one.
    logits = tensor(jnp.roll(outputs.logits, 1, axis=1))
    deltas = tensor(jnp.pad(outputs.deltas, ((0, 0), (1, 0), (0, 0)))).flatten(1)
    boxes, scores, labels = heads.postprocess_detections(
        logits, deltas, [tensor(proposals.boxes)], [tuple(int(side) for side in SIZE)]
    )
    rows = zip(boxes[0].numpy(), scores[0].numpy(), labels[0].numpy() - 1, strict=True)
    check(run(outputs, proposals), list(rows))
