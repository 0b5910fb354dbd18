"""IoU in NumPy and greedy suppression as a loop, for the tests of what is built on them."""

import numpy as np


def iou(a, b):
    """IoU of boxes [..., 4], one with one or by NumPy's broadcasting; 0 where there is no area."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.prod(sides.clip(min=0), axis=-1)
    area = lambda x: np.prod(x[..., 2:] - x[..., :2], axis=-1)
    union = area(a) + area(b) - shared
    return np.divide(shared, union, out=np.zeros_like(union), where=union > 0)


def greedy_nms(boxes, scores, threshold, classes=None, *, inclusive=False):
    """Indices of the kept boxes by falling score."""
    kept = []
    for i in np.argsort(-np.asarray(scores), kind="stable"):
        rivals = (j for j in kept if classes is None or classes[i] == classes[j])
        overlaps = [iou(boxes[i], boxes[j]) for j in rivals]
        if not any(o >= threshold if inclusive else o > threshold for o in overlaps):
            kept.append(i)
    return kept
