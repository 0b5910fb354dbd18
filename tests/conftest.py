"""What every test runs under: CPU, strict promotion, all warnings as errors."""

import contextlib
import os
import pathlib
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The programs of this environment, also where pytest is called by its path: launch/ runs `python`.
os.environ["PATH"] = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])

# First: the library of triton, which it imports, crashes once TensorFlow is loaded (2026-11).
with contextlib.suppress(ImportError):
    import torchvision  # noqa: F401

import jax
import pytest
from absl import flags
from hypothesis import settings

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("ci")
flags.FLAGS.mark_as_parsed()

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder that holds `data/`, `weights/` beside the project (or SEPHJAX_DATA)."""
    folder = pathlib.Path(os.environ.get("SEPHJAX_DATA", ROOT.parent / "shared"))
    if not (folder / "data" / "coco_tiny").is_dir():
        pytest.skip(f"no data/coco_tiny in {folder}; set SEPHJAX_DATA")
    return folder


@pytest.fixture(scope="session")
def shared_data(shared: pathlib.Path) -> pathlib.Path:
    return shared / "data"


@pytest.fixture(params=["scan", "gather"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test once with each way of pooling ROIs, whatever the platform."""
    from sephjax.ops import roi_align, roi_gather, roi_scan

    module = {"scan": roi_scan, "gather": roi_gather}[request.param]
    monkeypatch.setattr(roi_align, "_read", module.pool)
    monkeypatch.setattr(roi_align, "_write", module.spread)
    return request.param


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """With SEPHJAX_NO_SKIP (CI) a skipped test fails the run."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = len(reporter.stats.get("skipped", [])) if reporter else 0
    if os.environ.get("SEPHJAX_NO_SKIP") and skipped and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        reporter.write_line(f"{skipped} skipped: SEPHJAX_NO_SKIP forbids it", red=True)
