"""Region proposal network: objectness and box deltas of every anchor, arXiv 1506.01497."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sephjax.nets import layers, norms
from sephjax.types import RpnOutputs


class LevelTower(nnx.Module):
    """3x3 convolutions `conv0`, ... shared by all levels; `norm0_p3`, ... are a level's own."""

    def __init__(
        self,
        channels: int,
        convs: int,
        *,
        levels: Sequence[str],
        norm: str | norms.NormFactory,
        bias: bool,
        init: layers.Init,
        rngs: nnx.Rngs,
    ):
        make = norms.norm_factory(norm)
        self.convs = convs
        for i in range(convs):
            conv = layers.Conv(channels, channels, 3, bias=bias, init=init, rngs=rngs)
            setattr(self, f"conv{i}", conv)
            for level in levels:
                setattr(self, f"norm{i}_{level}", make(channels, rngs=rngs))

    def layer(
        self,
        i: int,
        level: str,
        x: Float[Array, "b h w c"],
        valid: Bool[Array, "b h w"] | None,
        *,
        train: bool = False,
    ) -> Float[Array, "b h w c"]:
        """Convolution `i` on a level, its norm, and ReLU unless the norm activates."""
        norm = getattr(self, f"norm{i}_{level}")
        return layers.act(norm(getattr(self, f"conv{i}")(x, valid), valid, train=train), norm)

    def tower(
        self,
        level: str,
        x: Float[Array, "b h w c"],
        valid: Bool[Array, "b h w"] | None,
        *,
        train: bool = False,
    ) -> Float[Array, "b h w c"]:
        """All of them on a level."""
        for i in range(self.convs):
            x = self.layer(i, level, x, valid, train=train)
        return x


class RPNHead(LevelTower):
    """The convolutions, then a 1x1 for logits and one for deltas.

    The convolutions keep their bias under a norm too, as the series' sephv17.
    """

    def __init__(
        self,
        channels: int,
        anchors: int,
        *,
        levels: Sequence[str],
        convs: int = 1,
        norm: str | norms.NormFactory = "none",
        init: layers.Init = ("normal", 0.01),
        rngs: nnx.Rngs,
    ):
        """Builds the head.

        Args:
            channels: Width of the pyramid, kept throughout.
            anchors: Anchors to a cell.
            levels: Names of the levels, each of which gets norms of its own.
            convs: Number of 3x3 convolutions.
            norm: After each of them, then ReLU unless the norm activates.
            init: Of all kernels; detectron2, torchvision: normal(0.01); the series: xavier_uniform.
            rngs: Where the kernels are drawn from.
        """
        super().__init__(channels, convs, levels=levels, norm=norm, bias=True, init=init, rngs=rngs)
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
        maps = [self.tower(level, x, masks[level], train=train) for level, x in pyramid.items()]
        return by_anchor([self.logits(x) for x in maps], [self.deltas(x) for x in maps])


def by_anchor(
    logits: Sequence[Float[Array, "b _h _w _a"]], deltas: Sequence[Float[Array, "b _h _w _a4"]]
) -> RpnOutputs:
    """The maps of all levels as rows of anchors: levels as given, cells row-major."""
    rows = lambda maps, *last: [x.reshape(x.shape[0], -1, *last) for x in maps]
    return RpnOutputs(
        jnp.concatenate(rows(logits), axis=1).astype(jnp.float32),
        jnp.concatenate(rows(deltas, 4), axis=1).astype(jnp.float32),
    )
