"""The order of training: every picture once an epoch, buckets in proportion, O(1) in the step."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sephjax.errors import UserError
from sephjax.input.buckets import assign, canvases, group
from sephjax.input.schedule import Schedule, augmentation


def schedule(*sizes, seed=0, batch=3):
    ends = np.cumsum([0, *sizes])
    members = [np.arange(a, b) for a, b in itertools.pairwise(ends)]
    return Schedule(seed, batch, tuple(members))


@given(
    sizes=st.tuples(*[st.integers(1, 50)] * 4), seed=st.integers(0, 9), step=st.integers(0, 5_000)
)
def test_one_bucket_grows_a_step_and_shares_follow_the_sizes(sizes, seed, step):
    order = schedule(*sizes, seed=seed)
    before, after = np.asarray(order.counts(step)), np.asarray(order.counts(step + 1))
    assert sorted(after - before) == [0, 0, 0, 1]
    assert before.sum() == step
    share = step * np.asarray(sizes) / sum(sizes)
    assert np.abs(before - share).max() < len(sizes)


def test_a_bucket_count_is_the_number_of_earlier_steps_of_it():
    order = schedule(7, 3, 2, seed=4)
    seen = collections.Counter()
    for step in range(100):
        bucket, count = order.bucket(step)
        assert count == seen[bucket]
        seen[bucket] += 1


def test_every_picture_is_seen_once_in_each_epoch_of_its_bucket():
    order = schedule(10, 7, seed=1)
    for bucket, members in enumerate(order.members):
        size = len(members)
        epochs = [[order.item(bucket, e * size + j) for j in range(size)] for e in range(4)]
        for number, epoch in enumerate(epochs):
            assert sorted(item.picture for item in epoch) == members.tolist()
            assert {item.epoch for item in epoch} == {number}
        assert len({tuple(item.picture for item in epoch) for epoch in epochs}) > 1


def test_order_depends_on_the_seed_and_on_nothing_remembered():
    forward, backward = schedule(30, seed=5), schedule(30, seed=5)
    wanted = [forward.item(0, place) for place in range(1_000)]
    assert [backward.item(0, place) for place in reversed(range(1_000))][::-1] == wanted
    other = schedule(30, seed=6)
    assert [other.item(0, place) for place in range(30)] != wanted[:30]
    assert augmentation(5, wanted[3]).random() == augmentation(5, wanted[3]).random()
    assert augmentation(5, wanted[3]).random() != augmentation(5, wanted[33]).random()


def test_canvases_are_landscape_and_portrait_and_multiples():
    assert canvases((640, 800), 1333, (1.5,), 32) == [
        (800, 1216),
        (1216, 800),
        (800, 1344),
        (1344, 800),
    ]
    assert canvases((64,), 64, (), 32) == [(64, 64)]
    with pytest.raises(UserError, match="long_side=600 is below short_sides"):
        canvases((800,), 600, (), 32)


def test_a_picture_goes_to_the_smallest_canvas_that_always_holds_it():
    choices = canvases((640, 800), 1333, (1.5,), 32)
    sizes = np.asarray([(480, 640), (640, 480), (427, 640), (360, 640), (640, 360), (500, 500)])
    where = assign(sizes, choices, (640, 800), 1333, "keep_aspect")
    assert [choices[k] for k in where] == [
        (800, 1216),
        (1216, 800),
        (800, 1216),
        (800, 1344),
        (1344, 800),
        (800, 1216),
    ]
    used, members = group(where, choices)
    assert used == choices
    assert [m.tolist() for m in members] == [[0, 2, 5], [1], [3], [4]]


@given(
    h=st.integers(1, 3000), w=st.integers(1, 3000), mode=st.sampled_from(["series", "keep_aspect"])
)
def test_every_picture_has_a_canvas(h, w, mode):
    choices = canvases((512, 576, 640), 800, (1.0, 1.3), 32)
    assert assign(np.asarray([[h, w]]), choices, (512, 576, 640), 800, mode).shape == (1,)
