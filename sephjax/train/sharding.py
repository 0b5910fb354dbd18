"""Where arrays live: one mesh axis `data`; the state on every device, a batch cut along it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sephjax.errors import UserError
from sephjax.types import Batch

AXIS = "data"


def make_mesh() -> Mesh:
    """All devices of all processes on the one axis `data`, those of a process side by side."""
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    return Mesh(np.asarray(devices), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of the state and of scalars: a whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batched(mesh: Mesh) -> NamedSharding:
    """The sharding of everything whose first axis is the image."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def by_device(
    mesh: Mesh, run: Callable[..., Any], whole: tuple[int, ...], out: Any = None
) -> Callable[..., Any]:
    """`run` on each device's own images, with nothing exchanged between devices.

    Left to itself the partitioner gathers features and proposals where it cannot see that images
    are independent (sorts, gathers, loops). One device runs `run` itself.

    Args:
        mesh: the devices.
        run: of arrays whose first axis is the image, and of others.
        whole: positions of the arguments that every device has a copy of (weights, whose gradient
            is then summed over the devices).
        out: tree of the results' `PartitionSpec`, where `PartitionSpec()` says that all devices
            return the same; None: each result's first axis is the image.
    """
    if mesh.size == 1:
        return run

    def call(*args: Any) -> Any:
        cut, copy = PartitionSpec(AXIS), PartitionSpec()
        specs = tuple(copy if i in whole else cut for i in range(len(args)))
        # Checking would ask every custom gradient to declare what varies over devices.
        return jax.shard_map(
            run, mesh=mesh, in_specs=specs, out_specs=cut if out is None else out, check_vma=False
        )(*args)

    return call


def check_batch(images: int, mesh: Mesh, key: str, accumulate: int = 1) -> None:
    """Checks that a global batch of `images` can be cut evenly over the mesh.

    Args:
        images: images of all devices.
        mesh: the devices.
        key: the batch's name in the config.
        accumulate: equal parts that each device cuts its images into (`train.accumulate`).

    Raises:
        UserError: it cannot.
    """
    least = mesh.size * accumulate
    if images % least:
        devices = f"{mesh.size} device{'s' if mesh.size > 1 else ''}"
        parts = f" with train.accumulate={accumulate}" if accumulate > 1 else ""
        raise UserError(
            f"{key} is {images}, which {devices}{parts} cannot share evenly;"
            f" set --config.{key} to a multiple of {least}."
        )


def put_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Moves this process' part of a batch (NumPy arrays) to its devices as global arrays.

    It is allowed under `jax.transfer_guard("disallow")`. Every process gives the same number of
    images; leaves that are None stay None.
    """
    sharding = batched(mesh)
    processes = jax.process_count()

    def put(local: Any) -> jax.Array:
        shape = (local.shape[0] * processes, *local.shape[1:])
        return jax.make_array_from_process_local_data(sharding, local, shape)

    # With several processes JAX takes this transfer for one that nobody asked for.
    with jax.transfer_guard_host_to_device("allow"):
        return jax.tree.map(put, batch)


def put_whole(mesh: Mesh, tree: Any) -> Any:
    """A copy of `tree`, which every process has, on every device of the mesh."""
    sharding = replicated(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding, may_alias=False)

    def put(leaf: Any) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        local = np.asarray(jax.device_get(leaf))
        return jax.make_array_from_process_local_data(sharding, local, local.shape)

    return jax.tree.map(put, tree)


def abstract_on(mesh: Mesh, tree: Any) -> Any:
    """Shapes and dtypes of `tree`, each with the sharding of the state: what a restore is given."""
    sharding = replicated(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
