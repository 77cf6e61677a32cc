// The stand-in driver's own declarations. NVIDIA's cuda.h is not needed: the few types and constants are restated here.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "../include/cusim/runtime.h"

#define DRIVER_API extern "C" __attribute__((visibility("default")))

typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
enum : CUresult {
    CUDA_SUCCESS = 0,
    CUDA_ERROR_INVALID_VALUE = 1,
    CUDA_ERROR_OUT_OF_MEMORY = 2,
    CUDA_ERROR_NOT_INITIALIZED = 3,
    CUDA_ERROR_INVALID_DEVICE = 101,
    CUDA_ERROR_INVALID_IMAGE = 200,
    CUDA_ERROR_INVALID_CONTEXT = 201,
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
    CUDA_ERROR_INVALID_HANDLE = 400,
    CUDA_ERROR_NOT_FOUND = 500,
    CUDA_ERROR_NOT_READY = 600,
    CUDA_ERROR_ILLEGAL_ADDRESS = 700,
    CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712,
    CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED = 713,
    CUDA_ERROR_LAUNCH_FAILED = 719,
    CUDA_ERROR_NOT_SUPPORTED = 801,
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900,
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901,
    CUDA_ERROR_STREAM_CAPTURE_UNMATCHED = 903,
    CUDA_ERROR_STREAM_CAPTURE_UNJOINED = 904,
    CUDA_ERROR_STREAM_CAPTURE_ISOLATION = 905,
    CUDA_ERROR_STREAM_CAPTURE_IMPLICIT = 906,
    CUDA_ERROR_CAPTURED_EVENT = 907,
    CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD = 908,
};

// --- control.cpp: settings, planned failures, the device's error state ---

struct Settings {
    size_t device_bytes = (size_t)1 << 30;
    unsigned jitter_us = 0; // the longest random pause before each operation of a stream
    unsigned copy_us = 0;   // added to each asynchronous copy of 16 KiB or more
    double wait_limit_s = 20;
    int n_devices = 1; // 0: as on a machine without a GPU
    int order = CUSIM_FORWARD;
    uint64_t seed = 1;
};
extern Settings &settings;

// Starts every driver call: counts it; gives the failure planned for it, the device's error, or success.
CUresult enter(const char *call);
// The same, and the calling thread needs a current context.
CUresult enter_context(const char *call);
#define ENTER(call)                                                                                                    \
    do {                                                                                                               \
        if (CUresult error_ = enter(#call))                                                                            \
            return error_;                                                                                             \
    } while (0)
#define ENTER_CONTEXT(call)                                                                                            \
    do {                                                                                                               \
        if (CUresult error_ = enter_context(#call))                                                                    \
            return error_;                                                                                             \
    } while (0)

// The failure planned for something that happens in a stream ("copy", "kernel"), or success.
CUresult planned_failure(const char *event);

// The error that a failed operation left; every later call returns it until the context is reset.
extern std::atomic<CUresult> device_error;
void fail_device(CUresult error, const char *format, ...) __attribute__((format(printf, 2, 3)));
void random_pause();
void count(const char *what);

// --- handles: what callers hold is the object's address ---

template <class T> class Registry {
  public:
    void *add(std::shared_ptr<T> object) {
        std::lock_guard<std::mutex> lock(mutex_);
        objects_[object.get()] = object;
        return object.get();
    }
    std::shared_ptr<T> find(const void *handle) {
        std::lock_guard<std::mutex> lock(mutex_);
        auto found = objects_.find(handle);
        return found == objects_.end() ? nullptr : found->second;
    }
    std::shared_ptr<T> remove(const void *handle) {
        std::shared_ptr<T> object = find(handle);
        std::lock_guard<std::mutex> lock(mutex_);
        objects_.erase(handle);
        return object;
    }
    std::vector<std::shared_ptr<T>> all() {
        std::lock_guard<std::mutex> lock(mutex_);
        std::vector<std::shared_ptr<T>> result;
        for (auto &entry : objects_)
            result.push_back(entry.second);
        return result;
    }
    void clear() {
        std::lock_guard<std::mutex> lock(mutex_);
        objects_.clear();
    }

  private:
    std::mutex mutex_;
    std::map<const void *, std::shared_ptr<T>> objects_;
};

// --- graphs.cpp and streams.cpp ---

enum class NodeKind { Kernel = 0, Copy = 1, Set = 2, Host = 3, EventRecord = 7, MemoryOperations = 12 }; // CUgraphNodeType

struct Operation {
    NodeKind kind;
    std::function<void()> run;
};

struct Node {
    Operation operation;
    size_t lane;                 // the stream it was captured on; nodes of a lane run in order
    std::vector<size_t> parents; // nodes that must be done before
};

struct Graph {
    std::vector<Node> nodes; // parents come before children
    size_t n_lanes = 0;
};

struct GraphExec {
    Graph graph;
    std::mutex running; // launches of one executable graph do not overlap
};

struct Stream;

enum CaptureMode { CAPTURE_GLOBAL, CAPTURE_THREAD_LOCAL, CAPTURE_RELAXED };

// The recording of a graph from the calls on its origin stream and on streams that wait for events of the recording.
struct Capture {
    Graph graph;
    Stream *origin;
    CaptureMode mode;
    std::thread::id thread;
    bool is_invalid = false;
    struct Lane {
        size_t index;
        std::vector<size_t> tails; // what the next node of this stream depends on
    };
    std::map<Stream *, Lane> lanes;
};

struct Event {
    std::mutex mutex;
    std::condition_variable changed;
    uint64_t n_recorded = 0, n_completed = 0;
    bool has_timing;
    std::chrono::steady_clock::time_point time;
    // the last record, if it was captured
    std::shared_ptr<Capture> capture;
    std::vector<size_t> captured_tails;
};

struct Stream {
    explicit Stream(bool is_default);
    ~Stream();
    // Queues an operation, or records it if the stream is being captured.
    CUresult submit(Operation operation);
    CUresult synchronize();
    bool is_idle();

    const bool is_default;
    std::shared_ptr<Capture> capture; // under capture_mutex

  private:
    void work();
    std::mutex mutex_;
    std::condition_variable changed_;
    std::vector<Operation> queue_;
    bool is_stopping_ = false, is_busy_ = false;
    std::thread worker_;
};

extern Registry<Stream> &streams;
extern Registry<Event> &events;
extern Registry<Graph> &graphs;
extern Registry<GraphExec> &graph_execs;
extern std::recursive_mutex &capture_mutex;

// A stream by handle; null, 1 and 2 are the default stream. Null if there is none.
std::shared_ptr<Stream> find_stream(void *handle);
// Fails a call that no thread, or not this one, may make while a capture goes on, and spoils that capture.
CUresult forbid_while_capturing(CUresult error);
// Runs the nodes of a graph, each after its parents, lanes at the same time.
void run_graph(GraphExec &exec);
void synchronize_all();

// --- memory.cpp ---

// Whether [address, address + n_bytes) lies inside one live allocation.
bool is_device_memory(CUdeviceptr address, size_t n_bytes);
bool is_mapped_memory(CUdeviceptr address, size_t n_bytes); // device memory, or pinned host memory
// An address that is in nobody's allocation is plain host memory; one that starts in an allocation must end in it.
bool is_host_or_mapped_memory(CUdeviceptr address, size_t n_bytes);
// Looks for writes beyond the ends of device allocations; `who` is blamed.
void check_guards(const char *who);
void release_all_memory();

// --- modules.cpp ---
void configure_runtimes(); // passes order, seed and wait limit on to the kernel runtimes in use
void release_all_modules();
