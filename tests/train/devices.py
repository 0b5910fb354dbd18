"""Ten steps on one device and on eight, in a process that has eight.

`python -m tests.train.devices [double]`; `double` computes in float64, where what is left is a
difference of what is computed. Prints one JSON object: by number of devices the scalars of every
step, by how much the detections of a picture differ, and what the compiled step of eight devices
sends between them.
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import Mesh

from sephjax import build, learner
from sephjax.ahead import account
from sephjax.train import sharding, step
from tests import narrow
from tests.parity import double

STEPS = 10
SIZES = [(64, 96), (50, 70), (64, 80), (60, 96), (64, 64), (40, 96), (64, 90), (55, 96)]
COUNTS = [2, 3, 0, 1, 3, 1, 2, 2]
CONFIG = {"optimizer.lr": 0.001, "optimizer.clip": 10.0}
GROUPS = {"rpn.sample_group": 4}  # images that share a sample, on four devices


def state_and_step(mesh, **changes):
    config = narrow.config(**CONFIG | changes)
    model = build.model(config, narrow.CLASSES)
    params, frozen = narrow.draw(model)
    params["box_head"]["logits"]["kernel"] *= 0.05
    learns = learner.learner(config, model, mesh)
    state = learns.start(params, frozen, jax.random.key(3))
    predict = step.make_predict_step(model, build.classify(config), masks=True)
    return state, learns.train_step, sharding.by_device(mesh, predict, (0, 1))


def compile_step(mesh, batch, **changes):
    """State and batch on the devices, the compiled step of theirs, the predict step."""
    state, train_step, predict = state_and_step(mesh, **changes)
    whole, cut = sharding.replicated(mesh), sharding.batched(mesh)
    state, batch = jax.device_put(state, whole), sharding.put_batch(mesh, batch)
    places = {"in_shardings": (whole, cut), "out_shardings": (whole, whole)}
    step = jax.jit(train_step, compiler_options=narrow.QUICK, **places)
    return state, batch, step.lower(state, batch).compile(), predict


def run(mesh, batch):
    state, batch, train_step, predict = compile_step(mesh, batch, **GROUPS)
    rows = []
    for _ in range(STEPS):
        state, scalars = train_step(state, batch)
        rows.append(jax.tree.map(float, scalars))
    whole, cut = sharding.replicated(mesh), sharding.batched(mesh)
    places = {"in_shardings": (whole, whole, cut), "out_shardings": cut}
    predict = jax.jit(predict, compiler_options=narrow.QUICK, **places)
    found = jax.device_get(predict(state.params, state.frozen, batch))
    return rows, found, account.collectives(train_step.as_text()), state.params


def main():
    with double.everywhere(sys.argv[1:] == ["double"]):
        compare(narrow.batch(SIZES, COUNTS))


def compare(batch):
    one, alone, _, params = run(Mesh(np.asarray(jax.devices()[:1]), ("data",)), batch)
    mesh = sharding.make_mesh()
    eight, apart, groups, _ = run(mesh, batch)
    single = compile_step(mesh, batch)[2]
    leaves = [jax.tree.leaves(found) for found in (alone, apart)]
    told = {
        "one": one,
        "eight": eight,
        "detections": [
            float(np.abs(np.float64(a) - np.float64(b)).max()) for a, b in zip(*leaves, strict=True)
        ],
        "found": int(alone.valid.sum()),
        "exchanged": {"groups": groups, "single": account.collectives(single.as_text())},
        "parameters": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
