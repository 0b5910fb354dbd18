"""Kills one of two processes at random steps, again and again, and looks at what is left.

`python -m benchmarks.kills FOLDER [--kills 10] [--seed 0]` trains a tiny detector (tests/tiny.py)
once undisturbed and once with kills (SIGKILL, of either process), each time with `launch/local.sh`.
It checks that no kill loses more than one checkpoint interval, that every checkpoint found after it
can be read, and that the end is the undisturbed run's, bit for bit.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import time

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from sephjax.checkpoint import Checkpoints
from tests.tiny import ROOT, config_file

STEPS, EVERY = 120, 10
AHEAD = 25  # steps after the last checkpoint, at most, at which a run is killed
CHANGES = {
    "train__batch": 2,
    "train__steps": STEPS,
    "eval__batch": 2,
    "checkpoint__every": EVERY,
    "checkpoint__keep": 2,
    "optimizer__lr": 0.002,
}


def start(folder: pathlib.Path, name: str) -> subprocess.Popen[bytes]:
    """A run of two processes with a device each, in a session of its own."""
    settings = {
        "PROCESSES": "2",
        "DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "PYTHONPATH": str(ROOT),
    }
    words = f"--config={config_file(folder, **CHANGES)}", f"--workdir={folder / name}"
    log = (folder / f"{name}.log").open("ab")
    return subprocess.Popen(
        [ROOT / "launch" / "local.sh", *words],
        cwd=ROOT,
        env=os.environ | settings,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def children(parent: int) -> list[int]:
    """The Python processes that a launcher started, in the order of their number."""
    path = pathlib.Path(f"/proc/{parent}/task/{parent}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def last_step(workdir: pathlib.Path) -> int:
    """The last step that was logged, 0 before any."""
    log = workdir / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    steps = [json.loads(line).get("step", 0) for line in lines if line.endswith("}")]
    return steps[-1] if steps else 0


def written(workdir: pathlib.Path) -> int:
    """When the log of steps was last written, 0 before."""
    log = workdir / "metrics.jsonl"
    return log.stat().st_mtime_ns if log.exists() else 0


def kill_at(folder: pathlib.Path, step: int, which: int) -> dict[str, int]:
    """Runs until `step` is logged, kills process `which`, and tells what was lost."""
    workdir = folder / "killed"
    before = written(workdir)
    running = start(folder, "killed")
    # Until the run goes on, the log may hold steps that the last kill lost.
    while written(workdir) == before or last_step(workdir) < step:
        if running.poll() is not None:
            raise SystemExit(f"the run ended before step {step}: see {folder / 'killed.log'}")
        time.sleep(0.02)
    os.kill(children(running.pid)[which], signal.SIGKILL)
    began, code = time.monotonic(), running.wait()
    reached = last_step(workdir)
    kept = Checkpoints(workdir / "checkpoints").latest(whole=True) or 0
    told = {"process": which, "step": reached, "kept": kept, "lost": reached - kept, "code": code}
    return told | {"seconds_to_end": round(time.monotonic() - began)}


def weights(workdir: pathlib.Path) -> list[np.ndarray]:
    """All arrays of the last checkpoint, here on one device."""
    import orbax.checkpoint as ocp

    folder, place = workdir / "checkpoints" / str(STEPS), SingleDeviceSharding(jax.devices()[0])
    leaves = []
    for item in ("params", "optimizer"):
        with ocp.StandardCheckpointer() as reader:
            known = reader.metadata(folder / item).item_metadata.tree
            here = lambda told: jax.ShapeDtypeStruct(told.shape, told.dtype, sharding=place)
            leaves += jax.tree.leaves(reader.restore(folder / item, jax.tree.map(here, known)))
    return [np.asarray(leaf) for leaf in leaves]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if start(folder, "whole").wait():
        raise SystemExit(f"the undisturbed run failed: see {folder / 'whole.log'}")
    draw = random.Random(arguments.seed)
    for turn in range(arguments.kills):
        kept = Checkpoints(folder / "killed" / "checkpoints").latest(whole=True) or 0
        step = kept + draw.randint(1, min(AHEAD, STEPS - 1 - kept))
        told = kill_at(folder, step, draw.randrange(2))
        print(f"kill {turn + 1}: {json.dumps(told)}", flush=True)
        if told["lost"] > EVERY + 1:  # the step under way comes besides
            raise SystemExit("more than a checkpoint interval is lost")
    if start(folder, "killed").wait():
        raise SystemExit(f"the last run failed: see {folder / 'killed.log'}")
    pairs = zip(weights(folder / "whole"), weights(folder / "killed"), strict=True)
    same = all(np.array_equal(a, b) for a, b in pairs)
    print(f"parameters and optimizer at step {STEPS}: {'the same' if same else 'DIFFERENT'}")
    raise SystemExit(0 if same else 1)


if __name__ == "__main__":
    main()
