"""Decoding, held against Pillow."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from sephjax.input.example import UnreadableImage, decode_image, image_size


def picture(seed=0, height=48, width=64):
    small = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_decodes_as_pillow_decodes_it(progressive):
    """Two builds of libjpeg may differ in the inverse DCT and chroma: 3 levels are allowed."""
    data = encoded(picture(), "JPEG", quality=95, progressive=progressive)
    ours = decode_image(data, "a.jpg").astype(int)
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert np.abs(ours - theirs).max() <= 3


@pytest.mark.data
def test_coco_jpegs_decode_as_pillow_decodes_them(shared_data):
    paths = sorted((shared_data / "coco_tiny" / "train").glob("*.jpg"))[:20]
    assert paths
    for path in paths:
        ours = decode_image(path.read_bytes(), path.name).astype(int)
        theirs = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert np.abs(ours - theirs).max() <= 3


def test_a_png_decodes_exactly_and_rgba_loses_its_alpha():
    image = picture()
    np.testing.assert_array_equal(decode_image(encoded(image, "PNG"), "a.png"), image)
    rgba = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
    np.testing.assert_array_equal(decode_image(encoded(rgba, "PNG"), "a.png"), image)


def test_a_grey_jpeg_has_three_equal_channels():
    data = encoded(picture()[..., 0], "JPEG")
    image = decode_image(data, "grey.jpg")
    assert image.shape == (48, 64, 3)
    assert (image == image[..., :1]).all()


def test_the_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    data = encoded(picture(), "JPEG", exif=exif)
    assert decode_image(data, "turned.jpg").shape == (48, 64, 3)
    assert image_size(data, "turned.jpg") == (48, 64)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_file_cut_short_is_unreadable(kind, kept):
    data = encoded(picture(), kind)
    with pytest.raises(UnreadableImage, match="broken"):
        decode_image(data[: int(kept * len(data))], "broken")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("progressive", [False, True])
def test_what_follows_the_end_of_a_picture_is_not_looked_at(kind, progressive):
    """As a phone's film; by chance it holds markers."""
    options = {"progressive": progressive} if kind == "JPEG" else {}
    data = encoded(picture(), kind, **options)
    alone = decode_image(data, "a")
    for seed in range(5):
        trailer = np.random.default_rng(seed).bytes(300_000)
        np.testing.assert_array_equal(decode_image(data + trailer, "a"), alone)
    with pytest.raises(UnreadableImage, match="is cut short"):
        decode_image(data[: len(data) // 2], "a")


def test_a_thumbnail_does_not_hide_that_a_jpeg_is_cut_short():
    thumbnail = encoded(picture(1), "JPEG")
    comment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    data = encoded(picture(), "JPEG")
    data = data[:2] + comment + data[2:]
    assert decode_image(data, "whole.jpg").shape == (48, 64, 3)
    with pytest.raises(UnreadableImage, match="is cut short"):
        decode_image(data[:-200], "broken.jpg")


def test_trailing_bytes_do_no_harm():
    data = encoded(picture(), "JPEG") + b"\0\0trailer"
    assert decode_image(data, "a.jpg").shape == (48, 64, 3)


def test_text_is_no_picture():
    with pytest.raises(UnreadableImage, match="is no picture"):
        decode_image(b"hello world, this is text", "a.txt")
    with pytest.raises(UnreadableImage, match="is no picture"):
        image_size(b"hello world, this is text", "a.txt")
