"""Reads the ImageNet ResNet-50 of keras.applications, stored as an npz: layout `msra`, depth 50.

Names are `res2a_branch2a/kernel`, `bn2a_branch2a/gamma`; kernels are HWIO like ours. Its
convolutions have a bias, which is folded into the mean of the norm after it; its norms were trained
with eps 1e-3, and the difference to the model's eps is folded into the variance: nothing is lost.
"""

import os
import pathlib

import numpy as np

from sephjax.errors import UserError
from sephjax.nets.backbone import resnet
from sephjax.types import Params
from sephjax.weights import table

KERAS_EPS = 1e-3

_NORM = {"gamma": "gamma", "beta": "beta", "mean": "moving_mean", "variance": "moving_variance"}
RULES = [
    table.Rule("stem/conv/kernel", "conv1/kernel"),
    table.Rule("stage{s}/block{b}/conv{c}/kernel", "res{s:+1}{b:a}_branch2{c:a1}/kernel"),
    table.Rule("stage{s}/block{b}/shortcut_conv/kernel", "res{s:+1}{b:a}_branch1/kernel"),
    *(
        rule
        for ours, theirs in _NORM.items()
        for rule in (
            table.Rule(f"stem/norm/{ours}", f"bn_conv1/{theirs}"),
            table.Rule(
                "stage{s}/block{b}/norm{c}/" + ours, "bn{s:+1}{b:a}_branch2{c:a1}/" + theirs
            ),
            table.Rule(
                "stage{s}/block{b}/shortcut_norm/" + ours, "bn{s:+1}{b:a}_branch1/" + theirs
            ),
        )
    ),
]


def load_keras_resnet50(
    path: str | os.PathLike[str],
    params: Params,
    frozen: Params,
    layout: str,
    depth: int,
    *,
    eps: float | None = None,
) -> tuple[Params, Params, table.LoadReport]:
    """Loads the file into a backbone.

    Args:
        path: The npz.
        params: Trained values of the backbone, or their shapes.
        frozen: Frozen values of the backbone, or their shapes.
        layout: Of the model; the file has `msra`.
        depth: Of the model; the file has 50.
        eps: Of the model's batch norm; the layout's by default.

    Returns:
        New `(params, frozen)` of float32 NumPy arrays, and the report; the classifier is unused.

    Raises:
        UserError: another layout or depth, no such file, or tensors that do not fit.
    """
    if (layout, depth) != ("msra", 50):
        raise UserError(
            f"The weights in {path} are a ResNet-50 of layout 'msra' and the config asks for a "
            f"ResNet-{depth} of layout {layout!r}: set the backbone to the former or take others."
        )
    if not pathlib.Path(path).is_file():
        raise UserError(f"There is no weight file {path}: check init.path.")
    with np.load(path) as archive:
        tensors = {name: np.asarray(archive[name], np.float32) for name in archive.files}
    model_eps = resnet.LAYOUTS[layout].eps if eps is None else eps
    flat_params, flat_frozen = table.flatten(params), table.flatten(frozen)
    arrays, report = table.load(
        RULES,
        flat_params | flat_frozen,
        _fold(tensors, model_eps),
        source=str(path),
        ignore=("^fc1000/",),
    )
    return (
        table.unflatten({path: arrays[path] for path in flat_params}),
        table.unflatten({path: arrays[path] for path in flat_frozen}),
        report,
    )


def _fold(tensors: table.Arrays, eps: float) -> table.Arrays:
    """Moves biases into means and the difference of eps into variances."""
    folded = {}
    for name, value in tensors.items():
        layer, kind = name.rsplit("/", 1)
        if kind == "moving_mean":
            conv = "conv1" if layer == "bn_conv1" else "res" + layer.removeprefix("bn")
            value = value - tensors[f"{conv}/bias"]  # (x + bias) - mean = x - (mean - bias)
        elif kind == "moving_variance":
            value = value + np.float32(KERAS_EPS - eps)
        if kind != "bias" or layer == "fc1000":
            folded[name] = value
    return folded
