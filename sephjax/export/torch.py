"""The detector as a PyTorch module, and its weights there and back, bit for bit.

The module itself is `export/twin.py`; torch is imported where it is first needed, since it is an
optional extra (`pip install sephjax[torch]`).

A twin file holds all that is needed to rebuild the module: the resolved config (JSON), the number
of classes and the state dict; it is read with `torch.load(..., weights_only=True)`.
"""

import json
import os
import pathlib
import pickle
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs._chain import flat, plain
from sephjax import build
from sephjax.errors import UserError
from sephjax.export import names
from sephjax.nets.functional import check_same
from sephjax.types import Params
from sephjax.weights import files, table
from sephjax.weights.contents import Contents

FORMAT = "sephjax twin 1"
# Keys that say what given weights compute, so a file's config must have the same; a name with a dot
# at its end stands for everything below it.
MEANING = (
    "mask_padding",
    "heads_bn.eps",
    "backbone.depth",
    "backbone.layout",
    "backbone.width",
    "backbone.norm",
    "backbone.norm_eps",
    "fpn.",
    "anchors.",
    "rpn.name",
    "rpn.levels",
    "rpn.convs",
    "rpn.norm",
    "rpn.weights",
    "roi.levels",
    "roi.canonical.",
    "roi.pooler.",
    "roi.head.",
    "roi.class_agnostic",
    "roi.weights",
    "roi.cascade.weights",
    "mask.enabled",
    "mask.input",
    "mask.convs",
    "mask.dim",
    "mask.norm",
    "mask.deconv_norm",
    "mask.pool",
)


def build_twin(config: ConfigDict, classes: int) -> Any:
    """The `torch.nn.Module` of a config, in evaluation mode, with torch's initial weights.

    Call it as `twin(images, size)`: uint8 RGB [b, h, w, 3] and int [b, 2]; see `twin.Twin.forward`.

    Raises:
        UserError: torch is not installed, or the twin does not have a component of the config.
    """
    _torch()
    names.rules(config)  # refuses what the twin does not have
    from sephjax.export import twin

    return twin.Twin(config, classes).eval()


def load_twin(twin: Any, params: Params, frozen: Params) -> None:
    """Copies our weights into a twin.

    Raises:
        UserError: they are not those of the twin's config, or not float32.
    """
    state = _state(twin.config, twin.classes, params, frozen)
    twin.load_state_dict({name: _torch().from_numpy(value) for name, value in state.items()})


def save_twin(
    config: ConfigDict, classes: int, params: Params, frozen: Params, path: str | os.PathLike[str]
) -> int:
    """Writes a twin file; returns the number of its tensors.

    Raises:
        UserError: the weights are not those of the config, or the file cannot be written.
    """
    torch = _torch()
    state = _state(config, classes, params, frozen)
    content = {
        "format": FORMAT,
        "config": json.dumps(config.to_dict()),
        "classes": classes,
        "state_dict": {name: torch.from_numpy(value) for name, value in state.items()},
    }
    file = pathlib.Path(path)
    files.write_with(torch.save, content, file, "choose another")
    return len(state)


def read(path: str) -> Contents:
    """What a twin file holds, as the readers of `weights.formats` give it.

    Raises:
        UserError: it is no twin file, or a tensor is not float32.
    """
    content = _read(path)
    config = _config(content)
    _check_float32(content["state_dict"], path)
    return Contents(
        source=path,
        tensors={name: tensor.numpy() for name, tensor in content["state_dict"].items()},
        rules=names.rules(config),
        layout=config.backbone.layout,
        whole=True,
        classes=content["classes"],
    )


def check_meaning(path: str | os.PathLike[str], config: ConfigDict) -> None:
    """Compares the config of a twin file with `config`.

    Raises:
        UserError: it is no twin file, or a key differs that says what given weights compute.
    """
    there, here = dict(flat(_config(_read(path)))), dict(flat(config))
    below = tuple(name for name in MEANING if name.endswith("."))
    keys = [key for key in sorted(there | here) if key in MEANING or key.startswith(below)]
    told = [
        f"{key} is {there.get(key, 'absent')!r} there and {here.get(key, 'absent')!r} here"
        for key in keys
        if there.get(key) != here.get(key)
    ]
    if told:
        raise UserError(
            f"{path} was written from another model: {'; '.join(told)}; set these keys alike."
        )


def twin_from_file(path: str | os.PathLike[str]) -> Any:
    """The twin that a file holds, rebuilt from the file alone.

    Raises:
        UserError: it is no twin file, or a damaged one.
    """
    content = _read(path)
    twin = build_twin(_config(content), content["classes"])
    try:
        twin.load_state_dict(content["state_dict"])
    except RuntimeError as error:
        raise UserError(f"{path} is damaged ({_line(error)}); write it anew.") from error
    return twin


def _torch() -> Any:
    try:
        import torch
        import torchvision  # noqa: F401, the twin's operators
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed, which a PyTorch twin needs; "
            "run pip install 'sephjax[torch]'."
        ) from error
    return torch


def _state(
    config: ConfigDict, classes: int, params: Params, frozen: Params
) -> dict[str, np.ndarray]:
    """Our weights under the twin's names, each an array of its own."""
    abstract = build.model(config, classes).abstract
    check_same(abstract[0], params, "parameters")
    check_same(abstract[1], frozen, "frozen values")
    ours = jax.device_get(table.flatten(params) | table.flatten(frozen))
    _check_float32(ours, "the model")
    return {name: x.copy(order="C") for name, x in table.save(names.rules(config), ours).items()}


def _check_float32(arrays: Mapping[str, Any], source: str) -> None:
    """Of NumPy's arrays or torch's tensors."""
    for name, value in arrays.items():
        if (dtype := str(value.dtype).removeprefix("torch.")) != "float32":
            raise UserError(f"{name} of {source} is {dtype}; it must be float32.")


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        content = _torch().load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); correct the path.") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"{path} is no twin file ({_line(error)}); write one first.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no twin file of format {FORMAT!r}; write one first.")
    return content


def _config(content: Mapping[str, Any]) -> ConfigDict:
    return ConfigDict(plain(json.loads(content["config"]))).lock()


def _line(error: BaseException) -> str:
    """An error as part of a sentence."""
    lines = str(error).strip().splitlines()
    return (
        f"{type(error).__name__}: {lines[0][:200].rstrip(' .:')}" if lines else type(error).__name__
    )
