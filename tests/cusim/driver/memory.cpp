// Device memory (host memory that starts as NaN and has guards around it), pinned memory, copies and fills.
#include "driver.h"

#include <cstdlib>
#include <cstring>

namespace {

const size_t GUARD_BYTES = 512; // also the alignment
const int POISON = 0xff, GUARD = 0xa5;

struct Memory {
    std::mutex mutex;
    std::map<CUdeviceptr, size_t> device, pinned, registered; // address -> bytes
    size_t device_bytes = 0;
} &memory = *new Memory;

// Whether a range lies in one of the allocations (`inside`), or begins in one and leaves it (`crosses`).
struct Overlap {
    bool inside = false, crosses = false;
};
Overlap overlap(const std::map<CUdeviceptr, size_t> &allocations, CUdeviceptr address, size_t n_bytes) {
    auto next = allocations.upper_bound(address);
    if (next == allocations.begin())
        return {};
    auto [start, size] = *std::prev(next);
    if (address >= start + size)
        return {};
    bool fits = n_bytes <= start + size - address;
    return {fits, !fits};
}

CUdeviceptr guarded_start(CUdeviceptr address) { return address - GUARD_BYTES; }

bool are_guards_intact(CUdeviceptr address, size_t n_bytes) {
    static const std::vector<char> intact(GUARD_BYTES, (char)GUARD);
    return !memcmp((void *)guarded_start(address), intact.data(), GUARD_BYTES) &&
           !memcmp((void *)(address + n_bytes), intact.data(), GUARD_BYTES);
}

} // namespace

bool is_device_memory(CUdeviceptr address, size_t n_bytes) {
    std::lock_guard<std::mutex> lock(memory.mutex);
    return overlap(memory.device, address, n_bytes).inside;
}

bool is_mapped_memory(CUdeviceptr address, size_t n_bytes) {
    std::lock_guard<std::mutex> lock(memory.mutex);
    return overlap(memory.device, address, n_bytes).inside || overlap(memory.pinned, address, n_bytes).inside ||
           overlap(memory.registered, address, n_bytes).inside;
}

bool is_host_or_mapped_memory(CUdeviceptr address, size_t n_bytes) {
    std::lock_guard<std::mutex> lock(memory.mutex);
    return address && !overlap(memory.device, address, n_bytes).crosses && !overlap(memory.pinned, address, n_bytes).crosses;
}

void check_guards(const char *who) {
    std::lock_guard<std::mutex> lock(memory.mutex);
    for (auto [address, n_bytes] : memory.device)
        if (!are_guards_intact(address, n_bytes))
            fail_device(CUDA_ERROR_ILLEGAL_ADDRESS, "%s wrote outside of a device allocation of %zu bytes", who, n_bytes);
}

void release_all_memory() {
    std::lock_guard<std::mutex> lock(memory.mutex);
    for (auto &allocation : memory.device)
        free((void *)guarded_start(allocation.first));
    for (auto &allocation : memory.pinned)
        free((void *)allocation.first);
    memory.device.clear();
    memory.pinned.clear();
    memory.registered.clear();
    memory.device_bytes = 0;
}

// --- device memory ---

DRIVER_API CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t n_bytes) {
    ENTER_CONTEXT(cuMemAlloc);
    if (CUresult error = forbid_while_capturing(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED))
        return error;
    if (!n_bytes)
        return CUDA_ERROR_INVALID_VALUE;
    std::lock_guard<std::mutex> lock(memory.mutex);
    void *p;
    if (n_bytes > settings.device_bytes || memory.device_bytes > settings.device_bytes - n_bytes ||
        posix_memalign(&p, GUARD_BYTES, n_bytes + 2 * GUARD_BYTES))
        return CUDA_ERROR_OUT_OF_MEMORY;
    memset(p, GUARD, GUARD_BYTES);
    memset((char *)p + GUARD_BYTES, POISON, n_bytes);
    memset((char *)p + GUARD_BYTES + n_bytes, GUARD, GUARD_BYTES);
    *address = (CUdeviceptr)p + GUARD_BYTES;
    memory.device[*address] = n_bytes;
    memory.device_bytes += n_bytes;
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuMemFree_v2(CUdeviceptr address) {
    ENTER_CONTEXT(cuMemFree);
    if (CUresult error = forbid_while_capturing(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED))
        return error;
    if (!address)
        return CUDA_SUCCESS;
    synchronize_all(); // as the real one does
    check_guards("something");
    std::lock_guard<std::mutex> lock(memory.mutex);
    auto found = memory.device.find(address);
    if (found == memory.device.end())
        return CUDA_ERROR_INVALID_VALUE;
    memory.device_bytes -= found->second;
    memset((void *)address, POISON, found->second);
    free((void *)guarded_start(address));
    memory.device.erase(found);
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuMemGetInfo_v2(size_t *n_free, size_t *n_total) {
    ENTER_CONTEXT(cuMemGetInfo);
    std::lock_guard<std::mutex> lock(memory.mutex);
    *n_total = settings.device_bytes;
    *n_free = settings.device_bytes - std::min(memory.device_bytes, settings.device_bytes);
    return CUDA_SUCCESS;
}

// --- pinned host memory ---

DRIVER_API CUresult cuMemHostAlloc(void **p, size_t n_bytes, unsigned) {
    ENTER_CONTEXT(cuMemHostAlloc);
    if (CUresult error = forbid_while_capturing(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED))
        return error;
    if (!n_bytes)
        return CUDA_ERROR_INVALID_VALUE;
    if (posix_memalign(p, 4096, n_bytes))
        return CUDA_ERROR_OUT_OF_MEMORY;
    memset(*p, POISON, n_bytes);
    std::lock_guard<std::mutex> lock(memory.mutex);
    memory.pinned[(CUdeviceptr)*p] = n_bytes;
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuMemAllocHost_v2(void **p, size_t n_bytes) { return cuMemHostAlloc(p, n_bytes, 0); }

DRIVER_API CUresult cuMemFreeHost(void *p) {
    ENTER_CONTEXT(cuMemFreeHost);
    synchronize_all();
    std::lock_guard<std::mutex> lock(memory.mutex);
    if (!memory.pinned.erase((CUdeviceptr)p))
        return CUDA_ERROR_INVALID_VALUE;
    free(p);
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuMemHostRegister_v2(void *p, size_t n_bytes, unsigned) {
    ENTER_CONTEXT(cuMemHostRegister);
    if (!p || !n_bytes)
        return CUDA_ERROR_INVALID_VALUE;
    std::lock_guard<std::mutex> lock(memory.mutex);
    auto next = memory.registered.lower_bound((CUdeviceptr)p);
    if (overlap(memory.registered, (CUdeviceptr)p, 1).inside ||
        (next != memory.registered.end() && next->first < (CUdeviceptr)p + n_bytes))
        return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
    memory.registered[(CUdeviceptr)p] = n_bytes;
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuMemHostUnregister(void *p) {
    ENTER_CONTEXT(cuMemHostUnregister);
    std::lock_guard<std::mutex> lock(memory.mutex);
    return memory.registered.erase((CUdeviceptr)p) ? CUDA_SUCCESS : CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED;
}

DRIVER_API CUresult cuMemHostGetDevicePointer_v2(CUdeviceptr *address, void *p, unsigned) {
    ENTER_CONTEXT(cuMemHostGetDevicePointer);
    if (!is_mapped_memory((CUdeviceptr)p, 1))
        return CUDA_ERROR_INVALID_VALUE;
    *address = (CUdeviceptr)p;
    return CUDA_SUCCESS;
}

// --- copies and fills ---

namespace {

enum Side { HOST, DEVICE, ANY };

bool is_valid(Side side, CUdeviceptr address, size_t n_bytes) {
    // device pointers may also be those of mapped host memory
    return side == DEVICE ? is_mapped_memory(address, n_bytes) : is_host_or_mapped_memory(address, n_bytes);
}

// The bytes are read when the stream comes to it, also from memory that is not pinned: whoever changes a source too
// early is found out.
CUresult copy(Side to_side, CUdeviceptr to, Side from_side, CUdeviceptr from, size_t n_bytes, void *handle) {
    std::shared_ptr<Stream> stream = find_stream(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_HANDLE;
    if (!is_valid(to_side, to, n_bytes) || !is_valid(from_side, from, n_bytes))
        return CUDA_ERROR_INVALID_VALUE;
    return stream->submit({NodeKind::Copy, [=] {
                               const size_t large = 16 << 10;
                               count("copy");
                               if (CUresult error = planned_failure("copy"))
                                   return fail_device(error, "a copy of %zu bytes failed as planned", n_bytes);
                               if (n_bytes >= large && settings.copy_us)
                                   std::this_thread::sleep_for(std::chrono::microseconds(settings.copy_us));
                               if (!is_valid(to_side, to, n_bytes) || !is_valid(from_side, from, n_bytes))
                                   return fail_device(CUDA_ERROR_ILLEGAL_ADDRESS,
                                                      "a copy of %zu bytes uses memory that was freed", n_bytes);
                               memmove((void *)to, (void *)from, n_bytes);
                           }});
}

template <class T> CUresult fill(CUdeviceptr to, T value, size_t n, void *handle) {
    std::shared_ptr<Stream> stream = find_stream(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_HANDLE;
    if (to % sizeof(T) || !is_mapped_memory(to, n * sizeof(T)))
        return CUDA_ERROR_INVALID_VALUE;
    return stream->submit({NodeKind::Set, [=] {
                               for (size_t i = 0; i < n; i++)
                                   ((T *)to)[i] = value;
                           }});
}

// For the forms without Async: on the default stream, and done on return.
CUresult finish(CUresult error) { return error ? error : find_stream(nullptr)->synchronize(); }

} // namespace

#define COPY(name, To, to_side, From, from_side)                                                                       \
    DRIVER_API CUresult name##Async_v2(To to, From from, size_t n_bytes, void *stream) {                               \
        ENTER_CONTEXT(name##Async);                                                                                    \
        return copy(to_side, (CUdeviceptr)to, from_side, (CUdeviceptr)from, n_bytes, stream);                          \
    }                                                                                                                  \
    DRIVER_API CUresult name##_v2(To to, From from, size_t n_bytes) {                                                  \
        ENTER_CONTEXT(name);                                                                                           \
        if (CUresult error = forbid_while_capturing(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT))                               \
            return error;                                                                                              \
        return finish(copy(to_side, (CUdeviceptr)to, from_side, (CUdeviceptr)from, n_bytes, nullptr));                 \
    }
COPY(cuMemcpyHtoD, CUdeviceptr, DEVICE, const void *, HOST)
COPY(cuMemcpyDtoH, void *, HOST, CUdeviceptr, DEVICE)
COPY(cuMemcpyDtoD, CUdeviceptr, DEVICE, CUdeviceptr, DEVICE)

DRIVER_API CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t n_bytes, void *stream) {
    ENTER_CONTEXT(cuMemcpyAsync);
    return copy(ANY, to, ANY, from, n_bytes, stream);
}
DRIVER_API CUresult cuMemcpy(CUdeviceptr to, CUdeviceptr from, size_t n_bytes) {
    ENTER_CONTEXT(cuMemcpy);
    if (CUresult error = forbid_while_capturing(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT))
        return error;
    return finish(copy(ANY, to, ANY, from, n_bytes, nullptr));
}

#define FILL(name, T)                                                                                                  \
    DRIVER_API CUresult name##Async(CUdeviceptr to, T value, size_t n, void *stream) {                                 \
        ENTER_CONTEXT(name##Async);                                                                                    \
        return fill<T>(to, value, n, stream);                                                                          \
    }                                                                                                                  \
    DRIVER_API CUresult name##_v2(CUdeviceptr to, T value, size_t n) {                                                 \
        ENTER_CONTEXT(name);                                                                                           \
        if (CUresult error = forbid_while_capturing(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT))                               \
            return error;                                                                                              \
        return finish(fill<T>(to, value, n, nullptr));                                                                 \
    }
FILL(cuMemsetD8, unsigned char)
FILL(cuMemsetD16, unsigned short)
FILL(cuMemsetD32, unsigned)

// --- for tests ---

DRIVER_API size_t cusim_driver_device_bytes() {
    std::lock_guard<std::mutex> lock(memory.mutex);
    return memory.device_bytes;
}
DRIVER_API size_t cusim_driver_pinned_allocations() {
    std::lock_guard<std::mutex> lock(memory.mutex);
    return memory.pinned.size() + memory.registered.size();
}
