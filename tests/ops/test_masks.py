import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
    """One bilinear look-up for each bin centre."""
    out = np.zeros((size, size))
    for i in range(size):
        for j in range(size):
            y = roi[1] + (i + 0.5) / size * (roi[3] - roi[1])
            x = roi[0] + (j + 0.5) / size * (roi[2] - roi[0])
            if not (box[0] <= x <= box[2] and box[1] <= y <= box[3]):
                continue
            v = min(max((y - box[1]) / (box[3] - box[1]) * SIDE - 0.5, 0), SIDE - 1)
            u = min(max((x - box[0]) / (box[2] - box[0]) * SIDE - 0.5, 0), SIDE - 1)
            v0, u0 = min(int(v), SIDE - 2), min(int(u), SIDE - 2)
            fv, fu = v - v0, u - u0
            patch = mask[v0 : v0 + 2, u0 : u0 + 2]
            out[i, j] = np.array([1 - fv, fv]) @ patch @ np.array([1 - fu, fu])
    return out


def test_a_crop_agrees_with_a_loop():
    masks = random_blobs(0, 2)
    boxes = np.array([[10, 20, 90, 140], [30, 5, 61, 44]], np.float32)
    rois = np.array([[5, 15, 80, 150], [33, 9, 50, 40], [60, 60, 200, 100]], np.float32)
    matched = np.array([0, 1, 0])
    crops = mask_ops.crop_masks(
        *map(jnp.asarray, (masks, boxes, rois, matched)), output_size=14, samples=1
    )
    expected = [
        brute_crop(masks[g], boxes[g], roi, 14) for g, roi in zip(matched, rois, strict=True)
    ]
    np.testing.assert_allclose(crops, expected, atol=2e-4)


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


def test_more_samples_average_the_bin():
    mask = jnp.zeros((1, SIDE, SIDE), jnp.uint8).at[:, :, :56].set(1)
    box = jnp.array([[0.0, 0.0, 112.0, 112.0]])
    # Four bins of 28 pixels from x = 14: the edge at 56 lies in the middle of the second.
    roi = jnp.array([[14.0, 0.0, 126.0, 112.0]])
    crop = mask_ops.crop_masks(mask, box, roi, jnp.array([0]), output_size=4, samples=2)
    np.testing.assert_allclose(crop[0, 0], [1.0, 0.5, 0.0, 0.0], atol=1e-5)


def test_a_box_without_area_gives_zeros_and_a_roi_without_area_is_finite():
    masks = jnp.ones((1, SIDE, SIDE), jnp.uint8)
    box, point = jnp.array([[4.0, 2.0, 8.0, 7.0]]), jnp.array([[5.0, 5.0, 5.0, 5.0]])
    assert float(mask_ops.crop_masks(masks, point, box, jnp.array([0])).max()) == 0.0
    np.testing.assert_allclose(
        mask_ops.crop_masks(masks, box, point, jnp.array([0])), 1.0, atol=1e-6
    )


def test_crops_can_be_mapped_over_images():
    masks = jnp.asarray(random_blobs(1, 4)).reshape(2, 2, SIDE, SIDE)
    boxes = jnp.array([[[0.0, 0, 50, 50], [10.0, 10, 30, 60]]] * 2)
    matched = jnp.array([[0, 1], [1, 1]])
    together = jax.jit(jax.vmap(mask_ops.crop_masks))(masks, boxes, boxes, matched)
    alone = mask_ops.crop_masks(masks[1], boxes[1], boxes[1], matched[1])
    np.testing.assert_allclose(together[1], alone, atol=1e-5)


@pytest.mark.torch
def test_a_crop_agrees_with_torchs_grid_sample():
    torch = pytest.importorskip("torch")
    masks = random_blobs(2, 1)
    box, roi = np.array([[10, 20, 90, 140]], np.float32), np.array([[20, 30, 85, 120]], np.float32)
    crop = mask_ops.crop_masks(*map(jnp.asarray, (masks, box, roi, np.array([0]))), samples=1)
    centres = (np.arange(28) + 0.5) / 28
    x = (roi[0, 0] + centres * (roi[0, 2] - roi[0, 0]) - box[0, 0]) / (box[0, 2] - box[0, 0])
    y = (roi[0, 1] + centres * (roi[0, 3] - roi[0, 1]) - box[0, 1]) / (box[0, 3] - box[0, 1])
    grid = np.stack(np.meshgrid(x * 2 - 1, y * 2 - 1), axis=-1)[None].astype(np.float32)
    theirs = torch.nn.functional.grid_sample(
        torch.from_numpy(masks[None].astype(np.float32)),
        torch.from_numpy(grid),
        align_corners=False,
    )
    np.testing.assert_allclose(crop, theirs[0].numpy(), atol=2e-4)
