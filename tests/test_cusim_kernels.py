"""The kernel emulator itself: intrinsics and layouts against numpy, schedules, and planted bugs that must be found."""

from __future__ import annotations

import re

import numpy as np
import pytest
from cusim import KernelError, Module, Pointers, SanitizerError, build, needs_emulator, run_every_way

pytestmark = needs_emulator

KERNELS = build.HERE / "kernels"
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_120")


def rows_and_norms(n_rows: int = 5, n: int = 384) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((n_rows, n), dtype=np.float32)
    return x, x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5)


@pytest.mark.parametrize(("kernel", "shared_bytes"), [("rms_norm", 16), ("rms_norm_tree", 0)])
def test_a_correct_kernel_gives_the_same_bits_in_every_build_and_order(kernel: str, shared_bytes: int) -> None:
    x, expected = rows_and_norms()
    y = np.full_like(x, np.nan)
    run_every_way(KERNELS / "reduce.cu", kernel, 5, 128, x, y, 384, 1e-5, shared_bytes=shared_bytes)
    np.testing.assert_allclose(y, expected, rtol=1e-5)


# -- intrinsics -------------------------------------------------------------------------------------------------------


def test_warp_intrinsics() -> None:
    x = np.random.default_rng(1).integers(0, 1000, 32).astype(np.int32)
    out = np.zeros((8, 32), np.int32)
    run_every_way(KERNELS / "intrinsics.cu", "warp_exchange", 1, 32, x, out)
    lane = np.arange(32)
    down = np.where(lane % 16 + 2 < 16, lane + 2, lane)
    expected = [x[lane // 8 * 8 + 5], x[lane ^ 3], x[down], x[np.where(lane >= 7, lane - 7, lane)]]
    votes = sum(int(v & 1) << i for i, v in enumerate(x))
    matches = [sum(1 << i for i in range(32) if x[i] % 4 == v % 4) for v in x]
    ends = [x[:16].max()] * 16 + [x[16:].min()] * 16
    for found, wanted in zip(out, [*expected, [votes] * 32, matches, [x.sum()] * 32, ends], strict=True):
        assert np.array_equal(found.view(np.uint32), np.array(wanted).astype(np.uint32))


def test_barriers_with_votes() -> None:
    x = np.array([1] * 40 + [0] * 24, np.int32)
    out = np.zeros((64, 3), np.int32)
    run_every_way(KERNELS / "intrinsics.cu", "block_votes", 1, 64, x, out)
    assert (out == [40, 0, 1]).all()


def test_rounded_arithmetic_is_exact() -> None:
    rng, n = np.random.default_rng(2), 1000
    a, b, c = (rng.standard_normal(n).astype(np.float32) * 10 for _ in range(3))
    a[:6] = [np.nan, np.inf, -np.inf, 2.5, 3.5, -2.5]
    out, whole = np.zeros((4, n), np.float32), np.zeros(n, np.int32)
    run_every_way(KERNELS / "intrinsics.cu", "floats", 8, 128, a, b, c, out, whole, n)
    product = a.astype(np.float64) * b  # exact; so the sum below is rounded twice, but hardly ever differently
    fused = (product.astype(np.longdouble) + c).astype(np.float32)
    for found, wanted in zip(out, [fused, a * b + c, a / b, np.sqrt(np.abs(a))], strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert (out[0][6:] != out[1][6:]).any()  # contraction is off
    assert whole[:6].tolist() == [0, 2**31 - 1, -(2**31), 2, 4, -2]
    np.testing.assert_array_equal(whole[6:], np.rint(a[6:]).astype(np.int32))


def test_half_conversions() -> None:
    module = Module(KERNELS / "intrinsics.cu")
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    out = np.zeros(1 << 16, np.float32)
    module.launch("all_halves", 256, 256, out)
    np.testing.assert_array_equal(out, every.astype(np.float32))
    exact = out[np.isfinite(out)]
    rng = np.random.default_rng(3)
    with np.errstate(over="ignore"):  # behind the largest number comes infinity
        behind = np.nextafter(every, np.float16(np.inf)).astype(np.float32)
    middles = (exact + behind[np.isfinite(out)]) / 2  # ties
    bits = rng.integers(0, 1 << 32, 50_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([exact, middles, bits, np.float32([65519.9, 65520, 2.0**-25, 2.0**-24 * 0.51])])
    half, bfloat = np.zeros(len(x), np.uint16), np.zeros(len(x), np.uint16)
    module.launch("halves", -(-len(x) // 256), 256, x, half, bfloat, len(x))
    with np.errstate(over="ignore"):
        wanted = x.astype(np.float16).view(np.uint16)
    number = ~np.isnan(x)
    assert np.array_equal(half[number], wanted[number])
    assert (half[~number] == 0x7FFF).all()
    assert (bfloat[~number] == 0x7FFF).all()
    rounded = bfloat.astype(np.uint32) << 16
    up, down = (x.view(np.uint32) & 0xFFFF0000) + 0x10000, x.view(np.uint32) & 0xFFFF0000
    low = x.view(np.uint32) & 0xFFFF
    nearest = np.where((low > 0x8000) | ((low == 0x8000) & (down >> 16 & 1 == 1)), up, down)
    assert np.array_equal(rounded[number], nearest[number])


def test_byte_intrinsics() -> None:
    rng = np.random.default_rng(4)
    a, b = (rng.integers(-128, 128, (32, 4)).astype(np.int8) for _ in range(2))
    out = np.zeros((5, 32), np.int32)
    run_every_way(KERNELS / "intrinsics.cu", "bytes", 1, 32, a, b, out)
    wide_a, wide_b = a.astype(np.int32), b.astype(np.int32)
    assert np.array_equal(out[0], (wide_a * wide_b).sum(1) + 7)
    assert np.array_equal(out[1].view(np.int8).reshape(32, 4), np.clip(wide_a - wide_b, -128, 127))
    pairs = np.concatenate([a, b], axis=1)
    assert np.array_equal(out[2].view(np.int8).reshape(32, 4), pairs[:, [0, 4, 2, 6]])
    signs = pairs >> 7
    picked = np.stack([signs[:, 3], pairs[:, 1], pairs[:, 5], signs[:, 6]], axis=1)
    assert np.array_equal(out[3].view(np.int8).reshape(32, 4), picked)
    assert np.array_equal(out[4], (a.view(np.int16).astype(np.int32) * wide_b[:, 2:]).sum(1) + 7)


def test_atomics() -> None:
    ids = np.random.default_rng(5).integers(0, 10, 512).astype(np.int32)
    counts, total, largest = np.zeros(10, np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32)
    run_every_way(KERNELS / "intrinsics.cu", "atomics", 4, 128, ids, counts, total, largest)
    assert np.array_equal(counts, np.bincount(ids, minlength=10))
    assert (total[0], largest[0]) == (ids.sum(), 9)


# -- tensor cores -----------------------------------------------------------------------------------------------------


def fragments(matrix: np.ndarray, element_bytes: int) -> np.ndarray:
    """Spread A [16, k], or B transposed [8, k], over the lanes as the PTX manual says: uint32 [32, registers]."""
    per_register, k = 4 // element_bytes, matrix.shape[1]
    n_registers = 4 if len(matrix) == 16 else 2
    out = np.zeros((32, n_registers, per_register), matrix.dtype)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for r in range(n_registers):
            row, far = (g + 8 * (r & 1), r >> 1) if n_registers == 4 else (g, r)
            first = per_register * t + k // 2 * far
            out[lane, r] = matrix[row, first : first + per_register]
    return out.view(np.uint32).reshape(32, n_registers)


def from_fragments(c: np.ndarray) -> np.ndarray:
    out = np.zeros((16, 8), c.dtype)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for i in range(4):
            out[g + 8 * (i >> 1), 2 * t + (i & 1)] = c[lane, i]
    return out


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_mma_of_16_bit_floats(kind: str) -> None:
    rng = np.random.default_rng(6)
    a, b = (rng.standard_normal((n, 16)).astype(np.float16).astype(np.float32) for n in (16, 8))
    if kind == "bf16":
        a, b = ((m.view(np.uint32) & 0xFFFF0000).view(np.float32) for m in (a, b))
        packed = [(m.view(np.uint32) >> 16).astype(np.uint16) for m in (a, b)]
    else:
        packed = [m.astype(np.float16) for m in (a, b)]
    c = rng.standard_normal((32, 4)).astype(np.float32)
    expected = from_fragments(c) + a @ b.T
    inputs = [fragments(m, 2) for m in packed]
    run_every_way(KERNELS / "tensor.cu", f"fragments_{kind}", 1, 32, *inputs, c, modes=("fast",))
    np.testing.assert_allclose(from_fragments(c), expected, rtol=1e-5, atol=1e-5)


def test_mma_of_int8_is_exact() -> None:
    rng = np.random.default_rng(7)
    a, b = (rng.integers(-128, 128, (n, 32)).astype(np.int8) for n in (16, 8))
    c = np.full((32, 4), 7, np.int32)
    expected = a.astype(np.int32) @ b.astype(np.int32).T
    run_every_way(KERNELS / "tensor.cu", "fragments_s8", 1, 32, fragments(a, 1), fragments(b, 1), c, modes=("fast",))
    assert np.array_equal(from_fragments(c), expected)


def test_the_shorter_mma_of_int8_is_exact() -> None:
    rng = np.random.default_rng(7)
    a, b = (rng.integers(-128, 128, (n, 16)).astype(np.int8) for n in (16, 8))
    c = np.full((32, 4), 7, np.int32)
    expected = a.astype(np.int32) @ b.astype(np.int32).T
    words = [np.ascontiguousarray(m.view(np.uint32)) for m in (a, b)]  # four columns each
    lane = np.arange(32)
    own_a = np.stack([words[0][lane // 4 + 8 * r, lane % 4] for r in (0, 1)], axis=1)
    own_b = words[1][lane // 4, lane % 4]
    run_every_way(KERNELS / "tensor.cu", "fragments_s8_short", 1, 32, own_a, own_b, c, modes=("fast",))
    assert np.array_equal(from_fragments(c), expected)


def test_ldmatrix() -> None:
    matrices = np.arange(4 * 64, dtype=np.uint16).reshape(4, 8, 8)
    out = np.zeros((2, 32, 4, 2), np.uint16)
    run_every_way(KERNELS / "tensor.cu", "load_matrices", 1, 32, matrices, out)
    for found, source in ((out[0], matrices), (out[1], matrices.transpose(0, 2, 1))):
        for lane in range(32):
            g, t = divmod(lane, 4)
            assert np.array_equal(found[lane], source[:, g, 2 * t : 2 * t + 2])


def test_staged_matmul() -> None:
    a, b, expected = matmul_case()
    c = np.zeros((16, 8), np.float32)
    run_every_way(KERNELS / "tensor.cu", "matmul_f16", 1, 32, a, b, c, 80)
    np.testing.assert_allclose(c, expected, rtol=1e-4, atol=1e-4)


def matmul_case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(8)
    a, b = (rng.standard_normal((n, 80)).astype(np.float16) for n in (16, 8))
    return a, b, a.astype(np.float32) @ b.astype(np.float32).T


# -- the same sources under NVRTC -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_sources_compile_with_nvrtc(arch: str) -> None:
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    for source in sorted(KERNELS.glob("*.cu")):
        program = nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, [], [])[1]
        options = [f"--gpu-architecture={arch}", "--std=c++17", f"-I{build.KERNEL_SOURCES}"]
        (code,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
        nvrtc.nvrtcGetProgramLog(program, log)
        assert code == nvrtc.nvrtcResult.NVRTC_SUCCESS, log.decode()


# -- planted bugs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "define", "shared_bytes"),
    [("rms_norm", "BUG_NO_BARRIER", 16), ("rms_norm_tree", "BUG_NO_TREE_BARRIER", 0)],
)
def test_a_missing_barrier_is_found(kernel: str, define: str, shared_bytes: int) -> None:
    x, expected = rows_and_norms()
    y = np.zeros_like(x)
    arguments = (kernel, 5, 128, x, y, 384, 1e-5)
    with pytest.raises(KernelError, match=r"race in .* shared memory.*reduce\.cu:\d+"):
        Module(KERNELS / "reduce.cu", "race", defines=[define]).launch(*arguments, shared_bytes=shared_bytes)
    module = Module(KERNELS / "reduce.cu", defines=[define])
    for order in ("forward", "reverse", "random"):
        module.launch(*arguments, shared_bytes=shared_bytes, order=order)
        assert not np.allclose(y, expected, rtol=1e-5)


def bug(kernel: str, *args: object, mode: str = "fast", n_threads: int = 64, **options) -> None:
    Module(KERNELS / "bugs.cu", mode).launch(kernel, 1, n_threads, *args, **options)


@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
@pytest.mark.parametrize(
    ("kernel", "n_threads", "message"),
    [
        ("half_warp_waits", 32, r"deadlock: threads 0\.\.15 wait in __shfl_xor_sync .*16\.\.31 wait at __syncthreads"),
        ("divergent_barrier", 64, r"divergent barrier: .*bugs\.cu:13.*bugs\.cu:15|bugs\.cu:15.*bugs\.cu:13"),
        ("wrong_mask", 32, r"__shfl_sync .* with mask 0000ffff, which does not name the calling lane"),
        ("shuffle_from_exited_lane", 32, r"shuffles from lane 3, which is not in the mask or has exited"),
        ("traps", 32, r"thread 3: assertion failed: threadIdx.x != 3"),
    ],
)
def test_broken_rules_are_named(kernel: str, n_threads: int, message: str, order: str) -> None:
    y = np.zeros(64, np.float32)
    with pytest.raises(KernelError, match=message):
        bug(kernel, y, n_threads=n_threads, order=order)
    x, expected = rows_and_norms()  # and the runtime goes on as if nothing had been
    Module(KERNELS / "reduce.cu").launch("rms_norm", 5, 128, x, out := np.zeros_like(x), 384, 1e-5, shared_bytes=16)
    np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_uninitialised_shared_memory_is_nan() -> None:
    y = np.zeros(64, np.float32)
    bug("reads_before_writing", y)
    assert (y[:32] == 1).all()
    assert np.isnan(y[32:]).all()


def test_a_copy_that_nobody_waits_for_is_found() -> None:
    a, b, expected = matmul_case()
    module = Module(KERNELS / "tensor.cu", defines=["BUG_NO_WAIT"])
    c = np.zeros((16, 8), np.float32)
    module.launch("matmul_f16", 1, 32, a, b, c, 80)
    assert np.isnan(c).any()
    module.launch("matmul_f16", 1, 32, a, b, c, 80, order="reverse")  # copies land at once: lucky, as on some GPUs
    np.testing.assert_allclose(c, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("define", ["BUG_NO_SYNC_AFTER_WAIT", "BUG_NO_SYNC_BEFORE_REUSE"])
def test_races_of_asynchronous_copies_are_found(define: str) -> None:
    a, b, _ = matmul_case()
    module = Module(KERNELS / "tensor.cu", "race", defines=[define])
    with pytest.raises(KernelError, match=r"race in static shared memory.*tensor\.cu:\d+"):
        module.launch("matmul_f16", 1, 32, a, b, np.zeros((16, 8), np.float32), 80)


@pytest.mark.parametrize("kernel", ["reads_atomic_counter", "syncs_warp_only", "overwrites_too_early"])
def test_other_races_are_found(kernel: str) -> None:
    with pytest.raises(KernelError, match=r"race in static shared memory"):
        bug(kernel, np.zeros(64, np.float32), mode="race")


@pytest.mark.parametrize(
    ("kernel", "args", "options", "report"),
    [
        ("beyond_static_shared", [np.zeros(64, np.float32)], {"n_threads": 32}, r"index 32 out of bounds"),
        ("beyond_dynamic_shared", [np.zeros(64, np.float32)], {"shared_bytes": 128}, r"use-after-poison"),
        ("beyond_global", [np.zeros(50, np.float32), 50], {}, r"heap-buffer-overflow"),
        ("misaligned_load", [np.zeros(4096, np.uint8), np.zeros(4, np.int32)], {"n_threads": 2}, r"misaligned address"),
        ("cast_overflows", [np.float32([1e20]), np.zeros(1, np.int32)], {"n_threads": 1}, r"outside the range"),
    ],
)
def test_the_sanitizers_report_the_line(kernel: str, args: list, options: dict, report: str) -> None:
    with pytest.raises(SanitizerError, match=report) as caught:
        bug(kernel, *args, mode="asan", **options)
    assert re.search(r"bugs\.cu:\d+", str(caught.value))


def test_a_kernel_that_spins_for_ever_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module(KERNELS / "bugs.cu")
    monkeypatch.setattr(module._library.configure.__func__, "__defaults__", (0.2,))
    with pytest.raises(KernelError, match=r"spins for more than 0\.2 s"):
        module.launch("spins", 1, 32, np.zeros(1, np.uint32))


# -- launches ---------------------------------------------------------------------------------------------------------


def test_wrong_launches_are_refused() -> None:
    module = Module(KERNELS / "reduce.cu")
    x = np.zeros((4, 384), np.float32)
    good = (x, x.copy(), 384, 1e-5)
    with pytest.raises(KernelError, match="takes 4 arguments, got 2"):
        module.launch("rms_norm", 1, 128, x, 384)
    with pytest.raises(KernelError, match="is not an integer of 4 bytes"):
        module.launch("rms_norm", 1, 128, *good[:2], 384.0, 1e-5)
    with pytest.raises(KernelError, match="not C-contiguous"):
        module.launch("rms_norm", 1, 128, x[:, ::2], *good[1:])
    with pytest.raises(KernelError, match="1 to 1024 are possible"):
        module.launch("rms_norm", 1, 2048, *good)
    with pytest.raises(KernelError, match="bytes of dynamic shared memory"):
        module.launch("rms_norm", 1, 128, *good, shared_bytes=1 << 20)


SUM_THROUGH_TABLE = """
struct Sources { const float *const *table; int n; };
extern "C" __global__ void sum(Sources s, float *out) {
    float total = 0.0f;
    for (int i = 0; i < s.n; i++)
        total += s.table[i] ? s.table[i][threadIdx.x] : 0.0f;
    out[threadIdx.x] = total;
}
"""


def test_addresses_in_tables_and_structs_reach_the_sanitizer_build(tmp_path) -> None:
    (tmp_path / "sum.cu").write_text(SUM_THROUGH_TABLE)
    arrays = [np.arange(4, dtype=np.float32) * k for k in (1, 10)]
    table = Pointers([arrays[0], None, arrays[1]])
    struct = np.array([table.table.ctypes.data, 3], np.uint64).tobytes()
    out = np.zeros(4, np.float32)
    run_every_way(tmp_path / "sum.cu", "sum", 1, 4, struct, out, memory=[table.table, *arrays])
    assert out.tolist() == [0, 11, 22, 33]
