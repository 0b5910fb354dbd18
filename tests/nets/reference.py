"""Torch modules as the other side of a weight table, and canvases, for the tests of nets."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sephjax.weights import table

NORM = {"gamma": "weight", "beta": "bias", "mean": "running_mean", "variance": "running_var"}


class Abstract(NamedTuple):
    """Stands for a part of a model where values are loaded."""

    abstract: tuple


def torchvision_resnet_rules() -> list[table.Rule]:
    """torchvision.models.resnet's names without its classifier."""
    rules = [
        table.Rule("stem/conv/kernel", "conv1.weight", table.CONV),
        table.Rule("stage{s}/block{b}/conv{c}/kernel", "layer{s}.{b}.conv{c}.weight", table.CONV),
        table.Rule(
            "stage{s}/block{b}/shortcut_conv/kernel", "layer{s}.{b}.downsample.0.weight", table.CONV
        ),
    ]
    for ours, theirs in NORM.items():
        rules += [
            table.Rule(f"stem/norm/{ours}", f"bn1.{theirs}"),
            table.Rule("stage{s}/block{b}/norm{c}/" + ours, "layer{s}.{b}.bn{c}." + theirs),
            table.Rule(
                "stage{s}/block{b}/shortcut_norm/" + ours, "layer{s}.{b}.downsample.1." + theirs
            ),
        ]
    return rules


def from_torch(rules, model, module, ignore=()):
    """`(params, frozen)` of `model` (a Functional) with the values of a torch module."""
    params, frozen = (table.flatten(part) for part in model.abstract)
    state = {name: value.detach().numpy() for name, value in module.state_dict().items()}
    arrays, _ = table.load(
        rules, params | frozen, state, source="torch", ignore=("num_batches_tracked$", *ignore)
    )
    return tuple(
        table.unflatten({p: jnp.asarray(arrays[p]) for p in part}) for part in (params, frozen)
    )


def draw(model, seed=0):
    """Draws `(params, frozen)` of a Functional: kernels of unit gain, no trivial vector."""
    rng = np.random.default_rng(seed)

    def leaf(like):
        if len(like.shape) == 1:
            values = rng.uniform(0.5, 1.5, like.shape)
        else:
            values = rng.normal(size=like.shape) / np.sqrt(np.prod(like.shape[:-1]))
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map(leaf, model.abstract)
