"""Greedy suppression as a loop in NumPy, for the tests of what is built on it."""

import numpy as np


def iou(a, b):
    """IoU of two boxes; 0 where there is no area."""
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = max(sides[0], 0) * max(sides[1], 0)
    union = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared
    return shared / union if union > 0 else 0.0


def greedy_nms(boxes, scores, threshold, classes=None, *, inclusive=False):
    """Indices of the kept boxes by falling score."""
    kept = []
    for i in np.argsort(-np.asarray(scores), kind="stable"):
        rivals = (j for j in kept if classes is None or classes[i] == classes[j])
        overlaps = [iou(boxes[i], boxes[j]) for j in rivals]
        if not any(o >= threshold if inclusive else o > threshold for o in overlaps):
            kept.append(i)
    return kept
