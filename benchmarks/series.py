"""The table of the series in docs/RESULTS.md, from the configs: `python -m benchmarks.series`.

A line a row: name, what it changes of its parent, published mAP, where this project stands with it,
and the command of the full run. `STATUS` is kept by hand; everything else comes from the rows.
"""

import importlib
import pathlib
from typing import Any

from configs._chain import plain

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "RESULTS.md"
BEGIN, END = "<!-- series: begin -->", "<!-- series: end -->"
FAMILIES = (
    "c3", "cascade", "fpn3", "sephnv15", "sephv10", "sephv11", "sephv12", "sephv13", "sephv14",
    "sephv15", "sephv16", "sephv17", "sephv18", "sephv19", "sephv21", "sephv22", "sephv3", "sephv9",
)  # fmt: skip
SMALL = "trains and evaluates in small (two steps); full COCO: not run"
STATUS = {"sephv14": "trains (20 steps at full size, above); full COCO: not run"}
FLAGS = {  # beyond those of the page's `run`, which come first
    "fpn3:hooks_x2": "--config.train.steps=180000",
    # Three images on each of 8 GPUs; as many images in all as 120,000 steps of 9.
    "sephnv15": "--config.train.batch=24 --config.optimizer.lr=0.0533333 "
    "--config.train.steps=45000 --config.schedule.warmup_steps=375",
    "sephv9": "--config.train.steps=150000",
}


def table() -> str:
    """The table, without the markers."""
    lines = [
        "| row | differs from | by | published mAP | status | full run |",
        "|---|---|---|---|---|---|",
    ]
    for family in FAMILIES:
        module = importlib.import_module(f"configs.{family}")
        lines += [_line(family, module, row) for row in module.ROWS]
    return "\n".join(lines)


def page(text: str) -> str:
    """`text` with the table between its two markers renewed."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


def _line(family: str, module: Any, row: str) -> str:
    entry = module.ROWS[row]
    name = f"{family}:{row}" if row else family
    parent = module.get_config(row).lineage[-2]
    difference = ", ".join(f"{path} {_short(value)}" for path, value in entry.diff.items())
    file = f"configs/{family}.py:{row}" if row else f"configs/{family}.py"
    status = STATUS.get(name, SMALL)
    words = ("run", file, name.replace(":", "_"), FLAGS.get(name, ""))
    command = f"`{' '.join(filter(None, words))}`"
    cells = (name, parent, difference, entry.published, status, command)
    return "| " + " | ".join(cells) + " |"


def _short(value: Any) -> str:
    value = plain(value)
    if isinstance(value, dict):
        name = value.get("name", "")
        rest = " ".join(f"{key}={_short(item)}" for key, item in value.items() if key != "name")
        return f"{name} ({rest})" if rest else str(name)
    if isinstance(value, tuple):
        return "[" + " ".join(map(_short, value)) + "]"
    return str(value)


def main() -> None:
    PAGE.write_text(page(PAGE.read_text()))
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
