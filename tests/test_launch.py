"""Two processes with four devices each do what one process with one device does."""

import contextlib
import io
import json
import subprocess

import pytest

from sephjax import cluster, modes
from sephjax.errors import RunError, UserError
from tests.tiny import (
    ROOT,
    config_file,
    environment,
    quick,  # noqa: F401 - a fixture for the whole module
    rows,
    tiny_config,
)

CHANGES = {
    "train__batch": 8,
    "eval__batch": 8,
    "data__shapes__eval_images": 11,  # no number of devices divides it
    "optimizer__lr": 0.002,
    "checkpoint__every": 2,
}


def launch(folder, workdir, factory, **more):
    words = (f"--config={config_file(folder, **CHANGES | more)}", f"--workdir={workdir}")
    done = subprocess.run(
        [ROOT / "launch" / "local.sh", *words],
        cwd=ROOT,
        env=environment(factory),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return done.stdout


def metrics(workdir, step):
    return json.loads((workdir / "eval" / str(step) / "metrics.json").read_text())


@pytest.mark.multi
def test_two_processes_train_evaluate_and_go_on_as_one(tmp_path, tmp_path_factory):
    one, two = tmp_path / "one", tmp_path / "two"
    with contextlib.redirect_stdout(io.StringIO()):
        assert modes.train(tiny_config(**CHANGES), str(one)) == 0
    launch(tmp_path, two, tmp_path_factory, train__steps=2)
    manifest = json.loads((two / "manifest.json").read_text())
    assert manifest["devices"]["count"] == 8
    assert manifest["devices"]["processes"] == 2
    assert "going on from step 2" in launch(tmp_path, two, tmp_path_factory)

    for ours, theirs in zip(rows(one), rows(two), strict=True):
        assert ours["step"] == theirs["step"]
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-3)  # float32, four steps
    found, alone = metrics(two, 4), metrics(one, 4)
    assert found["images"] == alone["images"] == 11
    assert found["bbox"]["AP"] == pytest.approx(alone["bbox"]["AP"], abs=0.01)

    # And back: one process goes on from what two have saved.
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert modes.train(tiny_config(**CHANGES | {"train__steps": 5}), str(two)) == 0
    assert "going on from step 4" in said.getvalue()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("host:1", 2, None), "--coordinator=host:1 needs --process_id"),
        (("host:1", None, None), "needs --num_processes and --process_id"),
        ((None, 2, 0), "need --coordinator"),
        (("auto", 2, None), "need --coordinator=<host>:<port>"),
        (("host:1", 2, 2), "--process_id=2 is none of 0..1"),
    ],
)
def test_flags_come_together(flags, said):
    with pytest.raises(UserError, match=said):
        cluster.start(*flags)


def test_one_process_needs_no_cluster(monkeypatch):
    for name in cluster._COUNTS:
        monkeypatch.delenv(name, raising=False)
    cluster.start(None, None, None)
    cluster.start("localhost:1", 1, 0)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "8"}, True),
        ({"SLURM_NTASKS": "many"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
    ],
)
def test_a_clusters_variables_tell_of_several_processes(environment, expected):
    assert cluster.several(environment) == expected


def test_a_machine_without_the_wanted_device_is_told_so(monkeypatch):
    def none():
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr(cluster.jax, "local_devices", none)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(RunError, match="no device of JAX_PLATFORMS='cuda': install its plugin"):
        cluster.start("localhost:1", 1, 0)
