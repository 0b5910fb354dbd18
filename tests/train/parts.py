"""One step in float64: of one device, and of two that cut their images into two parts.

Run in a process with two devices: `python -m tests.train.parts`. Prints one JSON object: the
scalars of both, by how much the parameters differ, and what the two devices send each other,
without parts and with.
"""

import json

import jax
import numpy as np
from jax.sharding import Mesh

from sephjax.ahead import account
from sephjax.train import sharding
from tests import narrow
from tests.parity import double
from tests.train import devices

# Each device has two pictures of a group in each of its parts.
WHOLE = {"norm": "frozen_bn", "optimizer.no_decay": (), "rpn.sample_group": 4}
PARTS = WHOLE | {"train.accumulate": 2}


def run(mesh, changes):
    """Scalars, parameters and collectives of a step."""
    images = narrow.batch(devices.SIZES, devices.COUNTS)
    state, images, train_step, _ = devices.compile_step(mesh, images, **changes)
    after, scalars = train_step(state, images)
    sent = account.collectives(train_step.as_text())
    return jax.tree.map(float, scalars), jax.device_get(after.params), sent


def main():
    with double.everywhere(wanted=True):
        one = run(Mesh(np.asarray(jax.devices()[:1]), ("data",)), WHOLE)
        two = [run(sharding.make_mesh(), changes) for changes in (WHOLE, PARTS)]
    far = lambda a, b: float(np.abs(a - b).max() / np.abs(a).max())
    told = {
        "scalars": [one[0], two[1][0]],
        "parameters": max(jax.tree.leaves(jax.tree.map(far, one[1], two[1][1]))),
        "exchanged": [sent for _, _, sent in two],
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
