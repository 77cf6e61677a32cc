"""Fixtures that every test may use."""

import gc
import os
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from tests.cusim import StandInDriver

REPO = Path(__file__).resolve().parent.parent

# Several test processes share the cores: a thread with nothing to do gives its core away at once. Libraries look at
# this when they are loaded, which is later.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A test asserts and does not time: on a busy machine any example may take long.
settings.register_profile("untimed", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """Thousands of tests are there to the end: to look through them again and again for garbage takes long."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_gpu_by_chance(request: pytest.FixtureRequest) -> None:
    """Where there is a real GPU, keep tests that are not about it away from it: the stand-in driver takes its place."""
    if find_library("cuda") and not any(item.get_closest_marker("gpu") for item in request.session.items):
        from tests.cusim import missing_requirement, stand_in_driver  # noqa: PLC0415

        if missing_requirement() is None:
            stand_in_driver().set(n_devices=0)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> "Iterator[StandInDriver]":
    """The stand-in driver as the machine's GPU; afterwards nothing may be left of what the test allocated."""
    from tests.cusim import StandInCompiler, stand_in_driver  # noqa: PLC0415

    monkeypatch.setattr("engine.devices.cuda.runtime.NVRTCCompiler", lambda arch: StandInCompiler())
    monkeypatch.setattr("engine.devices.cuda.speeds._COPY_BYTES", 1 << 20)  # its speeds are those of no GPU
    monkeypatch.setattr("engine.devices.cuda.speeds._RAM_BYTES", 16 << 20)
    # For its four multiprocessors: a warp takes several rows then, as of large models on large GPUs.
    for name, n in (("_MULTIPROCESSORS", 4), ("_WARPS_WANTED", 48), ("_FLOAT_WARPS_WANTED", 64)):
        monkeypatch.setattr(f"engine.devices.cuda.kernels.{name}", n)
    stand_in = stand_in_driver()
    stand_in.reset()
    yield stand_in
    assert stand_in.device_bytes == 0
    assert stand_in.pinned_allocations == 0
    stand_in.reset()
    stand_in.set(n_devices=0)  # for tests of other files that take whatever device there is


@pytest.fixture(scope="session")
def data() -> Path:
    """The small files that every checkout has: `tests/data`."""
    return REPO / "tests" / "data"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The full golden files, models and traces, which stand beside the checkout where the project is developed.

    A user's checkout has none: those tests are skipped there, and the copies in `tests/data` still run. CI must have
    them.
    """
    folder = Path(os.environ.get("ENGINE_SHARED", REPO.parent / "shared"))
    if not (folder / "golden").is_dir():
        message = f"no golden files in {folder} (set ENGINE_SHARED to their folder)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def golden_path(data: Path, request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """Where a golden file lies: the small copies of `tests/data/golden` if they have it, else the full set."""

    def find(name: str) -> Path:
        copy = data / "golden" / name
        return copy if copy.exists() else request.getfixturevalue("shared") / "golden" / name

    return find


@pytest.fixture(scope="module", params=["recurrent", "attention"])
def small_model(request: pytest.FixtureRequest, golden_path: Callable[[str], Path]) -> Path | None:
    """The bundled model, which has recurrent layers, and one of attention layers only."""
    return None if request.param == "recurrent" else golden_path("qwen3moe/qwen3moe-micro-Q8_0.gguf")
