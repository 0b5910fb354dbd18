"""Stitch, jitter and copy-paste in the pipeline: they act, and depend on the step alone."""

import json

import jax
import numpy as np
import pytest

from sephjax import check
from sephjax.errors import UserError
from sephjax.input import views
from sephjax.input.batches import TrainBatches
from sephjax.input.example import UnreadableImage
from sephjax.input.pipeline import train_batches
from sephjax.input.sources import open_source
from tests.input.test_pipeline import equal
from tests.tiny import tiny_config

# pycocotools converts its results in a way that NumPy 2 frowns upon.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

JITTER = {"low": 0.5, "high": 2.0, "crop": 64}
KINDS = {
    "stitch": {"stitch": 0.5},
    "jitter": {"jitter": JITTER},
    "copy_paste": {"copy_paste": 0.6},
    "all": {"stitch": 0.5, "jitter": JITTER, "copy_paste": 0.6},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def drawn(data):
    data.source = "shapes"
    data.shapes.train_images = 11
    return data


def batches_of(data, kind=None, *, steps=6, batch=4, masks=True, **keywords):
    for key, value in KINDS.get(kind, {}).items():
        data[key] = value
    source = open_source(data, train=True)
    return train_batches(source, data, seed=3, batch=batch, steps=steps, masks=masks, **keywords)


@every_kind
def test_the_batches_differ_from_those_without_it(drawn, kind):
    plain = [batch for batch, _ in batches_of(drawn)]
    found = [batch for batch, _ in batches_of(drawn, kind)]
    changed = [not equal(a, b) for a, b in zip(plain, found, strict=True)]
    assert all(changed) if "jitter" in KINDS[kind] else sum(changed) >= 2


@every_kind
@pytest.mark.parametrize(("workers", "threads"), [(2, 1), (0, 4)])
def test_batches_do_not_depend_on_workers_and_threads(drawn, kind, workers, threads):
    wanted = list(batches_of(drawn, kind))
    drawn.workers, drawn.threads = workers, threads
    pipeline = batches_of(drawn, kind)
    found = list(pipeline)
    pipeline.close()
    for (a, dropped_a), (b, dropped_b) in zip(wanted, found, strict=True):
        assert equal(a, b)
        assert dropped_a == dropped_b


@every_kind
@pytest.mark.parametrize("group", [1, 2])
def test_the_slices_of_processes_make_the_global_batch(drawn, kind, group):
    """Also where a pair to stitch lies on both sides of a border."""
    whole = list(batches_of(drawn, kind, group=group))
    for count in (2, 4):
        parts = [
            batches_of(drawn, kind, group=group, process_index=p, process_count=count)
            for p in range(count)
        ]
        for (batch, dropped), *slices in zip(whole, *parts, strict=True):
            joined = jax.tree.map(lambda *x: np.concatenate(x), *(part for part, _ in slices))
            assert equal(batch, joined)
            total = sum(sum(lost.values()) for _, lost in slices)
            assert total == sum(dropped.values())


@every_kind
def test_a_restored_state_gives_the_same_continuation(drawn, kind):
    pipeline = batches_of(drawn, kind)
    for _ in range(3):
        next(pipeline)
    state = json.loads(json.dumps(pipeline.get_state()))
    wanted = [next(pipeline) for _ in range(3)]
    again = batches_of(drawn, kind)
    again.set_state(state)
    assert all(equal(next(again)[0], batch) for batch, _ in wanted)


@every_kind
def test_batches_keep_their_promises(drawn, kind):
    drawn.max_objects = 5
    for batch, _ in batches_of(drawn, kind, steps=8):
        truth, (h, w) = batch.truth, batch.image.shape[1:3]
        assert (batch.size <= [h, w]).all()
        low, high = truth.boxes[..., :2], truth.boxes[..., 2:]
        assert (low[truth.valid] >= -1e-3).all()
        assert (high <= batch.size[:, None, ::-1] + 1e-3).all()
        assert (high[truth.valid] > low[truth.valid]).all()
        assert truth.masks[truth.valid].any(axis=(1, 2)).all()
        assert not truth.boxes[~truth.valid].any()
        assert not truth.masks[~truth.valid].any()
        for image, (height, width) in zip(batch.image, batch.size.tolist(), strict=True):
            assert not image[height:].any()
            assert not image[:, width:].any()


def test_masks_lie_on_the_pixels_of_their_objects(drawn):
    """Drawn shapes have one hue, so what a mask covers varies less than its surroundings.

    Oracle: the spread of hue-like ratios inside each mask against that of its box.
    """
    drawn.shapes.max_objects = 2
    inside, around = [], []
    for batch, _ in batches_of(drawn, "all", steps=12):
        for row, image in enumerate(batch.image.astype(np.float64)):
            for box, mask in zip(
                batch.truth.boxes[row][batch.truth.valid[row]],
                batch.truth.masks[row][batch.truth.valid[row]],
                strict=True,
            ):
                x1, y1, x2, y2 = box
                if min(x2 - x1, y2 - y1) < 16 or not 0.3 < mask.mean() < 0.9:
                    continue
                cells = (np.arange(112) + 0.5) / 112
                y = np.minimum((y1 + cells * (y2 - y1)).astype(int), image.shape[0] - 1)
                x = np.minimum((x1 + cells * (x2 - x1)).astype(int), image.shape[1] - 1)
                colours = image[y][:, x]
                hue = colours / np.maximum(colours.sum(axis=-1, keepdims=True), 1)
                inside.append(hue[mask > 0].std(axis=0).mean())
                around.append(hue.reshape(-1, 3).std(axis=0).mean())
    assert len(inside) > 30
    assert np.mean(inside) < 0.6 * np.mean(around)


def test_a_group_has_one_composite_at_most_and_as_often_as_asked(drawn):
    """Composites differ from the plain batch; 60 steps of two groups at one half."""
    drawn.shapes.train_images, drawn.flip = 40, 0.0
    plain = batches_of(drawn, steps=60, masks=False)
    drawn.stitch = 0.5
    stitched = batches_of(drawn, steps=60, masks=False, group=2)
    count = 0
    for (a, _), (b, _) in zip(plain, stitched, strict=True):
        changed = [not np.array_equal(x, y) for x, y in zip(a.image, b.image, strict=True)]
        assert sum(changed[:2]) <= 1
        assert sum(changed[2:]) <= 1
        count += sum(changed)
    assert abs(count - 60) < 17  # standard deviation 5.5


def test_jitter_has_one_canvas_and_sees_every_picture_once_an_epoch(drawn):
    pipeline = batches_of(drawn, "jitter", steps=22, batch=1)
    assert list(pipeline.buckets) == [(64, 64)]
    seen = [int(batch.index[0]) for batch, _ in pipeline]
    assert sorted(seen[:11]) == sorted(seen[11:]) == list(range(11))


def test_what_is_lost_is_counted(drawn):
    """Cut away, covered and over the cap: the objects of all sources are accounted for."""
    drawn.shapes.max_objects, drawn.max_objects = 4, 3
    drawn.jitter = {"low": 1.5, "high": 3.0, "crop": 64}
    source = open_source(drawn, train=True)
    total = {"objects_cut_away": 0}
    for batch, dropped in batches_of(drawn, steps=12):
        there = sum(len(source.example(i).boxes) for i in batch.index.tolist())
        kept = int(batch.truth.valid.sum())
        assert there == kept + sum(dropped.values())
        total["objects_cut_away"] += dropped.get("objects_cut_away", 0)
    assert total["objects_cut_away"] > 5


def test_pictures_that_are_covered_lose_objects_and_say_so(coco, data):
    coco.image(1)
    coco.object(1, (10.0, 8.0, 6.0, 6.0))
    coco.image(2)
    coco.object(2, (0.0, 0.0, 60.0, 40.0), category_id=3)
    paths = coco.write()
    data.train.annotations, data.train.images = paths
    data.update({"source": "coco", "copy_paste": 1.0, "flip": 0.0})
    ((batch, dropped),) = batches_of(data, steps=1, batch=2)
    # Picture 1 goes under the whole of picture 2, which gets the small object on top.
    assert dropped == {"objects_covered": 1}
    first, second = np.argsort(batch.index)
    assert batch.truth.valid.sum(axis=1)[[first, second]].tolist() == [1, 2]
    assert batch.truth.labels[first, 0] == 0
    assert batch.truth.labels[second, :2].tolist() == [0, 1]


def test_a_partner_that_cannot_be_read_is_told_and_leaves_the_picture(drawn, monkeypatch):
    source = open_source(drawn, train=True)
    plain = [batch for batch, _ in batches_of(drawn, steps=2, batch=2)]
    read = type(source).example
    first = {int(i) for batch in plain for i in batch.index}

    def broken(self, i):
        if i not in first:
            raise UnreadableImage("it is broken")
        return read(self, i)

    drawn.copy_paste = 1.0
    monkeypatch.setattr(type(source), "example", broken)
    told = 0
    for batch, dropped in batches_of(drawn, steps=2, batch=2):
        before = plain.pop(0)
        same = [np.array_equal(a, b) for a, b in zip(batch.image, before.image, strict=True)]
        assert sum(same) == dropped.get("unreadable_images", 0)
        told += sum(same)
    assert told >= 1


def test_the_ordinary_path_makes_no_masks_of_pixels(drawn, monkeypatch):
    def never(*_):
        raise AssertionError("full-size masks are for cuts and pastes")

    monkeypatch.setattr(views, "pixels", never)
    assert len(list(batches_of(drawn))) == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__jitter__crop": 50}, r"data\.jitter\.crop=50 is no multiple .*size_multiple=32"),
        ({"data__jitter__high": 2.0}, r"do nothing while data\.jitter\.crop is 0"),
        ({"data__jitter__low": 3.0, "data__jitter__crop": 64}, "are no range of scales"),
        ({"data__stitch": 1.5}, r"data\.stitch is 1\.5; it must be from 0 to 1"),
        ({"data__copy_paste": -0.1}, r"data\.copy_paste is -0\.1; it must be from 0 to 1"),
        (
            {"data__stitch": 0.2, "train__batch": 1},
            r"needs two images a step and train\.batch is 1",
        ),
        ({"train__ema": 1.0}, r"train\.ema is 1\.0; it is a decay"),
    ],
)
def test_a_value_that_does_not_do_is_a_sentence(changes, said):
    with pytest.raises(UserError, match=said):
        check.check(tiny_config(**changes))


def test_copy_paste_needs_masks_and_a_second_picture(coco, data):
    coco.image(1)
    coco.object(1)
    data.train.annotations, data.train.images = coco.write()
    data.update({"source": "coco", "copy_paste": 0.5})
    with pytest.raises(UserError, match="needs a second picture"):
        batches_of(data, batch=1)
    coco.image(2)
    coco.object(2, segmentation=[])
    coco.write()
    with pytest.raises(UserError, match=r"which data\.copy_paste cannot cut out"):
        batches_of(data, batch=1)


@pytest.mark.data
@every_kind
def test_real_pictures_go_through(tiny, kind):
    config = tiny(24)
    before = batches_of(config, steps=4)
    sizes = {batch.image.shape[1:3] for batch, _ in before}
    for batch, _ in batches_of(config, kind, steps=4):
        assert batch.truth.valid.any()
        assert batch.image.shape[1:3] in ({(64, 64)} if "jitter" in KINDS[kind] else sizes)


def test_the_batch_of_a_step_is_a_function_of_the_step(drawn):
    pipeline = batches_of(drawn, "all")
    make = pipeline._make
    assert isinstance(make, TrainBatches)
    forwards = [make(step).arrays for step in range(4)]
    backwards = [make(step).arrays for step in reversed(range(4))][::-1]
    assert all(equal(a, b) for a, b in zip(forwards, backwards, strict=True))
