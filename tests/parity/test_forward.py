"""What the rows `torchvision` of mask_rcnn compute is what torchvision's models compute.

Three real pictures of different shape lie on one canvas that none of them fills. The weights are
random, the same on both sides, and behave like trained ones (benchmarks/peer.py). With `-s` the
largest differences are printed.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from sephjax import build
from sephjax.evaluation import paste
from sephjax.train import step
from tests.export.parity import paired
from tests.parity import pictures, sides

torch = pytest.importorskip("torch")
pytestmark = [pytest.mark.torch, pytest.mark.data]

PROPOSALS = 200  # an image; torchvision's 1,000 are only more of the same
# Pixels: of a box that the border cuts down so far, 1e-4 of an anchor is more than 0.001 IoU.
SLIVER = 1e-3


@dataclasses.dataclass(frozen=True)
class Compared:
    """One row on both sides: everything of ours by batch, everything of theirs by image."""

    batch: Any
    ours: Any  # pyramid, RPN outputs, proposals, detections
    theirs: Any


@pytest.fixture(scope="module", params=sides.PEERS)
def both(request, shared_data):
    batch = pictures.batch(shared_data)
    theirs = sides.theirs(request.param, batch, proposals=PROPOSALS)
    ours = sides.ours(request.param, theirs, **{"rpn.proposals.test_post": PROPOSALS})
    return Compared(batch, run_ours(ours, batch), run_theirs(theirs, batch))


def run_ours(ours, batch):
    model, masks = ours.model, ours.config.mask.enabled
    predict = step.make_predict_step(model, build.classify(ours.config), masks=masks)

    def everything(params, frozen, batch):
        pyramid, proposals, _ = model.apply(params, frozen, batch, method="candidates")
        rpn = model.apply(params, frozen, pyramid, method="rpn.__call__")
        return pyramid, rpn, proposals, predict(params, frozen, batch)

    return jax.device_get(jax.jit(everything)(ours.params, ours.frozen, batch))


def run_theirs(model, batch):
    images, _ = model.transform(pictures.tensors(batch))
    sizes = [tuple(size) for size in batch.size.tolist()]
    assert images.tensors.shape[2:] == pictures.CANVAS
    assert images.image_sizes == sizes
    with torch.no_grad():
        features = model.backbone(images.tensors)
        head = model.rpn.head(list(features.values()))
        kept = []
        model.rpn.filter_proposals = keep_scores(model.rpn.filter_proposals, kept)
        proposals, _ = model.rpn(images, features)
        found, _ = model.roi_heads(features, proposals, sizes)
    return features, head, kept[0], [{k: v.numpy() for k, v in one.items()} for one in found]


def keep_scores(method, kept):
    """`filter_proposals` that also writes down what it returns: the RPN drops the scores."""

    def run(*args):
        kept.append(method(*args))
        return kept[-1]

    return run


def partners(found, i, theirs):
    """For each of their detections the one of ours it is."""
    kept = found.valid[i]
    labels = theirs["labels"], found.labels[i][kept] + 1
    return paired(theirs["boxes"], found.boxes[i][kept], *labels, sliver=SLIVER)


def below(limit, what, *differences):
    """Asserts that each difference is below `limit`, and prints the largest."""
    worst = max(float(np.max(difference)) for difference in differences)
    print(f"\nlargest difference, {what}: {worst:.1e}")
    assert worst <= limit


def test_every_level_of_the_pyramid(both):
    pyramid, features = both.ours[0], both.theirs[0]
    assert len(pyramid) == len(features) == 5
    pairs = zip(pyramid.values(), features.values(), strict=True)
    errors = [sides.relative_error(x, y.permute(0, 2, 3, 1).numpy()) for x, y in pairs]
    below(1e-4, "pyramid, relative", *errors)


def test_logits_and_deltas_of_every_anchor_in_order(both):
    rpn, (logits, deltas) = both.ours[1], both.theirs[1]
    images = len(both.batch.size)
    last = lambda maps, width: np.concatenate(
        [x.permute(0, 2, 3, 1).reshape(images, -1, width).numpy() for x in maps], axis=1
    )
    # Relative, since rounding is: logits reach 12.
    below(1e-4, "RPN logits, relative", sides.relative_error(rpn.logits, last(logits, 1)[..., 0]))
    below(1e-4, "RPN deltas, relative", sides.relative_error(rpn.deltas, last(deltas, 4)))


def test_proposals_one_to_one(both):
    proposals, (boxes, scores) = both.ours[2], both.theirs[2]
    apart, scored = [], []
    for i in range(len(both.batch.size)):
        kept = proposals.valid[i]
        assert kept.sum() == PROPOSALS
        mine = paired(boxes[i].numpy(), proposals.boxes[i][kept], sliver=SLIVER)
        apart.append(np.abs(proposals.boxes[i][kept][mine] - boxes[i].numpy()))
        probability = 1 / (1 + np.exp(-proposals.scores[i][kept][mine]))
        scored.append(np.abs(probability - scores[i].numpy()))
    below(0.1, "proposals, pixels", *apart)  # `paired` has the bound: IoU 0.999
    below(1e-4, "proposals, score", *scored)


def test_detections_one_to_one(both):
    found, raw = both.ours[3], both.theirs[3]
    apart, scored, masked, counts = [], [], [], []
    for i, theirs in enumerate(raw):
        kept = found.valid[i]
        mine = partners(found, i, theirs)
        apart.append(np.abs(found.boxes[i][kept][mine] - theirs["boxes"]))
        scored.append(np.abs(found.scores[i][kept][mine] - theirs["scores"]))
        if "masks" in theirs:
            masked.append(np.abs(found.masks[i][kept][mine] - theirs["masks"][:, 0]))
        counts.append(len(mine))
    assert min(counts) >= 5, counts
    print(f"\n{sum(counts)} detections")
    below(0.1, "detections, pixels", *apart)  # `paired` has the bound: IoU 0.999
    below(1e-4, "detections, score", *scored)
    if masked:
        below(1e-3, "mask probabilities", *masked)


def test_pasted_masks(both):
    """By our paste, and by torchvision's.

    The two do not mix: torchvision cuts a box down to whole pixels before it pastes. For the same
    reason its paste gets their boxes both times, lest rounding move a mask by a pixel.
    """
    found, raw = both.ours[3], both.theirs[3]
    if found.masks is None:
        assert "masks" not in raw[0]
        return
    for i, theirs in enumerate(raw):
        kept, size = found.valid[i], tuple(both.batch.original[i].tolist())
        scale = np.float32(np.tile(np.array(size)[::-1] / both.batch.size[i][::-1], 2))
        mine = partners(found, i, theirs)
        boxes, their_boxes = found.boxes[i][kept][mine] * scale, theirs["boxes"] * scale
        masks, their_masks = found.masks[i][kept][mine], theirs["masks"][:, 0]
        ours = paste_ours(masks, boxes, size)
        same = paste_ours(their_masks, their_boxes, size)
        theirs = paste_theirs(their_masks, their_boxes, size)
        # A box under a pixel high has a row of pixels, covered by a half or nearly: 1e-3 pixels of
        # its corners may turn some, 2 of 39 have been seen.
        whole = (their_boxes[:, 2:] - their_boxes[:, :2]).min(axis=1) >= 1
        assert np.sum(~whole) <= 2
        assert np.all((ours ^ same)[~whole].sum(axis=(1, 2)) <= 3)
        missed = (
            1 - overlaps(ours, same)[whole],
            1 - overlaps(paste_theirs(masks, their_boxes, size), theirs),
        )
        below(0.01, "pasted masks, 1 - IoU", *missed)


def overlaps(ours, theirs):
    """IoU of each pair of masks; 1 where both are empty."""
    union = (ours | theirs).sum(axis=(1, 2))
    return np.where(union > 0, (ours & theirs).sum(axis=(1, 2)) / np.maximum(union, 1), 1.0)


def paste_ours(masks, boxes, size):
    whole = np.zeros((len(boxes), *size), bool)
    for full, mask, box in zip(whole, masks, boxes, strict=True):
        region, (x, y) = paste.paste(mask, box, size)
        full[y : y + region.shape[0], x : x + region.shape[1]] = region
    return whole


def paste_theirs(masks, boxes, size):
    from torchvision.models.detection import roi_heads

    arrays = torch.from_numpy(masks[:, None]), torch.from_numpy(boxes)
    return roi_heads.paste_masks_in_image(*arrays, size)[:, 0].numpy() >= 0.5
