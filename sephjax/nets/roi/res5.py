"""The box head of the C3 rows: a stage of a ResNet on pooled features (EXPERIMENTS 4.4)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sephjax.nets import layers, norms
from sephjax.nets.backbone import resnet
from sephjax.nets.roi.box_head import BoxHead, Norm, Pooled, Predictors, cells
from sephjax.types import BoxOutputs


class Res5(BoxHead):
    """Bottlenecks of stride 1, their mean over the cells, predictors; a mask head may read the map.

    They start at random, unlike detectron2's C4 heads, which take them from ImageNet.

    Attributes:
        channels: width of the map.
    """

    def __init__(  # noqa: PLR0913, the keys of config.roi.head
        self,
        pooled: Pooled,
        predictors: Predictors,
        *,
        blocks: int = 3,
        width: int = 512,
        norm: Norm = "bn",
        eps: float = 1e-5,
        decay: float = 0.999,
        init: layers.Init = "xavier_uniform",
        rngs: nnx.Rngs,
    ):
        """Builds the head.

        Args:
            pooled: height, width and channels of a pooled ROI.
            predictors: of classes and boxes.
            blocks: number of bottlenecks; the first projects its shortcut if it widens.
            width: of their 3x3 convolutions; the map is four times as wide.
            norm: after each convolution.
            eps: of the norm.
            decay: `bn` only: what the stored statistics keep of themselves at a step.
            init: of the convolutions.
            rngs: Where the kernels are drawn from.
        """
        options: dict[str, Any] = {"eps": eps} | ({"decay": decay} if norm == "bn" else {})
        make = norms.norm_factory(norm, **options)
        layout = resnet.LAYOUTS["slim"]._replace(init=init)
        self.channels, self.blocks = 4 * width, blocks
        channels = pooled[2]
        for i in range(blocks):
            block = resnet.Block(
                channels, width, stride=1, bottleneck=True, layout=layout, norm=make, rngs=rngs
            )
            setattr(self, f"block{i}", block)
            channels = self.channels
        self.end(channels, channels, predictors, rngs=rngs)

    def features(
        self,
        pooled: Float[Array, "n h w c"],
        valid: Bool[Array, "n"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "n h w _o"]:
        """The map of each ROI; `valid` says which count in batch statistics."""
        x, mask = pooled, cells(valid, pooled)
        for i in range(self.blocks):
            x = getattr(self, f"block{i}")(x, (mask, mask), train=train)
        return x

    def __call__(
        self,
        pooled: Float[Array, "n h w c"],
        valid: Bool[Array, "n"] | None = None,
        *,
        train: bool = False,
    ) -> BoxOutputs:
        """Float32 logits `[n, k + 1]` and deltas `[n, k, 4]` (`[n, 1, 4]` if class-agnostic).

        In training with the map that they were predicted from.
        """
        x = self.features(pooled, valid, train=train)
        means = jnp.mean(x, axis=(1, 2), dtype=jnp.float32).astype(x.dtype)
        return self.say(means, means, features=x if train else None)
