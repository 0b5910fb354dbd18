"""sephjax's own checkpoints as a format: a workdir, or one step of it."""

import json
import pathlib

from sephjax.checkpoint import Checkpoints
from sephjax.errors import UserError
from sephjax.nets.backbone import resnet
from sephjax.weights import classes, table
from sephjax.weights.contents import Contents


def read(path: str) -> Contents:
    """Reads the newest checkpoint of a workdir, or `<workdir>/checkpoints/<step>`.

    Raises:
        UserError: there is none, or the folder does not say which layout its backbone has.
    """
    place = pathlib.Path(path)
    step = int(place.name) if place.parent.name == "checkpoints" and place.name.isdigit() else None
    workdir = place if step is None else place.parent.parent
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    found = checkpoints.latest() if step is None else step
    if found is None:
        raise UserError(f"{path} holds no finished checkpoint; give the workdir of a run.")
    try:
        config = json.loads((workdir / "config.json").read_text())
        layout = config["backbone"]["layout"]
        eps = config["backbone"]["norm_eps"] or resnet.LAYOUTS[layout].eps
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{workdir}/config.json does not say what its checkpoints are of "
            f"({type(error).__name__}); give the workdir of a run."
        ) from error
    try:
        tensors = table.flatten(checkpoints.read_weights(found))
    finally:
        checkpoints.close()
    return Contents(
        f"{workdir}/checkpoints/{found}",
        tensors,
        [table.Rule(name, name) for name in tensors],
        layout=layout,
        eps=eps,
        whole=True,
        classes=classes.count_of(tensors),
        names=_names(workdir / "categories.json"),
    )


def _names(file: pathlib.Path) -> tuple[str, ...] | None:
    """Names of the classes by label, if the folder says them."""
    if not file.exists():
        return None
    try:
        return tuple(str(row["name"]) for row in json.loads(file.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} does not say what the classes are ({type(error).__name__}); mend or remove it."
        ) from error
