"""What the RPN should say: anchors matched to the ground truth, then sampled."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sephjax.ops import sampling
from sephjax.types import Array, Match, RpnTargets, Truth

Matcher = Callable[[Array, Array, Array], Match]


def rpn_targets(
    keys: Array,
    anchors: Array,
    inside: Array,
    truth: Truth,
    *,
    matcher: Matcher,
    samples: int,
    positive_fraction: float,
    group: int,
) -> RpnTargets:
    """Labels `samples` anchors in every group of `group` images.

    Args:
        keys: one PRNG key an image, [b]; a group uses its first image's.
        anchors: float32 [n, 4], pixels; the same for every image.
        inside: bool [b, n]; False for anchors that an image must not use (their centre is padding).
        truth: ground truth of the batch.
        matcher: (anchors, boxes, valid) -> Match for one image.
        samples: anchors sampled a group (256); 0: every anchor that is not ignored.
        positive_fraction: at most this share of them is positive.
        group: images that share a sample: 1 as in detectron2 and torchvision; the series samples
            256 over the 4 images of a GPU. `b` must be a multiple of it, or smaller.

    An image without objects gives negatives only.
    """
    match = jax.vmap(matcher, in_axes=(None, 0, 0))(anchors, truth.boxes, truth.valid)
    boxes = jnp.take_along_axis(truth.boxes, match.index[:, :, None], axis=1)
    images, count = inside.shape
    group = min(group, images)
    shared = (images // group, group * count)
    if samples == 0:
        found = match.positive & inside, match.negative & inside
        return RpnTargets(boxes, *found)
    draw = lambda key, positive, negative: sampling.subsample(
        key, positive, negative, count=samples, positive_fraction=positive_fraction
    )
    positive, negative = jax.vmap(draw)(
        keys[::group],
        (match.positive & inside).reshape(shared),
        (match.negative & inside).reshape(shared),
    )
    return RpnTargets(boxes, positive.reshape(images, count), negative.reshape(images, count))
