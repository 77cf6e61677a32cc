"""`bench/gpu.py` is for machines that are rented by the minute: here each section runs once, on the stand-in driver."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import gpu
from engine.devices.cuda import runtime
from tests.cusim import StandInCompiler, needs_emulator

pytestmark = [needs_emulator, pytest.mark.usefixtures("driver")]

MODELS = ("handshake", "prompt", "model", "swaps", "guesses", "operations", "prompt_operations")
SIZES = {"threads": 2, "prompt": 8, "longest": 33, "tokens": 2}


@pytest.mark.parametrize("section", gpu.SECTIONS)
def test_sections_run(section: str, data: Path, tmp_path: Path, driver, monkeypatch) -> None:
    """Kernels at the sizes of big models are not launched, and nothing is kept of what was timed."""
    monkeypatch.setattr(StandInCompiler, "_version", (0, 0), raising=False)
    monkeypatch.setattr(gpu, "NVRTCCompiler", lambda arch: StandInCompiler())
    monkeypatch.setattr(gpu, "RAM_BYTES", 16 << 20)
    driver.set(device_bytes=8 << 30)
    if section not in MODELS:
        for owner, name in ((runtime.Context, "prepare"), (runtime.Context, "function"), (runtime.Stream, "launch")):
            monkeypatch.setattr(owner, name, lambda *_: None)
        monkeypatch.setattr(runtime.Stream, "fill", lambda *_: None)  # gigabytes
    model = data / "golden" / "qwen3moe" / "qwen3moe-micro-Q8_0.gguf"
    arguments = SIZES | {"model": model, "sections": section, "out": tmp_path}
    gpu.main([f"--{name}={value}" for name, value in arguments.items()])
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert "errors" not in found
    assert sum(len(values) for values in found.values()) > 1
    assert not [
        name for values in found.values() for name, value in values.items() if "same bits" in name and not value
    ]


@pytest.mark.parametrize(
    ("argument", "message"),
    [("--sections=nonsense", "there is no section 'nonsense'"), ("--tokens=0", "--tokens is 0; expected 1 or more")],
)
def test_what_cannot_be_measured_is_a_message(argument: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([argument])
    assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(driver) -> None:
    driver.set(n_devices=0)
    with pytest.raises(SystemExit, match="error: no GPU was found"):
        gpu.main([])
