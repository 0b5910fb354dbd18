"""Several processes as one run, with `jax.distributed`: from flags, or from what a cluster sets."""

import os
import signal
import threading
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sephjax.errors import RunError, UserError
from sephjax.train import sharding

FLAGS = ("coordinator", "num_processes", "process_id")
# Set by clusters that jax.distributed knows by itself, with the number of processes.
_COUNTS = {
    "SLURM_NTASKS": int,  # srun
    "OMPI_COMM_WORLD_SIZE": int,  # mpirun
    "TPU_WORKER_HOSTNAMES": lambda names: len(names.split(",")),  # TPUs on GKE; not TPU VMs
    "MEGASCALE_NUM_SLICES": int,  # TPU multislice
}


def start(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins this process to the others of its run, if there are any, and looks for its devices.

    Must come before anything that asks JAX for its devices.

    Args:
        coordinator: `host:port` of process 0, or "auto": JAX finds out by itself (a TPU pod, GKE,
            Slurm, Open MPI). None: as "auto" where a variable of a cluster tells of several (on TPU
            VMs none does).
        num_processes: of the run; with `host:port` only.
        process_id: of this process, from 0; likewise.

    Raises:
        UserError: some of the three flags are missing.
        RunError: the processes do not find each other, or this one finds no device.
    """
    _join(coordinator, num_processes, process_id)
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # a plugin that is not there fails an assertion
        wanted = os.environ.get("JAX_PLATFORMS", "")
        raise RunError(
            f"JAX finds no device of JAX_PLATFORMS={wanted!r}: install its plugin (the extras cuda"
            " and tpu), or set JAX_PLATFORMS=cpu."
        ) from error
    if jax.process_count() > 1:
        _meet()


def _meet() -> None:
    """All processes compute together: with all devices, and device by device over the processes.

    On CPUs Gloo connects a set of devices at its first computation and gives the processes 30 s to
    come to it; afterwards they wait for each other. So here, before what takes unequal times, as
    reading data and compiling do.
    """
    mesh = sharding.make_mesh()
    ones = jax.make_array_from_callback(
        (mesh.size,), sharding.batched(mesh), lambda _: np.ones(1, np.float32)
    )
    jax.block_until_ready(jax.jit(jnp.sum, out_shardings=sharding.replicated(mesh))(ones))
    multihost_utils.sync_global_devices("sephjax")


def _join(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    given = dict(zip(FLAGS, (coordinator, num_processes, process_id), strict=True))
    alone = [name for name, value in given.items() if value is None]
    if coordinator in (None, "auto"):
        if len(alone) < 2 or (coordinator is None and len(alone) < 3):
            raise UserError(
                "--num_processes and --process_id need --coordinator=<host>:<port>; give all three."
            )
        if coordinator == "auto" or several(os.environ):
            _initialize({})
        return
    if alone:
        raise UserError(
            f"--coordinator={coordinator} needs --{' and --'.join(alone)}; give all three."
        )
    assert num_processes is not None
    assert process_id is not None
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} is none of 0..{num_processes - 1}; correct it or "
            "--num_processes."
        )
    if num_processes > 1:
        address = {"coordinator_address": coordinator}
        _initialize(address | {"num_processes": num_processes, "process_id": process_id})


def several(environment: Mapping[str, str]) -> bool:
    """Does a cluster's variable tell of more than one process?"""
    for name, count in _COUNTS.items():
        try:
            if name in environment and count(environment[name]) > 1:
                return True
        except ValueError:
            continue
    return False


def _initialize(options: dict[str, str | int]) -> None:
    try:
        jax.distributed.initialize(**options)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise RunError(
            f"the processes of this run did not find each other: {first}; check --coordinator, or "
            "start one process only."
        ) from error
    # JAX now catches SIGTERM and only logs it; until the loop asks for it, it ends the process.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
