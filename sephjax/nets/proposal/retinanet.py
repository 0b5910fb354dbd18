"""RetinaNet's head as a proposal generator: one class, `object`; arXiv 1708.02002."""

import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sephjax.nets import layers, norms
from sephjax.nets.proposal.rpn import LevelTower, by_anchor
from sephjax.types import RpnOutputs

PRIOR = 0.01  # of an anchor to be an object, before training (section 4.1)


class RetinaNetHead(nnx.Module):
    """A tower of 3x3 convolutions for the class and one for the box, then a 3x3 each.

    The towers share nothing; a layer of them with a norm has no bias (the series' sephv9).
    """

    def __init__(
        self,
        channels: int,
        anchors: int,
        *,
        levels: Sequence[str],
        convs: int = 1,
        norm: str | norms.NormFactory = "evonorm_s0",
        init: layers.Init = ("normal", 0.01),
        rngs: nnx.Rngs,
    ):
        """Builds the head.

        Args:
            channels: Width of the pyramid, kept throughout.
            anchors: Anchors to a cell.
            levels: Names of the levels, each of which gets norms of its own.
            convs: Number of 3x3 convolutions of each tower; the paper has 4, the series 1.
            norm: After each of them, then ReLU unless the norm activates.
            init: Of all kernels; torchvision: normal(0.01); the series: xavier_uniform.
            rngs: Where the kernels are drawn from.
        """
        bias = not norms.has_norm(norm)
        tower = lambda: LevelTower(
            channels, convs, levels=levels, norm=norm, bias=bias, init=init, rngs=rngs
        )
        self.classify, self.refine = tower(), tower()
        self.logits = layers.Conv(channels, anchors, 3, init=init, rngs=rngs)
        self.logits.bias = nnx.Param(jnp.full((anchors,), -math.log((1 - PRIOR) / PRIOR)))
        self.deltas = layers.Conv(channels, 4 * anchors, 3, init=init, rngs=rngs)

    def __call__(
        self,
        pyramid: dict[str, Float[Array, "b _h _w _c"]],
        size: Int[Array, "b 2"] | None = None,
        strides: Mapping[str, float] | None = None,
        *,
        train: bool = False,
    ) -> RpnOutputs:
        """Scores all anchors of a pyramid; arguments and result are those of `RPNHead`."""
        masks = layers.level_masks(pyramid, size, strides)

        def run(tower: LevelTower, last: layers.Conv) -> list[Float[Array, "b _h _w _o"]]:
            found = []
            for level, x in pyramid.items():
                valid = masks[level]
                found.append(last(tower.tower(level, x, valid, train=train), valid))
            return found

        return by_anchor(run(self.classify, self.logits), run(self.refine, self.deltas))
