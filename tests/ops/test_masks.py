import cv2
import jax
import jax.numpy as jnp
import numpy as np

from sephjax.ops import masks as mask_ops

SIDE = 112


def random_blobs(seed, count):
    """[count, SIDE, SIDE] uint8, each an ellipse."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    radius = rng.uniform(20, 60, (count, 2))
    centre = rng.uniform(40, 70, (count, 2))
    return np.stack(
        [
            (((y - c[0]) / r[0]) ** 2 + ((x - c[1]) / r[1]) ** 2 <= 1).astype(np.uint8)
            for r, c in zip(radius, centre, strict=True)
        ]
    )


def brute_crop(mask, box, roi, size):
    """Every bin against every cell: the area they share, one by one."""
    out = np.zeros((size, size))
    step = (roi[2:] - roi[:2]) / size
    cell = (box[2:] - box[:2]) / SIDE
    for i, j in np.ndindex(size, size):
        low = roi[:2] + np.array([j, i]) * step
        for v, u in np.argwhere(mask):
            corner = box[:2] + np.array([u, v]) * cell
            sides = np.minimum(low + step, corner + cell) - np.maximum(low, corner)
            out[i, j] += np.prod(np.maximum(sides, 0)) / np.prod(step)
    return out


def test_a_crop_agrees_with_a_loop_over_bins_and_cells():
    masks = np.zeros((2, SIDE, SIDE), np.uint8)
    masks[0, 17:29, 40:53], masks[1, :9, 100:] = 1, 1
    boxes = np.array([[10, 20, 90, 140], [30, 5, 61, 44]], np.float64)
    rois = np.array([[5, 15, 80, 150], [33, 1, 70, 40], [40, 40, 45, 46]], np.float64)
    matched = np.array([0, 1, 0])
    crops = mask_ops.crop_masks(
        jnp.asarray(masks),
        *(jnp.asarray(x, jnp.float32) for x in (boxes, rois)),
        jnp.asarray(matched),
        output_size=7,
    )
    expected = [
        brute_crop(masks[g], boxes[g], roi, 7) for g, roi in zip(matched, rois, strict=True)
    ]
    np.testing.assert_allclose(crops, expected, atol=2e-5)  # float32 edges in pixels up to 150


def test_a_crop_agrees_with_opencvs_area_resize():
    masks = random_blobs(3, 1)
    # Pixels and cells are one here; 28 bins of 2.54 by 3.61 cells.
    box, roi = np.array([[0, 0, SIDE, SIDE]], np.float32), np.array([[20, 5, 91, 106]], np.float32)
    crop = mask_ops.crop_masks(*map(jnp.asarray, (masks, box, roi, np.array([0]))))
    patch = masks[0, 5:106, 20:91].astype(np.float32)
    expected = cv2.resize(patch, (28, 28), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(crop[0], expected, atol=1e-5)


def test_a_full_mask_is_one_on_exactly_its_box():
    masks = jnp.ones((1, SIDE, SIDE), jnp.uint8)
    crop = mask_ops.crop_masks(
        masks,
        jnp.array([[4.0, 2.0, 8.0, 7.0]]),
        jnp.array([[0.0, 0.0, 10.0, 10.0]]),
        jnp.array([0]),
        output_size=10,
    )
    expected = np.zeros((10, 10))
    expected[2:7, 4:8] = 1
    np.testing.assert_allclose(crop[0], expected, atol=1e-6)


def test_a_bin_that_an_edge_cuts_in_half_is_one_half():
    mask = jnp.zeros((1, SIDE, SIDE), jnp.uint8).at[:, :, :56].set(1)
    box = jnp.array([[0.0, 0.0, 112.0, 112.0]])
    # Four bins of 28 pixels from x = 14: the edge at 56 lies in the middle of the second.
    roi = jnp.array([[14.0, 0.0, 126.0, 112.0]])
    crop = mask_ops.crop_masks(mask, box, roi, jnp.array([0]), output_size=4)
    np.testing.assert_allclose(crop[0, 0], [1.0, 0.5, 0.0, 0.0], atol=1e-5)


def test_a_box_or_a_roi_without_area_gives_zeros():
    masks = jnp.ones((1, SIDE, SIDE), jnp.uint8)
    box, point = jnp.array([[4.0, 2.0, 8.0, 7.0]]), jnp.array([[5.0, 5.0, 5.0, 5.0]])
    inverted = box[:, jnp.array([2, 3, 0, 1])]
    for of, at in ((point, box), (box, point), (inverted, box), (box, inverted)):
        crop = mask_ops.crop_masks(masks, of, at, jnp.array([0]))
        np.testing.assert_array_equal(crop, np.zeros_like(crop))


def test_crops_can_be_mapped_over_images():
    masks = jnp.asarray(random_blobs(1, 4)).reshape(2, 2, SIDE, SIDE)
    boxes = jnp.array([[[0.0, 0, 50, 50], [10.0, 10, 30, 60]]] * 2)
    matched = jnp.array([[0, 1], [1, 1]])
    together = jax.jit(jax.vmap(mask_ops.crop_masks))(masks, boxes, boxes, matched)
    alone = mask_ops.crop_masks(masks[1], boxes[1], boxes[1], matched[1])
    np.testing.assert_allclose(together[1], alone, atol=1e-5)
