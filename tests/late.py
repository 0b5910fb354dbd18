"""One of two processes, of which one comes late to each computation, as after a long compilation.

`python -m tests.late PORT PROCESS LATE SECONDS`: process LATE waits before the first computation of
all devices and before the first that goes over the processes; prints both results. Then both say
different things, and print what they agree on.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sephjax import cluster
from sephjax.train import agreement, sharding


def main() -> None:
    port, process, late, seconds = (int(word) for word in sys.argv[1:])
    cluster.start(f"localhost:{port}", 2, process)
    print("met", flush=True)
    mesh = sharding.make_mesh()
    if process == late:
        time.sleep(seconds)
    cut = sharding.batched(mesh)
    ids = jax.make_array_from_callback((mesh.size,), cut, lambda at: np.arange(mesh.size)[at])
    print(int(jax.jit(jnp.sum, out_shardings=sharding.replicated(mesh))(ids)), flush=True)
    if process == late:
        time.sleep(seconds)
    print(multihost_utils.process_allgather(jnp.asarray(process)).tolist(), flush=True)
    print(agreement.agreed(5 + process), agreement.agreed(-1 - process), flush=True)
    print([agreement.any_process(process in saying) for saying in ((), (1,), (0, 1))], flush=True)
    print([agreement.alike(content) for content in (b"same", bytes([process]))], flush=True)


if __name__ == "__main__":
    main()
