"""What pyproject.toml cannot say: the extension, and one C library for each instruction-set level.

Only the objects of a level are compiled with its instructions, so the extension loads on any x86-64 CPU and picks
a level at run time. Fused multiply-add is always written out (`-ffp-contract=off`): the arithmetic is the same bits
on every level.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib
from setuptools.command.build_ext import build_ext

KERNELS = Path("engine/kernels")
HEADERS = sorted(str(p) for p in KERNELS.rglob("*.h"))
SANITIZE = os.environ.get("ENGINE_SANITIZE", "")  # for example "address,undefined"; see the Makefile

CFLAGS = ["-std=gnu11", "-O3", "-g1", "-fno-math-errno", "-ffp-contract=off", "-fopenmp", "-fPIC", "-Wall", "-Wextra"]
# Copies of a loop for each case in it take a third of the compiler's time, and make nothing faster here.
CFLAGS += ["-fno-unswitch-loops", "-fno-split-loops", "-fno-split-paths", "-fno-gcse-after-reload"]
LDFLAGS = ["-fopenmp"]
if SANITIZE:  # warnings are the plain build's, and nothing goes on after a failed check: that is compiled sooner
    CFLAGS += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-w"]
    # Most of the time goes into passes over the registers of long functions, which tests are quick enough without.
    passes = ("forward-propagate", "cprop-registers", "dse", "move-loop-invariants", "if-conversion", "if-conversion2")
    passes += ("split-wide-types", "combine-stack-adjustments", "shrink-wrap")
    CFLAGS += ["-fira-algorithm=priority", "-fira-region=one", *(f"-fno-{name}" for name in passes)]
    CFLAGS += ["-fno-sanitize=object-size,pointer-overflow"]  # what is read or written out of bounds ASan sees
    CFLAGS += ["-fno-wrapv"]  # with Python's -fwrapv no signed overflow would be found
    LDFLAGS += [f"-fsanitize={SANITIZE}"]

LEVELS = {"scalar": []}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
    LEVELS["avx2"] = avx2
    LEVELS["avx512"] = [
        *avx2,
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512vnni",
        "-mprefer-vector-width=512",
    ]
    LEVELS["avx512_vbmi"] = [*LEVELS["avx512"], "-mavx512vbmi", "-mgfni"]

if SANITIZE:  # leave out what could not be run here: it takes longest to compile
    cpu_flags = set(Path("/proc/cpuinfo").read_text().split())
    for level, flags in (("avx512", {"avx512_vnni"}), ("avx512_vbmi", {"avx512_vnni", "avx512vbmi"})):
        if not flags <= cpu_flags:
            LEVELS.pop(level, None)

HAS_LEVELS = [(f"ENGINE_HAS_{level.upper()}", "1") for level in LEVELS]
COMMON = sorted(str(p) for p in KERNELS.glob("*.c") if not p.name.startswith("level_"))


def library(name: str, sources: list[str], flags: list[str]) -> tuple[str, dict]:
    """Return what `build_clib` takes for a library of some C files."""
    facts = {"sources": sources, "cflags": CFLAGS + flags, "include_dirs": ["engine"], "macros": HAS_LEVELS}
    return f"engine_{name}", facts | {"obj_deps": {"": HEADERS}}


libraries = [
    library("common", COMMON, []),  # first: it is linked before the levels, which it knows
    *(library(level, [str(KERNELS / f"level_{level}.c")], flags) for level, flags in LEVELS.items()),
]


class BuildInParallel(build_clib):
    """Compiles the libraries at the same time: the levels are most of the work."""

    def build_libraries(self, libraries: list) -> None:
        """Build each library in a thread of its own."""
        build_one = super().build_libraries
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda library: build_one([library]), libraries))


class BuildWithLibraries(build_ext):
    """Builds the libraries first; `build` alone would, but not `build_ext --inplace`."""

    def run(self) -> None:
        """Build the libraries, then the extension."""
        self.run_command("build_clib")
        super().run()


extension = Extension(
    "engine._kernels",
    ["engine/_kernels.pyx"],
    include_dirs=["engine"],
    depends=[*HEADERS, *(source for _, facts in libraries for source in facts["sources"])],  # it holds the libraries
    extra_compile_args=[*CFLAGS, "-O1", "-Wno-unused-function"],  # it only passes on what Python says
    extra_link_args=LDFLAGS,
    define_macros=HAS_LEVELS,
)

setup(
    cmdclass={"build_clib": BuildInParallel, "build_ext": BuildWithLibraries},
    libraries=libraries,
    ext_modules=cythonize(
        [extension],
        compiler_directives={
            "language_level": 3,
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "embedsignature": False,
            "binding": True,
        },
    ),
)
