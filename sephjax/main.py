"""The one program: `python -m sephjax.main --config=configs/<family>.py[:<row>] --mode=<mode>`."""

import os
import sys
import time
import traceback
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from sephjax import command
from sephjax.errors import RunError, UserError

MODES = (
    "train", "eval", "predict", "convert", "export", "describe", "prepare", "parity", "compile"
)  # fmt: skip
TOGETHER = ("train", "eval")  # by several processes
GRACE = 3.0  # seconds

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with :row for a row of it.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
MODE = flags.DEFINE_string("mode", "train", f"One of {', '.join(MODES)}.")
STEP = flags.DEFINE_integer(
    "step", None, "Checkpoint to restore in eval, predict, convert, export; default: the latest."
)
IMAGES = flags.DEFINE_string("images", None, "predict, parity: a file, a folder or a glob.")
OUTPUT = flags.DEFINE_string(
    "output", None, "predict, parity: the folder to write; compile: JSON file; export: file."
)
SOURCE = flags.DEFINE_string(
    "source",
    None,
    "convert, parity: <format>:<file> of weights, which convert brings into workdir.",
)
TARGET = flags.DEFINE_string("target", None, "convert: <format>:<file> to write from workdir.")
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "train, eval in several processes: <host>:<port> of the first, or auto (TPU pod, GKE, Slurm).",
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Processes of the run.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
TOPOLOGY = flags.DEFINE_string("topology", None, "compile: chips, such as v5e:2x4 or h100:8.")
PROGRAM = flags.DEFINE_string("program", "train", "compile: train or predict.")
CHIP_BATCHES = flags.DEFINE_list("chip_batches", ["1", "2", "4", "8"], "compile: images a chip.")
OURS = (
    "config", "workdir", "mode", "step", "images", "output", "source", "target",
    "coordinator", "num_processes", "process_id", "topology", "program", "chip_batches",
)  # fmt: skip


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, but a mistake is one sentence and exit code 2."""
    try:
        command.check_config(argv)
        rest = flags.FLAGS(argv)
        command.check_values(argv, CONFIG.value)
    except UserError as error:
        _leave(str(error), 2)
    except SystemExit:  # --help has printed what it has to say
        sys.exit(0)
    except flags.UnrecognizedFlagError as error:
        _leave(command.unknown_flag(error.flagname, OURS), 2)
    except Exception as error:  # whatever absl and ml_collections raise here, the command caused
        _leave(command.one_sentence(error), 2)
    return rest


def _leave(message: str, code: int) -> NoReturn:
    sys.stdout.flush()
    print(f"sephjax: {message}", file=sys.stderr)
    _exit(code)


def _exit(code: int) -> NoReturn:
    """Ends this process; of several that failed it does not wait for the others.

    At a usual exit JAX waits for them, who wait for this one in a computation: 5 minutes later all
    are aborted, with another code. The first process, which the others notice at once, gives those
    that fail alike the time to do so by themselves.
    """
    if _several():
        sys.stderr.flush()
        if sys.modules["jax"].process_index() == 0:
            time.sleep(GRACE)
        os._exit(code)
    sys.exit(code)


def _several() -> bool:
    """Has this process met the others of its run?"""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def _need(value: str | None, flag: str) -> str:
    if not value:
        raise UserError(f"--mode={MODE.value} needs --{flag}; add it to the command.")
    return value


def _local(value: str | None, flag: str) -> str:
    """A path of this machine, `~` expanded; `` for none."""
    if value and "://" in value:
        raise UserError(
            f"--{flag}={value} is no local path; mount the bucket and name the folder there"
            " (launch/README.md)."
        )
    return os.path.expanduser(value or "")


def _check_mode() -> None:
    if MODE.value not in MODES:
        raise UserError(
            f"--mode={MODE.value} is unknown; did you mean {command.nearest(MODE.value, MODES)}? "
            f"The modes are {', '.join(MODES)}."
        )
    if CONFIG.value is None:
        raise UserError(
            "--config is missing; name a file such as configs/demo.py or configs/sephv14.py."
        )
    if COORDINATOR.value and MODE.value not in TOGETHER:
        raise UserError(
            f"--mode={MODE.value} is the work of one process; start it once, without --coordinator."
        )


def _dispatch() -> int:
    # Modes are imported when they run: a usage error must not wait for JAX.
    _check_mode()
    workdir = images = source = ""
    output = _local(OUTPUT.value, "output")
    if MODE.value not in ("describe", "prepare", "parity", "compile"):
        workdir = _need(_local(WORKDIR.value, "workdir"), "workdir")
    if MODE.value == "parity":
        source, images = _need(SOURCE.value, "source"), _need(IMAGES.value, "images")
        output = output or _local(WORKDIR.value, "workdir") or "."
    if MODE.value == "predict":
        images = _need(IMAGES.value, "images")
    if MODE.value in ("predict", "export"):
        _need(output, "output")
    if MODE.value in TOGETHER:
        from sephjax import cluster

        cluster.start(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    from sephjax import convert, modes

    config = CONFIG.value
    run = {
        "train": lambda: modes.train(config, workdir),
        "eval": lambda: modes.evaluate(config, workdir, STEP.value),
        "predict": lambda: modes.predict(config, workdir, STEP.value, images, output),
        "convert": lambda: convert.convert(config, workdir, STEP.value, SOURCE.value, TARGET.value),
        "export": lambda: modes.export(config, workdir, STEP.value, output),
        "describe": lambda: modes.describe(config),
        "prepare": lambda: modes.prepare(config),
        "parity": lambda: modes.parity(config, source, images, output),
        "compile": lambda: modes.compile_for(
            config,
            topology=_need(TOPOLOGY.value, "topology"),
            program=PROGRAM.value,
            batches=CHIP_BATCHES.value,
            output=output,
        ),
    }
    return run[MODE.value]()


def main(argv: list[str]) -> None:
    """Runs one mode; exit code 0: done, 1: failed for the reason printed, 2: a wrong command."""
    try:
        if len(argv) > 1:
            raise UserError(f"{argv[1]!r} is no flag; flags start with --.")
        code = _dispatch()
    except UserError as error:
        _leave(str(error), 2)
    except RunError as error:
        _leave(str(error), 1)
    except Exception:  # a fault of ours: told with its traceback, and left by the same door
        if not _several():
            raise
        traceback.print_exc()
        _exit(1)
    else:
        sys.exit(code)


if __name__ == "__main__":
    logging.set_verbosity(logging.WARNING)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow's start-up chatter
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    app.run(main, flags_parser=_parse)
