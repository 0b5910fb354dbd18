"""The files of launch/: shell and YAML that are right in form, and commands that the program takes.

No cluster is at hand: the Job is held against Kubernetes' own schema, the JobSet around it against
one written from its API reference (v1alpha2), and `gcloud` is a script that runs what it is given.
"""

import ast
import importlib
import math
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jsonschema
import kubernetes_validate
import pytest
import yaml

from sephjax import check, main
from tests.tiny import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
JOBS = sorted({*SCRIPTS, LAUNCH / "gke_jobset.yaml"} - {LAUNCH / "finished.sh"})
CHIPS = 8  # of every example
FULL = {"configs/sephv14.py", "configs/sephnv15.py"}
STOPPED = 75

# https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2: what the file may use of it.
RULE = {
    "type": "object",
    "required": ["name", "action"],
    "additionalProperties": False,
    "properties": {
        "name": {"pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
        "action": {"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
        "onJobFailureReasons": {
            "uniqueItems": True,
            "items": {
                "enum": [
                    "BackoffLimitExceeded",
                    "DeadlineExceeded",
                    "FailedIndexes",
                    "MaxFailedIndexesExceeded",
                    "PodFailurePolicy",
                ]
            },
        },
        "targetReplicatedJobs": {"items": {"type": "string"}},
    },
}
JOBSET = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": {
            "type": "object",
            "required": ["replicatedJobs"],
            "additionalProperties": False,
            "properties": {
                "suspend": {"type": "boolean"},
                "ttlSecondsAfterFinished": {"type": "integer", "minimum": 0},
                "failurePolicy": {
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer", "minimum": 0},
                        "rules": {"type": "array", "items": RULE},
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "required": ["name", "template"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer", "minimum": 1},
                            "template": {"type": "object", "required": ["spec"]},
                        },
                    },
                },
            },
        },
    },
}


def jobset():
    return yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())


def job_spec():
    (job,) = jobset()["spec"]["replicatedJobs"]
    assert job["replicas"] == 1
    return job["template"]["spec"]


def examples(file):
    """The flags of each commented job, and of the YAML's own."""
    text = re.sub(r"^[ #]*(- )?", "", file.read_text(), flags=re.MULTILINE)
    if file.suffix == ".yaml":
        return [args.split() for args in re.findall(r"^args:\n((?:--.*\n)+)", text, re.MULTILINE)]
    lines = [line for line in text.replace("\\\n", " ").splitlines() if "--workdir=" in line]
    words = [[w for w in shlex.split(line) if w.startswith("--")] for line in lines]
    return [flags for flags in words if FULL & {flags[0].removeprefix("--config=")}]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert os.access(script, os.X_OK)


@pytest.mark.parametrize("file", JOBS, ids=lambda path: path.name)
def test_the_full_jobs_are_commands_that_the_program_takes(file):
    jobs = examples(file)
    assert {flags[0].removeprefix("--config=") for flags in jobs} == FULL
    for flags in jobs:
        pairs = dict(flag.removeprefix("--").split("=", 1) for flag in flags)
        name = pathlib.Path(pairs.pop("config")).stem
        config = importlib.import_module(f"configs.{name}").get_config()
        keys = {key for key in pairs if key.startswith("config.")}
        assert pairs.keys() - keys <= set(main.OURS)
        usual = config.optimizer.lr / config.train.batch
        images = config.train.batch * config.train.steps
        warm = config.train.batch * config.schedule.warmup_steps
        for key in keys:
            config.update_from_flattened_dict({key.removeprefix("config."): literal(pairs[key])})
        check.check(config)
        assert config.train.batch % CHIPS == 0
        assert config.eval.batch % CHIPS == 0
        # As long a run as the row's, at the same rate an image.
        assert config.train.batch * config.train.steps == images
        assert config.train.batch * config.schedule.warmup_steps == warm
        assert config.optimizer.lr / config.train.batch == pytest.approx(usual, rel=1e-5)
        assert config.schedule.name == "cosine"  # which has no milestones to scale


def literal(text):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def test_all_files_have_the_same_jobs():
    def settings(file):
        return [[f for f in flags if "--workdir=" not in f] for flags in examples(file)]

    first, *rest = map(settings, JOBS)
    assert all(others == first for others in rest)


def test_the_jobset_is_one():
    jsonschema.validate(jobset(), JOBSET)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}}
    kubernetes_validate.validate(job | {"spec": job_spec()}, "1.34", strict=True)


def test_the_schemas_refuse_what_is_wrong():
    wrong = jobset()
    wrong["spec"]["failurePolicy"]["maxRestart"] = 1
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        jsonschema.validate(wrong, JOBSET)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "slice"}}
    spec = job_spec() | {"paralelism": 2}
    with pytest.raises(kubernetes_validate.ValidationError, match="paralelism"):
        kubernetes_validate.validate(job | {"spec": spec}, "1.34", strict=True)


def test_the_jobset_fills_its_slice():
    spec = job_spec()
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    assert spec["parallelism"] == spec["completions"]
    assert chips * spec["parallelism"] == math.prod(map(int, topology.split("x"))) == CHIPS
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_slurm_starts_one_task_a_gpu():
    lines = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (LAUNCH / "slurm_gpu.sh").read_text(), re.M)
    options = dict(lines)
    tasks = int(options["ntasks-per-node"])
    assert tasks == int(options["gpus-per-node"])
    assert tasks * int(options["nodes"]) == CHIPS
    # Neither hides GPUs from a task: jax.distributed picks by SLURM_LOCALID.
    assert "gpus-per-task" not in options


@pytest.mark.parametrize(
    ("flags", "files", "code"),
    [
        ((), {}, STOPPED),
        ((), {"config.json": '{"train": {"steps": 4}}'}, STOPPED),
        ((), {"config.json": '{"train": {"steps": 4}}', "eval/2/metrics.json": ""}, STOPPED),
        ((), {"config.json": '{"train": {"steps": 4}}', "eval/4/metrics.json": ""}, 0),
        ((), {"config.json": '{"train": {"steps": 4}}', "eval/12/metrics.json": ""}, 0),
        (("--mode=eval",), {}, 0),
        (("--mode", "eval"), {}, 0),
    ],
)
def test_a_stopped_run_is_not_finished(tmp_path, flags, files, code):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    ways = [f"--workdir={tmp_path}"], ["--workdir", str(tmp_path)], [f"-workdir={tmp_path}"]
    for words in ways:
        done = subprocess.run([LAUNCH / "finished.sh", *words, *flags])
        assert done.returncode == code


def test_without_a_workdir_no_run_is_taken_for_a_stopped_one():
    assert subprocess.run([LAUNCH / "finished.sh", "--config=x"]).returncode == 2


FAKES = {
    # Runs the --command of `gcloud ... ssh` as the worker's shell would, in a home of its own.
    "bin/gcloud": """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$FAKE/calls"
for word in "$@"; do
  case $word in --command=*) HOME=$FAKE/home exec bash -c "${word#*=}" ;; esac
done
""",
    "home/venv/bin/python": """#!/usr/bin/env bash
[[ $1 != -c ]] || exec "$REAL" "$@"
trap 'echo saved > "$FAKE/saved"; exit 0' TERM
printf '%s\\n' "$@" > "$FAKE/draft" && mv "$FAKE/draft" "$FAKE/words"
for ((i = 0; i < 300; i++)); do sleep 0.1; done
""",
}


def faked(folder):
    """Writes the stand-ins; returns the environment that they need."""
    for name, text in FAKES.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)
    return os.environ | {"FAKE": str(folder), "REAL": sys.executable}


@pytest.fixture
def pod(tmp_path):
    """Calls tpu_pod.sh with a `gcloud` whose worker is a folder."""
    (tmp_path / "home/sephjax").mkdir(parents=True)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environment = faked(tmp_path) | {"PATH": path, "TPU": "pod", "ZONE": "z-a"}

    def call(*words):
        return subprocess.run(
            [LAUNCH / "tpu_pod.sh", *words], env=environment, capture_output=True, text=True
        )

    yield call
    if (tmp_path / "home/sephjax.pid").exists():
        call("stop")


def wait_for(file):
    for _ in range(100):
        if file.exists():
            return file.read_text()
        subprocess.run(["sleep", "0.1"])
    raise AssertionError(f"{file} did not come")


def test_a_pod_gets_the_flags_as_they_are_and_can_be_stopped(tmp_path, pod):
    flags = ["--config=configs/a.py:b", "--config.schedule.milestones=(1, 2)", "--x=it's $HOME; ~"]
    done = pod("run", *flags)
    assert done.returncode == 0, done.stderr
    words = wait_for(tmp_path / "words").splitlines()
    assert words == ["-m", "sephjax.main", "--coordinator=auto", *flags]
    call = (tmp_path / "calls").read_text()
    assert call.startswith("compute tpus tpu-vm ssh pod --zone=z-a --worker=all --command=")
    again = pod("run", *flags)
    assert again.returncode == 1
    assert "stop it first" in again.stderr
    assert pod("stop").returncode == 0
    assert wait_for(tmp_path / "saved") == "saved\n"


def test_a_pod_needs_a_name_and_a_verb(pod):
    assert pod().returncode == 2
    done = subprocess.run([LAUNCH / "tpu_pod.sh", "run"], capture_output=True, text=True, env={})
    assert done.returncode != 0
    assert "usage: TPU=<name>" in done.stderr


@pytest.mark.parametrize(("last", "code"), [(2, STOPPED), (4, 0)])
def test_the_jobsets_shell_passes_sigterm_on(tmp_path, last, code):
    (container,) = job_spec()["template"]["spec"]["containers"]
    environment = faked(tmp_path)
    environment["PATH"] = f"{tmp_path / 'home/venv/bin'}:{os.environ['PATH']}"
    (tmp_path / "config.json").write_text('{"train": {"steps": 4}}')
    (tmp_path / "eval" / str(last)).mkdir(parents=True)
    (tmp_path / "eval" / str(last) / "metrics.json").touch()
    words = [*container["command"], f"--workdir={tmp_path}"]
    with subprocess.Popen(words, env=environment, cwd=ROOT) as shell:
        assert wait_for(tmp_path / "words").startswith("-m\nsephjax.main\n--coordinator=auto\n")
        shell.terminate()
        assert shell.wait(timeout=30) == code
    assert (tmp_path / "saved").exists()
