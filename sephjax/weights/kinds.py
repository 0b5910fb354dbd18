"""What a file of tensors is, told by one name in it, so that a wrong file is refused in words."""

from collections.abc import Collection

from sephjax.errors import UserError

RESNET = "classification ResNet"
SIGNS = {  # a name that is in each file of a kind: the kind, and the formats that read it
    "backbone.body.conv1.weight": ("detector of torchvision", ("torchvision",)),
    "backbone.bottom_up.stem.conv1.weight": ("detector of detectron2", ("detectron2",)),
    "conv1.weight": (RESNET, ("torchvision", "timm")),
    "conv1_w": ("Caffe2 ResNet (MSRA)", ("detectron2",)),
    "conv1/kernel": ("Keras ResNet", ("keras",)),
    "conv1.0.weight": ("ResNet with a deep stem", ()),
    "stem.conv1.weight": ("ResNet in detectron2's names", ()),
}


def require(tensors: Collection[str], path: str, wanted: str, *kinds: str) -> str:
    """The kind of a file.

    Args:
        tensors: The names in it.
        path: The file, for messages.
        wanted: The format that it was given as.
        kinds: What that format reads.

    Raises:
        UserError: it is of another kind; it names the format to give instead, if there is one.
    """
    kind, formats = next((SIGNS[sign] for sign in SIGNS if sign in tensors), ("", ()))
    if kind in kinds:
        return kind
    if not kind:
        few = ", ".join(sorted(tensors)[:3]) or "none"
        found = f"tensors of neither (the first names: {few})"
    elif formats:
        found = f"a {kind}: give it as {' or '.join(formats)}"
    else:
        found = f"a {kind}, which no layout here has"
    raise UserError(
        f"{path} was given as {wanted}, which reads a {' or a '.join(kinds)}, and holds {found}."
    )
