"""Cascade R-CNN (arXiv 1712.00726): box heads in a row, each on the boxes of the one before.

A single head is a cascade of one stage, so that the detector knows one way only.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sephjax.ops import boxes as box_ops
from sephjax.types import BoxOutputs, Proposals, Rois, Truth

Weights = tuple[float, float, float, float]
# (head, boxes [b, n, 4], valid [b, n]) -> what the head says of them
Run = Callable[[nnx.Module, Float[Array, "b n 4"], Bool[Array, "b n"]], BoxOutputs]


class CascadeHeads(nnx.Module):
    """Box heads `stage0`, `stage1`, ... that share nothing."""

    def __init__(self, make: Callable[..., nnx.Module], stages: int, *, rngs: nnx.Rngs):
        """`make(rngs=...)` gives one head."""
        self.stages = stages
        for i in range(stages):
            setattr(self, f"stage{i}", make(rngs=rngs))


def heads_of(box_head: nnx.Module) -> list[nnx.Module]:
    """The heads of all stages; one without a cascade."""
    if isinstance(box_head, CascadeHeads):
        return [getattr(box_head, f"stage{i}") for i in range(box_head.stages)]
    return [box_head]


@dataclasses.dataclass(frozen=True)
class Cascade:
    """What happens between the stages; everything is bound by `recipe`.

    Attributes:
        weights: of the deltas of each stage.
        rematch: of each stage but the first, (keys, boxes, valid, truth) -> the ROIs it trains on.
        gradient_scale: of the gradient that the stages send to the maps.
    """

    weights: tuple[Weights, ...]
    rematch: tuple[Callable[..., Rois], ...] = ()
    gradient_scale: float = 1.0

    def maps(self, pyramid: Mapping[str, Array]) -> dict[str, Array]:
        """What the stages pool from: the maps, with a scaled gradient.

        Pooling hands the gradient of its features on to the maps linearly, so scaling it here is
        scaling that of the features of every stage, as the papers' code does.
        """
        return {name: scale_gradient(x, self.gradient_scale) for name, x in pyramid.items()}

    def train(
        self,
        heads: Sequence[nnx.Module],
        run: Run,
        rois: Rois,
        truth: Truth,
        keys: Array,
        size: Float[Array, "b 2"],
    ) -> list[tuple[Rois, BoxOutputs]]:
        """ROIs and outputs of every stage.

        Args:
            heads: of the stages.
            run: pools and applies a head.
            rois: sampled for the first stage.
            truth: ground truth of the batch.
            keys: one PRNG key an image, [b]; `split` into two elsewhere.
            size: height and width of each picture; boxes are cut at its edge.
        """
        found = [(rois, run(heads[0], rois.boxes, rois.valid))]
        for i, (head, rematch) in enumerate(zip(heads[1:], self.rematch, strict=True)):
            rois, outputs = found[-1]
            boxes = moved(rois.boxes, outputs, size, self.weights[i])
            # Folding in 0 or 1 would give the keys that splitting in two gives.
            own = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, 2 + i)
            rois = rematch(own, boxes, rois.valid, truth)
            found.append((rois, run(head, rois.boxes, rois.valid)))
        return found

    def test(
        self,
        heads: Sequence[nnx.Module],
        run: Run,
        proposals: Proposals,
        size: Float[Array, "b 2"],
    ) -> tuple[Proposals, BoxOutputs]:
        """The boxes that the last stage reads, its deltas, and the classes of all stages.

        The logits are logarithms of the probabilities' mean over the stages (their softmax is that
        mean); with one stage they are its own.
        """
        found = [run(heads[0], proposals.boxes, proposals.valid)]
        for head, weights in zip(heads[1:], self.weights[:-1], strict=True):
            boxes = moved(proposals.boxes, found[-1], size, weights)
            proposals = Proposals(boxes, proposals.scores, proposals.valid)
            found.append(run(head, boxes, proposals.valid))
        if len(found) == 1:
            return proposals, found[0]
        logs = jnp.stack([jax.nn.log_softmax(outputs.logits) for outputs in found])
        mean = jax.nn.logsumexp(logs, axis=0) - math.log(len(found))
        return proposals, dataclasses.replace(found[-1], logits=mean)


def moved(
    boxes: Float[Array, "b n 4"],
    outputs: BoxOutputs,
    size: Float[Array, "b 2"],
    weights: Weights,
) -> Float[Array, "b n 4"]:
    """Boxes after a stage's class-agnostic deltas, cut at the pictures' edges; constants."""
    decoded = box_ops.decode(boxes, outputs.deltas[:, :, 0], weights=weights)
    return jax.lax.stop_gradient(jax.vmap(box_ops.clip)(decoded, size))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def scale_gradient(x: Float[Array, "..."], scale: float) -> Float[Array, "..."]:
    """`x`, whose gradient is multiplied by `scale`."""
    del scale
    return x


def _forward(x: Array, scale: float) -> tuple[Array, None]:
    del scale
    return x, None


def _backward(scale: float, _: None, slope: Array) -> tuple[Array]:
    return (slope if scale == 1.0 else slope * scale,)


scale_gradient.defvjp(_forward, _backward)
