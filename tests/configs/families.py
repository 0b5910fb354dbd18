"""Every row of every family, for the tests of configs."""

import importlib
import pathlib

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "configs"


def families():
    """Modules of `configs/` that have rows, by name."""
    names = sorted(path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_"))
    modules = {name: importlib.import_module(f"configs.{name}") for name in names}
    return {name: module for name, module in modules.items() if hasattr(module, "ROWS")}


ROWS = [(name, row) for name, module in families().items() for row in module.ROWS]
IDS = [f"{name}:{row}" if row else name for name, row in ROWS]


def read(family, row):
    """The config of a row."""
    return families()[family].get_config(row)
