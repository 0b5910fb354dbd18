"""A run with averaged weights, from end to end: they are saved, resumed, evaluated and exported."""

import json
import shutil

import jax
import numpy as np
import pytest

from sephjax import convert, modes, restore
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


def state_of(workdir, step):
    setup = modes.make_setup(config_of(), workdir)
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
    from sephjax import build

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
