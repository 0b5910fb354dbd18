"""Every row of every family: it resolves, differs from all others, and its train step traces."""

import jax
import pytest

from configs import base
from configs._chain import flat
from sephjax import build, check, describe, learner
from sephjax.train import sharding
from tests.configs.families import IDS, ROWS, families, read

CLASSES, IMAGES, SIDE = 80, 4, 128
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


@every_row
def test_the_train_step_of_a_row_traces_and_keeps_the_shapes_of_its_state(family, row):
    config = read(family, row)
    model = build.model(config, CLASSES)
    learns = learner.learner(config, model, sharding.make_mesh())
    whole_groups = IMAGES - IMAGES % config.rpn.sample_group
    batch = describe.abstract_batch(config, whole_groups, SIDE, SIDE)
    after, scalars = jax.eval_shape(learns.train_step, learns.abstract, batch)
    like = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
    assert like(after) == like(learns.abstract)
    assert ("loss/mask" in scalars) == config.mask.enabled
    assert all(value.shape == () for value in scalars.values())
