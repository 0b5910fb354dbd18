"""The table of the series in docs/RESULTS.md is that of the configs."""

import ast
import importlib
import re

import pytest

from benchmarks import series
from tests.configs.families import ROWS


def test_the_committed_table_is_fresh():
    text = series.PAGE.read_text()
    assert series.page(text) == text, "stale: run python -m benchmarks.series"


def test_every_row_of_the_series_has_a_line():
    names = [line.split("|")[1].strip() for line in series.table().splitlines()[2:]]
    ours = [
        f"{f}:{r}" if r else f for f, r in ROWS if f.startswith(("c3", "cascade", "fpn3", "seph"))
    ]
    assert names == ours
    assert set(series.STATUS) <= set(names)


def test_a_line_says_difference_parent_numbers_status_and_command():
    (line,) = (x for x in series.table().splitlines() if x.startswith("| sephv15:1 |"))
    assert line == (
        "| sephv15:1 | sephv15 | roi.box_loss_scale 8.0 | box 32.2 (high confidence: yaml at "
        "869210b) | trains and evaluates in small (two steps); full COCO: not run "
        "| `run configs/sephv15.py:1 sephv15_1` |"
    )


def test_a_row_that_the_common_flags_do_not_fit_has_its_own_after_them():
    (line,) = (line for line in series.table().splitlines() if line.startswith("| sephnv15 |"))
    assert "| `run configs/sephnv15.py sephnv15 --config.train.batch=24 " in line  # 3 on each of 8


@pytest.mark.parametrize(
    ("family", "row"), [(f, r) for f, r in ROWS if f in series.FAMILIES], ids=str
)
def test_the_full_run_sees_the_images_of_the_row(family, row):
    """The linear rule: images in all, in warm-up and at each milestone, and the rate an image."""
    common = re.search(r"^run\(\) {.*?^}", series.PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert common
    own = series.FLAGS.get(f"{family}:{row}" if row else family, "")
    given = dict(re.findall(r"--config\.(\S+)=(\S+)", f"{common.group()} {own}"))
    config = importlib.import_module(f"configs.{family}").get_config(row)
    schedule, batch = config.schedule, int(given["train.batch"])
    scale = config.train.batch / batch
    assert int(given["train.steps"]) == pytest.approx(config.train.steps * scale, rel=1e-6)
    assert float(given["optimizer.lr"]) == pytest.approx(config.optimizer.lr / scale, rel=1e-3)
    warmup = int(given["schedule.warmup_steps"])
    assert warmup == pytest.approx(schedule.warmup_steps * scale, rel=1e-6)
    if schedule.name != "cosine":
        drops = ast.literal_eval(given["schedule.milestones"].strip("'"))
        assert drops == pytest.approx([step * scale for step in schedule.milestones], rel=1e-6)


def test_only_what_is_between_the_markers_changes():
    text = f"before\n{series.BEGIN}\nold\n{series.END}\nafter\n"
    assert series.page(text) == f"before\n{series.BEGIN}\n{series.table()}\n{series.END}\nafter\n"
    assert not re.search(r"^old$", series.page(text), re.MULTILINE)
