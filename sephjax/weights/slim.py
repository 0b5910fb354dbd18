"""TF-slim's `resnet_v1_50` and `_101`, from a TensorFlow 1 checkpoint: layout `slim`.

Names are `resnet_v1_50/block1/unit_1/bottleneck_v1/conv1/weights`; kernels are HWIO like ours.
TensorFlow is imported when such a file is read.
"""

import pathlib
import re

from sephjax.errors import UserError
from sephjax.weights import files, table
from sephjax.weights.contents import Contents

SLIM_EPS = 1e-5  # slim's resnet_arg_scope
_NORM = {"gamma": "gamma", "beta": "beta", "mean": "moving_mean", "variance": "moving_variance"}


def rules(scope: str) -> list[table.Rule]:
    """The table of one network, whose names start with `scope`."""
    ours = "backbone/stage{s}/block{b}/"
    unit = scope + "/block{s}/unit_{b:+1}/bottleneck_v1/"
    found = [
        table.Rule("backbone/stem/conv/kernel", f"{scope}/conv1/weights"),
        table.Rule(ours + "conv{c}/kernel", unit + "conv{c}/weights"),
        table.Rule(ours + "shortcut_conv/kernel", unit + "shortcut/weights"),
    ]
    for mine, theirs in _NORM.items():
        found += [
            table.Rule(f"backbone/stem/norm/{mine}", f"{scope}/conv1/BatchNorm/{theirs}"),
            table.Rule(ours + "norm{c}/" + mine, unit + "conv{c}/BatchNorm/" + theirs),
            table.Rule(ours + "shortcut_norm/" + mine, unit + "shortcut/BatchNorm/" + theirs),
        ]
    return found


def read(path: str) -> Contents:
    """Reads a checkpoint: the one file of its first version, or the prefix of its second.

    Args:
        path: `resnet_v1_50.ckpt`, beside which `.index` and `.data-...` may stand.

    Raises:
        UserError: there is no such checkpoint, or it holds no `resnet_v1`.
    """
    prefix = path.removesuffix(".index")
    if not pathlib.Path(f"{prefix}.index").is_file():
        files.existing(prefix)
    import tensorflow as tf

    try:
        reader = tf.train.load_checkpoint(prefix)
        names = sorted(reader.get_variable_to_shape_map())
        tensors = files.floats({name: reader.get_tensor(name) for name in names})
    except Exception as error:  # errors of TensorFlow, and whatever NumPy makes of the values
        raise UserError(
            f"{path} is no TensorFlow checkpoint ({type(error).__name__}): give the .ckpt file, or "
            "the path up to .index."
        ) from error
    scopes = sorted({name.partition("/")[0] for name in names if re.match(r"resnet_v1_\d+/", name)})
    if len(scopes) != 1:
        raise UserError(
            f"{path} was given as slim, which reads a resnet_v1, and holds "
            f"{' and '.join(scopes) or 'none'} (the first names: {', '.join(names[:3])})."
        )
    scope = scopes[0]
    return Contents(
        path,
        tensors,
        rules(scope),
        layout="slim",
        eps=SLIM_EPS,
        ignore=(f"^{scope}/(logits/|mean_rgb$)", "^global_step$", "/(Momentum|RMSProp|Adam)"),
    )
