"""The one program: `python -m sephjax.main --config=configs/<family>.py[:<row>] --mode=<mode>`."""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from sephjax.errors import RunError, UserError

MODES = ("train", "eval", "predict", "describe", "prepare")

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, with :row for a row of it.")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
MODE = flags.DEFINE_string("mode", "train", f"One of {', '.join(MODES)}.")
STEP = flags.DEFINE_integer(
    "step", None, "Checkpoint to restore in eval and predict; default: the latest."
)
IMAGES = flags.DEFINE_string("images", None, "predict: a file, a folder or a glob.")
OUTPUT = flags.DEFINE_string("output", None, "predict: the folder to write.")


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, but a mistake is one sentence and exit code 2."""
    try:
        return flags.FLAGS(argv)
    except (
        flags.Error,
        AttributeError,
        KeyError,
        ValueError,
        TypeError,
        OSError,
        ImportError,
    ) as error:
        _leave(_first_sentence(error), 2)


def _first_sentence(error: Exception) -> str:
    """The gist of a config error: ml_collections prints every field before its suggestion."""
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if "Did you mean" in text:
        return f"{text.split(' and cannot be added')[0]}. {text[text.rindex('Did you mean') :]}"
    if "Other fields present" in text:
        return f"{text.split(' and cannot be added')[0]}; see configs/base.py for the keys."
    return text.strip()


def _leave(message: str, code: int) -> None:
    sys.stdout.flush()
    print(f"sephjax: {message}", file=sys.stderr)
    sys.exit(code)


def _need(value: str | None, flag: str) -> str:
    if not value:
        raise UserError(f"--mode={MODE.value} needs --{flag}; add it to the command.")
    return value


def _dispatch() -> int:
    # Modes are imported when they run: a usage error must not wait for JAX.
    if MODE.value not in MODES:
        raise UserError(f"--mode={MODE.value} is unknown; use one of {', '.join(MODES)}.")
    if CONFIG.value is None:
        raise UserError(
            "--config is missing; name a file such as configs/demo.py or configs/sephv14.py."
        )
    from sephjax import modes

    config = CONFIG.value
    if MODE.value == "describe":
        return modes.describe(config)
    if MODE.value == "prepare":
        return modes.prepare(config)
    workdir = _need(WORKDIR.value, "workdir")
    if MODE.value == "train":
        return modes.train(config, workdir)
    if MODE.value == "eval":
        return modes.evaluate(config, workdir, STEP.value)
    images = _need(IMAGES.value, "images")
    return modes.predict(config, workdir, STEP.value, images, _need(OUTPUT.value, "output"))


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
    else:
        sys.exit(code)


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # of clu's TensorBoard writer
    logging.set_verbosity(logging.WARNING)
    app.run(main, flags_parser=_parse)
