"""Mask head: a convolution tower, doubled in size, with one mask a class; arXiv 1703.06870."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sephjax.nets import layers, norms


class MaskHead(nnx.Module):
    """3x3 convolutions, a 2x2 transposed convolution, a 1x1 predictor.

    Training and testing look at the mask of one class only, so the head computes that one:
    each ROI's column of the predictor is gathered, 1/k of the work and memory of all classes.
    """

    def __init__(  # noqa: PLR0913, the keys of config.mask
        self,
        channels: int,
        classes: int,
        *,
        convs: int = 4,
        dim: int = 256,
        norm: str | norms.NormFactory = "none",
        deconv_norm: str | norms.NormFactory = "none",
        init: layers.Init = "msra",
        predictor_init: layers.Init = ("normal", 0.001),
        rngs: nnx.Rngs,
    ):
        """Builds the head.

        Args:
            channels: Width of the pooled features.
            classes: Number of classes, without background.
            convs: Number of 3x3 convolutions, at the pooled size.
            dim: Their width and the transposed convolution's.
            norm: After each 3x3 convolution.
            deconv_norm: After the transposed convolution: the series has one, others none.
            init: Of all kernels but the predictor's.
            predictor_init: Of the predictor's; the series has xavier_uniform.
            rngs: Where the kernels are drawn from.
        """
        make = norms.norm_factory(norm)
        self.convs = convs
        for i in range(convs):
            bias = not norms.has_norm(norm)
            conv = layers.Conv(channels, dim, 3, bias=bias, init=init, rngs=rngs)
            setattr(self, f"conv{i}", conv)
            setattr(self, f"norm{i}", make(dim, rngs=rngs))
            channels = dim
        bias = not norms.has_norm(deconv_norm)
        self.deconv = layers.ConvTranspose2x2(channels, dim, bias=bias, init=init, rngs=rngs)
        self.deconv_norm = norms.norm_factory(deconv_norm)(dim, rngs=rngs)
        self.predictor = layers.Conv(dim, classes, 1, init=predictor_init, rngs=rngs)

    def features(
        self,
        pooled: Float[Array, "n h w c"],
        valid: Bool[Array, "n"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "n _oh _ow _o"]:
        """What the predictor reads, at twice the pooled size."""
        x = pooled
        cells = None if valid is None else jnp.broadcast_to(valid[:, None, None], x.shape[:3])
        for i in range(self.convs):
            norm = getattr(self, f"norm{i}")
            x = layers.act(norm(getattr(self, f"conv{i}")(x), cells, train=train), norm)
        x = self.deconv(x)
        cells = None if valid is None else jnp.broadcast_to(valid[:, None, None], x.shape[:3])
        return layers.act(self.deconv_norm(x, cells, train=train), self.deconv_norm)

    def __call__(
        self,
        pooled: Float[Array, "n h w c"],
        labels: Int[Array, "n"],
        valid: Bool[Array, "n"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "n _oh _ow"]:
        """Float32 mask logits of each ROI's own class.

        Args:
            pooled: Pooled features, `[n, 14, 14, c]` for masks of 28x28.
            labels: Class of each ROI; what lies outside `0..k-1` (background) is clipped and means
                nothing.
            valid: Which ROIs count in batch statistics.
            train: Whether `bn` uses and moves its statistics.
        """
        x = self.features(pooled, valid, train=train)
        kernel = self.predictor.kernel[...][0, 0]
        labels = jnp.clip(labels, 0, kernel.shape[1] - 1)
        columns = jnp.take(kernel, labels, axis=1).T.astype(x.dtype)
        masks = jnp.einsum("nhwc,nc->nhw", x, columns, preferred_element_type=jnp.float32)
        return masks + jnp.take(self.predictor.bias[...], labels)[:, None, None]
