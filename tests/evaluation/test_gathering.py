"""What several processes found comes together on each."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from sephjax.evaluation import gathering

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_one_process_has_everything_already():
    rows = [{"a": 1}]
    assert gathering.all_rows(rows) is rows
    np.testing.assert_array_equal(gathering.local_rows(jnp.arange(3)), [0, 1, 2])
    np.testing.assert_array_equal(gathering.local_rows(np.arange(3)), [0, 1, 2])


@pytest.mark.multi
def test_two_processes_see_the_rows_of_both():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    script = pathlib.Path(__file__).with_name("gathering_process.py")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), str(port), "2", str(me)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
        )
        for me in range(2)
    ]
    outputs = [process.communicate(timeout=100) for process in processes]
    for process, (out, err) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, err
        assert json.loads(out.splitlines()[-1]) == [{"image_id": 1, "name": "žaba"}] * 3
