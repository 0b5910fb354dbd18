"""One of several processes that gather; run by `test_gathering.py`, never imported."""

import json
import sys

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sephjax.evaluation import gathering

port, count, me = (int(word) for word in sys.argv[1:])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", count, me)
mesh = jax.make_mesh((count,), ("data",))
rows = np.arange(4 * count, dtype=np.float32).reshape(2 * count, 2)
local = rows[2 * me : 2 * me + 2]
array = jax.make_array_from_process_local_data(
    NamedSharding(mesh, PartitionSpec("data")), local, rows.shape
)
np.testing.assert_array_equal(gathering.local_rows(array), local)
# Lists of different lengths, one of them empty, with letters of more than one byte.
mine = [{"image_id": me, "name": "žaba"}] * (3 * me)
print(json.dumps(gathering.all_rows(mine)))
