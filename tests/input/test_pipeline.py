"""Batches: right content, and the same whatever prepares them."""

import json
import multiprocessing
import os
import pickle
import signal

import jax
import numpy as np
import pytest

from sephjax.errors import UserError
from sephjax.input import table
from sephjax.input.batches import frame_of
from sephjax.input.coco import open_coco
from sephjax.input.pipeline import eval_batches, image_batch, train_batches
from sephjax.input.sources import open_source

# pycocotools converts its results in a way that NumPy 2 frowns upon.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def equal(a, b):
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(leaves_a) == len(leaves_b) and all(
        x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(leaves_a, leaves_b, strict=True)
    )


@pytest.fixture
def drawn(data):
    data.source = "shapes"
    data.shapes.train_images, data.shapes.eval_images = 11, 10
    return data


def batches_of(data, *, steps=8, batch=4, seed=3, **keywords):
    source = open_source(data, train=True)
    return train_batches(source, data, seed=seed, batch=batch, steps=steps, masks=True, **keywords)


def test_a_batch_has_the_promised_shapes_and_types(drawn):
    pipeline = batches_of(drawn)
    assert set(pipeline.buckets) == {(64, 96), (96, 64)}
    seen = set()
    for batch, _ in pipeline:
        h, w = batch.image.shape[1:3]
        seen.add((h, w))
        assert batch.image.dtype == np.uint8
        assert batch.truth.boxes.shape == (4, 20, 4)
        assert batch.truth.boxes.dtype == np.float32
        assert batch.truth.labels.dtype == batch.index.dtype == batch.size.dtype == np.int32
        assert batch.truth.masks.shape == (4, 20, 112, 112)
        assert batch.truth.valid.any(axis=1).all()
        assert (batch.size <= [h, w]).all()
        right_low = batch.truth.boxes[..., 2:]
        assert (right_low <= batch.size[:, None, ::-1] + 1e-3).all()
    assert seen == set(pipeline.buckets)


def test_boxes_and_masks_lie_on_the_pixels_they_belong_to(coco, data):
    """A white rectangle is drawn where box and mask say, for every size and flip."""
    path = coco.image(1)
    image = np.zeros((40, 60, 3), np.uint8)
    image[8:24, 10:30] = 255
    import cv2

    cv2.imwrite(path.replace(".jpg", ".png"), image)
    coco.content["images"][0]["file_name"] = "000001.png"
    coco.object(1)
    source = open_coco(*coco.write(), train=True)
    left = set()
    for batch, _ in train_batches(source, data, seed=0, batch=1, steps=24, masks=True):
        x1, y1, x2, y2 = np.rint(batch.truth.boxes[0, 0]).astype(int)
        left.add((x1, x2, y2))
        inside = batch.image[0, y1 + 1 : y2 - 1, x1 + 1 : x2 - 1]
        assert (inside > 250).all()
        white = (batch.image[0, ..., 0] > 127).sum()
        assert abs(white - (x2 - x1) * (y2 - y1)) < 0.1 * white
        assert batch.truth.masks[0, 0].all()
        assert not batch.truth.masks[0, 1:].any()
    assert len(left) == 6  # three sizes, flipped or not


def test_a_flip_mirrors_the_mask_crop(coco, data):
    coco.image(1)
    coco.object(1, segmentation=[[10.0, 8.0, 10.0, 24.0, 30.0, 24.0]])
    source = open_coco(*coco.write(), train=True)
    data.train.short_sides = (64,)
    crops = {}
    for flip in (0.0, 1.0):
        data.flip = flip
        ((batch, _),) = train_batches(source, data, seed=0, batch=1, steps=1, masks=True)
        crops[flip] = batch
    a, b = crops[0.0], crops[1.0]
    np.testing.assert_array_equal(a.truth.masks[..., ::-1], b.truth.masks)
    h, w = a.size[0]
    # the flip comes before the resize, whose fixed point may round the other way
    difference = a.image[0, :h, :w][:, ::-1].astype(int) - b.image[0, :h, :w]
    assert np.abs(difference).max() <= 1
    np.testing.assert_allclose(b.truth.boxes[0, 0, 0], w - a.truth.boxes[0, 0, 2], atol=1e-4)


def test_every_image_is_seen_once_an_epoch(drawn):
    source = open_source(drawn, train=True)
    landscape = np.flatnonzero(source.sizes[:, 1] >= source.sizes[:, 0])
    seen = [
        index
        for batch, _ in batches_of(drawn, steps=44, batch=1)
        if batch.image.shape[1] < batch.image.shape[2]
        for index in batch.index.tolist()
    ]
    for start in range(0, len(seen) - len(landscape) + 1, len(landscape)):
        assert sorted(seen[start : start + len(landscape)]) == landscape.tolist()
    assert len(seen) >= 2 * len(landscape)


@pytest.mark.parametrize(("workers", "threads"), [(2, 1), (0, 4)])
def test_batches_do_not_depend_on_workers_and_threads(drawn, workers, threads):
    wanted = list(batches_of(drawn))
    drawn.workers, drawn.threads = workers, threads
    pipeline = batches_of(drawn)
    found = list(pipeline)
    pipeline.close()
    assert len(found) == len(wanted) == 8
    for (a, dropped_a), (b, dropped_b) in zip(wanted, found, strict=True):
        assert equal(a, b)
        assert dropped_a == dropped_b


def test_ctrl_c_reaches_the_workers_too_and_ends_none_of_them(drawn):
    wanted = list(batches_of(drawn, steps=40))
    before = set(multiprocessing.active_children())
    drawn.workers, drawn.prefetch = 2, 2
    pipeline = batches_of(drawn, steps=40)
    found = [next(pipeline) for _ in range(2)]  # one of each
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    found += list(pipeline)
    pipeline.close()
    assert len(found) == 40
    assert all(equal(a, b) for (a, _), (b, _) in zip(wanted, found, strict=True))


def test_the_slices_of_two_processes_make_the_global_batch(drawn):
    whole = batches_of(drawn)
    parts = [batches_of(drawn, process_index=p, process_count=2) for p in range(2)]
    for (batch, _), (a, _), (b, _) in zip(whole, *parts, strict=True):
        assert equal(batch, jax.tree.map(lambda x, y: np.concatenate([x, y]), a, b))


def test_a_batch_that_processes_cannot_share_is_a_sentence(drawn):
    with pytest.raises(UserError, match=r"train\.batch=4 cannot be split evenly over 3 processes"):
        batches_of(drawn, process_count=3)


def test_a_restored_state_gives_the_same_continuation(drawn):
    pipeline = batches_of(drawn)
    for _ in range(3):
        next(pipeline)
    state = json.loads(json.dumps(pipeline.get_state()))
    wanted = [next(pipeline) for _ in range(3)]
    pipeline.set_state(state)  # back
    again = batches_of(drawn)
    again.set_state(state)  # in a new run
    for batch, _ in wanted:
        assert equal(next(pipeline)[0], batch)
        assert equal(next(again)[0], batch)
    assert again.get_state() == {"step": 6}


def test_the_seed_changes_order_and_augmentation(drawn):
    first, second = batches_of(drawn, seed=1), batches_of(drawn, seed=2)
    assert not all(
        np.array_equal(a.index, b.index) for (a, _), (b, _) in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_sees_every_image_exactly_once(drawn, processes):
    source = open_source(drawn, train=False)
    seen = []
    for p in range(processes):
        batches = eval_batches(source, drawn, batch=4, process_index=p, process_count=processes)
        assert len(batches) == len(list(batches)) == 3  # 7 landscape in 2, 3 portrait in 1
        for batch in batches:
            assert batch.image.shape[0] == 4 // processes
            assert not batch.image[~batch.valid].any()
            assert batch.truth.boxes.shape == (4 // processes, 0, 4)
            assert batch.truth.masks is None
            seen += batch.index[batch.valid].tolist()
            np.testing.assert_array_equal(
                batch.original[batch.valid], source.sizes[batch.index[batch.valid]]
            )
    assert sorted(seen) == list(range(10))


def test_pictures_in_memory_become_the_same_evaluation_batch(drawn):
    source = open_source(drawn, train=False)
    for batch in eval_batches(source, drawn, batch=4):
        images = [source.example(i).image for i in batch.index[batch.valid].tolist()]
        ours = image_batch(images, drawn, rows=4)
        np.testing.assert_array_equal(ours.image, batch.image)
        np.testing.assert_array_equal(ours.size, batch.size)
        np.testing.assert_array_equal(ours.valid, batch.valid)
    with pytest.raises(ValueError, match="one bucket"):
        image_batch([np.zeros((30, 60, 3), np.uint8), np.zeros((60, 30, 3), np.uint8)], drawn)


def test_evaluation_takes_one_short_side(drawn):
    drawn.eval.short_sides = (64, 72)
    with pytest.raises(UserError, match="exactly one"):
        eval_batches(open_source(drawn, train=False), drawn, batch=1)


def test_box_only_batches_have_no_masks(drawn):
    source = open_source(drawn, train=True)
    batch, _ = next(train_batches(source, drawn, seed=0, batch=2, steps=1, masks=False))
    assert batch.truth.masks is None
    assert not frame_of(drawn, drawn.train, train=True, masks=False).masks


@pytest.mark.data
@pytest.mark.parametrize("shared_from", [0, table.SHARED])
def test_a_coco_source_survives_pickling(tiny, monkeypatch, shared_from):
    monkeypatch.setattr(table, "SHARED", shared_from)
    config = tiny(6)
    source = open_source(config, train=True)
    copy = pickle.loads(pickle.dumps(source))
    assert isinstance(copy.table.points, np.memmap) == (shared_from == 0)
    assert copy.ground_truth() == source.ground_truth()
    np.testing.assert_array_equal(copy.example(2).image, source.example(2).image)


@pytest.mark.data
def test_the_ground_truth_is_the_file(tiny):
    """Every field that pycocotools reads, to the last digit, crowds included."""
    config = tiny()
    truth = open_source(config, train=False).ground_truth()
    with open(config.eval.annotations) as file:
        content = json.load(file)
    keys = ("id", "image_id", "category_id", "iscrowd", "area", "bbox", "segmentation")
    wanted = {a["id"]: {key: a[key] for key in keys} for a in content["annotations"]}
    assert {a["id"]: a for a in truth["annotations"]} == wanted
    assert [i["id"] for i in truth["images"]] == sorted(i["id"] for i in content["images"])
    names = {c["id"]: c["name"] for c in content["categories"]}
    assert {c["id"]: c["name"] for c in truth["categories"]} == names
