"""Every row of every family: it resolves, differs from all others, and its train step traces."""

import functools

import jax
import jax.numpy as jnp
import pytest

from configs import base
from configs._chain import flat
from sephjax import build, check
from sephjax.train import optimizer, step
from sephjax.types import Batch, TrainState, Truth
from tests.configs.families import IDS, ROWS, families, read

CLASSES, IMAGES, OBJECTS, SIDE = 80, 4, 3, 128
every_row = pytest.mark.parametrize(("family", "row"), ROWS, ids=IDS)


def test_there_are_families():
    assert {"demo", "mask_rcnn", "sephv14"} <= set(families())


@every_row
def test_a_row_resolves_to_known_keys_and_says_what_it_asks(family, row):
    config = read(family, row)
    assert config.name == (f"{family}_{row}" if row else family)
    assert config.lineage[-1] == (f"{family}:{row}" if row else family)
    assert set(config) == set(base.get_config())
    for section in ("data", "eval", "train", "rpn", "roi", "mask", "test"):
        assert set(config[section]) == set(base.get_config()[section]), section
    assert families()[family].ROWS[row].asks
    check.check(config)


@every_row
def test_a_row_is_short(family, row):
    if row:  # a family's head may be longer
        assert len(families()[family].ROWS[row].diff) <= 8


def test_no_two_rows_are_equal():
    seen = {}
    for family, row in ROWS:
        values = dict(flat(read(family, row)))
        del values["name"], values["lineage"]
        key = repr(sorted(values.items()))
        assert key not in seen, f"{family}:{row} is {seen[key]}"
        seen[key] = f"{family}:{row}"


@functools.cache
def shapes(masks, images):
    """Images on a small canvas."""
    leaf = lambda dtype, *sides: jax.ShapeDtypeStruct((images, *sides), dtype)
    truth = Truth(
        boxes=leaf(jnp.float32, OBJECTS, 4),
        labels=leaf(jnp.int32, OBJECTS),
        valid=leaf(jnp.bool_, OBJECTS),
        masks=leaf(jnp.uint8, OBJECTS, 112, 112) if masks else None,
    )
    return Batch(
        image=leaf(jnp.uint8, SIDE, SIDE, 3),
        size=leaf(jnp.int32, 2),
        original=leaf(jnp.int32, 2),
        index=leaf(jnp.int32),
        valid=leaf(jnp.bool_),
        truth=truth,
    )


@every_row
def test_the_train_step_of_a_row_traces_and_keeps_the_shapes_of_its_state(family, row):
    config = read(family, row)
    model = build.model(config, CLASSES)
    params, frozen = model.abstract
    known = optimizer.parameter_names(frozen)
    mask = optimizer.frozen_mask(params, config.optimizer.freeze, known)
    trained, fixed = optimizer.split_by_mask(params, mask)
    names = [*optimizer.parameter_names(fixed), *known]
    tx = optimizer.make_optimizer(config, trained, names)
    key = jax.eval_shape(lambda: jax.random.key(0))
    count = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(count, params, frozen, jax.eval_shape(tx.init, trained), key)
    train_step = step.make_train_step(model, tx, build.losses(config), mask)
    whole_groups = IMAGES - IMAGES % config.rpn.sample_group
    batch = shapes(config.mask.enabled, whole_groups)
    after, scalars = jax.eval_shape(train_step, state, batch)
    like = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
    assert like(after) == like(state)
    assert ("loss/mask" in scalars) == config.mask.enabled
    assert all(value.shape == () for value in scalars.values())
