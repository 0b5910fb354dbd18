"""The work counted by hand against what JAX traces."""

import math

import jax
import pytest
from jax.interpreters import partial_eval

from configs import cascade, demo, mask_rcnn, sephv14
from sephjax import build, describe, learner
from sephjax.ahead import flops
from sephjax.train import sharding, step

CANVAS = (256, 320)
CONFIGS = {"mask_rcnn": mask_rcnn, "demo": demo, "sephv14": sephv14}


def traced(closed):
    """FLOPs of what is needed of a traced function, without products with the zeros that a strided
    convolution's input gradient stretches its operand with."""
    jaxpr, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    return count(jaxpr)


def count(jaxpr):
    total = 0.0
    for equation in jaxpr.eqns:
        total += describe._primitive(equation).flops / math.prod(
            equation.params.get("lhs_dilation") or (1,)
        )
        inner = [count(sub) for sub in describe._inner(equation.params.values())]
        if equation.primitive.name == "cond":
            inner = [max(inner, default=0.0)]
        turns = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        total += turns * sum(inner)
    return total


@pytest.mark.parametrize("name", ["mask_rcnn", "sephv14"])
def test_prediction_is_what_is_traced(name):
    config = CONFIGS[name].get_config()
    model = build.model(config, 80)
    batch = describe.abstract_batch(config, 1, *CANVAS)
    run = step.make_predict_step(model, build.classify(config), masks=config.mask.enabled)
    found = traced(jax.make_jaxpr(run)(*model.abstract, batch))
    by_hand = flops.predict_flops(config, model.abstract[0], CANVAS)
    assert found == pytest.approx(sum(by_hand.values()), rel=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_train_step_is_what_is_traced(name):
    config = CONFIGS[name].get_config()
    model = build.model(config, 80)
    batch = describe.abstract_batch(config, 1, *CANVAS)
    learns = learner.learner(config, model, sharding.make_mesh())
    found = traced(jax.make_jaxpr(learns.train_step)(learns.abstract, batch))
    by_hand = flops.train_flops(config, model.abstract[0], CANVAS)
    assert found == pytest.approx(sum(by_hand.values()), rel=1e-2)


def test_a_cascade_is_not_counted():
    assert not flops.countable(cascade.get_config())
    assert flops.countable(sephv14.get_config())
