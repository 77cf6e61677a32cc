"""Compiles the kernel sources for the GPU at hand, with NVRTC, and keeps the results on disk.

A kernel file is compiled once for each set of `-D` definitions it is used with. The result is machine code for one
architecture (a cubin), so no driver has to translate anything. What the cache is keyed by is everything the code
depends on: compiler version, architecture, options, definitions, the source and all headers it includes.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from engine.errors import DeviceError

OPTIONS = (
    "--std=c++17",
    "--fmad=false",  # a multiply-add is one rounding only where the source says so: the same bits as on the CPU
    "--prec-div=true",
    "--prec-sqrt=true",
    "--ftz=false",
    "-lineinfo",
)
_log = logging.getLogger(__name__)
_CACHE_FORMAT = 1
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)

Progress = Callable[[str, int, int], None]  # file, files done, files in all


class Compiler(Protocol):
    """Turns a kernel file into an image that the driver loads. The tests have one for the stand-in driver."""

    def compile(self, source: str, definitions: Sequence[str]) -> bytes:
        """Return the image of `cuda/<source>` with `definitions` such as `N_TOKENS=1`; raise `DeviceError`."""
        ...


@functools.cache
def sources() -> Path:
    """Return the folder of the kernel sources: in the wheel, or `cuda/` of the checkout."""
    for folder in (Path(str(resources.files("engine"))) / "cuda_sources", Path(__file__).parents[3] / "cuda"):
        if (folder / "common.cuh").is_file():
            return folder
    raise DeviceError("the kernel sources are missing (common.cuh); install the package again")


def include_closure(source: str) -> dict[str, str]:
    """Return the texts of a kernel file and of every header it includes, by file name."""
    folder, texts, open_files = sources(), dict[str, str](), [source]
    while open_files:
        name = open_files.pop()
        if name not in texts and (folder / name).is_file():
            texts[name] = (folder / name).read_text(encoding="utf-8")
            open_files += _INCLUDE.findall(texts[name])
    return texts


def cache_folder() -> Path:
    """Return where compiled kernels are kept: below `$XDG_CACHE_HOME`, or `~/.cache`."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "hot-experts" / "cubin"


class NVRTCCompiler:
    """NVIDIA's run-time compiler, for one architecture such as `sm_89`. Needs no GPU and no driver."""

    def __init__(self, arch: str, cache: Path | None = None) -> None:
        self.arch = arch
        self.cache = cache or cache_folder()
        self._nvrtc = _load_nvrtc()
        self._version = tuple(self._call("nvrtcVersion"))

    def compile(self, source: str, definitions: Sequence[str]) -> bytes:
        """Return the cubin of a kernel file, from the cache if it is there."""
        path = self._cache_path(source, definitions)
        try:
            return path.read_bytes()
        except OSError as error:
            if not isinstance(error, FileNotFoundError):
                _log.debug("a compiled kernel cannot be read back: %s", error)  # it is compiled again
        image = self._compile(source, definitions)
        _write_atomically(path, image)
        return image

    def forget(self, source: str, definitions: Sequence[str]) -> None:
        """Remove a cached cubin that the driver would not load."""
        self._cache_path(source, definitions).unlink(missing_ok=True)

    def _cache_path(self, source: str, definitions: Sequence[str]) -> Path:
        texts = sorted(include_closure(source).items())
        key = json.dumps([_CACHE_FORMAT, self._version, self.arch, OPTIONS, sorted(definitions), source, texts])
        return self.cache / f"{Path(source).stem}.{self.arch}.{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"

    def _compile(self, source: str, definitions: Sequence[str]) -> bytes:
        nvrtc = self._nvrtc
        text = (sources() / source).read_bytes()
        program = self._call("nvrtcCreateProgram", text, source.encode(), 0, [], [])
        try:
            options = [f"--gpu-architecture={self.arch}", *OPTIONS, f"-I{sources()}", *(f"-D{d}" for d in definitions)]
            (code,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
            if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
                log = bytearray(self._call("nvrtcGetProgramLogSize", program))
                self._call("nvrtcGetProgramLog", program, log)
                shown = " ".join(definitions)
                raise DeviceError(
                    f"cuda/{source} ({shown}) does not compile for {self.arch} with NVRTC "
                    f"{self._version[0]}.{self._version[1]}:\n{log.decode(errors='replace').rstrip(chr(0))}"
                )
            image = bytearray(self._call("nvrtcGetCUBINSize", program))
            self._call("nvrtcGetCUBIN", program, image)
            return bytes(image)
        finally:
            nvrtc.nvrtcDestroyProgram(program)

    def _call(self, name: str, *args: Any) -> Any:
        nvrtc = self._nvrtc
        code, *results = getattr(nvrtc, name)(*args)
        if code != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise DeviceError(f"{name} failed: {nvrtc.nvrtcGetErrorString(code)[1].decode()} ({int(code)})")
        return results[0] if len(results) == 1 else tuple(results) if results else None


def _load_nvrtc() -> ModuleType:
    try:
        from cuda.bindings import nvrtc  # noqa: PLC0415

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:  # the package, or the library behind it
        raise DeviceError(
            f"NVIDIA's run-time compiler cannot be loaded ({_first_line(error)}); pip install nvidia-cuda-nvrtc-cu12"
        ) from None
    return nvrtc  # type: ignore[no-any-return]


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that other processes see all of it or nothing. A cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)
    except OSError:
        _log.warning("compiled kernels cannot be kept in %s", path.parent, exc_info=True)
