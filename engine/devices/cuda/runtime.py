"""A GPU made ready: its context, memory, compiled kernels, streams and graphs."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.devices.cuda.driver import GPU, DriverCallError, bindings, call
from engine.devices.cuda.jit import Compiler, NVRTCCompiler, Progress
from engine.devices.cuda.launch import Launch
from engine.errors import DeviceError
from engine.resources import Resources

_WRONG_IMAGE = {"CUDA_ERROR_INVALID_IMAGE", "CUDA_ERROR_NO_BINARY_FOR_GPU", "CUDA_ERROR_INVALID_PTX"}
_DEFAULT_SHARED_BYTES = 40 << 10  # from 48 KB on it must be asked for, and kernels have some of fixed size, too


class DeviceMemory:
    """One allocation on the device, freed by `close`."""

    def __init__(self, n_bytes: int) -> None:
        self.n_bytes = n_bytes
        self.address = int(call("cuMemAlloc", max(n_bytes, 1)))

    def close(self) -> None:
        """Free it; the device waits for all work first."""
        if self.address:
            address, self.address = self.address, 0
            call("cuMemFree", address)


class PinnedMemory:
    """Host memory that the device reads and writes in place; `bytes` is our view of it. Zero at first."""

    def __init__(self, n_bytes: int) -> None:
        flags = bindings().CU_MEMHOSTALLOC_DEVICEMAP | bindings().CU_MEMHOSTALLOC_PORTABLE
        self._pointer = call("cuMemHostAlloc", max(n_bytes, 1), flags)
        try:
            self.device_address = int(call("cuMemHostGetDevicePointer", self._pointer, 0))
        except BaseException:
            self.close()
            raise
        self.n_bytes = n_bytes
        view = (ctypes.c_uint8 * n_bytes).from_address(int(self._pointer))
        self.bytes: npt.NDArray[np.uint8] = np.ctypeslib.as_array(view)
        self.bytes[:] = 0
        self.address = int(self.bytes.ctypes.data)

    def close(self) -> None:
        """Free it; views of `bytes` must not be used after that."""
        if self._pointer is not None:
            pointer, self._pointer = self._pointer, None
            call("cuMemFreeHost", pointer)


class PinnedPages:
    """Memory of the caller's, pinned until `close`; it begins at a page and shares its pages with nobody else."""

    def __init__(self, address: int, n_bytes: int) -> None:
        n_bytes = -(-n_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        flags = bindings().CU_MEMHOSTREGISTER_DEVICEMAP | bindings().CU_MEMHOSTREGISTER_PORTABLE
        call("cuMemHostRegister", address, n_bytes, flags)
        self._address: int | None = address
        try:
            self.device_address = int(call("cuMemHostGetDevicePointer", address, 0))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unpin; no copy may be under way."""
        if self._address is not None:
            address, self._address = self._address, None
            call("cuMemHostUnregister", address)


class Context:
    """The device, opened. Every thread that uses it calls `make_current` first."""

    def __init__(self, gpu: GPU, compiler: Compiler | None = None) -> None:
        self.gpu = gpu
        self.compiler = compiler or NVRTCCompiler(gpu.arch)
        self._modules: dict[tuple[str, tuple[str, ...]], Any] = {}
        self._functions: dict[tuple[str, tuple[str, ...], str], Any] = {}
        self._shared_bytes: dict[tuple[str, tuple[str, ...], str], int] = {}  # that was asked for
        device = call("cuDeviceGet", gpu.index)
        with Resources() as held:
            self._context = call("cuDevicePrimaryCtxRetain", device)
            held.defer(call, "cuDevicePrimaryCtxRelease", device)
            self.make_current()
            self._held = held.pop_all()

    def make_current(self) -> None:
        """Use the device from the calling thread."""
        call("cuCtxSetCurrent", self._context)

    def close(self) -> None:
        """Give the device back; its streams, graphs and memory must be closed before."""
        self._modules.clear()
        self._functions.clear()
        self._held.close()

    def free_bytes(self) -> int:
        """Return how much device memory is free."""
        return int(call("cuMemGetInfo")[0])

    # -- kernels -----------------------------------------------------------------------------------------------------

    def prepare(self, launches: Iterable[Launch], progress: Progress | None = None) -> None:
        """Compile and load everything that the launches need."""
        wanted = list(dict.fromkeys((launch.source, launch.definitions) for launch in launches))
        for done, (source, definitions) in enumerate(wanted):
            if progress is not None:
                progress(source, done, len(wanted))
            self._module(source, definitions)
        if progress is not None:
            progress("", len(wanted), len(wanted))

    def function(self, launch: Launch) -> Any:
        """Return the handle of the launch's kernel."""
        key = (launch.source, launch.definitions, launch.kernel)
        found = self._functions.get(key)
        if found is None:
            module = self._module(launch.source, launch.definitions)
            found = self._functions[key] = call("cuModuleGetFunction", module, launch.kernel.encode())
            if self.gpu.can_overlap:  # one division of all L1 caches, so that no kernel waits until another has left
                carveout = bindings().CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
                call("cuFuncSetAttribute", found, carveout, 100)
        if launch.shared_bytes > self.gpu.shared_bytes:
            raise DeviceError(
                f"rows or heads of this model are too long for {self.gpu.name}: {launch.kernel} "
                f"({', '.join(launch.definitions)}) needs {launch.shared_bytes >> 10} KB of shared memory, and there "
                f"are {self.gpu.shared_bytes >> 10}; use a k-quant of the model, or set "
                '[engine] kv_type = "f16" if it is "f32", or device = "cpu"'
            )
        if launch.shared_bytes > self._shared_bytes.get(key, _DEFAULT_SHARED_BYTES):
            attribute = bindings().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call("cuFuncSetAttribute", found, attribute, launch.shared_bytes)
            self._shared_bytes[key] = launch.shared_bytes
        return found

    def _module(self, source: str, definitions: tuple[str, ...]) -> Any:
        module = self._modules.get((source, definitions))
        if module is None:
            try:
                module = call("cuModuleLoadData", self.compiler.compile(source, definitions))
            except DriverCallError as error:
                if error.name not in _WRONG_IMAGE or not isinstance(self.compiler, NVRTCCompiler):
                    raise
                self.compiler.forget(source, definitions)  # a damaged cache entry: compile once more
                module = call("cuModuleLoadData", self.compiler.compile(source, definitions))
            self._held.defer(call, "cuModuleUnload", module)
            self._modules[source, definitions] = module
        return module


class Stream:
    """A queue of work on the device. It does not wait for others, nor for the default stream."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.handle = call("cuStreamCreate", bindings().CUstream_flags.CU_STREAM_NON_BLOCKING)

    def launch(self, launch: Launch) -> None:
        """Queue a kernel."""
        arguments, function = launch.arguments, self.context.function(launch)
        packed = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        if not self.context.gpu.can_overlap:
            sizes = (*launch.grid, launch.block, 1, 1, launch.shared_bytes)
            call("cuLaunchKernel", function, *sizes, self.handle, ctypes.addressof(packed), 0)
            return
        cuda = bindings()
        overlap, config = cuda.CUlaunchAttribute(), cuda.CUlaunchConfig()
        overlap.id = cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        overlap.value.programmaticStreamSerializationAllowed = 1
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.block, 1, 1
        config.sharedMemBytes, config.hStream = launch.shared_bytes, self.handle
        config.attrs, config.numAttrs = [overlap], 1
        call("cuLaunchKernelEx", config, function, ctypes.addressof(packed), 0)

    def upload(self, device: int, host: int, n_bytes: int) -> None:
        """Queue a copy to the device; from pinned memory it runs beside the host, else it is done on return."""
        call("cuMemcpyHtoDAsync", device, host, n_bytes, self.handle)

    def download(self, host: int, device: int, n_bytes: int) -> None:
        """Queue a copy to the host."""
        call("cuMemcpyDtoHAsync", host, device, n_bytes, self.handle)

    def copy(self, to: int, device: int, n_bytes: int) -> None:
        """Queue a copy within the device."""
        call("cuMemcpyDtoDAsync", to, device, n_bytes, self.handle)

    def fill(self, device: int, value: int, n_bytes: int) -> None:
        """Queue setting bytes."""
        call("cuMemsetD8Async", device, value, n_bytes, self.handle)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Return as a graph what `work` queues here, without running it."""
        mode = bindings().CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        call("cuStreamBeginCapture", self.handle, mode)
        try:
            work()
        except BaseException:
            with contextlib.suppress(DriverCallError):  # of a capture that failed there may be no graph
                call("cuGraphDestroy", call("cuStreamEndCapture", self.handle))
            raise
        return Graph(call("cuStreamEndCapture", self.handle))

    def wait(self, event: Event) -> None:
        """Let what is queued from now on wait for what was before the event's latest mark."""
        call("cuStreamWaitEvent", self.handle, event.handle, 0)

    def synchronize(self) -> None:
        """Wait until everything queued is done."""
        call("cuStreamSynchronize", self.handle)

    def is_idle(self) -> bool:
        """Return whether everything queued is done; raise `DeviceError` if something failed."""
        try:
            call("cuStreamQuery", self.handle)
        except DriverCallError as error:
            if error.name == "CUDA_ERROR_NOT_READY":
                return False
            raise
        return True

    def close(self) -> None:
        """Destroy the stream after its work, for which it waits."""
        if self.handle is not None:
            handle, self.handle = self.handle, None
            with Resources() as held:
                held.defer(call, "cuStreamDestroy", handle)
                call("cuStreamSynchronize", handle)


class Graph:
    """Recorded work, launched as one."""

    def __init__(self, graph: Any) -> None:
        try:
            self._executable = call("cuGraphInstantiate", graph, 0)
        finally:
            call("cuGraphDestroy", graph)

    def launch(self, stream: Stream) -> None:
        """Queue one run."""
        call("cuGraphLaunch", self._executable, stream.handle)

    def close(self) -> None:
        """Destroy the graph; no run may be under way."""
        if self._executable is not None:
            executable, self._executable = self._executable, None
            call("cuGraphExecDestroy", executable)


class Event:
    """A mark in a stream."""

    def __init__(self) -> None:
        self.handle = call("cuEventCreate", bindings().CUevent_flags.CU_EVENT_DISABLE_TIMING)

    def record(self, stream: Stream) -> None:
        """Mark what is queued now."""
        call("cuEventRecord", self.handle, stream.handle)

    def is_done(self) -> bool:
        """Return whether everything before the mark is done."""
        try:
            call("cuEventQuery", self.handle)
        except DriverCallError as error:
            if error.name == "CUDA_ERROR_NOT_READY":
                return False
            raise
        return True

    def synchronize(self) -> None:
        """Wait until everything before the mark is done."""
        call("cuEventSynchronize", self.handle)

    def close(self) -> None:
        """Destroy it."""
        if self.handle is not None:
            handle, self.handle = self.handle, None
            call("cuEventDestroy", handle)
