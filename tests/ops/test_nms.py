"""NMS against brute-force NumPy, literal cases and torchvision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.ops import nms as nms_ops
from sephjax.ops import nms_loop, nms_rank, nms_tiled

N = 96
TILE = 20  # several, and not a whole number of them


@pytest.fixture(scope="module", params=["loop", "tiled"], autouse=True)
def way(request):
    """Everything holds of the way of a CPU and of that of an accelerator."""
    ways = {
        "loop": lambda loop, tiled, ranked, removes, most: loop(ranked, removes, most),
        "tiled": lambda loop, tiled, ranked, removes, most: tiled(ranked, removes, most, TILE),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nms_ops, "_by_platform", ways[request.param])
        for jitted in (run, run_exactly):
            jitted.clear_cache()
        yield request.param


def iou_of(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    shared = np.float32(width * height)
    areas = [np.float32(max(x[2] - x[0], 0) * max(x[3] - x[1], 0)) for x in (a, b)]
    union = areas[0] + areas[1] - shared
    return float(shared / union) if union > 0 else 0.0


def greedy(boxes, scores, valid, threshold, classes=None, inclusive=False):
    """Greedy NMS, box by box, in plain Python."""
    order = [i for i in np.argsort(-scores, kind="stable") if valid[i]]
    kept = []
    for i in order:
        same = [j for j in kept if classes is None or classes[i] == classes[j]]
        overlaps = [iou_of(boxes[i], boxes[j]) for j in same]
        if not any(o > threshold or (inclusive and o >= threshold) for o in overlaps):
            kept.append(i)
    return kept


def exactly(boxes, scores, valid, threshold, count):
    """The published series' intended rule, box by box."""
    kept = greedy(boxes, scores, valid, threshold, inclusive=True)[:count]
    order = [i for i in np.argsort(-scores, kind="stable") if valid[i]]
    rank = {i: r for r, i in enumerate(order)}
    rest = {}
    for i in order:
        if i not in kept:
            before = [j for j in kept if rank[j] < rank[i]]
            rest[i] = scores[i] * np.prod([1 - iou_of(boxes[i], boxes[j]) for j in before])
    while len(kept) < count and rest:
        best = max(rest, key=lambda i: (rest[i], -rank[i]))
        del rest[best]
        kept.append(best)
        rest = {i: s * (1 - iou_of(boxes[i], boxes[best])) for i, s in rest.items()}
    return sorted(kept, key=rank.get)


def clustered(seed, n=N, objects=12):
    """Jittered copies of a few objects, with tied scores, duplicates and invalid boxes."""
    rng = np.random.default_rng(seed)
    centre, side = rng.uniform(0, 200, (objects, 2)), rng.uniform(20, 80, (objects, 2))
    which = rng.integers(0, objects, n)
    middle = centre[which] + rng.normal(0, 6, (n, 2))
    extent = side[which] * np.exp(rng.normal(0, 0.15, (n, 2)))
    boxes = np.concatenate([middle - extent / 2, middle + extent / 2], 1).astype(np.float32)
    boxes[n // 2 : n // 2 + 8] = boxes[:8]
    scores = (rng.integers(-20, 20, n) / 8).astype(np.float32)
    return boxes, scores, rng.uniform(size=n) > 0.2


@functools.partial(jax.jit, static_argnames=("threshold", "max_output", "inclusive"))
def run(boxes, scores, valid, classes=None, *, threshold, max_output=N, inclusive=False):
    return nms_ops.nms(
        boxes,
        scores,
        valid,
        threshold=threshold,
        max_output=max_output,
        classes=classes,
        inclusive=inclusive,
    )


@functools.partial(jax.jit, static_argnames=("threshold", "count"))
def run_exactly(boxes, scores, valid, *, threshold, count):
    return nms_ops.nms_exactly_k(boxes, scores, valid, threshold=threshold, count=count)


def listed(result):
    indices, valid = (np.asarray(x) for x in result)
    assert not np.any(~valid[:-1] & valid[1:])  # empty slots come last
    return indices[valid].tolist()


@pytest.mark.parametrize("inclusive", [False, True])
@pytest.mark.parametrize("threshold", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_nms_is_greedy_nms_at_every_threshold(threshold, inclusive):
    for seed in range(4):
        boxes, scores, valid = clustered(seed)
        want = greedy(boxes, scores, valid, threshold, inclusive=inclusive)
        assert listed(run(boxes, scores, valid, threshold=threshold, inclusive=inclusive)) == want


def test_boxes_of_other_classes_do_not_remove_each_other():
    boxes, scores, valid = clustered(5)
    classes = np.random.default_rng(0).integers(0, 3, N).astype(np.int32)
    want = greedy(boxes, scores, valid, 0.5, classes)
    assert listed(run(boxes, scores, valid, classes, threshold=0.5)) == want


def test_the_best_max_output_boxes_are_returned_when_more_survive():
    boxes, scores, valid = clustered(6)
    want = greedy(boxes, scores, valid, 0.7)
    assert len(want) > 10
    assert listed(run(boxes, scores, valid, threshold=0.7, max_output=10)) == want[:10]


def test_nms_of_no_valid_box_is_empty():
    boxes, scores, _ = clustered(7)
    assert listed(run(boxes, scores, np.zeros(N, bool), threshold=0.5)) == []
    assert listed(run_exactly(boxes, scores, np.zeros(N, bool), threshold=0.5, count=5)) == []


def test_one_box_survives():
    box = np.array([[1, 2, 3, 4]], np.float32)
    indices, valid = run(box, np.array([-3], np.float32), np.ones(1, bool), threshold=0.5)
    assert indices[0] == 0
    assert valid.tolist() == [True] + [False] * (N - 1)


def test_of_duplicates_with_equal_scores_the_first_survives():
    boxes = np.tile(np.array([[0, 0, 10, 10]], np.float32), (4, 1))
    scores = np.array([1, 2, 2, 2], np.float32)
    assert listed(run(boxes, scores, np.ones(4, bool), threshold=0.9)) == [1]


def test_an_overlap_equal_to_the_threshold_is_removed_only_when_inclusive():
    boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 2]], np.float32)  # IoU is one half
    scores, valid = np.array([2, 1], np.float32), np.ones(2, bool)
    assert listed(run(boxes, scores, valid, threshold=0.5)) == [0, 1]
    assert listed(run(boxes, scores, valid, threshold=0.5, inclusive=True)) == [0]


def test_degenerate_boxes_neither_remove_nor_are_removed():
    boxes = np.array([[0, 0, 9, 9], [3, 3, 3, 3], [3, 3, 3, 3], [8, 8, 2, 2]], np.float32)
    scores, valid = np.array([1, 4, 3, 2], np.float32), np.ones(4, bool)
    for inclusive in (False, True):
        result = run(boxes, scores, valid, threshold=0.5, inclusive=inclusive)
        assert listed(result) == [1, 2, 3, 0]


def test_an_invalid_box_does_not_remove_its_neighbour():
    boxes = np.array([[0, 0, 9, 9], [0, 0, 9, 8]], np.float32)
    scores = np.array([5, 1], np.float32)
    assert listed(run(boxes, scores, np.array([False, True]), threshold=0.5)) == [1]


def test_negative_coordinates_count_like_any_other():
    boxes = np.array([[-9, -9, 0, 0], [-9, -9, 0, -1], [-1, -1, 8, 8]], np.float32)
    scores, valid = np.array([3, 2, 1], np.float32), np.ones(3, bool)
    assert listed(run(boxes, scores, valid, threshold=0.5)) == [0, 2]


def test_vmap_over_images_gives_what_each_image_gives():
    images = [clustered(seed) for seed in range(3)]
    stacked = [jnp.asarray(np.stack(x)) for x in zip(*images, strict=True)]
    one = functools.partial(nms_ops.nms, threshold=0.6, max_output=20)
    indices, kept = jax.jit(jax.vmap(one))(*stacked)
    for i, image in enumerate(images):
        assert listed((indices[i], kept[i])) == greedy(*image, 0.6)[:20]


@pytest.mark.parametrize("count", [5, 40, 60])
def test_exactly_k_follows_the_series_rule(count):
    for seed in range(4):
        boxes, scores, valid = clustered(seed + 20)
        want = exactly(boxes, scores, valid, 0.7, count)
        assert len(want) == count
        got = listed(run_exactly(boxes, scores, valid, threshold=0.7, count=count))
        assert got == want


def test_exactly_k_returns_all_valid_boxes_when_there_are_no_more_than_k():
    boxes, scores, valid = clustered(30)
    order = [i for i in np.argsort(-scores, kind="stable") if valid[i]]
    assert listed(run_exactly(boxes, scores, valid, threshold=0.1, count=N)) == order


def test_exactly_k_brings_back_the_least_overlapped_of_the_removed():
    # Box 0 removes the others; by IoU .9, .8 and .7 their scores decay to .9, 1.6 and 2.1.
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8], [0, 0, 10, 7]], np.float32)
    scores, valid = np.array([10, 9, 8, 7], np.float32), np.ones(4, bool)
    assert listed(run_exactly(boxes, scores, valid, threshold=0.6, count=2)) == [0, 3]
    # With 8.5, box 2 has 1.7 and at IoU 7/8 with box 3 .2125; box 1 has .9 and at 7/9 .2.
    scores[2] = 8.5
    assert listed(run_exactly(boxes, scores, valid, threshold=0.6, count=3)) == [0, 2, 3]


@pytest.mark.torch
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("threshold", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_nms_equals_torchvision(threshold, tied):
    torch = pytest.importorskip("torch")
    ops = pytest.importorskip("torchvision").ops
    rng = np.random.default_rng(1)
    boxes, scores, _ = clustered(40)  # with duplicates; scores of 40 steps, so most are tied
    assert len(np.unique(scores)) < N / 2
    # Whole numbers: many IoUs lie on the threshold, and torchvision's offsets by class are exact.
    boxes = np.round(boxes)
    scores = scores if tied else rng.permutation(N).astype(np.float32)
    classes = rng.integers(0, 3, N).astype(np.int32)
    inputs = torch.tensor(boxes), torch.tensor(scores)
    everything = np.ones(N, bool)
    assert (
        listed(run(boxes, scores, everything, threshold=threshold))
        == ops.nms(*inputs, threshold).tolist()
    )
    assert (
        listed(run(boxes, scores, everything, classes, threshold=threshold))
        == ops.batched_nms(*inputs, torch.tensor(classes), threshold).tolist()
    )


@pytest.mark.torch
def test_classes_are_told_apart_without_moving_boxes():
    """torchvision moves the boxes of class c by c times their extent, which costs them float32
    digits: of class 89 the last is 1/128 pixel, and a pair next to the threshold may fall on the
    other side. Its own other way, a class at a time, is ours."""
    torch = pytest.importorskip("torch")
    from torchvision.ops import boxes as peer

    rng = np.random.default_rng(0)
    corner = np.sort(rng.uniform(0, 900, 20))
    first = np.stack([corner, corner, corner + 300, corner + 300], axis=1)
    second = first.copy()
    second[:, 3] -= 150 + rng.uniform(-2e-3, 2e-3, 20)  # IoU 0.5 within 7e-6
    kept = {"ours": [], "moved": [], "by class": []}
    for pair in np.float32(np.stack([first, second], axis=1)):
        pair = np.concatenate([pair, np.float32([[0, 0, 1333, 1333]])])  # the extent of the boxes
        scores, classes = np.float32([0.9, 0.8, 0.7]), np.array([89, 89, 0])
        inputs = torch.tensor(pair), torch.tensor(scores), torch.tensor(classes), 0.5
        kept["moved"].append(peer._batched_nms_coordinate_trick(*inputs).tolist())
        kept["by class"].append(peer._batched_nms_vanilla(*inputs).tolist())
        valid, classes = np.ones(3, bool), np.int32(classes)
        kept["ours"].append(listed(run(pair, scores, valid, classes, threshold=0.5, max_output=3)))
    assert kept["ours"] == kept["by class"]
    assert kept["moved"] != kept["by class"]


@pytest.mark.parametrize("size", [N, TILE, 1])
def test_a_chain_of_boxes_settles(size):
    """Each box kills the next one alone: a tile needs as many turns as it can need."""
    left = np.arange(size, dtype=np.float32)
    boxes = np.stack([left, 0 * left, left + 2, 0 * left + 1], axis=1)  # neighbours: IoU 1/3
    scores, valid = -left, np.ones(size, bool)
    assert listed(run(boxes, scores, valid, threshold=0.3)) == list(range(0, size, 2))


def test_both_ways_take_the_same_boxes_in_the_same_order():
    ranked = nms_rank.rank(*(jnp.asarray(x) for x in clustered(1)), None)
    removes = lambda iou: iou > 0.5
    loop, loop_count = nms_loop.take(ranked, removes, 30)
    tiled, tiled_count = nms_tiled.take(ranked, removes, 30, TILE)
    assert loop_count == tiled_count > 5
    assert (loop == tiled).all()
