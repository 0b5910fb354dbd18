"""Chips by name, and the devices of a topology that is described instead of attached."""

import math
import os
import re
from typing import Any, NamedTuple

from jax.experimental import topologies

from sephjax.errors import UserError

GIB = 2**30


class Chip(NamedTuple):
    """Facts of the vendor's data sheet."""

    platform: str  # tpu | cuda
    memory: float  # bytes a device
    bandwidth: float  # bytes a second of its memory


# cloud.google.com/tpu/docs/system-architecture-tpu-vm; NVIDIA's H100 SXM and A100 SXM data sheets.
CHIPS = {
    "v4": Chip("tpu", 32 * GIB, 1_228e9),
    "v5e": Chip("tpu", 16 * GIB, 819e9),
    "v5p": Chip("tpu", 95 * GIB, 2_765e9),
    "v6e": Chip("tpu", 32 * GIB, 1_640e9),
    "h100": Chip("cuda", 80e9, 3_350e9),
    "a100": Chip("cuda", 80e9, 2_039e9),
}


class Topology(NamedTuple):
    """Devices to compile for."""

    name: str
    chip: Chip
    devices: list[Any]


def topology(name: str) -> Topology:
    """The devices of `<chip>:<sides>` (`v5e:2x4`, `v5p:2x2x2`) or `<gpu>:<count>` (`h100:8`).

    Raises:
        UserError: the name is none of these, or this machine lacks the compiler.
    """
    kind, _, sides = name.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides):
        raise UserError(
            f"--topology={name} is none; write <chip>:<sides> with a chip of {', '.join(CHIPS)},"
            " such as v5e:2x4 or h100:8."
        )
    chip = CHIPS[kind]
    if chip.platform == "cuda" and "x" in sides:
        raise UserError(
            f"--topology={name} is none: of GPUs give the number in one node, such as h100:8."
        )
    count = math.prod(int(side) for side in sides.split("x"))
    try:
        devices = _tpu(name) if chip.platform == "tpu" else _cuda(kind, count)
    except RuntimeError as error:  # a plugin that is not there, and a shape that it does not know
        extra = "tpu" if chip.platform == "tpu" else "cuda"
        told = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"no compiler for --topology={name} here ({told}); check the name, and install it with"
            f" pip install -e '.[{extra}]'."
        ) from error
    return Topology(name, chip, devices)


def _tpu(name: str) -> list[Any]:
    # Without them libtpu asks the metadata server of a cloud machine, for minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    # No chip is touched, so two of these may run at a time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return list(topologies.get_topology_desc(name, "tpu").devices)


def _cuda(kind: str, count: int) -> list[Any]:
    described = topologies.get_topology_desc(
        "", "cuda", target_config=_gpu(kind), topology=f"1x1x{count}"
    )
    return list(described.devices)


# Name, compute capability, multiprocessors, clock in GHz, L2 bytes, shared bytes a multiprocessor
# and a block, fp32 units a multiprocessor.
_GPUS = {
    "h100": ("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 50 * 2**20, 228 * 1024, 227 * 1024, 128),
    "a100": ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 40 * 2**20, 164 * 1024, 163 * 1024, 64),
}


def _gpu(kind: str) -> str:
    """What XLA's GPU compiler asks a device, as the text of its `GpuTargetConfigProto`."""
    name, (major, minor), cores, clock, cache, shared, block, units = _GPUS[kind]
    chip = CHIPS[kind]
    return f"""
gpu_device_info {{
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {block}
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {units}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {int(chip.bandwidth)}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {int(chip.memory)}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  name: "{name}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{name}"
"""
