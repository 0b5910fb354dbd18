"""The detector as one file of StableHLO, weights included, that runs without sephjax.

The file is what `jax.export` writes: any JAX of the next six months or more reads it
(docs.jax.dev, "Exporting and serializing"), on each platform that it was lowered for.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from sephjax.types import Batch, Detections, Params, Truth

PLATFORMS = ("cpu", "cuda", "tpu")

PredictStep = Callable[[Params, Params, Batch], Detections]


def serialize(
    predict_step: PredictStep,
    params: Params,
    frozen: Params,
    *,
    category_ids: Sequence[int],
    canvas: tuple[int, int],
    batch: int,
) -> bytes:
    """The file's content: `(image, size) -> dict`, for all of PLATFORMS.

    Takes uint8 RGB [b, h, w, 3], each picture resized to lie top-left on its canvas and 0 beyond,
    and int32 [b, 2], its valid height and width. Gives, best first and padded to d detections:
    `boxes` float32 [b, d, 4] as (x1, y1, x2, y2) in pixels of the canvas, `scores` float32 [b, d],
    `category_ids` int32 [b, d], `valid` bool [b, d], and with a mask head `masks` float32
    [b, d, 28, 28], probabilities in the frame of each box.

    Args:
        predict_step: of `train.step.make_predict_step`.
        params: trained weights, as they are evaluated.
        frozen: the others.
        category_ids: of the annotations, by label.
        canvas: height and width.
        batch: pictures of a call.
    """
    weights = jax.device_get((params, frozen))  # constants of the program, on no device
    ids = np.asarray(category_ids, np.int32)

    def detect(image: jax.Array, size: jax.Array) -> dict[str, jax.Array]:
        params, frozen = jax.tree.map(jnp.asarray, weights)
        found = predict_step(params, frozen, _batch(image, size))
        told = {
            "boxes": found.boxes,
            "scores": found.scores,
            "category_ids": jnp.asarray(ids)[found.labels],
            "valid": found.valid,
        }
        return told if found.masks is None else told | {"masks": found.masks}

    image = jax.ShapeDtypeStruct((batch, *canvas, 3), np.uint8)
    size = jax.ShapeDtypeStruct((batch, 2), np.int32)
    return bytes(export.export(jax.jit(detect), platforms=PLATFORMS)(image, size).serialize())


def _batch(image: Any, size: Any) -> Batch:
    """What the detector reads of a batch, and nothing for the rest."""
    rows = image.shape[0]
    truth = Truth(
        jnp.zeros((rows, 0, 4)), jnp.zeros((rows, 0), jnp.int32), jnp.zeros((rows, 0), bool), None
    )
    return Batch(image, size, size, jnp.arange(rows), jnp.ones(rows, bool), truth)
