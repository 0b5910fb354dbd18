"""A checkpoint gives back every bit, and nothing that was not finished."""

import dataclasses
import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from sephjax.checkpoint import Checkpoints, DamagedError
from sephjax.errors import RunError, UserError
from sephjax.train import sharding
from sephjax.types import TrainState, Weights

TX = optax.chain(
    optax.add_decayed_weights(1e-4, {"a": {"w": True}, "b": False}),
    optax.trace(0.9),
    optax.scale_by_learning_rate(lambda step: 0.1),
)


def make_state(seed: int, frozen=True, typed=True) -> TrainState:
    params = {"a": {"w": jax.random.normal(jax.random.key(seed), (64, 8))}, "b": jnp.ones(3)}
    state = TrainState(
        step=jnp.int32(seed),
        params=params,
        frozen={"mean": jnp.full(4, seed, jnp.float32)} if frozen else {},
        opt_state=TX.init(params),
        key=jax.random.key(seed) if typed else jax.random.PRNGKey(seed),
    )
    return jax.device_put(state, sharding.replicated(sharding.make_mesh()))


def abstract(**kinds) -> TrainState:
    return sharding.abstract_on(
        sharding.make_mesh(), jax.eval_shape(lambda: make_state_shapes(**kinds))
    )


def make_state_shapes(frozen=True, typed=True) -> TrainState:
    params = {"a": {"w": jnp.zeros((64, 8))}, "b": jnp.ones(3)}
    key = jax.random.key(0) if typed else jax.random.PRNGKey(0)
    fixed = {"mean": jnp.zeros(4)} if frozen else {}
    return TrainState(jnp.int32(0), params, fixed, TX.init(params), key)


def bits(state: TrainState) -> list[bytes]:
    raw = jax.tree.map(
        lambda x: (
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ),
        state,
    )
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(raw)]


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_state_comes_back_bit_for_bit(tmp_path, frozen, typed):
    state = make_state(3, frozen, typed)
    first = Checkpoints(tmp_path / "c", keep=2)
    first.save(3, state, {"next": [1, 2], "seen": 7})
    first.close()
    second = Checkpoints(tmp_path / "c", keep=2)
    got, inputs = second.restore(3, abstract(frozen=frozen, typed=typed))
    second.close()
    assert jax.tree.structure(got) == jax.tree.structure(state)
    assert got.key.dtype == state.key.dtype
    assert bits(got) == bits(state)
    assert inputs == {"next": [1, 2], "seen": 7}


def test_a_state_may_be_donated_while_it_is_being_saved(tmp_path):
    state = make_state(3)
    expected = bits(state)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, state, {})
    spoil = jax.jit(
        lambda s: jax.tree.map(lambda x: x * 0 - 1, (s.params, s.opt_state)), donate_argnums=0
    )
    jax.block_until_ready(spoil(state))
    checkpoints.wait()
    assert bits(checkpoints.restore(3, abstract())[0]) == expected
    checkpoints.close()


def test_the_newest_ones_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), {}, wait=True)
    assert checkpoints.steps() == [2, 3]
    assert Checkpoints(tmp_path).latest() == 3
    checkpoints.close()


def test_an_unfinished_checkpoint_is_ignored(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=5)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), {}, wait=True)
    checkpoints.close()
    (tmp_path / "3").rename(tmp_path / "3.orbax-checkpoint-tmp-1")
    shutil.rmtree(tmp_path / "2" / "optimizer")
    checkpoints = Checkpoints(tmp_path, keep=5)
    assert checkpoints.latest(whole=True) == 1
    assert int(checkpoints.restore(1, abstract())[0].step) == 1
    checkpoints.close()


def test_a_reader_leaves_what_a_run_is_saving(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=5)
    checkpoints.save(1, make_state(1), {}, wait=True)
    checkpoints.close()
    under_way = tmp_path / "2.orbax-checkpoint-tmp"
    under_way.mkdir()
    reader, want = Checkpoints(tmp_path, read_only=True), abstract()
    reader.restore_weights(1, want.params, want.frozen)
    reader.read_weights(1)
    reader.close()
    assert under_way.is_dir()


def test_half_a_newer_checkpoint_does_not_keep_a_run_from_saving(tmp_path):
    """Orbax saves nothing, and says nothing, at a step that is not above all folders'."""
    for _ in range(2):
        (tmp_path / "9" / "params").mkdir(parents=True)
        checkpoints = Checkpoints(tmp_path, keep=5)
        step = 1 + (checkpoints.latest() or 0)
        checkpoints.save(step, make_state(step), {}, wait=True)
        assert checkpoints.latest(whole=True) == step
        checkpoints.close()
    assert {p.name for p in tmp_path.iterdir()} >= {"1", "2", "9.damaged", "9.damaged2"}


def test_a_step_below_a_finished_one_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=5)
    checkpoints.save(3, make_state(3), {}, wait=True)
    with pytest.raises(RunError, match=r"step 2 was not saved: .* holds a newer one \(3\)"):
        checkpoints.save(2, make_state(2), {}, wait=True)
    checkpoints.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of tensorstore
def test_a_truncated_file_is_reported_and_can_be_set_aside(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=5)
    checkpoints.save(1, make_state(1), {}, wait=True)
    for file in (tmp_path / "1" / "params").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(DamagedError, match="cannot be read"):
        checkpoints.restore(1, abstract())
    checkpoints.set_aside(1)
    assert checkpoints.latest() is None
    checkpoints.save(1, make_state(1), {}, wait=True)
    assert checkpoints.latest() == 1
    checkpoints.close()


def test_weights_are_read_without_the_optimizer(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    state = make_state(4)
    checkpoints.save(4, state, {}, wait=True)
    shutil.rmtree(tmp_path / "4" / "optimizer")
    want = abstract()
    params, frozen = checkpoints.restore_weights(4, want.params, want.frozen)
    np.testing.assert_array_equal(params["a"]["w"], state.params["a"]["w"])
    np.testing.assert_array_equal(frozen["mean"], state.frozen["mean"])
    checkpoints.close()


def test_weights_alone_can_be_evaluated_but_not_resumed(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = make_state(0)
    checkpoints.save_weights(0, state.params, state.frozen)
    assert checkpoints.latest() == 0
    assert checkpoints.latest(whole=True) is None
    want = abstract()
    params, _ = checkpoints.restore_weights(0, want.params, want.frozen)
    np.testing.assert_array_equal(params["b"], np.ones(3))
    checkpoints.close()


def averaged(seed: int) -> TrainState:
    state = make_state(seed)
    smooth = jax.tree.map(lambda x: x - 0.25, Weights(state.params, state.frozen))
    return dataclasses.replace(state, averages=smooth)


def abstract_averaged() -> TrainState:
    return sharding.abstract_on(sharding.make_mesh(), jax.eval_shape(lambda: averaged(0)))


def test_averages_come_back_bit_for_bit_and_are_what_is_read(tmp_path):
    state = averaged(3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, {}, wait=True)
    got, _ = checkpoints.restore(3, abstract_averaged())
    assert jax.tree.structure(got) == jax.tree.structure(state)
    assert bits(got) == bits(state)
    want = abstract()
    smooth = checkpoints.restore_weights(3, want.params, want.frozen, averages=True)
    plain = checkpoints.restore_weights(3, want.params, want.frozen)
    for (params, frozen), shift in ((smooth, 0.25), (plain, 0.0)):
        np.testing.assert_array_equal(params["b"], np.ones(3) - shift)
        np.testing.assert_array_equal(frozen["mean"], np.full(4, 3 - shift))
    np.testing.assert_array_equal(checkpoints.read_weights(3)["b"], np.full(3, 0.75))
    checkpoints.close()


def test_a_state_without_averages_saves_no_item_more(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {}, wait=True)
    items = {path.name for path in (tmp_path / "1").iterdir() if path.is_dir()}
    assert items == {"params", "frozen", "optimizer", "input"}
    want = abstract()
    with pytest.raises(UserError, match=r"no averaged weights; .* --config\.train\.ema=0\."):
        checkpoints.restore_weights(1, want.params, want.frozen, averages=True)
    checkpoints.close()


def test_averages_that_were_not_saved_begin_at_the_weights_and_unwanted_ones_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {}, wait=True)
    checkpoints.save(2, averaged(2), {}, wait=True)
    assert [checkpoints.has_averages(step) for step in (1, 2)] == [False, True]
    got, _ = checkpoints.restore(1, abstract_averaged())
    assert bits(got.averages) == bits(Weights(got.params, got.frozen))
    assert bits(dataclasses.replace(got, averages=None)) == bits(make_state(1))
    buffers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(got.averages)}
    assert not buffers & {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(got.params)}
    got, _ = checkpoints.restore(2, abstract())
    assert got.averages is None
    assert bits(got) == bits(make_state(2))
    checkpoints.close()


def test_of_converted_weights_there_are_only_the_ones(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    state = make_state(0)
    checkpoints.save_weights(0, state.params, state.frozen)
    want = abstract()
    params, _ = checkpoints.restore_weights(0, want.params, want.frozen, averages=True)
    np.testing.assert_array_equal(params["b"], np.ones(3))
    checkpoints.close()


def test_an_empty_folder_has_no_checkpoint_and_says_so(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none", keep=1)
    assert checkpoints.latest() is None
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="it holds none"):
        checkpoints.restore(7, abstract())


def test_a_checkpoint_of_another_model_names_the_parameters(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, make_state(1), {}, wait=True)
    want = abstract()
    other = {"a": {"w": jax.ShapeDtypeStruct((64, 9), jnp.float32)}, "b": want.params["b"]}
    with pytest.raises(UserError, match=r"a/w \(\(64, 8\) in the file, \(64, 9\) here\)"):
        checkpoints.restore_weights(1, other, want.frozen)
    checkpoints.close()


def test_the_input_state_is_json_by_process(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, make_state(1), {"at": 5}, wait=True)
    checkpoints.close()
    stored = [json.loads(file.read_text()) for file in (tmp_path / "1" / "input").glob("metadata")]
    assert stored == [{"processes": [{"at": 5}]}]


SYSTEM = [OSError(errno.ESTALE, "Stale file handle"), ValueError("UNAVAILABLE: no answer")]


@pytest.mark.parametrize("error", SYSTEM)
def test_what_the_system_refuses_to_read_is_not_damaged(tmp_path, error, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, make_state(1), {}, wait=True)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "restore", raising(error))
        with pytest.raises(RunError, match=r"cannot be read now .*; mend that") as caught:
            checkpoints.restore(1, abstract())
    assert not isinstance(caught.value, DamagedError)
    checkpoints.restore(1, abstract())
    checkpoints.close()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("OUT_OF_RANGE: x")])
def test_a_save_that_fails_is_one_sentence_and_earlier_ones_stay(tmp_path, error, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=5)
    checkpoints.save(1, make_state(1), {}, wait=True)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", raising(error))
        with pytest.raises(RunError, match=r"cannot be written .*earlier checkpoints are whole"):
            checkpoints.save(2, make_state(2), {}, wait=True)
    assert checkpoints.latest(whole=True) == 1
    checkpoints.close()


def raising(error):
    def never(*_, **__):
        raise error

    return never
