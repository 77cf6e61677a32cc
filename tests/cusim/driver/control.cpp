// Settings, planned failures, error state, and the functions through which tests steer the stand-in driver.
#include "driver.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

// Objects are never destroyed: worker threads may use them until the process is gone.
Settings &settings = *new Settings;
std::atomic<CUresult> device_error{CUDA_SUCCESS};

namespace {

struct Plan {
    std::string call;
    long countdown;
    CUresult error;
};

struct Control {
    std::mutex mutex;
    std::vector<Plan> plans;
    std::map<std::string, long> counts;
    std::string message; // the device's last failure
    bool is_initialized = false;
} &control = *new Control;

std::atomic<unsigned> context_generation{1};
thread_local unsigned current_context = 0; // generation of the context that is current in this thread

} // namespace

void count(const char *what) {
    std::lock_guard<std::mutex> lock(control.mutex);
    control.counts[what]++;
}

CUresult planned_failure(const char *event) {
    std::lock_guard<std::mutex> lock(control.mutex);
    for (size_t i = 0; i < control.plans.size(); i++)
        if (control.plans[i].call == event && --control.plans[i].countdown == 0) {
            CUresult error = control.plans[i].error;
            control.plans.erase(control.plans.begin() + (ptrdiff_t)i);
            return error;
        }
    return CUDA_SUCCESS;
}

CUresult enter(const char *call) {
    count(call);
    if (CUresult error = planned_failure(call))
        return error;
    if (!control.is_initialized)
        return CUDA_ERROR_NOT_INITIALIZED;
    return device_error;
}

CUresult enter_context(const char *call) {
    CUresult error = enter(call);
    return error ? error : current_context == context_generation ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}

void fail_device(CUresult error, const char *format, ...) {
    char text[4096];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    std::lock_guard<std::mutex> lock(control.mutex);
    CUresult none = CUDA_SUCCESS;
    if (device_error.compare_exchange_strong(none, error))
        control.message = text;
}

void random_pause() {
    if (!settings.jitter_us)
        return;
    static std::atomic<uint64_t> n{0};
    uint64_t x = (settings.seed + n++) * 0x9E3779B97F4A7C15u;
    x ^= x >> 32;
    std::this_thread::sleep_for(std::chrono::microseconds(x % settings.jitter_us));
}

// --- initialisation, device and context ---

DRIVER_API CUresult cuInit(unsigned) {
    count("cuInit");
    if (CUresult error = planned_failure("cuInit"))
        return error;
    control.is_initialized = true;
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDriverGetVersion(int *version) {
    *version = 13000;
    return planned_failure("cuDriverGetVersion");
}

DRIVER_API CUresult cuDeviceGetCount(int *n) {
    ENTER(cuDeviceGetCount);
    *n = settings.n_devices;
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    ENTER(cuDeviceGet);
    *device = 0;
    return ordinal == 0 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_DEVICE;
}

DRIVER_API CUresult cuDeviceGetName(char *name, int n_bytes, CUdevice) {
    ENTER(cuDeviceGetName);
    snprintf(name, (size_t)n_bytes, "stand-in device (no GPU)");
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDeviceGetUuid_v2(unsigned char *uuid, CUdevice) {
    ENTER(cuDeviceGetUuid);
    memcpy(uuid, "stand-in device", 16);
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDeviceTotalMem_v2(size_t *n_bytes, CUdevice) {
    ENTER(cuDeviceTotalMem);
    *n_bytes = settings.device_bytes;
    return CUDA_SUCCESS;
}

// Compute capability 9.0 with the shared memory of 8.9, so that what fits here fits on both.
DRIVER_API CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice) {
    ENTER(cuDeviceGetAttribute);
    static const std::map<int, int> values = {
        {1, 1024},       // MAX_THREADS_PER_BLOCK
        {2, 1024},       // MAX_BLOCK_DIM_X
        {3, 1024},       // MAX_BLOCK_DIM_Y
        {4, 64},         // MAX_BLOCK_DIM_Z
        {5, 2147483647}, // MAX_GRID_DIM_X
        {6, 65535},      // MAX_GRID_DIM_Y
        {7, 65535},      // MAX_GRID_DIM_Z
        {8, 48 << 10},   // MAX_SHARED_MEMORY_PER_BLOCK
        {10, 32},        // WARP_SIZE
        {12, 65536},     // MAX_REGISTERS_PER_BLOCK
        {13, 1500000},   // CLOCK_RATE, kHz
        {16, 4},         // MULTIPROCESSOR_COUNT
        {19, 1},         // CAN_MAP_HOST_MEMORY
        {31, 1},         // CONCURRENT_KERNELS
        {33, 1},         // PCI_BUS_ID
        {36, 1000000},   // MEMORY_CLOCK_RATE, kHz
        {37, 384},       // GLOBAL_MEMORY_BUS_WIDTH
        {38, 4 << 20},   // L2_CACHE_SIZE
        {39, 1536},      // MAX_THREADS_PER_MULTIPROCESSOR
        {40, 2},         // ASYNC_ENGINE_COUNT
        {41, 1},         // UNIFIED_ADDRESSING
        {75, 9},         // COMPUTE_CAPABILITY_MAJOR
        {76, 0},         // COMPUTE_CAPABILITY_MINOR
        {78, 1},         // STREAM_PRIORITIES_SUPPORTED
        {81, 100 << 10}, // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
        {82, 65536},     // MAX_REGISTERS_PER_MULTIPROCESSOR
        {90, 1},         // COMPUTE_PREEMPTION_SUPPORTED
        {97, 99 << 10},  // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
        {99, 1},         // HOST_REGISTER_SUPPORTED
        {106, 24},       // MAX_BLOCKS_PER_MULTIPROCESSOR
        {111, 1 << 10},  // RESERVED_SHARED_MEMORY_PER_BLOCK
        {122, 1},        // CAN_USE_64_BIT_STREAM_MEM_OPS
        {123, 1},        // CAN_USE_STREAM_WAIT_VALUE_NOR
    };
    auto found = values.find(attribute);
    *value = found == values.end() ? 0 : found->second;
    return CUDA_SUCCESS;
}

static void *const THE_CONTEXT = &control;

DRIVER_API CUresult cuDevicePrimaryCtxRetain(void **context, CUdevice) {
    ENTER(cuDevicePrimaryCtxRetain);
    *context = THE_CONTEXT;
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) {
    count("cuDevicePrimaryCtxRelease");
    return planned_failure("cuDevicePrimaryCtxRelease");
}

// Ends the context with everything in it, errors included, as a new process would.
DRIVER_API CUresult cuDevicePrimaryCtxReset_v2(CUdevice) {
    count("cuDevicePrimaryCtxReset");
    CUresult none = CUDA_SUCCESS;
    device_error.compare_exchange_strong(none, CUDA_ERROR_INVALID_CONTEXT); // wakes streams that wait
    synchronize_all();
    graph_execs.clear();
    graphs.clear();
    events.clear();
    streams.clear();
    release_all_modules();
    release_all_memory();
    context_generation++;
    device_error = CUDA_SUCCESS;
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxSetCurrent(void *context) {
    ENTER(cuCtxSetCurrent);
    current_context = context ? (unsigned)context_generation : 0;
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxPushCurrent_v2(void *context) { return cuCtxSetCurrent(context); }

DRIVER_API CUresult cuCtxGetCurrent(void **context) {
    ENTER(cuCtxGetCurrent);
    *context = current_context == context_generation ? THE_CONTEXT : nullptr;
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxPopCurrent_v2(void **context) {
    CUresult error = cuCtxGetCurrent(context);
    current_context = 0;
    return error;
}

DRIVER_API CUresult cuCtxGetDevice(CUdevice *device) {
    ENTER_CONTEXT(cuCtxGetDevice);
    *device = 0;
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    ENTER_CONTEXT(cuCtxGetStreamPriorityRange);
    *least = 0;
    *greatest = -5;
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuCtxSynchronize() {
    ENTER_CONTEXT(cuCtxSynchronize);
    if (CUresult error = forbid_while_capturing(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED))
        return error;
    synchronize_all();
    return device_error;
}

// --- errors ---

static const struct {
    CUresult code;
    const char *name, *text;
} ERRORS[] = {
#define ERROR(name, text) {name, #name, text},
    ERROR(CUDA_SUCCESS, "no error")
    ERROR(CUDA_ERROR_INVALID_VALUE, "invalid argument")
    ERROR(CUDA_ERROR_OUT_OF_MEMORY, "out of memory")
    ERROR(CUDA_ERROR_NOT_INITIALIZED, "initialization error")
    ERROR(CUDA_ERROR_INVALID_DEVICE, "invalid device ordinal")
    ERROR(CUDA_ERROR_INVALID_IMAGE, "device kernel image is invalid")
    ERROR(CUDA_ERROR_INVALID_CONTEXT, "invalid device context")
    ERROR(CUDA_ERROR_NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device")
    ERROR(CUDA_ERROR_INVALID_HANDLE, "invalid resource handle")
    ERROR(CUDA_ERROR_NOT_FOUND, "named symbol not found")
    ERROR(CUDA_ERROR_NOT_READY, "device not ready")
    ERROR(CUDA_ERROR_ILLEGAL_ADDRESS, "an illegal memory access was encountered")
    ERROR(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED, "part or all of the requested memory range is already mapped")
    ERROR(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, "pointer does not correspond to a registered memory region")
    ERROR(CUDA_ERROR_LAUNCH_FAILED, "unspecified launch failure")
    ERROR(CUDA_ERROR_NOT_SUPPORTED, "operation not supported")
    ERROR(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing")
    ERROR(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture")
    ERROR(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, "capture was not ended in the same stream as it began")
    ERROR(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, "capturing stream has unjoined work")
    ERROR(CUDA_ERROR_STREAM_CAPTURE_ISOLATION, "dependency created on uncaptured work in another stream")
    ERROR(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, "operation would make the legacy stream depend on a capturing stream")
    ERROR(CUDA_ERROR_CAPTURED_EVENT, "operation not permitted on an event last recorded in a capturing stream")
    ERROR(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "attempt to terminate a thread-local capture from another thread")
#undef ERROR
};

DRIVER_API CUresult cuGetErrorName(CUresult code, const char **name) {
    for (auto &error : ERRORS)
        if (error.code == code)
            return *name = error.name, CUDA_SUCCESS;
    *name = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

// The text of the error that the device is in tells what happened.
DRIVER_API CUresult cuGetErrorString(CUresult code, const char **text) {
    static thread_local std::string with_message;
    for (auto &error : ERRORS)
        if (error.code == code) {
            std::lock_guard<std::mutex> lock(control.mutex);
            with_message = error.text;
            if (code && code == device_error)
                with_message += ": " + control.message;
            *text = with_message.c_str();
            return CUDA_SUCCESS;
        }
    *text = nullptr;
    return CUDA_ERROR_INVALID_VALUE;
}

// --- for tests ---

// Returns 0 for an unknown setting.
DRIVER_API int cusim_driver_set(const char *name, double value) {
    std::string key = name;
    if (key == "device_bytes")
        settings.device_bytes = (size_t)value;
    else if (key == "jitter_us")
        settings.jitter_us = (unsigned)value;
    else if (key == "copy_us")
        settings.copy_us = (unsigned)value;
    else if (key == "wait_limit_s")
        settings.wait_limit_s = value;
    else if (key == "n_devices")
        settings.n_devices = (int)value;
    else if (key == "order")
        settings.order = (int)value;
    else if (key == "seed")
        settings.seed = (uint64_t)value;
    else
        return 0;
    configure_runtimes();
    return 1;
}

// Makes the n-th coming call of a driver function (or "copy", "kernel": executed by a stream) fail with this error.
DRIVER_API void cusim_driver_fail(const char *call, long nth, CUresult error) {
    std::lock_guard<std::mutex> lock(control.mutex);
    control.plans.push_back({call, nth, error});
}

DRIVER_API void cusim_driver_forget_failures() {
    std::lock_guard<std::mutex> lock(control.mutex);
    control.plans.clear();
}

// How often a driver function was called, or an operation executed ("copy", "kernel").
DRIVER_API long cusim_driver_count(const char *what) {
    std::lock_guard<std::mutex> lock(control.mutex);
    auto found = control.counts.find(what);
    return found == control.counts.end() ? 0 : found->second;
}

DRIVER_API const char *cusim_driver_message() {
    static thread_local std::string copy;
    std::lock_guard<std::mutex> lock(control.mutex);
    copy = control.message;
    return copy.c_str();
}

// CUSIM_DRIVER="jitter_us=50,copy_us=2000,fail:cuMemAlloc@3=2": settings and failures for a process that cannot call the
// functions above. What is malformed ends the process, or a test would run without its fault.
__attribute__((constructor)) static void read_environment() {
    const char *text = getenv("CUSIM_DRIVER");
    std::string rest = text ? text : "";
    while (!rest.empty()) {
        size_t end = rest.find(',');
        std::string item = rest.substr(0, end);
        rest = end == std::string::npos ? "" : rest.substr(end + 1);
        char name[64];
        double value;
        long nth;
        int error;
        if (sscanf(item.c_str(), "fail:%63[^@]@%ld=%d", name, &nth, &error) == 3)
            cusim_driver_fail(name, nth, error);
        else if (sscanf(item.c_str(), "%63[^=]=%lf", name, &value) != 2 || !cusim_driver_set(name, value)) {
            fprintf(stderr, "CUSIM_DRIVER: cannot read '%s'\n", item.c_str());
            abort();
        }
    }
}
