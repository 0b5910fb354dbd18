"""Cascade: what happens between its stages against NumPy, and a narrow detector with three."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sephjax import build
from sephjax.nets.roi import cascade
from sephjax.ops import matchers
from sephjax.targets import cascade as targets
from sephjax.types import BoxOutputs, Proposals, Rois, Truth
from tests import narrow

IOUS = (0.5, 0.6, 0.7)
WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
CLASSES, SIZE = 4, np.float32([[60, 80], [50, 70]])


class Says(nnx.Module):
    """A head of given outputs: the first rows of two arrays [b, many, ...]."""

    def __init__(self, logits, deltas):
        self.logits, self.deltas = nnx.Param(logits), nnx.Param(deltas)


def run(head, boxes, valid):
    n = boxes.shape[1]
    return BoxOutputs(head.logits[...][:, :n], head.deltas[...][:, :n])


def heads(seed=0, stages=3):
    rng = np.random.default_rng(seed)
    logits = lambda: jnp.float32(rng.normal(size=(2, 40, CLASSES + 1)))
    deltas = lambda: jnp.float32(rng.normal(size=(2, 40, 1, 4)))
    return [Says(logits(), deltas()) for _ in range(stages)]


def drawn(count=12, seed=1):
    """Boxes with a side of at least 10 that lie in both pictures."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, [50, 30], (2, count, 2))
    return np.float32(np.concatenate([corners, corners + rng.uniform(10, 20, (2, count, 2))], -1))


def decoded(boxes, deltas, weights, size):
    """NumPy in double precision; `size` is [b, 2], height and width."""
    boxes, d = np.float64(boxes), np.float64(deltas) / np.float64(weights)
    sides = boxes[..., 2:] - boxes[..., :2]
    centres = boxes[..., :2] + sides / 2 + d[..., :2] * sides
    sides = sides * np.exp(d[..., 2:])
    found = np.concatenate([centres - sides / 2, centres + sides / 2], axis=-1)
    edge = np.tile(size[:, None, ::-1], (1, 1, 2))
    return np.clip(found, 0, edge)


def three():
    rematch = tuple(
        functools.partial(
            targets.next_rois,
            matcher=functools.partial(matchers.max_iou, low=iou, high=iou, low_quality="none"),
            append=8,
            classes=CLASSES,
        )
        for iou in IOUS[1:]
    )
    return cascade.Cascade(WEIGHTS, rematch, 1 / 3)


def sampled():
    """ROIs of the first stage, one of them padding, and the ground truth."""
    boxes = drawn()
    truth = Truth(
        jnp.asarray(drawn(3, seed=2)),
        jnp.asarray([[0, 1, 2], [3, 0, 0]]),
        jnp.asarray([[True, True, True], [True, False, False]]),
        None,
    )
    zeros = jnp.zeros((2, 12), jnp.int32)
    valid = jnp.ones((2, 12), bool).at[1, 11].set(False)
    rois = Rois(
        jnp.asarray(boxes),
        zeros,
        zeros,
        jnp.asarray(boxes),
        jnp.zeros((2, 12)),
        valid & False,
        valid,
    )
    return rois, truth


def train(made, keys=None):
    rois, truth = sampled()
    keys = jax.random.split(jax.random.key(0), 2) if keys is None else keys
    return three().train(made, run, rois, truth, keys, jnp.asarray(SIZE))


def test_a_stage_trains_on_the_boxes_that_the_one_before_moved_and_on_ground_truths():
    made = heads()
    found = train(made)
    assert [rois.boxes.shape[1] for rois, _ in found] == [12, 20, 28]
    assert [outputs.logits.shape[1] for _, outputs in found] == [12, 20, 28]
    for i in (1, 2):
        before, after = found[i - 1][0], found[i][0]
        n = before.boxes.shape[1]
        deltas = np.asarray(made[i - 1].deltas[...])[:, :n, 0]
        expected = decoded(before.boxes, deltas, WEIGHTS[i - 1], SIZE)
        valid = np.asarray(before.valid)
        np.testing.assert_allclose(
            np.asarray(after.boxes[:, :n])[valid], expected[valid], atol=1e-3
        )
        np.testing.assert_array_equal(after.valid[:, :n], valid)
        assert np.all(after.valid[:, n:])
        np.testing.assert_array_equal(after.iou[:, n:], np.ones((2, 8)))
        foreground = np.asarray(after.iou) >= IOUS[i]
        np.testing.assert_array_equal(after.positive, foreground & np.asarray(after.valid))


def test_every_stage_draws_its_ground_truths_anew():
    made = heads()

    def orders(seed):
        found = train(made, jax.random.split(jax.random.key(seed), 2))
        return found[1][0].matched[0, 12:], found[2][0].matched[0, 20:]

    same = [np.array_equal(*orders(seed)) for seed in range(6)]  # of six orders each
    assert sum(same) < 4


def test_the_moved_boxes_are_constants():
    made = heads()
    graph, values = nnx.split(made)

    def objective(values):
        return sum(jnp.sum(rois.boxes) for rois, _ in train(nnx.merge(graph, values)))

    slopes = jax.tree.leaves(jax.grad(objective)(values))
    assert len(slopes) == 6
    assert all(np.all(np.asarray(slope) == 0) for slope in slopes)


def test_at_test_time_probabilities_are_averaged_and_the_last_boxes_are_read():
    made, boxes = heads(), drawn()
    valid = jnp.ones((2, 12), bool).at[0, 3].set(False)
    proposals = Proposals(jnp.asarray(boxes), jnp.zeros((2, 12)), valid)
    last, outputs = three().test(made, run, proposals, jnp.asarray(SIZE))
    expected = boxes
    for head, weights in zip(made[:2], WEIGHTS[:2], strict=True):
        expected = decoded(expected, head.deltas[...][:, :12, 0], weights, SIZE)
    np.testing.assert_allclose(last.boxes, expected, atol=1e-3)
    np.testing.assert_array_equal(last.valid, valid)
    np.testing.assert_array_equal(outputs.deltas, made[2].deltas[...][:, :12])
    powers = np.exp([np.float64(head.logits[...][:, :12]) for head in made])
    mean = np.mean(powers / powers.sum(axis=-1, keepdims=True), axis=0)
    np.testing.assert_allclose(jax.nn.softmax(outputs.logits), mean, rtol=1e-5)


def test_one_stage_is_the_head_itself():
    (head,), boxes = heads(stages=1), drawn()
    proposals = Proposals(jnp.asarray(boxes), jnp.zeros((2, 12)), jnp.ones((2, 12), bool))
    one = cascade.Cascade(WEIGHTS[:1])
    found, outputs = one.test([head], run, proposals, jnp.asarray(SIZE))
    assert found is proposals
    np.testing.assert_array_equal(outputs.logits, head.logits[...][:, :12])
    rois, truth = sampled()
    keys = jax.random.split(jax.random.key(0), 2)
    ((same, _),) = one.train([head], run, rois, truth, keys, jnp.asarray(SIZE))
    assert same is rois


@pytest.mark.parametrize("scale", [1 / 3, 1.0])
def test_the_maps_get_a_share_of_the_gradient(scale):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.float32(rng.normal(size=shape))
    maps = {"p2": draw(1, 4, 5, 3), "p3": draw(1, 2, 3, 3)}
    weights = {"p2": draw(1, 4, 5, 3), "p3": draw(1, 2, 3, 3)}
    made = cascade.Cascade(WEIGHTS, (), scale)

    def objective(maps):
        seen = made.maps(maps)
        return sum(jnp.sum(weights[name] * jnp.square(seen[name])) for name in maps)

    jax.tree.map(np.testing.assert_array_equal, made.maps(maps), maps)
    slopes = jax.grad(objective)(maps)
    for name, x in maps.items():
        np.testing.assert_allclose(slopes[name], scale * 2 * weights[name] * x, rtol=1e-5)


CASCADE = {
    "roi.class_agnostic": True,
    "roi.cascade.ious": IOUS,
    "roi.cascade.weights": WEIGHTS,
    "roi.class_weight": "quadratic",
}


def test_a_narrow_detector_with_three_stages():
    config = narrow.config(**CASCADE)
    model = build.model(config, narrow.CLASSES)
    params, frozen = narrow.draw(model)
    heads = [params["box_head"][f"stage{i}"] for i in range(3)]
    for head in (params["rpn"], *heads):
        head["deltas"]["kernel"] *= 0.1
    batch = narrow.batch([(50, 70), (64, 96)], [0, 3])
    terms, outputs, slopes = narrow.learn(build.losses(config), model, params, frozen, batch)
    names = [f"loss/roi_{kind}_stage{i}" for i in range(3) for kind in ("cls", "box")]
    assert set(terms) == {"loss", "loss/rpn_cls", "loss/rpn_box", "loss/mask", *names}
    assert all(np.isfinite(value) and value > 0 for value in terms.values()), terms
    assert [name for name, slope in slopes.items() if not np.all(np.isfinite(slope))] == []
    assert [name for name, slope in slopes.items() if not np.any(slope)] == []
    stages = [(outputs.rois, outputs.boxes), *outputs.later]
    assert [rois.boxes.shape[1] for rois, _ in stages] == [16, 24, 32]
    for i, (rois, boxes) in enumerate(stages):
        logits, iou, valid = (np.asarray(x) for x in (boxes.logits, rois.iou, rois.valid))
        labels = np.asarray(rois.labels)
        logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        entropy = -np.take_along_axis(logs, labels[..., None], axis=-1)[..., 0]
        weight = np.minimum(100 * (iou - 0.5) ** 2, 1)  # centred at 0.5 in every stage
        expected = np.sum((weight * entropy)[valid]) / np.sum(valid)
        np.testing.assert_allclose(terms[f"loss/roi_cls_stage{i}"], expected, rtol=1e-4)
        assert not np.any(rois.positive[0])
        assert np.any(rois.positive[1])
    # Every stage has outputs and boxes of its own.
    assert np.abs(stages[1][0].boxes[1, :16] - stages[0][0].boxes[1]).max() > 1
    assert np.abs(stages[2][0].boxes[1, :16] - stages[1][0].boxes[1, :16]).max() > 0.1


def test_without_stages_the_box_head_is_one_head():
    params, _ = build.model(narrow.config(), narrow.CLASSES).abstract
    assert set(params["box_head"]) == {"dense", "logits", "deltas"}
