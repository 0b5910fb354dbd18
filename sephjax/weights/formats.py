"""The formats that weights come in: what `init.format` and `--source` name."""

from collections.abc import Callable

from sephjax.weights import detectron2, keras, orbax, slim, timm, torchvision
from sephjax.weights.contents import Contents

Reader = Callable[[str], Contents]
FORMATS: dict[str, Reader] = {
    "torchvision": torchvision.read,  # detector or classification ResNet, .pth or .safetensors
    "timm": timm.read,  # classification ResNet, .safetensors or .pth
    "detectron2": detectron2.read,  # model-zoo .pkl, .pth, MSRA R-50.pkl and R-101.pkl
    "keras": keras.read,  # npz of keras.applications' ResNet-50
    "slim": slim.read,  # TensorFlow 1 checkpoint of resnet_v1_50 or _101
    "sephjax": orbax.read,  # workdir of a run
}
