"""Normalisers, one calling convention: `norm(x, valid=None, train=False)`.

Statistics are float32 whatever the compute type, and run over the valid part of a padded canvas
only, so that a picture's features do not depend on its padding. `activates` says whether the layer
holds its own non-linearity (EvoNorm-S0): then no ReLU follows.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sephjax.nets.functional import Frozen

NormFactory = Callable[..., Any]  # (channels, *, rngs) -> a normaliser
GROUPS = 32  # of EvoNorm-S0 (arXiv 2004.02967) and GroupNorm (arXiv 1803.08494)


def groups_of(channels: int) -> int:
    """32, or for narrow layers the largest power of two that leaves two channels to a group."""
    fits = (g for g in (GROUPS, 16, 8, 4, 2) if channels % g == 0 and channels > g)
    return next(fits, 1)


def per_channel(values: Float[Array, "c"], rank: int) -> Float[Array, "..."]:
    """Views a vector of channels as an array of `rank` axes."""
    return values.reshape((1,) * (rank - 1) + values.shape)


def group_moments(
    x: Float[Array, "b *s c"], valid: Bool[Array, "b *s"] | None, groups: int
) -> tuple[Float[Array, "b ... c"], Float[Array, "b ... c"]]:
    """Mean and biased variance of each sample's channel groups over its valid cells.

    Per-channel sums come first and the groups are folded afterwards: no reshape of the whole map,
    which accelerators lay out badly. A sample without a valid cell is taken to be valid everywhere,
    and so is every sample of a two-dimensional input. Results broadcast against `x`.
    """
    space = tuple(range(1, x.ndim - 1))
    mask = jnp.ones((1,) * x.ndim, bool)
    cells: Any = float(math.prod(x.shape[1:-1]))
    if valid is not None and space:
        mask = (valid | ~jnp.any(valid, axis=space, keepdims=True))[..., None]
        cells = jnp.sum(mask, axis=space, keepdims=True, dtype=jnp.float32)

    def fold(per_cell: Float[Array, "b *s c"]) -> Float[Array, "b ... c"]:
        sums = jnp.sum(jnp.where(mask, per_cell, 0.0), axis=space, keepdims=True)
        grouped = sums.reshape((*sums.shape[:-1], groups, -1))
        means = jnp.broadcast_to(jnp.mean(grouped, axis=-1, keepdims=True), grouped.shape)
        return means.reshape(sums.shape) / cells

    mean = fold(x)
    return mean, fold(jnp.square(x - mean))


class Identity(nnx.Module):
    """No normaliser."""

    activates = False

    def __call__(
        self, x: Float[Array, "b *s c"], valid: Any = None, *, train: bool = False
    ) -> Float[Array, "b *s c"]:
        """Returns `x`."""
        del valid, train
        return x


class EvoNormS0(nnx.Module):
    """Normaliser and activation in one: `x * sigmoid(v x) / std * gamma + beta`.

    `std` is that of a sample's channel group, biased, with `eps` under the root; `x` is not
    centred. Two-dimensional input (after a dense layer) takes it over the group's channels alone,
    which the paper does not define and the series did.
    Source: arXiv 2004.02967; timm's `EvoNorm2dS0`.
    """

    activates = True

    def __init__(self, channels: int, *, groups: int | None = None, eps: float = 1e-5):
        self.gamma = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.beta = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.v = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.groups = groups or groups_of(channels)
        self.eps = eps

    def __call__(
        self,
        x: Float[Array, "b *s c"],
        valid: Bool[Array, "b *s"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b *s c"]:
        """Normalises and activates; training and testing are the same."""
        del train
        wide = x.astype(jnp.float32)
        gamma, beta, v = (per_channel(p[...], x.ndim) for p in (self.gamma, self.beta, self.v))
        _, variance = group_moments(wide, valid, self.groups)
        y = wide * jax.nn.sigmoid(v * wide) * (jax.lax.rsqrt(variance + self.eps) * gamma) + beta
        return y.astype(x.dtype)


class GroupNorm(nnx.Module):
    """Centres and scales each sample's channel groups; arXiv 1803.08494."""

    activates = False

    def __init__(self, channels: int, *, groups: int | None = None, eps: float = 1e-5):
        self.gamma = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.beta = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.groups = groups or groups_of(channels)
        self.eps = eps

    def __call__(
        self,
        x: Float[Array, "b *s c"],
        valid: Bool[Array, "b *s"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b *s c"]:
        """Normalises; training and testing are the same."""
        del train
        wide = x.astype(jnp.float32)
        mean, variance = group_moments(wide, valid, self.groups)
        gamma, beta = (per_channel(p[...], x.ndim) for p in (self.gamma, self.beta))
        y = (wide - mean) * (jax.lax.rsqrt(variance + self.eps) * gamma) + beta
        return y.astype(x.dtype)


class BatchNorm(nnx.Module):
    """Batch norm: `frozen=True` always uses its stored statistics, otherwise training updates them.

    Stored statistics are `Frozen`; `gamma` and `beta` are parameters if `trainable_affine`. On
    several devices each one's statistics are of its own images, as in the series (`train/step.py`).
    """

    activates = False

    def __init__(
        self,
        channels: int,
        *,
        frozen: bool,
        trainable_affine: bool,
        eps: float = 1e-5,
        decay: float = 0.9,
    ):
        affine = nnx.Param if trainable_affine else Frozen
        self.gamma = affine(jnp.ones((channels,), jnp.float32))
        self.beta = affine(jnp.zeros((channels,), jnp.float32))
        self.mean = Frozen(jnp.zeros((channels,), jnp.float32))
        self.variance = Frozen(jnp.ones((channels,), jnp.float32))
        self.frozen = frozen
        self.eps = eps
        self.decay = decay

    def __call__(
        self,
        x: Float[Array, "b *s c"],
        valid: Bool[Array, "b *s"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b *s c"]:
        """Normalises; in training, unless frozen, by the batch, which moves the stored moments."""
        wide = x.astype(jnp.float32)
        mean, variance = self.mean[...], self.variance[...]
        if train and not self.frozen:
            mean, variance = self._batch_moments(wide, valid)
        scale = jax.lax.rsqrt(variance + self.eps) * self.gamma[...]
        mean, scale, beta = (per_channel(v, x.ndim) for v in (mean, scale, self.beta[...]))
        return ((wide - mean) * scale + beta).astype(x.dtype)

    def _batch_moments(
        self, x: Float[Array, "b *s c"], valid: Bool[Array, "b *s"] | None
    ) -> tuple[Float[Array, "c"], Float[Array, "c"]]:
        """Moments over the valid cells of the batch; moves the stored ones towards them.

        The stored variance takes the unbiased estimate, as PyTorch's and TensorFlow's fused norms.
        A batch without a valid cell leaves the stored values alone.
        """
        axes = tuple(range(x.ndim - 1))
        mask = (jnp.ones(x.shape[:-1], bool) if valid is None else valid)[..., None]
        cells = jnp.sum(mask, dtype=jnp.float32)
        count = jnp.maximum(cells, 1.0)
        mean = jnp.sum(jnp.where(mask, x, 0.0), axis=axes) / count
        squares = jnp.square(x - per_channel(mean, x.ndim))
        variance = jnp.sum(jnp.where(mask, squares, 0.0), axis=axes) / count
        move = jnp.where(cells > 0, 1.0 - self.decay, 0.0)
        unbiased = variance * (count / jnp.maximum(count - 1.0, 1.0))
        for stored, new in ((self.mean, mean), (self.variance, unbiased)):
            stored[...] = stored[...] + move * (jax.lax.stop_gradient(new) - stored[...])
        return mean, variance


def make_norm(
    name: str,
    channels: int,
    *,
    rngs: nnx.Rngs,
    eps: float | None = None,
    trainable_affine: bool = False,
    decay: float = 0.9,
) -> Any:
    """Builds the normaliser of a name.

    Args:
        name: `evonorm_s0`, `gn`, `frozen_bn`, `bn` or `none`.
        channels: Width of its input.
        rngs: Unused: no normaliser starts at random; here so that all factories look alike.
        eps: Under the root; 1e-5 by default. The series' BN has 1e-4.
        trainable_affine: `frozen_bn` only: gamma and beta are parameters (the series' backbone)
            instead of frozen with the statistics (detectron2, torchvision).
        decay: `bn` only: what the stored statistics keep of themselves at a step (PyTorch's 1 -
            momentum). The series' BN has 0.997.

    Raises:
        ValueError: no such name.
    """
    del rngs
    eps = 1e-5 if eps is None else eps
    match name:
        case "evonorm_s0":
            return EvoNormS0(channels, eps=eps)
        case "gn":
            return GroupNorm(channels, eps=eps)
        case "frozen_bn":
            return BatchNorm(channels, frozen=True, trainable_affine=trainable_affine, eps=eps)
        case "bn":
            return BatchNorm(channels, frozen=False, trainable_affine=True, eps=eps, decay=decay)
        case "none":
            return Identity()
    raise ValueError(f"Unknown norm {name!r}: use evonorm_s0, gn, frozen_bn, bn or none.")


def norm_factory(norm: str | NormFactory, **options: Any) -> NormFactory:
    """`norm` itself if it is a factory already, else `make_norm` with that name and `options`."""
    return functools.partial(make_norm, norm, **options) if isinstance(norm, str) else norm


def has_norm(norm: str | NormFactory) -> bool:
    """False for `"none"`: then the convolution before it keeps its bias."""
    return norm != "none"
