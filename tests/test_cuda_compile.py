"""The run-time compiler and its cache, without a GPU: every kernel for every supported architecture."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TypeAlias

import pytest

from engine.devices.cuda import jit
from engine.errors import DeviceError
from engine.quants.formats import FORMATS
from tests.cusim import environment, needs_emulator

pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda-python and NVRTC")

Kernel: TypeAlias = tuple[str, tuple[str, ...]]  # a file and what it is compiled for


def _with_defaults(source: str, defaults: dict[str, str | int], given: dict[str, str | int]) -> Kernel:
    return source, tuple(f"{name}={value}" for name, value in (defaults | given).items())


def _attention(source: str = "attention.cu", **definitions: str | int) -> Kernel:
    """Attention that sees all positions, but for what is given."""
    every = {"SHARED": 0, "CAP": "0.0f", "TOP_K": 0, "BLOCK": 1, "TAIL": 0, "BY_HEAD": 0, "PERIOD": 0, "WINDOW": 0}
    return _with_defaults(source, every, definitions)


def _merge(**definitions: int) -> Kernel:
    """The sum of its parts, without a gate or forms for products."""
    every = {"TOP_K": 0, "BLOCK": 1, "TAIL": 0, "PERIOD": 0, "WINDOW": 0, "GATE": 0, "PER_HEAD": 0, "FORMS": 0}
    return _with_defaults("merge_parts.cu", every, definitions)


ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
KERNELS = [
    ("linear.cu", ("FORMAT=Q4_K", "N_TOKENS=1", "ROW_WARPS=4", "N_EXPERTS=0")),
    ("linear.cu", ("FORMAT=Q4_K", "SECOND=Q6_K", "N_TOKENS=1", "ROW_WARPS=4", "N_EXPERTS=0")),
    ("linear.cu", ("FORMAT=F16", "N_TOKENS=8", "ROW_WARPS=2", "N_EXPERTS=0")),
    ("linear.cu", ("FORMAT=F32", "N_TOKENS=1", "ROW_WARPS=1", "N_EXPERTS=256", "SCORING=0", "N_GROUPS=1")),
    ("linear.cu", ("FORMAT=F32", "N_TOKENS=1", "ROW_WARPS=1", "PAIR_COLUMNS=2048", "N_EXPERTS=0")),
    ("linear.cu", ("FORMAT=Q4_K", "N_TOKENS=4", "ROW_WARPS=4", "N_EXPERTS=0")),
    ("linear.cu", ("FORMAT=Q5_1", "N_TOKENS=2", "ROW_WARPS=4", "N_EXPERTS=0")),
    ("linear_tiles.cu", ("FORMAT=Q4_K", "TILE_WARPS=12")),
    ("linear_tiles.cu", ("FORMAT=Q6_K", "TILE_WARPS=12")),
    ("linear_tiles.cu", ("FORMAT=Q5_1", "TILE_WARPS=6")),
    ("linear_float_tiles.cu", ("FORMAT=BF16",)),
    ("quantize.cu", ("GROUP=256",)),
    ("quantize.cu", ("GROUP=32",)),
    ("expert_gate_up.cu", ("GATE_FORMAT=Q4_K", "UP_FORMAT=Q4_K", "ACTIVATION=1", "LIMIT=0.0f", "UP_LIMIT=0.0f")),
    ("expert_down.cu", ("DOWN_FORMAT=Q6_K",)),
    ("expert_gate_up.cu", ("GATE_FORMAT=MXFP4", "UP_FORMAT=MXFP4", "ACTIVATION=3", "LIMIT=7.0f", "UP_LIMIT=0.0f")),
    ("expert_gate_up.cu", ("GATE_FORMAT=Q6_K", "UP_FORMAT=Q6_K", "ACTIVATION=5", "LIMIT=4.0f", "UP_LIMIT=25.0f")),
    (
        "expert_gate_up_tiles.cu",
        ("GATE_FORMAT=Q4_K", "UP_FORMAT=Q4_K", "ACTIVATION=0", "LIMIT=7.0f", "UP_LIMIT=0.0f", "TILE_WARPS=12"),
    ),
    (
        "expert_gate_up_tiles.cu",
        ("GATE_FORMAT=Q6_K", "UP_FORMAT=Q6_K", "ACTIVATION=5", "LIMIT=4.0f", "UP_LIMIT=25.0f", "TILE_WARPS=12"),
    ),
    ("expert_down_tiles.cu", ("DOWN_FORMAT=Q6_K", "TILE_WARPS=12")),
    ("group_choices.cu", ()),
    ("embed.cu", ("FORMAT=Q8_0",)),
    ("ngrams.cu", ()),
    ("carry_over.cu", ()),
    ("draw.cu", ()),
    ("transfer.cu", ()),
    ("elementwise.cu", ()),
    ("residual.cu", ("SOURCE=2", "N_USED=8", "NORMALIZE=1", "CENTER=0", "FORMS=3", "N_COLS=3072", "THREADS=768")),
    ("residual.cu", ("SOURCE=1", "N_USED=0", "NORMALIZE=1", "CENTER=1", "FORMS=3", "N_COLS=2048", "THREADS=256")),
    ("gate.cu", ("GATING=1", "LIMIT=0.0f", "OWN_LIMIT=0.0f", "PER_HEAD=0", "HEAD_SIZE=128", "N_STREAMS=1", "FORMS=1")),
    ("gate.cu", ("GATING=5", "LIMIT=0.0f", "OWN_LIMIT=0.0f", "PER_HEAD=0", "HEAD_SIZE=0", "N_STREAMS=1", "FORMS=3")),
    ("gate.cu", ("GATING=6", "LIMIT=0.0f", "OWN_LIMIT=0.0f", "PER_HEAD=0", "HEAD_SIZE=0", "N_STREAMS=1", "FORMS=1")),
    ("gate.cu", ("GATING=7", "LIMIT=4.0f", "OWN_LIMIT=25.0f", "PER_HEAD=0", "HEAD_SIZE=0", "N_STREAMS=1", "FORMS=1")),
    ("gate.cu", ("GATING=8", "LIMIT=7.0f", "OWN_LIMIT=0.0f", "PER_HEAD=0", "HEAD_SIZE=0", "N_STREAMS=1", "FORMS=2")),
    ("gate.cu", ("GATING=2", "LIMIT=7.0f", "OWN_LIMIT=0.0f", "PER_HEAD=1", "HEAD_SIZE=0", "N_STREAMS=1", "FORMS=2")),
    ("gate.cu", ("GATING=0", "LIMIT=0.0f", "OWN_LIMIT=0.0f", "PER_HEAD=0", "HEAD_SIZE=0", "N_STREAMS=4", "FORMS=1")),
    ("hyper_connections.cu", ("N_STREAMS=4", "N_MIXES=8", "MIXES=0")),
    ("hyper_connections.cu", ("N_STREAMS=8", "N_MIXES=16", "MIXES=0")),
    ("hyper_connections.cu", ("N_STREAMS=4", "N_MIXES=0", "MIXES=0")),
    ("hyper_connections.cu", ("N_STREAMS=4", "N_MIXES=24", "MIXES=0")),
    ("hyper_connections.cu", ("N_STREAMS=4", "N_MIXES=24", "MIXES=1")),
    ("hyper_connections.cu", ("N_STREAMS=4", "N_MIXES=4", "MIXES=1")),
    (
        "mix_residuals.cu",
        ("N_RESIDUALS=9", "MOST_RESIDUALS=16", "NORMALIZE=1", "FORMS=1", "N_COLS=7168", "THREADS=896"),
    ),
    (
        "mix_residuals.cu",
        ("N_RESIDUALS=16", "MOST_RESIDUALS=16", "NORMALIZE=0", "FORMS=0", "N_COLS=8200", "THREADS=1024"),
    ),
    ("compress.cu", ("N_PARTS=1",)),
    ("compress.cu", ("N_PARTS=2",)),
    ("group_router.cu", ()),
    (
        "norm_and_route.cu",
        (
            "FORMAT=F32",
            "ROW_WARPS=1",
            "PAIR_COLUMNS=3072",
            "N_EXPERTS=256",
            "SCORING=0",
            "N_GROUPS=1",
            "FORMS=3",
            "N_COLS=3072",
            "THREADS=128",
        ),
    ),
    ("router.cu", ("N_EXPERTS=256", "SCORING=3", "N_GROUPS=1")),
    ("router.cu", ("N_EXPERTS=256", "SCORING=1", "N_GROUPS=8")),
    ("attention_inputs.cu", ("KV_TYPE=2", "KEY_DIM=256", "VALUE_DIM=256", "SHARED=0")),
    ("attention_inputs.cu", ("KV_TYPE=1", "KEY_DIM=128", "VALUE_DIM=0", "SHARED=1")),
    ("select_positions.cu", ("KV_TYPE=1", "KEY_DIM=128", "VALUE_DIM=0", "SHARED=1", "N_HEADS=64")),
    ("select_positions.cu", ("KV_TYPE=2", "KEY_DIM=128", "VALUE_DIM=0", "SHARED=1", "N_HEADS=32")),
    ("select_blocks.cu", ("KV_TYPE=1", "KEY_DIM=128", "VALUE_DIM=0", "SHARED=1", "N_HEADS=4", "BLOCK=128")),
    ("select_blocks.cu", ("KV_TYPE=2", "KEY_DIM=128", "VALUE_DIM=0", "SHARED=1", "N_HEADS=4", "BLOCK=300")),
    _attention(KV_TYPE=1, KEY_DIM=128, VALUE_DIM=128, GROUP=16, TOP_K=16, BLOCK=128, BY_HEAD=1),
    _attention(KV_TYPE=1, KEY_DIM=256, VALUE_DIM=256, GROUP=16, TOP_K=513, BLOCK=4, TAIL=1),
    _attention(KV_TYPE=2, KEY_DIM=256, VALUE_DIM=256, GROUP=16),
    _attention(KV_TYPE=1, KEY_DIM=576, VALUE_DIM=512, SHARED=1, GROUP=128),
    _attention(KV_TYPE=1, KEY_DIM=576, VALUE_DIM=512, SHARED=1, GROUP=128, TOP_K=2048),
    _attention(KV_TYPE=1, KEY_DIM=512, VALUE_DIM=512, GROUP=8),
    _attention(KV_TYPE=0, KEY_DIM=64, VALUE_DIM=64, GROUP=1, CAP="30.0f"),
    _attention(KV_TYPE=1, KEY_DIM=512, VALUE_DIM=512, SHARED=1, GROUP=64, TOP_K=512, PERIOD=4, WINDOW=128),
    _attention(KV_TYPE=1, KEY_DIM=512, VALUE_DIM=512, SHARED=1, GROUP=64, TOP_K=513, BLOCK=4, TAIL=1),
    _attention("attention_prompt.cu", KV_TYPE=2, KEY_DIM=256, VALUE_DIM=256, GROUP=16, UNITS=4),
    _attention("attention_prompt.cu", KV_TYPE=1, KEY_DIM=128, VALUE_DIM=128, GROUP=8, UNITS=4),
    _attention("attention_prompt.cu", KV_TYPE=0, KEY_DIM=64, VALUE_DIM=64, GROUP=1, CAP="30.0f", UNITS=4),
    _merge(VALUE_DIM=512, TOP_K=513, BLOCK=4, TAIL=1),
    _merge(VALUE_DIM=512, TOP_K=512, PERIOD=4, WINDOW=128),
    _merge(VALUE_DIM=256, GATE=1, FORMS=1),
    _merge(VALUE_DIM=256, TOP_K=513, BLOCK=4, TAIL=1, GATE=1, FORMS=1),
    _merge(VALUE_DIM=128, TOP_K=16, BLOCK=128, FORMS=1),
    _merge(VALUE_DIM=512, TOP_K=2048),
    _merge(VALUE_DIM=64, GATE=3, PER_HEAD=1, FORMS=2),
    ("causal_conv.cu", ("KERNEL_SIZE=4", "DILATION=1", "ACTIVATES=1")),
    ("causal_conv.cu", ("KERNEL_SIZE=3", "DILATION=1", "ACTIVATES=0")),
    ("causal_conv.cu", ("KERNEL_SIZE=4", "DILATION=3", "ACTIVATES=1")),
    ("delta_net.cu", ("K_DIM=128", "V_DIM=128", "IS_DELTA=1", "BY_CHANNEL=0", "N_WARPS=8")),
    ("delta_net.cu", ("K_DIM=128", "V_DIM=128", "IS_DELTA=1", "BY_CHANNEL=1", "N_WARPS=4")),
    ("delta_net.cu", ("K_DIM=128", "V_DIM=64", "IS_DELTA=0", "BY_CHANNEL=0", "N_WARPS=4")),
    *(
        (
            "delta_net_step.cu",
            (
                "K_DIM=128",
                "V_DIM=128",
                f"BY_CHANNEL={n}",
                "KERNEL_SIZE=4",
                "DILATION=1",
                "ACTIVATES=1",
                "GATING=1",
                "FORMS=1",
            ),
        )
        for n in range(2)
    ),
    ("selective_scan.cu", ("STATE_SIZE=16", "CHANNEL_LANES=4")),
    ("selective_scan.cu", ("STATE_SIZE=256", "CHANNEL_LANES=32")),
    ("handshake.cu", ()),
]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_compiles(arch: str, tmp_path: Path) -> None:
    """Every file for every architecture; of a file's other definitions each for one of them, in turn."""
    compiler, seen = jit.NVRTCCompiler(arch, tmp_path), set()
    for i, (source, definitions) in enumerate(KERNELS):
        if source not in seen or ARCHITECTURES[i % len(ARCHITECTURES)] == arch:
            assert compiler.compile(source, definitions).startswith(b"\x7fELF")
        seen.add(source)


def test_the_benchmark_that_only_reads_compiles(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "bench" / "read.cu"
    compiler = jit.NVRTCCompiler("sm_90", tmp_path)
    assert compiler.compile(str(source), ("THREADS=128", "DEPTH=2")).startswith(b"\x7fELF")


def test_every_kernel_file_is_among_them() -> None:
    assert {path.name for path in jit.sources().glob("*.cu")} == {source for source, _ in KERNELS}


@pytest.mark.parametrize("weight_format", FORMATS, ids=lambda f: f.name)
def test_every_format_compiles(weight_format, tmp_path: Path) -> None:
    compiler = jit.NVRTCCompiler("sm_89", tmp_path)
    assert compiler.compile("linear.cu", (f"FORMAT={weight_format.name}", "N_TOKENS=1", "ROW_WARPS=4", "N_EXPERTS=0"))


def test_the_second_time_comes_from_the_cache(tmp_path: Path, monkeypatch) -> None:
    definitions = ("GROUP=32",)
    first = jit.NVRTCCompiler("sm_89", tmp_path).compile("quantize.cu", definitions)
    again = jit.NVRTCCompiler("sm_89", tmp_path)
    monkeypatch.setattr(again, "_compile", lambda *_: pytest.fail("compiled again"))
    assert again.compile("quantize.cu", definitions) == first


def test_a_changed_header_or_definition_is_another_entry(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "sources"
    folder.mkdir()
    for path in jit.sources().glob("*.cu*"):
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(jit, "sources", lambda: folder)
    compiler = jit.NVRTCCompiler("sm_89", tmp_path)
    before = compiler._cache_path("quantize.cu", ("GROUP=32",))
    assert compiler._cache_path("quantize.cu", ("GROUP=256",)) != before
    (folder / "ptx.cuh").write_text((folder / "ptx.cuh").read_text() + "\n")  # included by what it includes
    assert compiler._cache_path("quantize.cu", ("GROUP=32",)) != before


def test_a_forgotten_entry_is_compiled_again(tmp_path: Path) -> None:
    compiler = jit.NVRTCCompiler("sm_89", tmp_path)
    good = compiler.compile("quantize.cu", ("GROUP=32",))
    path = compiler._cache_path("quantize.cu", ("GROUP=32",))
    path.write_bytes(b"damaged")
    assert compiler.compile("quantize.cu", ("GROUP=32",)) == b"damaged"
    compiler.forget("quantize.cu", ("GROUP=32",))
    assert compiler.compile("quantize.cu", ("GROUP=32",)) == good


def test_a_compile_error_shows_the_compilers_words(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"cuda/quantize\.cu \(GROUP=nonsense\) does not compile(.|\n)*nonsense"):
        jit.NVRTCCompiler("sm_89", tmp_path).compile("quantize.cu", ("GROUP=nonsense",))


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, caplog) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert jit.NVRTCCompiler("sm_89", blocked / "below").compile("quantize.cu", ("GROUP=32",))
    assert "cannot be kept" in caplog.text


@needs_emulator
def test_it_compiles_beside_the_stand_in_driver(tmp_path: Path) -> None:
    """NVRTC asks the driver for more than the engine does, and other tests may have loaded the stand-in."""
    code = """import sys
from pathlib import Path
from engine.devices.cuda import jit
jit.NVRTCCompiler("sm_89", Path(sys.argv[1])).compile("quantize.cu", ("GROUP=32",))"""
    subprocess.run([sys.executable, "-c", code, tmp_path], env=os.environ | environment(), check=True)
    assert list(tmp_path.iterdir())


def test_the_cache_follows_xdg(monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert jit.cache_folder() == Path("/somewhere/hot-experts/cubin")


def test_without_a_driver_the_reason_is_one_line() -> None:
    """In a process of its own, since this one may have loaded the stand-in driver."""
    code = "from engine.devices.cuda import probe\ntry: probe()\nexcept Exception as e: print(type(e).__name__, e)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    if not done.stdout:
        pytest.skip("this machine has a GPU")
    assert done.stdout.startswith("DeviceError")
    assert "driver" in done.stdout
    assert done.stdout.count("\n") == 1
