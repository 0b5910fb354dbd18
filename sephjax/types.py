"""The data that flows between the parts: frozen dataclasses that JAX treats as pytrees.

Axis letters: `b` image, `n` anchors or proposals, `m` ground truths, `r` sampled ROIs, `d`
detections, `k` classes. Boxes are float32 `(x1, y1, x2, y2)` in pixels of the padded network input,
continuous edges. Labels are int32 `0..k-1`; background is `k`. A set of things has a fixed size and
a bool `valid`; what is not valid holds finite numbers without meaning.
"""

import dataclasses
import typing
from typing import Any, TypeVar

import jax

Array = Any  # a jax.Array inside jit, an np.ndarray on the host
Params = dict[str, Any]
T = TypeVar("T")


@typing.dataclass_transform(frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Makes `cls` a frozen dataclass whose fields are pytree children."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree
class Truth:
    """Ground truth of a batch, padded to `m` objects an image."""

    boxes: Array  # float32 [b, m, 4]
    labels: Array  # int32 [b, m]
    valid: Array  # bool [b, m]
    masks: (
        Array | None
    )  # uint8 [b, m, 112, 112], 0 or 1, each in the frame of its own box; None: box-only data


@pytree
class Batch:
    """One batch, global or of a process; every image lies top-left on a canvas of one size."""

    image: Array  # uint8 [b, h, w, 3], RGB; 0 in the padding
    size: Array  # int32 [b, 2], valid height and width on the canvas
    original: Array  # int32 [b, 2], height and width of the file
    index: Array  # int32 [b], position of the image in its source (the source knows its id)
    valid: Array  # bool [b], False for the filling of a last evaluation batch
    truth: Truth


@pytree
class Match:
    """What a matcher says of each box; a box that is neither positive nor negative is ignored."""

    index: Array  # int32 [n], the ground truth it belongs to; meaningful where positive
    iou: Array  # float32 [n], IoU with its best ground truth, 0 without any
    positive: Array  # bool [n]
    negative: Array  # bool [n]


@pytree
class Proposals:
    """Candidate boxes of a batch, best first within a level."""

    boxes: Array  # float32 [b, n, 4]
    scores: Array  # float32 [b, n], objectness logits
    valid: Array  # bool [b, n]


@pytree
class RpnOutputs:
    """Raw RPN outputs of all anchors: levels fine to coarse, cells row-major, then anchors."""

    logits: Array  # float32 [b, n]
    deltas: Array  # float32 [b, n, 4]


@pytree
class RpnTargets:
    """What the RPN should say at the sampled anchors."""

    boxes: Array  # float32 [b, n, 4], the matched ground truth; meaningful where positive
    positive: Array  # bool [b, n], sampled positives
    negative: Array  # bool [b, n], sampled negatives


@pytree
class Rois:
    """ROIs sampled for training; what was sampled as a positive comes first."""

    boxes: Array  # float32 [b, r, 4]
    labels: Array  # int32 [b, r], k for background
    matched: Array  # int32 [b, r], index of the ground truth; meaningful where positive
    targets: Array  # float32 [b, r, 4], the matched ground-truth box; meaningful where positive
    iou: Array  # float32 [b, r], IoU with the best ground truth
    positive: Array  # bool [b, r], foreground by the matcher, however it was sampled
    valid: Array  # bool [b, r]


@pytree
class BoxOutputs:
    """Raw box-head outputs of a list of ROIs."""

    logits: Array  # float32 [..., k + 1], background last
    deltas: Array  # float32 [..., k, 4], or [..., 1, 4] when class-agnostic
    iou: Array | None = None  # float32 [...], logit of the box's IoU; None without the IoU branch
    features: Array | None = None  # [..., h, w, c], what a mask head may read; in training only


@pytree
class TrainOutputs:
    """All that the losses need of one batch."""

    anchors: Array  # float32 [n, 4]
    rpn: RpnOutputs
    rpn_targets: RpnTargets
    rois: Rois
    boxes: BoxOutputs  # [b, r, ...]
    mask_sum: Array | None  # float32 [], mask loss summed over the positives of the batch
    later: tuple[tuple[Rois, BoxOutputs], ...] = ()  # of a cascade's stages after the first


@pytree
class Detections:
    """Final detections, best first; masks are probabilities in the frame of each box."""

    boxes: Array  # float32 [b, d, 4]
    scores: Array  # float32 [b, d]
    labels: Array  # int32 [b, d]
    valid: Array  # bool [b, d]
    masks: Array | None  # float32 [b, d, 28, 28], or None without a mask head


@pytree
class Weights:
    """All weights of a model."""

    params: Params
    frozen: Params


@pytree
class TrainState:
    """All that a run needs to go on: saved whole, restored whole."""

    step: Array  # int32 []
    params: Params  # float32, trained
    frozen: Params  # loaded and saved with the weights, never differentiated
    opt_state: Any
    key: Array  # the run's root key; a step's key is folded from it
    averages: Weights | None = None  # float32, with train.ema: moving averages of all weights

    @property
    def best(self) -> Weights:
        """The weights to evaluate: the averages where the run has them."""
        if self.averages is not None:
            return self.averages
        return Weights(self.params, self.frozen)
