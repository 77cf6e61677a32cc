// Stream capture, and graphs that replay what was captured.
#include "driver.h"

Registry<Graph> &graphs = *new Registry<Graph>;
Registry<GraphExec> &graph_execs = *new Registry<GraphExec>;
std::recursive_mutex &capture_mutex = *new std::recursive_mutex;

static auto &captures = *new std::set<std::shared_ptr<Capture>>; // that go on; under capture_mutex

CUresult forbid_while_capturing(CUresult error) {
    std::lock_guard<std::recursive_mutex> lock(capture_mutex);
    CUresult result = CUDA_SUCCESS;
    for (auto &capture : captures)
        if (capture->mode == CAPTURE_GLOBAL ||
            (capture->mode == CAPTURE_THREAD_LOCAL && capture->thread == std::this_thread::get_id())) {
            capture->is_invalid = true;
            result = error;
        }
    return result;
}

DRIVER_API CUresult cuStreamBeginCapture_v2(void *handle, int mode) {
    ENTER_CONTEXT(cuStreamBeginCapture);
    std::shared_ptr<Stream> stream = find_stream(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_HANDLE;
    std::lock_guard<std::recursive_mutex> lock(capture_mutex);
    if (stream->is_default)
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    if (stream->capture)
        return CUDA_ERROR_INVALID_VALUE;
    auto capture = std::make_shared<Capture>();
    capture->origin = stream.get();
    capture->mode = (CaptureMode)mode;
    capture->thread = std::this_thread::get_id();
    capture->lanes[stream.get()] = {capture->graph.n_lanes++, {}};
    captures.insert(capture);
    stream->capture = capture;
    return CUDA_SUCCESS;
}

// Whether everything that was captured comes before the origin's last node: forks have been joined.
static bool is_joined(Capture &capture) {
    std::vector<bool> is_before(capture.graph.nodes.size());
    std::vector<size_t> waiting = capture.lanes[capture.origin].tails;
    while (!waiting.empty()) {
        size_t node = waiting.back();
        waiting.pop_back();
        if (is_before[node])
            continue;
        is_before[node] = true;
        for (size_t parent : capture.graph.nodes[node].parents)
            waiting.push_back(parent);
    }
    for (bool reached : is_before)
        if (!reached)
            return false;
    return true;
}

DRIVER_API CUresult cuStreamEndCapture(void *handle, void **graph) {
    ENTER_CONTEXT(cuStreamEndCapture);
    *graph = nullptr;
    std::shared_ptr<Stream> stream = find_stream(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_HANDLE;
    std::lock_guard<std::recursive_mutex> lock(capture_mutex);
    std::shared_ptr<Capture> capture = stream->capture;
    if (!capture)
        return CUDA_ERROR_INVALID_VALUE;
    if (capture->origin != stream.get())
        return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
    if (capture->mode != CAPTURE_RELAXED && capture->thread != std::this_thread::get_id())
        return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    for (auto &lane : capture->lanes)
        lane.first->capture = nullptr;
    captures.erase(capture);
    if (capture->is_invalid)
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    capture->is_invalid = true; // its events cannot be waited for any more
    if (!is_joined(*capture))
        return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
    *graph = graphs.add(std::make_shared<Graph>(capture->graph));
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuStreamIsCapturing(void *handle, int *status) {
    ENTER_CONTEXT(cuStreamIsCapturing);
    std::shared_ptr<Stream> stream = find_stream(handle);
    if (!stream)
        return CUDA_ERROR_INVALID_HANDLE;
    std::lock_guard<std::recursive_mutex> lock(capture_mutex);
    *status = !stream->capture ? 0 : stream->capture->is_invalid ? 2 : 1; // NONE, INVALIDATED, ACTIVE
    return CUDA_SUCCESS;
}

// --- graphs ---

DRIVER_API CUresult cuGraphInstantiateWithFlags(void **exec, void *handle, unsigned long long) {
    ENTER_CONTEXT(cuGraphInstantiate);
    std::shared_ptr<Graph> graph = graphs.find(handle);
    if (!graph)
        return CUDA_ERROR_INVALID_VALUE;
    auto created = std::make_shared<GraphExec>();
    created->graph = *graph;
    *exec = graph_execs.add(created);
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuGraphDestroy(void *handle) {
    ENTER(cuGraphDestroy);
    return graphs.remove(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

DRIVER_API CUresult cuGraphExecDestroy(void *handle) {
    ENTER(cuGraphExecDestroy);
    return graph_execs.remove(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

DRIVER_API CUresult cuGraphUpload(void *handle, void *) {
    ENTER_CONTEXT(cuGraphUpload);
    return graph_execs.find(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

// Gives the number of nodes, and if `nodes` is there, as many handles as `n` has room for.
DRIVER_API CUresult cuGraphGetNodes(void *handle, void **nodes, size_t *n) {
    ENTER_CONTEXT(cuGraphGetNodes);
    std::shared_ptr<Graph> graph = graphs.find(handle);
    if (!graph)
        return CUDA_ERROR_INVALID_VALUE;
    for (size_t i = 0; nodes && i < *n; i++)
        nodes[i] = i < graph->nodes.size() ? &graph->nodes[i] : nullptr;
    *n = graph->nodes.size();
    return CUDA_SUCCESS;
}

DRIVER_API CUresult cuGraphNodeGetType(void *node, int *kind) {
    ENTER_CONTEXT(cuGraphNodeGetType);
    *kind = (int)((Node *)node)->operation.kind;
    return CUDA_SUCCESS;
}

namespace {

// One run of a graph.
struct Run {
    const Graph &graph;
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<bool> is_done;

    void lane(size_t index) {
        for (size_t i = 0; i < graph.nodes.size(); i++) {
            const Node &node = graph.nodes[i];
            if (node.lane != index)
                continue;
            {
                std::unique_lock<std::mutex> lock(mutex);
                changed.wait(lock, [&] {
                    for (size_t parent : node.parents)
                        if (!is_done[parent])
                            return false;
                    return true;
                });
            }
            random_pause();
            if (!device_error)
                node.operation.run();
            std::lock_guard<std::mutex> lock(mutex);
            is_done[i] = true;
            changed.notify_all();
        }
    }
};

} // namespace

void run_graph(GraphExec &exec) {
    std::lock_guard<std::mutex> lock(exec.running);
    Run run{exec.graph, {}, {}, std::vector<bool>(exec.graph.nodes.size())};
    std::vector<std::thread> others;
    for (size_t lane = 1; lane < exec.graph.n_lanes; lane++)
        others.emplace_back([&run, lane] { run.lane(lane); });
    run.lane(0);
    for (std::thread &thread : others)
        thread.join();
}

DRIVER_API CUresult cuGraphLaunch(void *handle, void *stream_handle) {
    ENTER_CONTEXT(cuGraphLaunch);
    std::shared_ptr<GraphExec> exec = graph_execs.find(handle);
    std::shared_ptr<Stream> stream = find_stream(stream_handle);
    if (!exec || !stream)
        return CUDA_ERROR_INVALID_HANDLE;
    {
        std::lock_guard<std::recursive_mutex> lock(capture_mutex);
        if (stream->capture) { // child graphs are not emulated
            stream->capture->is_invalid = true;
            return CUDA_ERROR_NOT_SUPPORTED;
        }
    }
    return stream->submit({NodeKind::Kernel, [exec] { run_graph(*exec); }});
}
