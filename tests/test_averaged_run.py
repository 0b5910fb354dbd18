"""A run with averaged weights, from end to end: they are saved, resumed, evaluated and exported."""

import json
import shutil

import jax
import numpy as np
import pytest

from sephjax import build, convert, modes, restore
from sephjax.checkpoint import AVERAGES, Checkpoints
from sephjax.errors import UserError
from sephjax.train import sharding
from tests.tiny import (
    quick,  # noqa: F401 - a fixture for the whole module
    tiny_config,
)

EMA = {
    "train__ema": 0.5,
    "backbone__norm": "bn",
    "data__copy_paste": 0.5,
    "data__stitch": 0.5,
    "data__jitter": {"low": 0.5, "high": 2.0, "crop": 64},
}


def config_of(**changes):
    config = tiny_config(**{k: v for k, v in EMA.items() if k != "data__jitter"} | changes)
    config.data.jitter.update(EMA["data__jitter"])
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick):  # noqa: F811
    workdir = tmp_path_factory.mktemp("averaged") / "run"
    assert modes.train(config_of(), str(workdir)) == 0
    return workdir


def state_of(workdir, step, **changes):
    setup = modes.make_setup(config_of(**changes), workdir)
    checkpoints = Checkpoints(workdir / "checkpoints")
    state, _ = checkpoints.restore(step, sharding.abstract_on(setup.mesh, setup.abstract))
    checkpoints.close()
    return state


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_two_and_two_steps_are_four_steps_bit_for_bit(trained, tmp_path):
    for steps in (2, 4):
        assert modes.train(config_of(train__steps=steps), str(tmp_path / "run")) == 0
    whole, parts = state_of(trained, 4), state_of(tmp_path / "run", 4)
    for name in ("params", "frozen", "opt_state", "averages"):
        assert bits(getattr(whole, name)) == bits(getattr(parts, name)), name
    assert bits(whole.averages.params) != bits(whole.params)
    assert bits(whole.averages.frozen) != bits(whole.frozen)


def model_of(config):
    return build.model(config, 3)


def test_the_modes_read_the_averages_and_without_the_key_the_weights(trained):
    state = state_of(trained, 4)
    smooth = restore.weights(config_of(), model_of(config_of()), trained, 4)
    assert bits(smooth) == bits((state.averages.params, state.averages.frozen))
    plain = restore.weights(config_of(train__ema=0.0), model_of(config_of()), trained, 4)
    assert bits(plain) == bits((state.params, state.frozen))


def test_evaluation_gives_the_numbers_of_training_and_other_ones_without_the_averages(trained):
    folder = trained / "eval" / "4"
    scores = lambda: [row["score"] for row in json.loads((folder / "detections.json").read_text())]
    during = (folder / "detections.json").read_bytes()
    first = scores()
    shutil.rmtree(folder)
    assert modes.evaluate(config_of(), str(trained), None) == 0
    assert (folder / "detections.json").read_bytes() == during
    assert modes.evaluate(config_of(train__ema=0.0), str(trained), None) == 0
    assert scores() != first


def test_a_run_without_them_cannot_be_read_with_them(trained, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    for item in AVERAGES:
        shutil.rmtree(copy / "checkpoints" / "4" / item)
    with pytest.raises(UserError, match=r"set --config\.train\.ema=0"):
        modes.evaluate(config_of(), str(copy), None)


def test_averages_can_begin_and_end_within_a_run(trained, tmp_path, capsys):
    """One more step from 4: with averages from a run without, and without from a run with them."""
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    for copy in (begun, ended):
        shutil.copytree(trained, copy)
    before = state_of(trained, 4)
    for item in AVERAGES:
        shutil.rmtree(begun / "checkpoints" / "4" / item)
    written = json.loads((begun / "config.json").read_text())
    written["train"]["ema"] = 0.0
    (begun / "config.json").write_text(json.dumps(written))

    assert modes.train(config_of(train__steps=5), str(begun)) == 0
    told = capsys.readouterr().out
    assert "train.ema was 0.0 and is 0.5: other averages, the same training" in told
    assert "its weights were not averaged: the averages begin at them" in told
    first = state_of(begun, 5)
    leaves = (before.params, first.params, first.averages.params)
    for old, new, smooth in zip(*map(jax.tree.leaves, leaves), strict=True):
        decay = (1 + 4) / (10 + 4)  # of the fifth update
        np.testing.assert_allclose(
            smooth, decay * np.asarray(old) + (1 - decay) * np.asarray(new), rtol=1e-5, atol=1e-7
        )

    assert modes.train(config_of(train__steps=5, train__ema=0.0), str(ended)) == 0
    assert "train.ema is 0: its averaged weights are left behind" in capsys.readouterr().out
    assert not Checkpoints(ended / "checkpoints").has_averages(5)
    last = state_of(ended, 5, train__ema=0.0)
    assert last.averages is None
    for a, b in zip(jax.tree.leaves(last.params), jax.tree.leaves(first.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)  # another program may fuse otherwise


@pytest.mark.torch
def test_the_averages_are_exported(trained, tmp_path):
    torch = pytest.importorskip("torch")
    from sephjax.export import torch as twins

    files = {}
    for name, ema in (("smooth", 0.5), ("plain", 0.0)):
        path = str(tmp_path / f"{name}.pt")
        config = config_of(train__ema=ema)
        assert convert.convert(config, str(trained), None, None, f"twin:{path}") == 0
        files[name] = twins.twin_from_file(path).state_dict()
    state = state_of(trained, 4)
    for name, params in (("smooth", state.averages.params), ("plain", state.params)):
        bias = np.asarray(params["box_head"]["logits"]["bias"])
        biases = [v for k, v in files[name].items() if k.endswith("bias") and v.shape == bias.shape]
        assert any(torch.equal(value, torch.from_numpy(bias.copy())) for value in biases)
