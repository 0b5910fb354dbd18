"""Region proposal network: objectness and box deltas of every anchor, arXiv 1506.01497."""

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sephjax.nets import layers, norms
from sephjax.types import RpnOutputs


class RPNHead(nnx.Module):
    """3x3 convolutions shared by all levels, then a 1x1 for logits and one for deltas.

    The convolutions keep their bias under a norm too, as the series' sephv17.
    """

    def __init__(
        self,
        channels: int,
        anchors: int,
        *,
        convs: int = 1,
        norm: str | norms.NormFactory = "none",
        norm_levels: tuple[str, ...] = (),
        init: layers.Init = ("normal", 0.01),
        rngs: nnx.Rngs,
    ):
        """Builds the head.

        Args:
            channels: Width of the pyramid, kept throughout.
            anchors: Anchors to a cell.
            convs: Number of 3x3 convolutions.
            norm: After each of them, then ReLU unless the norm activates.
            norm_levels: Levels that get a norm of their own (sephv17); empty: all share one.
            init: Of all kernels; detectron2, torchvision: normal(0.01); the series: xavier_uniform.
            rngs: Where the kernels are drawn from.
        """
        make = norms.norm_factory(norm)
        self.convs = convs
        self.anchors = anchors
        self.norm_levels = norm_levels
        for i in range(convs):
            conv = layers.Conv(channels, channels, 3, init=init, rngs=rngs)
            setattr(self, f"conv{i}", conv)
            for name in [f"norm{i}_{level}" for level in norm_levels] or [f"norm{i}"]:
                setattr(self, name, make(channels, rngs=rngs))
        self.logits = layers.Conv(channels, anchors, 1, init=init, rngs=rngs)
        self.deltas = layers.Conv(channels, 4 * anchors, 1, init=init, rngs=rngs)

    def __call__(
        self,
        pyramid: dict[str, Float[Array, "b _h _w _c"]],
        size: Int[Array, "b 2"] | None = None,
        strides: Mapping[str, float] | None = None,
        *,
        train: bool = False,
    ) -> RpnOutputs:
        """Scores all anchors of a pyramid given fine to coarse.

        Args:
            pyramid: Feature maps by level.
            size: Height and width of each picture on its canvas; None: no canvas is padded.
            strides: Pixels to a cell of each level; by default what the names say (p3: 8).
            train: Whether `bn` uses and moves its statistics.

        Returns:
            Float32 logits `[b, n]` and deltas `[b, n, 4]`: levels as in `pyramid`, cells row-major,
            the anchors of a cell innermost. Anchors in the padding get numbers without meaning.
        """
        masks = layers.level_masks(pyramid, size, strides)
        logits, deltas = [], []
        for level, x in pyramid.items():
            x = self._tower(x, masks[level], level, train=train)
            batch = x.shape[0]
            logits.append(self.logits(x).reshape(batch, -1))
            deltas.append(self.deltas(x).reshape(batch, -1, 4))
        return RpnOutputs(
            jnp.concatenate(logits, axis=1).astype(jnp.float32),
            jnp.concatenate(deltas, axis=1).astype(jnp.float32),
        )

    def _tower(
        self,
        x: Float[Array, "b h w c"],
        valid: Bool[Array, "b h w"] | None,
        level: str,
        *,
        train: bool,
    ) -> Float[Array, "b h w c"]:
        for i in range(self.convs):
            norm = getattr(self, f"norm{i}_{level}" if self.norm_levels else f"norm{i}")
            x = layers.act(norm(getattr(self, f"conv{i}")(x, valid), valid, train=train), norm)
        return x
