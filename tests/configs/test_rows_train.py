"""Two real train steps and an evaluation of rows, narrow, on pictures of coco_tiny.

A fifth of the series runs (`SEPHJAX_ROWS=1` to `=4` run the others); every row of every family:
`SEPHJAX_ROWS=all python -m pytest tests/configs/test_rows_train.py`.
"""

import contextlib
import io
import os

import jax
import numpy as np
import optax
import pytest

from benchmarks import series
from sephjax import modes
from sephjax.train import optimizer, sharding
from tests.configs.families import IDS, ROWS
from tests.configs.shrink import shrunk
from tests.tiny import quick  # noqa: F401 - a fixture for the whole module

WANTED = os.environ.get("SEPHJAX_ROWS", "0")
SERIES = [at for at, (family, _) in enumerate(ROWS) if family in series.FAMILIES]
CHOSEN = range(len(ROWS)) if WANTED == "all" else SERIES[int(WANTED) :: 5]


def names_where(tree, found):
    leaves = jax.tree.leaves(jax.device_get(tree))
    return [
        name
        for name, leaf in zip(optimizer.parameter_names(tree), leaves, strict=True)
        if found(leaf)
    ]


@pytest.mark.data
@pytest.mark.parametrize(
    ("family", "row"), [ROWS[at] for at in CHOSEN], ids=[IDS[at] for at in CHOSEN]
)
def test_a_row_learns_in_every_part_and_is_evaluated(family, row, shared_data, tmp_path):
    config = shrunk(family, row, shared_data / "coco_tiny")
    with contextlib.redirect_stdout(io.StringIO()):
        setup = modes.make_setup(config, tmp_path)
        before = setup.init()
    step = jax.jit(setup.train_step)
    state, batches = before, iter(setup.batches)
    for _ in range(2):
        batch, _ = next(batches)
        assert batch.truth.valid.any()
        state, scalars = step(state, sharding.put_batch(setup.mesh, batch))
        assert all(np.isfinite(value) for value in jax.device_get(scalars).values()), scalars
        assert scalars["positive_rois"] > 0

    trace = optax.tree.get(state.opt_state, "trace")
    assert not names_where(trace, lambda slope: not np.isfinite(slope).all())
    assert not names_where(trace, lambda slope: not slope.any()), "no gradient"
    mask = optimizer.frozen_mask(
        before.params, config.optimizer.freeze, optimizer.parameter_names(before.frozen)
    )
    fixed = [optimizer.split_by_mask(s.params, mask)[1] for s in (before, state)]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), *fixed))

    with contextlib.redirect_stdout(io.StringIO()):
        metrics = setup.evaluate(2, state.params, state.frozen)
    assert metrics["images"] == 3
    assert 0 <= metrics["bbox"]["AP"] <= 1
    assert ("segm" in metrics) == config.mask.enabled
    assert (tmp_path / "eval" / "2" / "detections.json").stat().st_size > 2
