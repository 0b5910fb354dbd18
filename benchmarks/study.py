"""The log's questions in small: trains every row of configs/study.py with several seeds.

`python -m benchmarks.study run FOLDER` trains the backbone that all rows start from, then what
docs/study.json lacks, one process a core, and goes on after a stop; `python -m benchmarks.study
report` writes table and plot into docs. The questions, and when one counts as answered, were fixed
before the first run.
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import subprocess
import sys
import threading
from typing import Any

from benchmarks import study_report
from configs import study

ROOT = pathlib.Path(__file__).resolve().parents[1]
RUNS = ROOT / "docs" / "study.json"
START = "pretrain"  # the row whose backbone the others start from
KEPT = ("AP", "AP50", "AP75", "APs", "APm", "AR100")
_writing = threading.Lock()


def missing(runs: dict[str, Any], rows: list[str], seeds: int) -> list[tuple[str, int]]:
    """Runs that are not there yet, all rows of a seed before the next seed."""
    return [
        (row, seed)
        for seed in range(seeds)
        for row in rows
        if str(seed) not in runs.get(row or "base", {})
    ]


def arms() -> list[str]:
    """The rows that are compared."""
    return [row for row in study.ROWS if row != START]


def _train(row: str, seed: int, folder: pathlib.Path, core: int) -> dict[str, Any]:
    """One run on one core; `sephjax.main` goes on from its own checkpoint."""
    workdir = folder / f"{row or 'base'}-{seed}"
    steps = study.get_config(row).train.steps
    command = [
        *("taskset", "-c", str(core), sys.executable, "-m", "sephjax.main"),
        f"--config=configs/study.py:{row}" if row else "--config=configs/study.py",
        f"--workdir={workdir}",
        f"--config.seed={seed}",
    ]
    if row != START:
        command.append(f"--config.init.path={folder / f'{START}-0'}")
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PLATFORMS": "cpu"}
    folder.mkdir(parents=True, exist_ok=True)
    metrics = workdir / "eval" / str(steps) / "metrics.json"
    if not metrics.exists():
        with (folder / f"{workdir.name}.log").open("a") as log:
            subprocess.run(
                command, cwd=ROOT, env=os.environ | cache, stdout=log, stderr=log, check=True
            )
    found = json.loads(metrics.read_text())
    kinds = [kind for kind in ("bbox", "segm") if kind in found]
    result = {kind: {name: round(found[kind][name], 5) for name in KEPT} for kind in kinds}
    return {"steps": steps, "commit": _commit(), **result}


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def _save(output: pathlib.Path, row: str, seed: int, result: dict[str, Any]) -> None:
    """Adds a run to the file, which a stop leaves whole."""
    with _writing:
        runs = json.loads(output.read_text()) if output.exists() else {}
        runs.setdefault(row or "base", {})[str(seed)] = result
        draft = output.with_suffix(".new")
        draft.write_text(json.dumps(runs, indent=1, sort_keys=True) + "\n")
        draft.replace(output)


def run(
    folder: pathlib.Path, output: pathlib.Path, seeds: int, cores: list[int], rows: list[str]
) -> int:
    """Trains what is missing; the number of runs that failed, which the next call tries again."""
    runs = json.loads(output.read_text()) if output.exists() else {}
    todo = missing(runs, rows, seeds)
    if todo:
        start = _train(START, 0, folder, cores[0])  # ends at once if it is there
        print(f"{START}: box AP {start['bbox']['AP']}", flush=True)
    free, failed = list(cores), 0

    def one(row: str, seed: int) -> None:
        core = free.pop()
        try:
            _save(output, row, seed, _train(row, seed, folder, core))
        finally:
            free.append(core)

    with concurrent.futures.ThreadPoolExecutor(len(cores)) as pool:
        waiting = {pool.submit(one, row, seed): f"{row or 'base'}-{seed}" for row, seed in todo}
        for done in concurrent.futures.as_completed(waiting):
            error = done.exception()
            failed += error is not None
            name = waiting[done]
            print(f"{name}: {error or 'done'}; {folder}/{name}.log", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("folder", type=pathlib.Path, nargs="?", default=pathlib.Path("runs/study"))
    parser.add_argument("--output", type=pathlib.Path, default=RUNS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--rows", nargs="+", default=[row or "base" for row in arms()])
    arguments = parser.parse_args()
    if arguments.what == "run":
        folder, output = arguments.folder.resolve(), arguments.output.resolve()
        rows = ["" if row == "base" else row for row in arguments.rows]
        sys.exit(run(folder, output, arguments.seeds, arguments.cores, rows) > 0)
    study_report.write(json.loads(arguments.output.read_text()))


if __name__ == "__main__":
    main()
