"""The ImageNet ResNet-50 of keras.applications, stored as an npz: layout `msra`, depth 50.

Names are `res2a_branch2a/kernel`, `bn2a_branch2a/gamma`; kernels are HWIO like ours. Its
convolutions have a bias, which is folded into the mean of the norm after it; its norms were trained
with eps 1e-3, and the difference to the model's eps goes into the variance: nothing is lost.
"""

from sephjax.weights import files, kinds, table
from sephjax.weights.contents import Contents

KERAS_EPS = 1e-3

_OURS = "backbone/stage{s}/block{b}/"
_NORM = {"gamma": "gamma", "beta": "beta", "mean": "moving_mean", "variance": "moving_variance"}
RULES = [
    table.Rule("backbone/stem/conv/kernel", "conv1/kernel"),
    table.Rule(_OURS + "conv{c}/kernel", "res{s:+1}{b:a}_branch2{c:a1}/kernel"),
    table.Rule(_OURS + "shortcut_conv/kernel", "res{s:+1}{b:a}_branch1/kernel"),
    *(
        rule
        for ours, theirs in _NORM.items()
        for rule in (
            table.Rule(f"backbone/stem/norm/{ours}", f"bn_conv1/{theirs}"),
            table.Rule(_OURS + "norm{c}/" + ours, "bn{s:+1}{b:a}_branch2{c:a1}/" + theirs),
            table.Rule(_OURS + "shortcut_norm/" + ours, "bn{s:+1}{b:a}_branch1/" + theirs),
        )
    ),
]


def read(path: str) -> Contents:
    """Reads the npz.

    Raises:
        UserError: the file cannot be read or holds something else.
    """
    tensors = files.read_npz(path)
    kinds.require(tensors, path, "keras", "Keras ResNet")
    folded = {
        f"{conv}/bias": mean
        for mean in tensors
        if mean.endswith("/moving_mean") and f"{(conv := _conv_before(mean))}/bias" in tensors
    }
    means = {  # (x + bias) - mean = x - (mean - bias)
        mean: tensors[mean] - tensors[bias] for bias, mean in folded.items()
    }
    left = {name: value for name, value in tensors.items() if name not in folded}
    return Contents(
        path,
        left | means,
        RULES,
        layout="msra",
        eps=KERAS_EPS,
        ignore=("^fc1000/",),
        folded=folded,
    )


def _conv_before(norm: str) -> str:
    layer = norm.rpartition("/")[0]
    return "conv1" if layer == "bn_conv1" else "res" + layer.removeprefix("bn")
