"""The weights of a workdir, for the modes that only read them."""

import pathlib

from ml_collections import ConfigDict

from sephjax.checkpoint import Checkpoints
from sephjax.errors import UserError
from sephjax.nets.functional import Functional
from sephjax.train import agreement, sharding
from sephjax.types import Params


def step_of(workdir: pathlib.Path, at: int | None) -> int:
    """The step to restore: `at`, or the newest. Asked before anything else takes its time.

    All processes get the answer of process 0, since a run may be saving meanwhile.

    Raises:
        UserError: there is none, or not that one.
    """
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    newest = checkpoints.latest() if at is None else at
    found = agreement.agreed(-1 if newest is None else newest)
    if found < 0:
        raise UserError(
            f"{workdir} holds no finished checkpoint; train first, or correct --workdir."
        )
    if found not in (steps := checkpoints.steps()):
        raise UserError(f"{workdir} holds no checkpoint of step {at}; --step may be {steps}.")
    return found


def weights(
    config: ConfigDict, model: Functional, workdir: pathlib.Path, step: int
) -> tuple[Params, Params]:
    """`(params, frozen)` of a checkpoint, a whole copy on each device.

    With `train.ema` they are the moving averages.

    Raises:
        UserError: it is of another model, or was trained without averages.
    """
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    mesh = sharding.make_mesh()
    params, frozen = model.abstract
    try:
        return checkpoints.restore_weights(
            step,
            sharding.abstract_on(mesh, params),
            sharding.abstract_on(mesh, frozen),
            averages=config.train.ema > 0,
        )
    finally:
        checkpoints.close()
