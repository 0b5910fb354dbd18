"""timm's plain ResNets (`resnet18`, `34`, `50`, `101`), which have torchvision's names."""

from sephjax.weights import files, kinds, torchvision
from sephjax.weights.contents import Contents


def read(path: str) -> Contents:
    """Reads a ResNet of timm: `.safetensors` or `.pth`; layout `torchvision`.

    Raises:
        UserError: the file cannot be read or holds something else, such as a variant with a deep
            stem (`resnet50d`).
    """
    tensors = files.read_torch(path)
    kinds.require(tensors, path, "timm", kinds.RESNET)
    return torchvision.resnet(path, tensors)
