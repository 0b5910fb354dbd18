"""`train.accumulate`: micro-batches give the step of the whole batch, in the memory of one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from sephjax import modes
from sephjax.errors import UserError
from sephjax.nets.backbone import resnet
from sephjax.nets.functional import flat_paths
from sephjax.train import sharding, step, workdir
from sephjax.types import BoxOutputs, Rois, RpnOutputs, RpnTargets, TrainOutputs
from tests import narrow
from tests.parity import double
from tests.tiny import printed
from tests.train import devices

ONE = Mesh(np.asarray(jax.devices()[:1]), ("data",))
ANCHORS, ROIS = 5, 4


class Counting:
    """A model whose outputs are the images' indices, and whose frozen values count its calls."""

    def apply_and_update(self, params, frozen, batch, keys, targets=None, *, method):
        assert method == "training"
        index = batch.index.astype(jnp.float32)
        if targets is None:
            targets = RpnTargets(*[rows(index, ANCHORS)] * 3)
        rois = Rois(*[rows(index, ROIS)] * 7)
        boxes = BoxOutputs(jax.random.key_data(keys), rows(index, ROIS))
        rpn = RpnOutputs(rows(index, ANCHORS), rows(index, ANCHORS))
        anchors, mask_sum = jnp.ones((ANCHORS, 4)) * params["w"], jnp.sum(index**2)
        outputs = TrainOutputs(anchors, rpn, targets, rois, boxes, mask_sum, ((rois, boxes),))
        norm = frozen["norm"]
        return outputs, {"norm": {"mean": 10 * norm["mean"] + index[0], "eps": norm["eps"]}}

    def apply(self, params, frozen, batch, keys, *, method):
        del params, frozen, keys
        assert method == "rpn_targets"
        return RpnTargets(*[rows(100 + batch.index.astype(jnp.float32), ANCHORS)] * 3)


def rows(index, count):
    return jnp.repeat(index[:, None], count, axis=1)


def counted(group, count):
    frozen = {"norm": {"mean": jnp.float32(0), "eps": jnp.float32(0.1)}}
    images = jax.tree.map(jnp.asarray, narrow.batch(devices.SIZES, devices.COUNTS))
    keys = jax.random.split(jax.random.key(0), 8)
    run = step.micro_batches(Counting(), group, count)
    return frozen, keys, *run({"w": jnp.float32(2)}, frozen, images, keys)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_outputs_have_the_images_in_their_order(count):
    _, keys, outputs, _ = counted(1, count)
    index = np.arange(8)
    for leaf in (outputs.rpn.logits, outputs.rpn_targets.positive, outputs.rois.iou):
        np.testing.assert_array_equal(leaf[:, 0], index)
    np.testing.assert_array_equal(outputs.later[0][0].labels[:, 0], index)
    np.testing.assert_array_equal(outputs.boxes.logits, jax.random.key_data(keys))
    np.testing.assert_array_equal(outputs.anchors, np.full((ANCHORS, 4), 2.0))
    assert outputs.mask_sum == 140  # 0 + 1 + 4 + 9 + 16 + 25 + 36 + 49


def test_frozen_values_move_part_by_part_and_the_others_stay_themselves():
    before, _, _, after = counted(1, 4)
    assert after["norm"]["mean"] == 246  # images 0, 2, 4 and 6 come first in their parts
    # The same array: several devices would take its mean, which rounds.
    assert after["norm"]["eps"] is before["norm"]["eps"]


@pytest.mark.parametrize(("group", "outside"), [(1, 0), (2, 0), (4, 100), (8, 100), (3, 100)])
def test_targets_of_a_group_in_several_parts_are_made_before(group, outside):
    _, _, outputs, _ = counted(group, 4)
    np.testing.assert_array_equal(outputs.rpn_targets.positive[:, 0], np.arange(8) + outside)


def one_step(**changes):
    """One step in float64 of eight pictures: the state before and after, scalars, memory.

    The memory is what the compiled step needs beside its arguments and results, in bytes.
    """
    with double.everywhere(wanted=True):
        images = narrow.batch(devices.SIZES, devices.COUNTS)
        state, images, train_step, _ = devices.compile_step(ONE, images, **changes)
        after, scalars = train_step(state, images)
        values = lambda s: jax.device_get((s.params, s.opt_state, s.frozen))
        size = train_step.memory_analysis().temp_size_in_bytes
        return values(state), values(after), jax.tree.map(float, scalars), size


@pytest.mark.parametrize(("group", "count"), [({}, 2), ({"rpn.sample_group": 4}, 4)])
def test_the_step_is_that_of_the_whole_batch_in_less_memory(group, count):
    """Groups of 4 images lie in two parts each; in parts of 4 they would be as without groups."""
    before, whole, scalars, size = one_step(**group)
    _, parts, found, less = one_step(**group, **{"train.accumulate": count})
    assert scalars["positive_rois"] > 8
    # The same numbers, summed in another order: in float64 they agree to 1e-12 and better.
    for name, value in scalars.items():
        assert found[name] == pytest.approx(value, rel=1e-10), name
    # The momentum of a first step is each parameter's gradient, clipped, with its decay.
    for old, one, other in zip(*map(jax.tree.leaves, (before, whole, parts)), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-9 * np.abs(one).max())
        assert not np.array_equal(old, one) or not np.any(old)
    # A part of 1/2 or 1/4 of the images, and what does not depend on their number.
    assert less < (1 / count + 0.15) * size


def test_batch_norm_sees_one_part_after_the_other():
    """The stem's statistics by hand: of four pictures, then of the other four."""
    before, after, *_ = one_step(norm="bn", **{"train.accumulate": 2})
    kernel = before[0]["backbone"]["stem"]["conv"]["kernel"]
    images = narrow.batch(devices.SIZES, devices.COUNTS)
    mean = np.zeros(8)
    for start in (0, 4):
        cells = [
            stem_cells(images.image[i], images.size[i], kernel) for i in range(start, start + 4)
        ]
        mean = 0.9 * mean + 0.1 * np.concatenate(cells).mean(axis=0)
    np.testing.assert_allclose(after[2]["backbone"]["stem"]["norm"]["mean"], mean, rtol=1e-9)
    moves = {name: np.any(a != b) for name, a, b in paired(before[2], after[2])}
    assert len(moves) > 30
    assert all(moves.values())


def paired(before, after):
    return [
        (name, a, b)
        for (name, a), (_, b) in zip(flat_paths(before), flat_paths(after), strict=True)
    ]


def stem_cells(image, size, kernel):
    """What the stem's convolution gives for one picture without its padding, [cells, channels]."""
    height, width = size
    layout = resnet.LAYOUTS["torchvision"]
    pixels = (image[:height, :width] - np.array(layout.mean)) / np.array(layout.std)
    pixels = np.pad(pixels, ((3, 3), (3, 3), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (7, 7), axis=(0, 1))[::2, ::2]
    return np.einsum("hwcij,ijco->hwo", windows, kernel).reshape(-1, kernel.shape[-1])


@pytest.mark.multi
def test_two_devices_with_two_parts_each(tmp_path_factory):
    told = printed(tmp_path_factory, 2, "tests.train.parts")
    one, two = told["scalars"]
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-10), name
    assert told["parameters"] < 1e-9
    # Nothing is exchanged by a part: what two devices send they send once, and as much as without.
    whole, parts = (sorted(map(tuple, sent)) for sent in told["exchanged"])
    assert parts == whole


@pytest.mark.parametrize(
    ("devices_", "count", "told"),
    [
        (1, 3, "train.batch is 8, which 1 device with train.accumulate=3 .* multiple of 3"),
        (2, 8, "train.batch is 8, which 2 devices with train.accumulate=8 .* multiple of 16"),
    ],
)
def test_a_batch_that_does_not_fall_into_equal_parts_is_refused(devices_, count, told):
    class Some:
        size = devices_

    with pytest.raises(UserError, match=told):
        sharding.check_batch(8, Some(), "train.batch", count)
    sharding.check_batch(16, Some(), "train.batch", 8)


def test_the_config_reaches_the_step(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(step, "make_train_step", lambda *_, **options: seen.update(options))
    config = narrow.config(**{"data.source": "shapes", "train.accumulate": 2})
    modes.make_setup(config, tmp_path)
    assert seen["accumulate"] == 2


def test_a_run_goes_on_with_other_parts_and_from_before_there_were_any(tmp_path):
    config = narrow.config()
    workdir.claim(tmp_path, config)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2}\n')
    stored = json.loads((tmp_path / "config.json").read_text())
    for key in ("accumulate", "remat"):
        del stored["train"][key]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert workdir.claim(tmp_path, config) == []
    config = narrow.config(**{"train.accumulate": 4, "train.remat": "stage"})
    (note,) = workdir.claim(tmp_path, config)
    assert note.startswith("train.accumulate was 1 and is 4: other batches for batch norm")
