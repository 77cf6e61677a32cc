// Streams (a worker thread each), events, stream memory operations and host functions.
#include "driver.h"

#include <cstring>

Registry<Stream> &streams = *new Registry<Stream>;
Registry<Event> &events = *new Registry<Event>;

// --- streams ---

Stream::Stream(bool is_default_) : is_default(is_default_), worker_([this] { work(); }) {}

Stream::~Stream() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        is_stopping_ = true;
    }
    changed_.notify_all();
    if (worker_.get_id() == std::this_thread::get_id())
        worker_.detach(); // its own last operation held the last reference
    else
        worker_.join();
}

void Stream::work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        changed_.wait(lock, [&] { return is_stopping_ || !queue_.empty(); });
        if (queue_.empty())
            return;
        Operation operation = std::move(queue_.front());
        queue_.erase(queue_.begin());
        is_busy_ = true;
        lock.unlock();
        random_pause();
        if (!device_error)
            operation.run();
        operation.run = nullptr; // drops what it holds before the stream counts as idle
        lock.lock();
        is_busy_ = false;
        changed_.notify_all();
    }
}

CUresult Stream::submit(Operation operation) {
    {
        std::lock_guard<std::recursive_mutex> lock(capture_mutex);
        if (capture) {
            if (capture->is_invalid)
                return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
            Capture::Lane &lane = capture->lanes[this];
            capture->graph.nodes.push_back({std::move(operation), lane.index, lane.tails});
            lane.tails = {capture->graph.nodes.size() - 1};
            return CUDA_SUCCESS;
        }
    }
    std::lock_guard<std::mutex> lock(mutex_);
    queue_.push_back(std::move(operation));
    changed_.notify_all();
    return CUDA_SUCCESS;
}

CUresult Stream::synchronize() {
    {
        std::lock_guard<std::recursive_mutex> lock(capture_mutex);
        if (capture) {
            capture->is_invalid = true;
            return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        }
    }
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return queue_.empty() && !is_busy_; });
    return device_error;
}

bool Stream::is_idle() {
    std::lock_guard<std::mutex> lock(mutex_);
    return queue_.empty() && !is_busy_;
}

static std::shared_ptr<Stream> default_stream() {
    static auto &stream = *new std::shared_ptr<Stream>(std::make_shared<Stream>(true));
    return stream;
}

std::shared_ptr<Stream> find_stream(void *handle) {
    return (uintptr_t)handle <= 2 ? default_stream() : streams.find(handle);
}

void synchronize_all() {
    std::vector<std::shared_ptr<Stream>> all = streams.all();
    all.push_back(default_stream());
    for (auto &stream : all)
        if (!stream->capture)
            stream->synchronize();
}

DRIVER_API CUresult cuStreamCreateWithPriority(void **stream, unsigned, int) {
    ENTER_CONTEXT(cuStreamCreate);
    *stream = streams.add(std::make_shared<Stream>(false));
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuStreamCreate(void **stream, unsigned flags) { return cuStreamCreateWithPriority(stream, flags, 0); }

#define FIND_STREAM(variable, handle)                                                                                  \
    std::shared_ptr<Stream> variable = find_stream(handle);                                                            \
    if (!variable)                                                                                                     \
        return CUDA_ERROR_INVALID_HANDLE

DRIVER_API CUresult cuStreamDestroy_v2(void *handle) {
    ENTER(cuStreamDestroy);
    std::shared_ptr<Stream> stream = streams.find(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_HANDLE;
    CUresult error = stream->synchronize();
    streams.remove(handle);
    return error;
}

DRIVER_API CUresult cuStreamSynchronize(void *handle) {
    ENTER_CONTEXT(cuStreamSynchronize);
    FIND_STREAM(stream, handle);
    return stream->synchronize();
}

DRIVER_API CUresult cuStreamQuery(void *handle) {
    ENTER_CONTEXT(cuStreamQuery);
    FIND_STREAM(stream, handle);
    std::lock_guard<std::recursive_mutex> lock(capture_mutex);
    if (stream->capture) {
        stream->capture->is_invalid = true;
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    return stream->is_idle() ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

DRIVER_API CUresult cuLaunchHostFunc(void *handle, void (*function)(void *), void *argument) {
    ENTER_CONTEXT(cuLaunchHostFunc);
    FIND_STREAM(stream, handle);
    return stream->submit({NodeKind::Host, [=] { function(argument); }});
}

// --- events ---

DRIVER_API CUresult cuEventCreate(void **event, unsigned flags) {
    ENTER_CONTEXT(cuEventCreate);
    const unsigned disable_timing = 2;
    auto created = std::make_shared<Event>();
    created->has_timing = !(flags & disable_timing);
    *event = events.add(created);
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuEventDestroy_v2(void *handle) {
    ENTER(cuEventDestroy);
    return events.remove(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

#define FIND_EVENT(variable, handle)                                                                                   \
    std::shared_ptr<Event> variable = events.find(handle);                                                             \
    if (!variable)                                                                                                     \
        return CUDA_ERROR_INVALID_HANDLE

DRIVER_API CUresult cuEventRecord(void *handle, void *stream_handle) {
    ENTER_CONTEXT(cuEventRecord);
    FIND_EVENT(event, handle);
    FIND_STREAM(stream, stream_handle);
    std::lock_guard<std::recursive_mutex> capture_lock(capture_mutex);
    event->capture = stream->capture;
    if (stream->capture) {
        event->captured_tails = stream->capture->lanes[stream.get()].tails;
        return stream->capture->is_invalid ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS;
    }
    uint64_t ticket;
    {
        std::lock_guard<std::mutex> lock(event->mutex);
        ticket = ++event->n_recorded;
    }
    return stream->submit({NodeKind::EventRecord, [=] {
                               std::lock_guard<std::mutex> lock(event->mutex);
                               event->n_completed = ticket;
                               event->time = std::chrono::steady_clock::now();
                               event->changed.notify_all();
                           }});
}

// Waits until the event has completed its record number `ticket`; gives up when the device fails.
static void wait_for_event(Event &event, uint64_t ticket) {
    std::unique_lock<std::mutex> lock(event.mutex);
    while (event.n_completed < ticket && !device_error)
        event.changed.wait_for(lock, std::chrono::milliseconds(20));
}

DRIVER_API CUresult cuStreamWaitEvent(void *stream_handle, void *handle, unsigned) {
    ENTER_CONTEXT(cuStreamWaitEvent);
    FIND_EVENT(event, handle);
    FIND_STREAM(stream, stream_handle);
    {
        std::lock_guard<std::recursive_mutex> lock(capture_mutex);
        if (event->capture) { // joins the capture
            if (event->capture->is_invalid)
                return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
            if (stream->capture && stream->capture != event->capture)
                return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
            Capture &capture = *event->capture;
            stream->capture = event->capture;
            auto lane = capture.lanes.find(stream.get());
            if (lane == capture.lanes.end())
                lane = capture.lanes.insert({stream.get(), {capture.graph.n_lanes++, {}}}).first;
            for (size_t node : event->captured_tails)
                lane->second.tails.push_back(node);
            return CUDA_SUCCESS;
        }
        if (stream->capture) {
            stream->capture->is_invalid = true;
            return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
        }
    }
    uint64_t ticket;
    {
        std::lock_guard<std::mutex> lock(event->mutex);
        ticket = event->n_recorded;
    }
    return stream->submit({NodeKind::EventRecord, [=] { wait_for_event(*event, ticket); }});
}

DRIVER_API CUresult cuEventSynchronize(void *handle) {
    ENTER_CONTEXT(cuEventSynchronize);
    FIND_EVENT(event, handle);
    if (event->capture)
        return CUDA_ERROR_CAPTURED_EVENT;
    wait_for_event(*event, event->n_recorded);
    return device_error;
}

DRIVER_API CUresult cuEventQuery(void *handle) {
    ENTER_CONTEXT(cuEventQuery);
    FIND_EVENT(event, handle);
    if (event->capture)
        return CUDA_ERROR_CAPTURED_EVENT;
    std::lock_guard<std::mutex> lock(event->mutex);
    return event->n_completed >= event->n_recorded ? CUDA_SUCCESS : CUDA_ERROR_NOT_READY;
}

DRIVER_API CUresult cuEventElapsedTime_v2(float *ms, void *from_handle, void *to_handle) {
    ENTER_CONTEXT(cuEventElapsedTime);
    FIND_EVENT(from, from_handle);
    FIND_EVENT(to, to_handle);
    if (!from->has_timing || !to->has_timing || !from->n_recorded || !to->n_recorded)
        return CUDA_ERROR_INVALID_HANDLE;
    for (Event *event : {from.get(), to.get()}) {
        std::lock_guard<std::mutex> lock(event->mutex);
        if (event->n_completed < event->n_recorded)
            return CUDA_ERROR_NOT_READY;
    }
    *ms = std::chrono::duration<float, std::milli>(to->time - from->time).count();
    return CUDA_SUCCESS;
}

// --- stream memory operations ---

namespace {

enum { WAIT_32 = 1, WRITE_32 = 2, WAIT_64 = 4, WRITE_64 = 5, BARRIER = 6 }; // CUstreamBatchMemOpType

// The layout of CUstreamBatchMemOpParams.
struct MemoryOperation {
    int kind;
    CUdeviceptr address;
    uint64_t value;
    unsigned flags;
    uint64_t reserved[2];
};
static_assert(sizeof(MemoryOperation) == 48, "as cuda.h has it");

template <class T> bool is_satisfied(T found, T wanted, unsigned comparison) {
    switch (comparison) {
    case 0: // GEQ, cyclic
        return (std::make_signed_t<T>)(found - wanted) >= 0;
    case 1: // EQ
        return found == wanted;
    case 2: // AND
        return (found & wanted) != 0;
    default: // NOR
        return (T) ~(found | wanted) != 0;
    }
}

template <class T> void wait_for_value(CUdeviceptr address, T wanted, unsigned comparison) {
    auto start = std::chrono::steady_clock::now();
    for (unsigned n = 0; !device_error; n++) {
        T found = __atomic_load_n((T *)address, __ATOMIC_ACQUIRE);
        if (is_satisfied(found, wanted, comparison))
            return;
        if (n < 1000)
            continue;
        std::this_thread::yield();
        std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
        if (waited.count() > settings.wait_limit_s)
            fail_device(CUDA_ERROR_LAUNCH_FAILED, "a stream waited %g s for a value: %#llx is %llu, wanted %s %llu",
                        settings.wait_limit_s, address, (unsigned long long)found,
                        comparison == 0   ? ">="
                        : comparison == 1 ? "=="
                        : comparison == 2 ? "&"
                                          : "nor",
                        (unsigned long long)wanted);
    }
}

void execute(const MemoryOperation &operation) {
    unsigned comparison = operation.flags & 3;
    switch (operation.kind) {
    case WAIT_32:
        return wait_for_value<uint32_t>(operation.address, (uint32_t)operation.value, comparison);
    case WAIT_64:
        return wait_for_value<uint64_t>(operation.address, operation.value, comparison);
    case WRITE_32:
        return __atomic_store_n((uint32_t *)operation.address, (uint32_t)operation.value, __ATOMIC_SEQ_CST);
    case WRITE_64:
        return __atomic_store_n((uint64_t *)operation.address, operation.value, __ATOMIC_SEQ_CST);
    default:
        return __atomic_thread_fence(__ATOMIC_SEQ_CST);
    }
}

CUresult check(const MemoryOperation &operation) {
    if (operation.kind == BARRIER)
        return CUDA_SUCCESS;
    bool is_64_bit = operation.kind == WAIT_64 || operation.kind == WRITE_64;
    if (!is_64_bit && operation.kind != WAIT_32 && operation.kind != WRITE_32)
        return CUDA_ERROR_NOT_SUPPORTED;
    size_t n_bytes = is_64_bit ? 8 : 4;
    return operation.address % n_bytes || !is_mapped_memory(operation.address, n_bytes) ? CUDA_ERROR_INVALID_VALUE
                                                                                         : CUDA_SUCCESS;
}

CUresult submit(void *handle, const MemoryOperation *operations, unsigned n) {
    FIND_STREAM(stream, handle);
    std::vector<MemoryOperation> copy(operations, operations + n);
    for (const MemoryOperation &operation : copy)
        if (CUresult error = check(operation))
            return error;
    return stream->submit({NodeKind::MemoryOperations, [=] {
                               for (const MemoryOperation &operation : copy)
                                   execute(operation);
                           }});
}

CUresult submit(void *handle, int kind, CUdeviceptr address, uint64_t value, unsigned flags) {
    MemoryOperation operation = {kind, address, value, flags, {0, 0}};
    return submit(handle, &operation, 1);
}

} // namespace

DRIVER_API CUresult cuStreamWaitValue32_v2(void *stream, CUdeviceptr address, uint32_t value, unsigned flags) {
    ENTER_CONTEXT(cuStreamWaitValue32);
    return submit(stream, WAIT_32, address, value, flags);
}
DRIVER_API CUresult cuStreamWaitValue64_v2(void *stream, CUdeviceptr address, uint64_t value, unsigned flags) {
    ENTER_CONTEXT(cuStreamWaitValue64);
    return submit(stream, WAIT_64, address, value, flags);
}
DRIVER_API CUresult cuStreamWriteValue32_v2(void *stream, CUdeviceptr address, uint32_t value, unsigned flags) {
    ENTER_CONTEXT(cuStreamWriteValue32);
    return submit(stream, WRITE_32, address, value, flags);
}
DRIVER_API CUresult cuStreamWriteValue64_v2(void *stream, CUdeviceptr address, uint64_t value, unsigned flags) {
    ENTER_CONTEXT(cuStreamWriteValue64);
    return submit(stream, WRITE_64, address, value, flags);
}
DRIVER_API CUresult cuStreamBatchMemOp_v2(void *stream, unsigned n, const MemoryOperation *operations, unsigned) {
    ENTER_CONTEXT(cuStreamBatchMemOp);
    return n > 256 ? CUDA_ERROR_INVALID_VALUE : submit(stream, operations, n);
}
