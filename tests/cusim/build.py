"""Builds kernel sources, the runtime and the stand-in driver with g++, once for each content."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPO = HERE.parent.parent
KERNEL_SOURCES = REPO / "cuda"

MODES = ("fast", "race", "asan")
RUNTIME_FLAGS = {
    "fast": [],
    "race": ["-DCUSIM_RACE"],
    "asan": ["-DCUSIM_ASAN", "-fsanitize=address", "-fno-omit-frame-pointer"],
}
# Most kernels take longer to compile than they ever run: what is worth its time is little.
KERNEL_FLAGS = {
    "fast": ["-O1"],
    "race": ["-Og", "-fsanitize=thread"],
    "asan": [
        "-Og",
        "-fsanitize=address,undefined,float-cast-overflow",
        "-fno-sanitize=object-size,pointer-overflow",  # what is read or written out of bounds ASan sees
        "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer",
        *("--param", "asan-instrumentation-with-call-threshold=0"),  # calls, not each check in full
    ],
}
# __shared__ becomes thread-local, so that a module's thread-local block is the static shared memory of a block and can
# be poisoned and watched as one piece. For ASan it is plain static memory, which has red zones.
SHARED_STORAGE = {"fast": "thread_local", "race": "thread_local", "asan": "static"}


class BuildError(Exception):
    """G++ rejected a source; the message holds its output."""


def missing_requirement() -> str | None:
    """Return why the emulator cannot run on this machine, or None if it can."""
    if platform.system() != "Linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"the kernel emulator runs on x86-64 Linux, this is {platform.machine()} {platform.system()}"
    if shutil.which("g++") is None:
        return "the kernel emulator needs g++ (Debian: apt install build-essential)"
    return None


def cache_folder() -> Path:
    """Return the folder of finished builds: CUSIM_CACHE, or build/cusim in the checkout."""
    folder = Path(os.environ.get("CUSIM_CACHE", REPO / "build" / "cusim"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def run(command: Sequence[str | Path]) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, command))}\n{done.stderr}")
    return done.stdout


@functools.cache
def machine_flags() -> tuple[str, ...]:
    """Return -m flags for what this CPU has: fused multiply-add in hardware is far faster than in libm."""
    present = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0]))
    return tuple(f"-m{name}" for name in ("avx2", "fma") if name in present)


@functools.cache
def toolchain() -> str:
    """Return what identifies compiler and emulator in cache keys."""
    digest = hashlib.sha256(run(["g++", "--version"]).encode())
    for path in sorted(HERE.glob("**/*")):
        if path.suffix in (".h", ".cpp") or path == Path(__file__):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def cached(name: str, suffix: str, key: Iterable[object], build) -> Path:
    """Return the finished file for a key; `build(target)` writes it if it is not there yet."""
    digest = hashlib.sha256(repr((toolchain(), *key)).encode()).hexdigest()[:16]
    target = cache_folder() / f"{name}-{digest}{suffix}"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            product = Path(scratch) / target.name
            build(product)
            product.replace(target)  # atomic: several test processes may build the same
    return target


def runtime_library(mode: str) -> Path:
    """Build libcusim for a mode, or find it built."""
    sources = [HERE / "runtime" / name for name in ("fiber.cpp", "scheduler.cpp")]
    if mode == "race":
        sources.append(HERE / "runtime" / "race.cpp")

    def build(target: Path) -> None:
        common = ["-std=c++17", "-O2", "-g", "-Wall", "-Wextra", "-fPIC", "-shared", "-fvisibility=hidden"]
        run(
            [
                "g++",
                *common,
                *RUNTIME_FLAGS[mode],
                *sources,
                "-ldl",
                f"-Wl,-soname,{target.name},-z,nodelete",
                "-o",
                target,
            ]
        )

    return cached(f"libcusim-{mode}", ".so", (), build)


def driver_library() -> Path:
    """Build the stand-in driver, or find it built; return .../libcuda.so.1.

    It has no kernel runtime of its own: every module brings one.
    """

    def build(target: Path) -> None:
        sources = sorted((HERE / "driver").glob("*.cpp"))
        common = ["-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-fPIC", "-shared", "-fvisibility=hidden", "-pthread"]
        run(["g++", *common, *sources, "-ldl", "-Wl,-soname,libcuda.so.1", "-o", target])

    library = cached("libcuda", ".so.1", (), build)
    folder = library.with_suffix("").with_suffix("")  # where a process finds it by its name, with LD_LIBRARY_PATH
    folder.mkdir(exist_ok=True)
    link = folder / "libcuda.so.1"
    with contextlib.suppress(FileExistsError):
        link.symlink_to(library)
    return link


@functools.cache  # a process asks for the same kernels all the time; reading takes longer than most launches
def digest_with_includes(source: Path, folders: tuple[Path, ...]) -> str:
    """Return a digest of a source and of every file that it includes in quotes, directly or not."""
    found: dict[Path, str] = {}
    waiting = [source]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = path.read_text()
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', found[path], re.MULTILINE):
            candidates = [folder / name for folder in (path.parent, *folders)]
            waiting += [c.resolve() for c in candidates if c.is_file()][:1]
    return hashlib.sha256(repr(sorted((str(p), text) for p, text in found.items())).encode()).hexdigest()


# Patterns begin with a word, which is what is found quickly in so long a text.
KERNEL = re.compile(r"__cusim_kernel__\s+(?:static\s+|inline\s+)?void\s+(?P<name>\w+)\s*\(")
DYNAMIC_SHARED = re.compile(
    r"extern\s+__cusim_shared__\s+(?:__attribute__\s*\(\(.*?\)\)\s*|alignas\s*\([^()]*\)\s*)?"
    r"(?P<type>[\w:\s]+?)\s*\b(?P<name>\w+)\s*\[\s*\]\s*;"
)
SHARED_ALIGNAS = re.compile(r"__cusim_shared__\s+alignas\s*\(([^()]*)\)")


def translate(preprocessed: str, mode: str, expressions: Sequence[str]) -> str:
    """Turn preprocessed CUDA C++ into C++: storage of shared memory, and the table of the module's kernels.

    Kernels that are no templates are found by themselves; instances of templates are named by `expressions`.
    """
    found = KERNEL.finditer(preprocessed)
    names = [m["name"] for m in found if not preprocessed[: m.start()].rstrip().endswith(">")]  # a template<...>
    text = DYNAMIC_SHARED.sub(r"\g<type> *const \g<name> = (\g<type> *)cusim_dynamic_shared();", preprocessed)
    text = SHARED_ALIGNAS.sub(r"__cusim_shared__ __attribute__((aligned(\1)))", text)
    storage = SHARED_STORAGE[mode]
    text = re.sub(r"static\s+__cusim_shared__", "__cusim_shared__", text)
    text = text.replace("__cusim_shared__", storage).replace("__cusim_kernel__", "")
    kernels = [*dict.fromkeys(names), *expressions]
    table = "".join(f'cusim_export<&{k}>::describe("{k}"), ' for k in kernels)
    if storage == "thread_local":
        anchor, address = "thread_local char cusim_anchor;", "&cusim_anchor"
    else:
        anchor, address = "", "nullptr"
    return (
        f'{text}\n# 1 "module table"\n{anchor}\n'
        f'extern "C" void *cusim_static_shared() {{ return {address}; }}\n'
        f'extern "C" const cusim_kernel cusim_kernels[] = {{{table}{{}}}};\n'
    )


def kernel_library(
    source: Path,
    mode: str = "fast",
    *,
    defines: Sequence[str] = (),
    expressions: Sequence[str] = (),
    include: Sequence[Path] = (),
) -> Path:
    """Build a .cu file into a library of kernels, or find it built.

    `defines` are NAME or NAME=VALUE; `expressions` name template instances, for example "router<4>", which are then
    called by this expression; `include` are folders beside that of the source and `cuda/`.
    """
    source = source.resolve()
    folders = (source.parent, *include, KERNEL_SOURCES, HERE / "include")
    # A process would have unique symbols once: kernels of one name in two files would share what is known of the first.
    flags = ["-std=c++17", "-g1", "-fPIC", "-w", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique"]
    flags += [*machine_flags(), *KERNEL_FLAGS[mode]]
    runtime = runtime_library(mode)

    def build(target: Path) -> None:
        options = [*flags, *(f"-D{d}" for d in defines), *(f"-I{folder}" for folder in folders)]
        text = run(["g++", "-E", "-x", "c++", *options, "-include", HERE / "include" / "cusim.h", source])
        translated = target.with_suffix(".ii")
        translated.write_text(translate(text, mode, expressions))
        product = target.with_suffix(".o")
        run(["g++", "-c", "-fpreprocessed", *flags, translated, "-o", product])
        # A process that loads kernels has the standard libraries; to look through them takes most of the linker's time.
        libraries = [f for f in flags if f.startswith("-fsanitize=")] if mode == "asan" else ["-nostdlib", "-lm", "-lc"]
        run(["g++", "-shared", *libraries, product, runtime, "-Wl,-rpath,$ORIGIN", "-o", target])

    key = (mode, flags, tuple(defines), tuple(expressions), digest_with_includes(source, folders))
    return cached(f"{source.stem}-{mode}", ".so", key, build)


def asan_library() -> str:
    """Return the path of libasan, which a process that loads sanitized code must preload."""
    return run(["g++", "-print-file-name=libasan.so"]).strip()


def name_places(text: str) -> str:
    """Replace [library+0xoffset] in a message of the runtime by file:line."""

    def lookup(match: re.Match) -> str:
        library, offset = match.groups()
        line = subprocess.run(["addr2line", "-e", library, offset], capture_output=True, text=True, check=False).stdout
        return line.split(" ")[0].strip() or match[0]

    return re.sub(r"\[([^\[\]+]+)\+(0x[0-9a-f]+)\]", lookup, text)
