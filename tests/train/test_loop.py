"""The loop's promises, on a toy: exact resumption, counted compiles, and every way to stop."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from sephjax.checkpoint import Checkpoints
from sephjax.errors import RunError, UserError
from sephjax.train import loop, sharding, workdir
from sephjax.train.programs import Programs
from tests.train.toy import BUCKETS, IMAGES, toy_config, toy_setup

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(folder, steps=4, **kinds) -> int:
    return loop.train(toy_setup(folder, steps, **kinds), folder, tensorboard=False)


def last_state(folder, steps):
    checkpoints = Checkpoints(folder / "checkpoints")
    setup = toy_setup(folder, steps)
    step = checkpoints.latest(whole=True)
    state, place = checkpoints.restore(step, sharding.abstract_on(setup.mesh, setup.abstract))
    checkpoints.close()
    return state, place


def bits(state) -> list[bytes]:
    leaves = [*jax.tree.leaves((state.params, state.frozen, state.opt_state)), state.step]
    return [np.asarray(leaf).tobytes() for leaf in (*leaves, jax.random.key_data(state.key))]


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_falls_and_every_logged_step_has_its_row(tmp_path):
    assert run(tmp_path, 40) == 40
    got = rows(tmp_path)
    assert [row["step"] for row in got] == list(range(2, 41, 2))
    keys = {"step", "loss", "loss/toy", "lr", "grad_norm"}
    assert all(set(r) == keys | {"images_per_sec", "step_time", "data_wait_share"} for r in got)
    assert got[-1]["loss"] < 0.3 * got[0]["loss"]
    # the rate of step n is that at t = n - 1: warm-up 0.001 -> 1 over two steps, a tenth from t = 3
    np.testing.assert_allclose([r["lr"] for r in got[:2]], [0.1 * 0.5005, 0.01], rtol=1e-5)
    assert all(0 <= row["data_wait_share"] <= 1 and row["images_per_sec"] > 0 for row in got)


def test_two_and_two_steps_are_four_steps_bit_for_bit(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole, 4)
    run(parts, 2)
    run(parts, 4)
    (a, place_a), (b, place_b) = last_state(whole, 4), last_state(parts, 4)
    assert bits(a) == bits(b)
    assert place_a == place_b == {"at": 4}
    losses = [[(row["step"], row["loss"]) for row in rows(folder)] for folder in (whole, parts)]
    assert losses[0] == losses[1]


def test_a_run_killed_after_a_checkpoint_goes_on_exactly(tmp_path):
    def config():
        config = toy_config(6)
        config.checkpoint.every = 2
        return config

    def die(at):
        if at == 5:
            raise OSError("killed")

    run(tmp_path / "whole", config=config())
    with pytest.raises(OSError, match="killed"):
        run(tmp_path / "parts", config=config(), on_batch=die)
    assert Checkpoints(tmp_path / "parts" / "checkpoints").latest() == 4
    run(tmp_path / "parts", config=config())
    assert bits(last_state(tmp_path / "whole", 6)[0]) == bits(last_state(tmp_path / "parts", 6)[0])
    assert [row["step"] for row in rows(tmp_path / "parts")] == [2, 4, 6]


def test_a_finished_run_ends_at_once(tmp_path, capsys):
    run(tmp_path, 2)
    setup = toy_setup(tmp_path, 2)

    def never(*_):
        raise AssertionError("it should have ended")

    for name in ("init", "train_step", "evaluate"):
        object.__setattr__(setup, name, never)
    capsys.readouterr()
    assert loop.train(setup, tmp_path) == 2
    assert "nothing to do" in capsys.readouterr().out


def test_there_is_one_compilation_a_canvas(tmp_path):
    # Counted twice: by the trainer, and by how often JAX traces the step.
    setup = toy_setup(tmp_path, 12)
    traced = []
    inner = setup.train_step

    def counting(state, batch):
        traced.append(batch.image.shape[1:3])
        return inner(state, batch)

    object.__setattr__(setup, "train_step", counting)
    loop.train(setup, tmp_path, tensorboard=False)
    assert sorted(traced) == sorted(BUCKETS)


def test_a_batch_of_a_third_shape_stops_the_run(tmp_path):
    with pytest.raises(RunError, match=r"\(8, (9|13), (8|12), 3\).*2 canvas sizes"):
        run(tmp_path, 8, odd=5)


def test_the_programs_count_themselves(tmp_path):
    setup = toy_setup(tmp_path)
    programs = Programs(setup)
    state = jax.device_put(setup.init(), sharding.replicated(setup.mesh))
    for _ in range(4):
        batch = sharding.put_batch(setup.mesh, next(setup.batches)[0])
        if not programs.has(batch):
            programs.compile(state, batch)
        state, _ = programs(state, batch)
    assert len(programs) == len(BUCKETS)


def test_a_folder_of_another_config_is_refused_with_the_keys(tmp_path):
    run(tmp_path, 2)
    config = toy_config(2)
    config.optimizer.lr = 0.2
    config.seed = 5
    with pytest.raises(
        UserError, match=r"optimizer.lr is 0.1 there and 0.2 here; seed is 0 there and 5 here"
    ):
        run(tmp_path, config=config)
    config = toy_config(2)
    config.eval.batch, config.train.log_every, config.data.workers = 1, 1, 3
    run(tmp_path, config=config)


def test_a_longer_cosine_is_allowed_and_told(tmp_path, capsys):
    config = toy_config(2)
    config.schedule.name = "cosine"
    run(tmp_path, config=config)
    config.train.steps = 4
    run(tmp_path, config=config)
    assert "train.steps was 2 and is 4" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_with_step_terms_and_images(tmp_path):
    # batch 2 (step 3) holds images 16..23; it is found at the next logged step, 4
    with pytest.raises(RunError, match=r"at step 3 \(.*loss nan.*\[16, 17, .*23\]"):
        run(tmp_path, 8, poison=2)
    assert Checkpoints(tmp_path / "checkpoints").latest() is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_well(tmp_path, number):
    def ask(at):
        if at == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    stopped = run(tmp_path / "a", 50, on_batch=ask)
    assert 3 <= stopped <= 6
    assert signal.getsignal(number) is before
    state, place = last_state(tmp_path / "a", 50)
    assert int(state.step) == stopped
    assert place == {"at": stopped}
    run(tmp_path / "a", 8)
    run(tmp_path / "b", 8)
    assert bits(last_state(tmp_path / "a", 8)[0]) == bits(last_state(tmp_path / "b", 8)[0])


def test_evaluations_come_on_time_once_and_after_a_checkpoint(tmp_path):
    config = toy_config(4)
    config.eval.every = 2
    run(tmp_path, config=config)  # the toy's evaluate fails on a second call for a step
    assert sorted(p.name for p in (tmp_path / "eval").iterdir()) == ["2", "4"]
    assert Checkpoints(tmp_path / "checkpoints").steps() == [2, 4]


def test_an_interrupted_evaluation_is_made_up_for_on_resumption(tmp_path):
    config = toy_config(4)
    config.eval.every = 2
    setup = toy_setup(tmp_path, config=config)

    def interrupted(step, *_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal should have ended this")

    object.__setattr__(setup, "evaluate", interrupted)
    assert loop.train(setup, tmp_path, tensorboard=False) == 2
    run(tmp_path, config=config)
    assert sorted(p.name for p in (tmp_path / "eval").iterdir()) == ["2", "4"]


def test_a_damaged_checkpoint_is_set_aside_and_an_older_one_used(tmp_path, capsys):
    config = toy_config(4)
    config.checkpoint.every = 2
    run(tmp_path / "a", config=config)
    expected = bits(last_state(tmp_path / "a", 4)[0])
    (tmp_path / "a" / "checkpoints" / "4" / "params" / "_METADATA").write_text('{"tree')
    (tmp_path / "a" / "eval" / "4" / "metrics.json").unlink()
    (tmp_path / "a" / "eval" / "4").rmdir()
    assert run(tmp_path / "a", config=config) == 4
    out = capsys.readouterr().out
    assert "set aside as 4.damaged" in out
    assert "going on from step 2" in out
    assert bits(last_state(tmp_path / "a", 4)[0]) == expected


def test_without_another_checkpoint_a_damaged_one_ends_the_run(tmp_path):
    """Else it would begin anew, over what it has written."""
    config = toy_config(4)
    config.checkpoint.keep = 1
    run(tmp_path, 2, config=config)
    before = rows(tmp_path)
    (tmp_path / "checkpoints" / "4" / "params" / "_METADATA").write_text('{"tree')
    config.train.steps = 6
    with pytest.raises(RunError, match=r"cannot be read .*; remove it to go on from what is left"):
        run(tmp_path, 6, config=config)
    assert rows(tmp_path) == before
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["4"]


def test_the_folder_says_whose_it_is(tmp_path):
    run(tmp_path, 2)
    run(tmp_path, 4)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["train"]["steps"] == 4
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["from_step"] == 2
    assert [start["from_step"] for start in manifest["earlier"]] == [0]
    assert manifest["devices"]["count"] == jax.device_count()


def test_a_batch_that_devices_cannot_share_is_refused():
    class Three:
        size = 3

    with pytest.raises(UserError, match=r"train\.batch is 8"):
        sharding.check_batch(8, Three(), "train.batch")


def test_lines_of_a_killed_run_are_taken_back(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 2}\n{"step": 4}\n{"ste')
    workdir.trim_metrics(tmp_path, 2)
    assert file.read_text() == '{"step": 2}\n'


def in_a_process(folder, steps, *more, **env) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tests.train.toy", str(folder), str(steps), *more],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


def test_a_new_process_continues_the_run_exactly_and_leaves_events(tmp_path):
    run(tmp_path / "parts", 2)
    told = in_a_process(tmp_path / "parts", 4, "events")
    assert "going on from step 2" in told.stdout
    run(tmp_path / "whole", 4)
    assert bits(last_state(tmp_path / "whole", 4)[0]) == bits(last_state(tmp_path / "parts", 4)[0])
    assert list((tmp_path / "parts").glob("events.out.tfevents.*"))


@pytest.mark.multi
def test_four_devices_train_as_one_does(tmp_path):
    in_a_process(tmp_path / "four", 6, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    run(tmp_path / "one", 6)
    manifest = json.loads((tmp_path / "four" / "manifest.json").read_text())
    assert manifest["devices"]["count"] == 4
    one, four = last_state(tmp_path / "one", 6)[0], last_state(tmp_path / "four", 6)[0]
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(four.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert IMAGES % 4 == 0


def test_importing_the_loop_does_not_import_tensorflow():
    code = "import sys, sephjax, sephjax.train.loop; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
