"""What every source yields: one decoded picture with its objects, and the protocol of a source."""

import dataclasses
import io
import re
from typing import Any, Protocol

import cv2
import numpy as np
from PIL import Image

from sephjax.input.objects import Objects, Segmentation, usable_boxes

# Neither a stuffed byte of a scan, nor a restart, nor filling.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_READ = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION


class UnreadableImage(Exception):  # noqa: N818 (it is no error of the program)
    """A picture that cannot be decoded whole; the pipeline skips it and counts it."""


@dataclasses.dataclass(frozen=True)
class Categories:
    """The classes of a source: ids ascending, label `i` means `ids[i]` and `names[i]`."""

    ids: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclasses.dataclass(frozen=True)
class Example:
    """One picture and its objects, in pixels of the file."""

    image_id: int
    file_name: str
    image: np.ndarray  # uint8 [h, w, 3], RGB
    height: int
    width: int
    boxes: np.ndarray  # float64 [m, 4], (x1, y1, x2, y2) inside the image, no side near 0
    labels: np.ndarray  # int32 [m], 0..k-1
    crowd: np.ndarray  # bool [m]; all False in a training view
    area: np.ndarray  # float64 [m], of the object as the file says, square pixels
    segmentations: list[Segmentation]  # [m]


class Source(Protocol):
    """A set of pictures by position, ascending by image id.

    A training view leaves crowds out of the examples, and images without a usable non-crowd object
    out altogether (when asked); an evaluation view holds every image.
    """

    @property
    def ids(self) -> np.ndarray:
        """Image ids, int64 [n], ascending."""
        ...

    @property
    def sizes(self) -> np.ndarray:
        """Height and width of each image, int32 [n, 2]."""
        ...

    @property
    def categories(self) -> Categories:
        """The classes."""
        ...

    @property
    def has_masks(self) -> bool:
        """Whether every usable non-crowd object has a segmentation."""
        ...

    @property
    def notes(self) -> dict[str, int]:
        """What opening dropped or changed, by kind."""
        ...

    def __len__(self) -> int:
        """Number of images."""
        ...

    def example(self, i: int) -> Example:
        """Reads and decodes image `i`; raises `UnreadableImage`."""
        ...

    def file_name(self, i: int) -> str:
        """Name of image `i`, without reading its picture."""
        ...

    def ground_truth(self) -> dict[str, Any]:
        """Everything annotated on these images, as a COCO JSON object for pycocotools."""
        ...


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decodes JPEG, PNG or whatever else OpenCV reads.

    Grey pictures become three equal channels. The EXIF orientation is ignored, as COCO's boxes do.

    Args:
        data: the whole file.
        name: what an error calls it.

    Returns:
        uint8 [h, w, 3], RGB.

    Raises:
        UnreadableImage: the file is empty, cut short or no picture.
    """
    if not data:
        raise UnreadableImage(f"{name} is empty")
    if _cut_short(data):
        raise UnreadableImage(f"{name} is cut short")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _READ)
    except cv2.error as error:
        raise UnreadableImage(f"{name} cannot be decoded: {error.err}") from error
    if image is None:
        raise UnreadableImage(f"{name} is no picture that OpenCV can decode")
    return image


def _cut_short(data: bytes) -> bool:
    # Decoders fill what is missing with grey and say nothing, so the end marker decides. What
    # follows it (a phone's film, say) is not looked at.
    if data.startswith(b"\xff\xd8"):
        return not _jpeg_ends(data)
    return data.startswith(b"\x89PNG") and not _png_ends(data)


def _jpeg_ends(data: bytes) -> bool:
    """Goes from marker to marker; a segment (with a thumbnail, say) is stepped over."""
    at = 2
    while marker := _MARKER.search(data, at):
        at = marker.end()
        if marker.group() == b"\xff\xd9":
            return True
        at += int.from_bytes(data[at : at + 2])
    return False


def _png_ends(data: bytes) -> bool:
    at = 8
    while at + 8 <= len(data):
        if data[at + 4 : at + 8] == b"IEND":
            return True
        at += 12 + int.from_bytes(data[at : at + 4])
    return False


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Height and width from the head of an image file, without decoding it.

    Raises:
        UnreadableImage: the head is not that of a picture.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImage(f"{name} is no picture: {error}") from error
    return height, width


@dataclasses.dataclass(frozen=True)
class Picture:
    """The bytes of one image file and what its source knows of it."""

    image_id: int
    file_name: str
    height: int
    width: int
    data: bytes


def make_example(picture: Picture, objects: Objects, *, train: bool) -> Example:
    """Decodes a picture and keeps the usable objects of its annotations.

    Args:
        picture: the file.
        objects: its annotations.
        train: leave crowds out.

    Raises:
        UnreadableImage: the file cannot be decoded, or has another size than was announced.
    """
    image = decode_image(picture.data, picture.file_name)
    if image.shape[:2] != (picture.height, picture.width):
        raise UnreadableImage(
            f"{picture.file_name} is {image.shape[0]}x{image.shape[1]} pixels where its "
            f"annotations say {picture.height}x{picture.width}"
        )
    return assemble(picture, image, objects, train=train)


def assemble(picture: Picture, image: np.ndarray, objects: Objects, *, train: bool) -> Example:
    """`make_example` for a picture that is already decoded."""
    size = np.asarray([[picture.height, picture.width]])
    boxes, kind = usable_boxes(objects.bbox, size)
    keep = kind.usable & ~objects.crowd if train else kind.usable
    return Example(
        image_id=picture.image_id,
        file_name=picture.file_name,
        image=image,
        height=picture.height,
        width=picture.width,
        boxes=boxes[keep],
        labels=objects.labels[keep],
        crowd=objects.crowd[keep],
        area=objects.area[keep],
        segmentations=[objects.segmentations[row] for row in np.flatnonzero(keep)],
    )
