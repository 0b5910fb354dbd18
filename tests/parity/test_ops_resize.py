"""The resize on the host against torchvision's GeneralizedRCNNTransform, and where it differs."""

import numpy as np
import pytest

from sephjax.input import transforms

torch = pytest.importorskip("torch")
transform = pytest.importorskip("torchvision.models.detection.transform")

pytestmark = pytest.mark.torch
SIZES = [(48, 64), (64, 48), (47, 61), (33, 99), (60, 60), (97, 41), (50, 75), (31, 200)]
SHORT, LONG = 80, 133  # a tenth of the usual 800 and 1333


def resized(image, boxes):
    """torchvision's picture [h, w, 3] in 0..255 and boxes, before normalisation."""
    resize = transform.GeneralizedRCNNTransform(SHORT, LONG, [0.0] * 3, [1.0] * 3).eval().resize
    tensor = torch.tensor(image).permute(2, 0, 1).float()
    picture, truth = resize(tensor, {"boxes": torch.tensor(boxes, dtype=torch.float32)})
    return picture.permute(1, 2, 0).numpy(), truth["boxes"].numpy()


def smooth(height, width):
    """A picture without noise: where sizes differ by a pixel, values stay comparable."""
    y, x = np.mgrid[:height, :width].astype(float)
    waves = [np.sin(y / 9 + k) + np.cos(x / 11 - k) for k in range(3)]
    return np.round(127 + 60 * np.stack(waves, -1)).astype(np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_the_new_size_is_torchvisions_or_one_pixel_more(size):
    # torchvision cuts the fraction of a side off, ours (detectron2's rule) rounds half up.
    picture, _ = resized(smooth(*size), np.zeros((0, 4)))
    new = transforms.resized_shape(*size, SHORT, LONG, "keep_aspect")
    scale = min(SHORT / min(size), LONG / max(size))
    for ours, theirs, side in zip(new, picture.shape[:2], size, strict=True):
        assert theirs == int(np.floor(side * scale))
        assert ours == int(np.floor(side * scale + 0.5))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("noise", [True, False])
def test_pixels_and_boxes_of_a_resize_to_torchvisions_size_agree(size, noise):
    image = smooth(*size)
    if noise:
        image = np.random.default_rng(0).integers(0, 256, image.shape, np.uint8)
    boxes = np.array([[3.5, 4.25, 20.0, 30.5], [0, 0, size[1], size[0]]])
    picture, scaled = resized(image, boxes)
    height, width = picture.shape[:2]
    canvas = np.zeros((160, 160, 3), np.uint8)
    transforms.resize_onto(canvas, image, height, width)
    # Bytes against floats: rounding is half a level, OpenCV's fixed point another half.
    assert np.abs(canvas[:height, :width] - picture).max() <= 1.0
    ours = transforms.scale_boxes(boxes, size, (height, width))
    np.testing.assert_allclose(ours, scaled, rtol=1e-6, atol=1e-5)
