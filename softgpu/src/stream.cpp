// stream.cpp - streams, events, and graphs: capture, instantiation, replay. What is put in a stream is queued
// (queue.cpp); a capture records it instead, and a replay puts what was recorded in the stream, in that order.
#include <algorithm>

#include "driver.h"

namespace softgpu {
struct Node {
    CUgraphNodeType type;
    std::string name;
    Work work;
};
struct Graph {
    std::vector<std::unique_ptr<Node>> nodes;
    struct Memory {
        std::shared_ptr<Place> range;
        bool freed;
    };
    std::map<CUdeviceptr, Memory> memory;  // that its nodes allocate
    int executables = 0;
};
struct Capture {
    Stream* origin;
    CUstreamCaptureMode mode;
    std::thread::id thread = std::this_thread::get_id();
    bool invalid = false;
    std::vector<Stream*> streams;  // that take part
    std::shared_ptr<Graph> graph = std::make_shared<Graph>();
};
}  // namespace softgpu

namespace {
struct Event {
    bool timing, recorded = false, captured = false;  // last in a stream that didn't capture, or in one that did
    int records = 0;
    bool happened = false;  // the last record
    std::chrono::steady_clock::time_point time;
    Clock clock;  // what waits for it comes after
    std::weak_ptr<Capture> capture;
    Seen seen;
};
struct Executable {
    std::shared_ptr<Graph> graph;
    bool auto_free;
    ~Executable() { --graph->executables; }
};

Stream& legacy_stream() {
    static Stream& s = *new Stream(true, false);
    return s;
}
Stream& thread_stream() {
    legacy_stream();
    thread_local Stream s(false, true);
    return s;
}
thread_local CUstreamCaptureMode thread_mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
// What the handles stand for. Never destroyed: other threads may still run when the program ends.
auto& streams = *new std::map<CUstream, std::unique_ptr<Stream>>;
auto& events = *new std::map<CUevent, std::shared_ptr<Event>>;
auto& graphs = *new std::map<CUgraph, std::shared_ptr<Graph>>;
auto& executables = *new std::map<CUgraphExec, std::unique_ptr<Executable>>;
auto& captures = *new std::vector<std::shared_ptr<Capture>>;  // that were begun and not ended

Stream* find_stream(CUstream s) {
    if (!s || s == CU_STREAM_LEGACY) return &legacy_stream();
    if (s == CU_STREAM_PER_THREAD) return &thread_stream();
    auto it = streams.find(s);
    return it == streams.end() ? nullptr : it->second.get();
}
template <class K, class V>
V* find(std::map<K, V>& all, K handle) {
    auto it = all.find(handle);
    return it == all.end() ? nullptr : &it->second;
}
CUresult no_handle(const char* what) {
    return bad(CUDA_ERROR_INVALID_HANDLE, std::string("unknown or destroyed ") + what);
}
CUresult invalidate(Capture& c, CUresult error, const std::string& message) {
    c.invalid = true;
    return bad(error, message + "; the capture is invalidated");
}
// The capture that the event is part of, if that has not ended.
std::shared_ptr<Capture> capture_of(const Event& e) {
    auto c = e.capture.lock();
    return std::find(captures.begin(), captures.end(), c) == captures.end() ? nullptr : c;
}
void leave(Capture& c) {
    for (Stream* s : c.streams) {
        s->capture = nullptr;
        s->seen.clear();
    }
    captures.erase(std::find_if(captures.begin(), captures.end(), [&](auto& x) { return x.get() == &c; }));
}
void merge(Seen& into, const Seen& from) {
    for (auto& [stream, position] : from) into[stream] = std::max(into[stream], position);
}
// Invalidates the captures that are so, or returns success where none is.
template <class F>
CUresult refuse_where(F&& is_so, CUresult error, const std::string& message) {
    CUresult r = CUDA_SUCCESS;
    for (auto& c : captures)
        if (is_so(*c)) r = invalidate(*c, error, message);
    return r;
}
}  // namespace

namespace softgpu {
unsigned long long Stream::last_id = 0;
Stream::~Stream() {
    Lock lock;
    queue = nullptr;
    if (!capture) return;
    auto& all = capture->streams;
    all.erase(std::find(all.begin(), all.end(), this));
    capture->invalid = true;
    if (capture->origin == this) leave(*std::shared_ptr<Capture>(capture));
}
CUresult refuse_unsafe(const char* what) {
    if (thread_mode == CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_SUCCESS;
    auto forbids = [](const Capture& c) {
        return c.thread == std::this_thread::get_id()
                   ? c.mode != CU_STREAM_CAPTURE_MODE_RELAXED
                   : c.mode == CU_STREAM_CAPTURE_MODE_GLOBAL && thread_mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
    };
    return refuse_where(forbids, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                        std::string(what) + " during a capture that isn't in relaxed mode would not be recorded");
}
CUresult refuse_legacy(const char* what) {
    auto blocking = [](const Capture& c) {
        return std::any_of(c.streams.begin(), c.streams.end(), [](Stream* s) { return s->blocking; });
    };
    return refuse_where(blocking, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
                        std::string(what) + " in the legacy stream would wait for a blocking stream that captures");
}
CUresult refuse_own(const char* what) {
    auto own = [](const Capture& c) { return c.thread == std::this_thread::get_id(); };
    return refuse_where(own, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, std::string(what) + " during a capture");
}
CUresult refuse_any(const char* what) {
    auto any = [](const Capture&) { return true; };
    return refuse_where(any, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, std::string(what) + " while a stream captures");
}
CUresult enter(CUstream handle, Stream** to, Capture** capture) {
    Stream* s = *to = find_stream(handle);
    if (!s) return no_handle("stream");
    *capture = s->capture.get();
    if (s->legacy) return refuse_legacy("work");
    if (s->capture && s->capture->invalid)
        return bad(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "work in a stream whose capture was invalidated");
    return CUDA_SUCCESS;
}
void record(Stream& s, CUgraphNodeType type, const std::string& name, Work work) {
    ++s.seen[&s];
    s.capture->graph->nodes.push_back(std::unique_ptr<Node>(new Node{type, name, std::move(work)}));
}
CUresult enqueue(CUstream handle, CUgraphNodeType type, const std::string& name, Work work) {
    CHECK();
    Stream* stream;
    Capture* capture;
    if (CUresult r = enter(handle, &stream, &capture)) return r;
    if (capture) {
        record(*stream, type, name, std::move(work));
        return CUDA_SUCCESS;
    }
    push(stream->queue, name, std::move(work));
    return settle(stream->queue);
}
CUresult refuse_host_copy(CUstream handle, const char* what, const char* why) {
    Stream* stream;
    Capture* capture;
    CUresult r = enter(handle, &stream, &capture);
    if (r || !capture) return r;
    return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                      std::string(what) + " in a stream that captures: " + why);
}
CUresult capture_alloc(Stream& s, CUdeviceptr* p, size_t n) {
    auto range = std::make_shared<Place>(n);
    if (!range->p) return bad(CUDA_ERROR_OUT_OF_MEMORY, "no memory for a graph");
    s.capture->graph->memory[range->p] = {range, false};
    *p = range->p;
    record(s, CU_GRAPH_NODE_TYPE_MEM_ALLOC, "cuMemAllocAsync", once([range] { return place(range); }));
    return CUDA_SUCCESS;
}
CUresult capture_free(Stream& s, CUdeviceptr p) {
    auto* memory = find(s.capture->graph->memory, p);
    if (!memory)
        return bad(CUDA_ERROR_INVALID_VALUE,
                   "cuMemFreeAsync in a stream that captures, of memory that was not allocated in this capture");
    if (memory->freed) return bad(CUDA_ERROR_INVALID_VALUE, "cuMemFreeAsync twice in one capture");
    memory->freed = true;
    record(s, CU_GRAPH_NODE_TYPE_MEM_FREE, "cuMemFreeAsync", once([p] { return release(p); }));
    return CUDA_SUCCESS;
}
}  // namespace softgpu

// ---- streams
API cuStreamCreate(CUstream* s, unsigned flags) {
    CHECK();
    legacy_stream();  // whose queue is the first
    auto made = std::make_unique<Stream>(false, !(flags & CU_STREAM_NON_BLOCKING));
    *s = (CUstream)made.get();
    streams[*s] = std::move(made);
    return CUDA_SUCCESS;
}
API cuStreamCreateWithPriority(CUstream* s, unsigned flags, int) { return cuStreamCreate(s, flags); }
API cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = *greatest = 0;
    return CUDA_SUCCESS;
}
API cuStreamDestroy_v2(CUstream s) {
    Lock lock;
    auto it = streams.find(s);
    if (it == streams.end()) return no_handle("stream");
    if (auto c = it->second->capture)
        return invalidate(*c, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "cuStreamDestroy of a stream that captures");
    streams.erase(it);
    return CUDA_SUCCESS;
}
static CUresult stream_wait(CUstream handle, const char* what) {
    CHECK();
    Stream* s = find_stream(handle);
    if (!s) return no_handle("stream");
    if (s->capture)
        return invalidate(*s->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,
                          std::string(what) + " of a stream that captures: nothing has run that could be waited for");
    if (CUresult r = s->legacy ? refuse_legacy(what) : CUDA_SUCCESS) return r;
    if (CUresult r = refuse_unsafe(what)) return r;
    CUresult r = wait_for(s->legacy ? clock_of(*s->queue) : s->queue->clock);
    pool_waited();
    return r;
}
API cuStreamSynchronize(CUstream s) { return stream_wait(s, "cuStreamSynchronize"); }
API cuStreamQuery(CUstream s) { return stream_wait(s, "cuStreamQuery"); }
API cuCtxSynchronize() {
    CHECK();
    if (CUresult r = refuse_any("cuCtxSynchronize")) return r;
    CUresult r = wait_for_all();
    pool_waited();
    return r;
}
API cuLaunchHostFunc(CUstream s, CUhostFn function, void* data) {
    auto call = [=](std::shared_ptr<void>& state) -> CUresult {
        if (!state) {
            host_knows(ptxsim::current->before);  // as the function may tell other threads
            auto ended = std::make_shared<std::atomic<bool>>(false);
            std::thread([=] {  // as it may also wait for them
                function(data);
                *ended = true;
            })
                .detach();
            state = ended;
        }
        if (*(std::atomic<bool>*)state.get()) return CUDA_SUCCESS;
        std::this_thread::sleep_for(std::chrono::microseconds(20));
        return CUDA_ERROR_NOT_READY;
    };
    return enqueue(s, CU_GRAPH_NODE_TYPE_HOST, "cuLaunchHostFunc", call);
}
API cuStreamGetId(CUstream handle, unsigned long long* id) {
    Lock lock;
    Stream* s = find_stream(handle);
    if (!s) return no_handle("stream");
    *id = s->id;
    return CUDA_SUCCESS;
}
// For the libraries of libs.cpp: `drop` is called when the data is of no more use.
EXPORT int softgpu_enqueue(void* s, const char* name, int (*run)(void*), void* data, void (*drop)(void*)) {
    std::shared_ptr<void> owned(data, drop);
    return enqueue((CUstream)s, CU_GRAPH_NODE_TYPE_KERNEL, name, once([=] { return (CUresult)run(owned.get()); }));
}

// ---- events
API cuEventCreate(CUevent* e, unsigned flags) {
    CHECK();
    auto made = std::make_shared<Event>();
    made->timing = !(flags & CU_EVENT_DISABLE_TIMING);
    *e = (CUevent)made.get();
    events[*e] = std::move(made);
    return CUDA_SUCCESS;
}
API cuEventDestroy_v2(CUevent e) {
    Lock lock;
    return events.erase(e) ? CUDA_SUCCESS : no_handle("event");
}
API cuEventRecord(CUevent handle, CUstream to) {
    CHECK();
    auto* e = find(events, handle);
    if (!e) return no_handle("event");
    Stream* stream;
    Capture* capture;
    if (CUresult r = enter(to, &stream, &capture)) return r;
    std::shared_ptr<Event> event = *e;
    event->capture = stream->capture;
    event->captured = capture;
    event->seen = stream->seen;
    event->recorded = !capture;
    event->happened = false;
    int now = ++event->records;
    if (capture) return CUDA_SUCCESS;
    auto happens = [event, now] {
        if (event->records != now) return CUDA_SUCCESS;  // it was recorded again
        event->happened = true;
        event->time = std::chrono::steady_clock::now();
        return CUDA_SUCCESS;
    };
    push(stream->queue, "cuEventRecord", once(happens));
    event->clock = stream->queue->clock;
    return settle(stream->queue);
}
static CUresult event_wait(CUevent handle, const char* what) {
    CHECK();
    auto* e = find(events, handle);
    if (!e) return no_handle("event");
    if ((*e)->captured) {
        std::string message = std::string(what) + " of an event that was last recorded in a stream that captured";
        auto c = capture_of(**e);
        return c ? invalidate(*c, CUDA_ERROR_CAPTURED_EVENT, message) : bad(CUDA_ERROR_CAPTURED_EVENT, message);
    }
    if (CUresult r = refuse_unsafe(what)) return r;
    CUresult r = (*e)->recorded ? wait_for((*e)->clock) : CUDA_SUCCESS;
    pool_waited();
    return r;
}
API cuEventSynchronize(CUevent e) { return event_wait(e, "cuEventSynchronize"); }
API cuEventQuery(CUevent e) { return event_wait(e, "cuEventQuery"); }
static CUresult elapsed(float* ms, CUevent from, CUevent to) {
    Lock lock;
    auto *a = find(events, from), *b = find(events, to);
    if (!a || !b) return no_handle("event");
    if (!(*a)->timing || !(*b)->timing)
        return bad(CUDA_ERROR_INVALID_HANDLE, "cuEventElapsedTime of an event without timing");
    if (!(*a)->recorded || !(*b)->recorded)
        return bad(CUDA_ERROR_INVALID_HANDLE, "cuEventElapsedTime of an event that was not recorded");
    if (!(*a)->happened || !(*b)->happened) return CUDA_ERROR_NOT_READY;
    *ms = std::chrono::duration<float, std::milli>((*b)->time - (*a)->time).count();
    return CUDA_SUCCESS;
}
#undef cuEventElapsedTime
API cuEventElapsedTime(float* ms, CUevent from, CUevent to) { return elapsed(ms, from, to); }
API cuEventElapsedTime_v2(float* ms, CUevent from, CUevent to) { return elapsed(ms, from, to); }
API cuStreamWaitEvent(CUstream handle, CUevent event, unsigned flags) {
    CHECK();
    auto* found = find(events, event);
    if (!found) return no_handle("event");
    if (flags) return bad(CUDA_ERROR_NOT_SUPPORTED, "cuStreamWaitEvent with flags");
    Event& e = **found;
    Stream* stream;
    Capture* capture;
    if (CUresult r = enter(handle, &stream, &capture)) return r;
    if (!e.captured) {
        if (!e.recorded) return CUDA_SUCCESS;
        if (!capture) {
            merge(stream->queue->clock, e.clock);
            return CUDA_SUCCESS;
        }
        return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_ISOLATION,
                          "cuStreamWaitEvent in a stream that captures, for an event recorded outside of the capture");
    }
    std::shared_ptr<Capture> other = capture_of(e);
    if (!other) return bad(CUDA_ERROR_CAPTURED_EVENT, "cuStreamWaitEvent for an event of a capture that has ended");
    if (other->invalid)
        return bad(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "cuStreamWaitEvent for an event of an invalidated capture");
    if (stream->legacy)
        return invalidate(*other, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
                          "cuStreamWaitEvent in the legacy stream for an event of a capture");
    if (!capture) {  // a fork: the stream joins the capture
        stream->capture = other;
        other->streams.push_back(stream);
    } else if (capture != other.get()) {
        other->invalid = true;
        return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_MERGE, "cuStreamWaitEvent between two captures");
    }
    merge(stream->seen, e.seen);
    return CUDA_SUCCESS;
}

// ---- capture
API cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
    if ((unsigned)*mode > CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
    std::swap(*mode, thread_mode);
    return CUDA_SUCCESS;
}
API cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
    CHECK();
    Stream* s = find_stream(handle);
    if (!s) return no_handle("stream");
    if ((unsigned)mode > CU_STREAM_CAPTURE_MODE_RELAXED) return CUDA_ERROR_INVALID_VALUE;
    if (s->legacy) return bad(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "the legacy stream can't capture");
    if (s->capture) return bad(CUDA_ERROR_ILLEGAL_STATE, "cuStreamBeginCapture of a stream that captures");
    s->capture = std::make_shared<Capture>();
    s->capture->origin = s;
    s->capture->mode = mode;
    s->capture->streams = {s};
    captures.push_back(s->capture);
    LOG("capture begins");
    return CUDA_SUCCESS;
}
API cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    Lock lock;
    *graph = nullptr;
    Stream* s = find_stream(handle);
    if (!s) return no_handle("stream");
    std::shared_ptr<Capture> c = s->capture;
    if (!c) return bad(CUDA_ERROR_ILLEGAL_STATE, "cuStreamEndCapture of a stream that doesn't capture");
    if (c->origin != s)
        return invalidate(*c, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED,
                          "cuStreamEndCapture of another stream than the one in which the capture began");
    if (c->mode != CU_STREAM_CAPTURE_MODE_RELAXED && c->thread != std::this_thread::get_id())
        return invalidate(*c, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "cuStreamEndCapture in another thread");
    bool joined = std::all_of(c->streams.begin(), c->streams.end(),
                              [&](Stream* other) { return s->seen[other] >= other->seen[other]; });
    leave(*c);
    if (c->invalid) return bad(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "the capture was invalidated");
    if (!joined)
        return bad(CUDA_ERROR_STREAM_CAPTURE_UNJOINED,
                   "a stream that joined the capture has work that the capture's own stream did not wait for");
    *graph = (CUgraph)c->graph.get();
    graphs[*graph] = c->graph;
    LOG("capture ends with %zu nodes", c->graph->nodes.size());
    return CUDA_SUCCESS;
}
API cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus* status) {
    Lock lock;
    Stream* s = find_stream(handle);
    if (!s) return no_handle("stream");
    for (auto& c : captures)
        if (s->legacy && std::any_of(c->streams.begin(), c->streams.end(), [](Stream* x) { return x->blocking; }))
            return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;  // this alone leaves the capture valid
    *status = !s->capture           ? CU_STREAM_CAPTURE_STATUS_NONE
              : s->capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                    : CU_STREAM_CAPTURE_STATUS_ACTIVE;
    return CUDA_SUCCESS;
}

// ---- graphs
API cuGraphGetNodes(CUgraph handle, CUgraphNode* nodes, size_t* n) {
    Lock lock;
    auto* g = find(graphs, handle);
    if (!g) return no_handle("graph");
    size_t all = (*g)->nodes.size();
    if (nodes)
        for (size_t i = 0; i < *n; ++i) nodes[i] = i < all ? (CUgraphNode)(*g)->nodes[i].get() : nullptr;
    if (!nodes || *n > all) *n = all;
    return CUDA_SUCCESS;
}
API cuGraphNodeGetType(CUgraphNode node, CUgraphNodeType* type) {
    *type = ((Node*)node)->type;
    return CUDA_SUCCESS;
}
API cuGraphDestroy(CUgraph handle) {
    Lock lock;
    return graphs.erase(handle) ? CUDA_SUCCESS : no_handle("graph");
}
API cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph handle, unsigned long long flags) {
    CHECK();
    auto* g = find(graphs, handle);
    if (!g) return no_handle("graph");
    bool auto_free = flags & CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
    bool on_device = flags & CUDA_GRAPH_INSTANTIATE_FLAG_DEVICE_LAUNCH;
    if (auto_free && on_device) return CUDA_ERROR_INVALID_VALUE;
    if (on_device) return bad(CUDA_ERROR_NOT_SUPPORTED, "graphs can't be launched from the device");
    if (!(*g)->memory.empty() && (*g)->executables)
        return bad(CUDA_ERROR_INVALID_VALUE, "a graph that allocates memory can be instantiated once at a time");
    ++(*g)->executables;
    auto made = std::unique_ptr<Executable>(new Executable{*g, auto_free});
    *executable = (CUgraphExec)made.get();
    executables[*executable] = std::move(made);
    return CUDA_SUCCESS;
}
API cuGraphExecDestroy(CUgraphExec handle) {
    Lock lock;
    return executables.erase(handle) ? CUDA_SUCCESS : no_handle("executable graph");
}
static CUresult enter_with_graph(CUgraphExec handle, CUstream to, Executable** executable,
                                 std::shared_ptr<Queue>* queue) {
    auto* found = find(executables, handle);
    if (!found) return no_handle("executable graph");
    *executable = found->get();
    Stream* stream;
    Capture* capture;
    CUresult r = enter(to, &stream, &capture);
    if (r) return r;
    *queue = stream->queue;
    if (!capture) return CUDA_SUCCESS;
    return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "graphs in graphs are not supported");
}
API cuGraphUpload(CUgraphExec handle, CUstream to) {
    CHECK();
    Executable* executable;
    std::shared_ptr<Queue> queue;
    return enter_with_graph(handle, to, &executable, &queue);
}
API cuGraphLaunch(CUgraphExec handle, CUstream to) {
    CHECK();
    Executable* executable;
    std::shared_ptr<Queue> queue;
    if (CUresult r = enter_with_graph(handle, to, &executable, &queue)) return r;
    std::shared_ptr<Graph> graph = executable->graph;
    bool auto_free = executable->auto_free;
    // so that memory which an earlier launch leaves is there, to be noticed
    if (CUresult r = run_all_of(queue)) return r;
    for (auto& [p, memory] : graph->memory) {
        if (!is_live(p)) continue;
        if (!auto_free)
            return bad(CUDA_ERROR_INVALID_VALUE,
                       "cuGraphLaunch while memory that the last launch allocated has not been freed");
        release_in(queue, p);
    }
    LOG("graph of %zu nodes", graph->nodes.size());
    for (auto& node : graph->nodes)
        push(queue, node->name, [graph, node = node.get()](std::shared_ptr<void>& state) { return node->work(state); });
    return settle(queue);
}
