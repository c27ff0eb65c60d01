// Tests of the software GPU: graphs, streams that overlap, the memory pool, events, and instructions that once were
// wrong. What it expects of
// the driver is meant to hold for CUDA's own too, so it also runs on a GPU; only there it doesn't expect what the
// checker finds.
#include <cuda.h>
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

static int failures;
static bool soft;         // on the software GPU
static std::string text;  // of the module
static CUmodule module;

#define EXPECT(condition)                                              \
    do {                                                               \
        if (!(condition)) {                                            \
            ++failures;                                                \
            printf("main.cpp:%d: not so: %s\n", __LINE__, #condition); \
        }                                                              \
    } while (0)
#define GIVES(error, call)                                                            \
    do {                                                                              \
        CUresult r_ = (call);                                                         \
        if (r_ != (error)) {                                                          \
            ++failures;                                                               \
            printf("main.cpp:%d: %s gave %d, not %s\n", __LINE__, #call, r_, #error); \
        }                                                                             \
    } while (0)
#define WORKS(call) GIVES(CUDA_SUCCESS, call)

static const int N = 100;
static const size_t BYTES = N * sizeof(int);

// The launch of a kernel of the module in blocks of 64 threads.
template <class... Args>
static CUresult launch(CUstream stream, const char* name, int threads, Args... args) {
    CUfunction f;
    if (CUresult r = cuModuleGetFunction(&f, module, name)) return r;
    void* params[] = {&args...};
    return cuLaunchKernel(f, (threads + 63) / 64, 1, 1, threads < 64 ? threads : 64, 1, 1, 0, stream, params, nullptr);
}
static CUstream stream_with(unsigned flags = CU_STREAM_NON_BLOCKING) {
    CUstream s = nullptr;
    WORKS(cuStreamCreate(&s, flags));
    return s;
}
static CUevent event_with(unsigned flags = CU_EVENT_DEFAULT) {
    CUevent e = nullptr;
    WORKS(cuEventCreate(&e, flags));
    return e;
}
static CUdeviceptr memory(size_t bytes = BYTES) {
    CUdeviceptr p = 0;
    WORKS(cuMemAlloc(&p, bytes));
    return p;
}
// Every element is `value`.
static bool holds(CUdeviceptr p, int value, CUstream stream) {
    std::vector<int> v(N, ~value);
    WORKS(cuMemcpyDtoHAsync(v.data(), p, BYTES, stream));
    WORKS(cuStreamSynchronize(stream));
    for (int x : v)
        if (x != value) {
            printf("main.cpp: %d instead of %d\n", x, value);
            return false;
        }
    return true;
}
static void begin(CUstream s, CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_THREAD_LOCAL) {
    WORKS(cuStreamBeginCapture(s, mode));
}
static CUgraph end(CUstream s) {
    CUgraph g = nullptr;
    WORKS(cuStreamEndCapture(s, &g));
    return g;
}
static CUgraphExec instantiate(CUgraph g, unsigned long long flags = 0) {
    CUgraphExec e = nullptr;
    WORKS(cuGraphInstantiate(&e, g, flags));
    return e;
}
// The capture has been invalidated: the stream takes nothing but the end of it, and works after that.
static void is_invalidated(CUstream s, CUdeviceptr p) {
    CUstreamCaptureStatus status;
    WORKS(cuStreamIsCapturing(s, &status));
    EXPECT(status == CU_STREAM_CAPTURE_STATUS_INVALIDATED);
    GIVES(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, cuMemsetD8Async(p, 1, BYTES, s));
    CUgraph g = (CUgraph)1;
    GIVES(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, cuStreamEndCapture(s, &g));
    EXPECT(g == nullptr);
    WORKS(cuMemsetD8Async(p, 1, BYTES, s));
    EXPECT(holds(p, 0x01010101, s));
}

// ---- graphs
static void records_and_replays_in_order() {
    CUstream s = stream_with();
    CUdeviceptr in = memory(), out = memory();
    WORKS(cuMemsetD8Async(out, 0, BYTES, s));
    begin(s);
    CUdeviceptr p, q;
    WORKS(cuMemAllocAsync(&p, BYTES, s));
    WORKS(cuMemcpyDtoDAsync(p, in, BYTES, s));
    int add = 1;
    WORKS(launch(s, "step", N, p, add, N));
    add = 5;
    WORKS(launch(s, "step", N, p, add, N));
    add = 1000;  // what was captured is a copy
    WORKS(cuMemAllocAsync(&q, BYTES, s));
    WORKS(cuMemsetD8Async(q, 0, BYTES, s));
    WORKS(cuMemcpyDtoDAsync(q, p, BYTES / 2, s));
    WORKS(cuMemcpyDtoDAsync(q + BYTES / 2, p, BYTES / 2, s));
    WORKS(cuMemcpyDtoDAsync(out, q, BYTES, s));
    WORKS(cuMemFreeAsync(p, s));
    WORKS(cuMemFreeAsync(q, s));
    CUgraph g = end(s);
    size_t n = 0;
    WORKS(cuGraphGetNodes(g, nullptr, &n));
    EXPECT(n == 11);
    CUgraphExec e = instantiate(g);
    CUgraphExec second;
    EXPECT(cuGraphInstantiate(&second, g, 0) != CUDA_SUCCESS);  // it has allocations
    WORKS(cuGraphDestroy(g));
    EXPECT(holds(out, 0, s));  // nothing ran
    for (int x : {3, 4, 3}) {
        WORKS(launch(s, "fill", N, in, x, N));
        WORKS(cuGraphUpload(e, s));
        WORKS(cuGraphLaunch(e, s));
        EXPECT(holds(out, 2 * (2 * x + 1) + 5, s));
    }
    WORKS(cuGraphExecDestroy(e));
    WORKS(cuStreamDestroy(s));
}

static void launches_with_attributes_are_recorded() {
    CUstream s = stream_with();
    CUdeviceptr out = memory(4 * sizeof(int));
    WORKS(cuMemsetD8Async(out, 9, 4 * sizeof(int), s));
    CUfunction f;
    WORKS(cuModuleGetFunction(&f, module, "ranks"));
    CUlaunchConfig config = {};
    config.gridDimX = 4, config.gridDimY = config.gridDimZ = 1;
    config.blockDimX = 32, config.blockDimY = config.blockDimZ = 1;
    config.hStream = s;
    void* params[] = {&out};
    begin(s);
    WORKS(cuLaunchKernelEx(&config, f, params, nullptr));
    WORKS(cuGraphLaunch(instantiate(end(s)), s));
    int ranks[4];
    WORKS(cuMemcpyDtoHAsync(ranks, out, sizeof ranks, s));
    WORKS(cuStreamSynchronize(s));
    EXPECT(ranks[0] == 0 && ranks[1] == 1 && ranks[2] == 0 && ranks[3] == 1);
}

static void memory_may_outlive_a_replay() {
    CUstream s = stream_with();
    for (bool auto_free : {false, true}) {
        begin(s);
        CUdeviceptr p;
        WORKS(cuMemAllocAsync(&p, BYTES, s));
        WORKS(launch(s, "fill", N, p, 7, N));
        CUgraphExec e = instantiate(end(s), auto_free ? CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH : 0);
        WORKS(cuGraphLaunch(e, s));
        EXPECT(holds(p, 7, s));
        GIVES(auto_free ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE, cuGraphLaunch(e, s));
        WORKS(launch(s, "step", N, p, 1, N));  // it is memory as any other now
        EXPECT(holds(p, 15, s));
        WORKS(cuMemFreeAsync(p, s));
        if (soft) GIVES(CUDA_ERROR_INVALID_VALUE, cuMemFreeAsync(p, s));
        WORKS(cuGraphLaunch(e, s));
        EXPECT(holds(p, 7, s));
        WORKS(cuGraphExecDestroy(e));
        EXPECT(holds(p, 7, s));
        WORKS(cuMemFreeAsync(p, s));
    }
}

static void memory_is_fresh_in_each_replay() {
    CUstream s = stream_with();
    CUdeviceptr flags = memory(2 * sizeof(int)), out = memory();
    int values[] = {1, 0};
    begin(s);
    CUdeviceptr p;
    WORKS(cuMemAllocAsync(&p, BYTES, s));
    WORKS(launch(s, "move_if", N, flags, out, p, N));      // writes p
    WORKS(launch(s, "move_if", N, flags + 4, p, out, N));  // reads p
    WORKS(cuMemFreeAsync(p, s));
    CUgraphExec e = instantiate(end(s));
    WORKS(cuMemsetD8(out, 0, BYTES));
    WORKS(cuMemcpyHtoD(flags, values, sizeof values));
    WORKS(cuGraphLaunch(e, s));
    WORKS(cuStreamSynchronize(s));
    if (!soft) return;
    values[0] = 0, values[1] = 1;
    WORKS(cuMemcpyHtoD(flags, values, sizeof values));
    WORKS(cuGraphLaunch(e, s));
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuStreamSynchronize(s));
}

static CUdeviceptr graph_memory(CUstream s, CUgraphExec* e) {
    begin(s);
    CUdeviceptr p;
    WORKS(cuMemAllocAsync(&p, BYTES, s));
    WORKS(launch(s, "fill", N, p, 7, N));
    WORKS(cuMemFreeAsync(p, s));
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemFreeAsync(p, s));
    *e = instantiate(end(s));
    return p;
}
static void memory_is_dead_before_a_replay() {
    CUstream s = stream_with();
    CUgraphExec e;
    CUdeviceptr p = graph_memory(s, &e);
    if (!soft) return;
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemsetD8Async(p, 0, BYTES, s));
    WORKS(launch(s, "fill", N, p, 7, N));
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuStreamSynchronize(s));
}
static void memory_is_dead_after_a_replay() {
    CUstream s = stream_with();
    CUgraphExec e;
    CUdeviceptr p = graph_memory(s, &e);
    WORKS(cuGraphLaunch(e, s));
    WORKS(cuGraphLaunch(e, s));
    if (!soft) return;
    WORKS(launch(s, "fill", N, p, 7, N));
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuStreamSynchronize(s));
}
static void memory_is_dead_after_its_free_node() {
    if (!soft) return;
    CUstream s = stream_with();
    begin(s);
    CUdeviceptr p;
    WORKS(cuMemAllocAsync(&p, BYTES, s));
    WORKS(cuMemFreeAsync(p, s));
    WORKS(launch(s, "fill", N, p, 7, N));
    CUgraphExec e = instantiate(end(s));
    WORKS(cuGraphLaunch(e, s));
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuStreamSynchronize(s));
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuCtxSynchronize());  // as after any failed kernel
}

static void waits_and_host_copies_invalidate_a_capture() {
    CUstream s = stream_with();
    CUdeviceptr p = memory();
    CUevent before = event_with(), within = event_with();
    WORKS(cuEventRecord(before, s));
    std::vector<int> host(N);
    struct {
        CUresult error;
        std::function<CUresult()> call;
    } calls[] = {
        {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, [&] { return cuStreamSynchronize(s); }},
        {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, [&] { return cuStreamQuery(s); }},
        {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, [&] { return cuCtxSynchronize(); }},
        {CUDA_ERROR_CAPTURED_EVENT, [&] { return cuEventSynchronize(within); }},
        {CUDA_ERROR_CAPTURED_EVENT, [&] { return cuEventQuery(within); }},
        {CUDA_ERROR_STREAM_CAPTURE_ISOLATION, [&] { return cuStreamWaitEvent(s, before, 0); }},
        {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, [&] { return cuMemcpyDtoHAsync(host.data(), p, BYTES, s); }},
        {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, [&] { return cuMemcpyHtoDAsync(p, host.data(), BYTES, s); }},
        {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, [&] { return cuMemcpyDtoH(host.data(), p, BYTES); }},
        {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, [&] { return cuMemcpyHtoD(p, host.data(), BYTES); }},
        {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, [&] { return cuEventSynchronize(before); }},
        {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, [&] { return cuMemAlloc(&p, BYTES); }},
        {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, [&] { return cuMemFree(p); }},
        {CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, [&] { return cuModuleLoadData(&module, text.c_str()); }},
    };
    for (auto& c : calls) {
        begin(s);
        WORKS(launch(s, "fill", N, p, 7, N));
        WORKS(cuEventRecord(within, s));
        CUresult r = c.call();
        EXPECT(r == c.error);
        if (r != c.error) printf("main.cpp: call %d gave %d\n", (int)(&c - calls), r);
        is_invalidated(s, p);
    }
}

static void relaxed_captures_allow_unsafe_calls() {
    CUstream s = stream_with(), other = stream_with();
    CUevent e = event_with();
    CUdeviceptr p = memory(), q;
    for (CUstreamCaptureMode mode : {CU_STREAM_CAPTURE_MODE_RELAXED, CU_STREAM_CAPTURE_MODE_GLOBAL}) {
        // a thread can also ask for it itself
        CUstreamCaptureMode asked = CU_STREAM_CAPTURE_MODE_RELAXED;
        WORKS(cuThreadExchangeStreamCaptureMode(&asked));
        EXPECT(asked == CU_STREAM_CAPTURE_MODE_GLOBAL);
        begin(s, mode);
        WORKS(cuMemAlloc(&q, BYTES));
        WORKS(cuModuleLoadData(&module, text.c_str()));
        WORKS(launch(s, "fill", N, p, 7, N));
        // what other streams do runs meanwhile
        WORKS(launch(other, "fill", N, q, 3, N));
        WORKS(cuEventRecord(e, other));
        WORKS(cuEventSynchronize(e));
        EXPECT(holds(q, 3, other));
        WORKS(cuMemFree(q));
        CUgraph g = end(s);
        WORKS(cuGraphLaunch(instantiate(g), other));
        EXPECT(holds(p, 7, other));
        WORKS(cuThreadExchangeStreamCaptureMode(&asked));
    }
    // of other threads, only captures in global mode count
    for (CUstreamCaptureMode mode : {CU_STREAM_CAPTURE_MODE_THREAD_LOCAL, CU_STREAM_CAPTURE_MODE_GLOBAL}) {
        begin(s, mode);
        CUresult r;
        std::thread([&] { r = cuMemAlloc(&q, BYTES); }).join();
        bool global = mode == CU_STREAM_CAPTURE_MODE_GLOBAL;
        EXPECT(r == (global ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_SUCCESS));
        CUgraph g;
        GIVES(global ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED : CUDA_SUCCESS, cuStreamEndCapture(s, &g));
    }
}

static void captures_begin_and_end_in_their_stream() {
    CUstream s = stream_with(), other = stream_with(), blocking = stream_with(CU_STREAM_DEFAULT);
    CUdeviceptr p = memory(), q;
    CUgraph g;
    CUstreamCaptureStatus status;
    for (CUstream legacy : {(CUstream) nullptr, CU_STREAM_LEGACY})
        GIVES(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, cuStreamBeginCapture(legacy, CU_STREAM_CAPTURE_MODE_RELAXED));
    GIVES(CUDA_ERROR_ILLEGAL_STATE, cuStreamEndCapture(s, &g));
    begin(s);
    GIVES(CUDA_ERROR_ILLEGAL_STATE, cuStreamBeginCapture(s, CU_STREAM_CAPTURE_MODE_RELAXED));
    WORKS(cuStreamIsCapturing(s, &status));
    EXPECT(status == CU_STREAM_CAPTURE_STATUS_ACTIVE);
    WORKS(cuStreamIsCapturing(other, &status));
    EXPECT(status == CU_STREAM_CAPTURE_STATUS_NONE);
    CUresult r;
    std::thread([&] { r = cuStreamEndCapture(s, &g); }).join();
    EXPECT(r == CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    cuStreamEndCapture(s, &g);

    // memory from outside can't be freed by a graph
    WORKS(cuMemAllocAsync(&q, BYTES, s));
    begin(s);
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemFreeAsync(q, s));
    cuStreamEndCapture(s, &g);
    WORKS(cuMemFreeAsync(q, s));

    // the legacy stream waits for blocking streams
    begin(blocking);
    GIVES(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, cuStreamIsCapturing(nullptr, &status));
    GIVES(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, launch(nullptr, "fill", N, p, 7, N));
    is_invalidated(blocking, p);
    begin(s);
    WORKS(launch(nullptr, "fill", N, p, 7, N));
    end(s);

    // a thread has its own default stream
    begin(CU_STREAM_PER_THREAD);
    WORKS(launch(CU_STREAM_PER_THREAD, "step", N, p, 1, N));
    std::thread([&] {
        CUcontext context;
        cuDevicePrimaryCtxRetain(&context, 0);
        cuCtxSetCurrent(context);
        r = launch(CU_STREAM_PER_THREAD, "step", N, p, 2, N);
        WORKS(cuStreamSynchronize(CU_STREAM_PER_THREAD));
    }).join();
    EXPECT(r == CUDA_SUCCESS);
    g = end(CU_STREAM_PER_THREAD);
    EXPECT(holds(p, 16, CU_STREAM_PER_THREAD));
    WORKS(cuGraphLaunch(instantiate(g), CU_STREAM_PER_THREAD));
    EXPECT(holds(p, 33, CU_STREAM_PER_THREAD));
}

static void streams_fork_and_join_in_a_capture() {
    CUstream s = stream_with(), side = stream_with(), third = stream_with();
    CUevent forked = event_with(CU_EVENT_DISABLE_TIMING), joined = event_with(CU_EVENT_DISABLE_TIMING);
    CUdeviceptr p = memory(), q = memory();
    CUgraph g;
    begin(s);
    WORKS(launch(s, "fill", N, p, 7, N));
    WORKS(cuEventRecord(forked, s));
    WORKS(cuStreamWaitEvent(side, forked, 0));
    WORKS(cuMemcpyDtoDAsync(q, p, BYTES, side));
    WORKS(launch(side, "step", N, q, 1, N));
    WORKS(cuEventRecord(joined, side));
    WORKS(launch(s, "step", N, p, 2, N));
    WORKS(cuStreamWaitEvent(s, joined, 0));
    WORKS(launch(s, "step", N, q, 0, N));
    g = end(s);
    CUgraphExec e = instantiate(g);
    for (int i = 0; i < 2; ++i) {
        WORKS(cuGraphLaunch(e, s));
        EXPECT(holds(p, 16, s));
        EXPECT(holds(q, 30, s));
    }
    WORKS(cuMemsetD8Async(p, 0, BYTES, side));  // which no longer captures
    EXPECT(holds(p, 0, side));

    begin(s);
    WORKS(cuEventRecord(forked, s));
    WORKS(cuStreamWaitEvent(side, forked, 0));
    WORKS(launch(side, "fill", N, p, 7, N));
    GIVES(CUDA_ERROR_STREAM_CAPTURE_UNJOINED, cuStreamEndCapture(s, &g));

    begin(s);
    begin(third, CU_STREAM_CAPTURE_MODE_RELAXED);
    WORKS(cuEventRecord(forked, s));
    GIVES(CUDA_ERROR_STREAM_CAPTURE_MERGE, cuStreamWaitEvent(third, forked, 0));
    is_invalidated(s, p);
    is_invalidated(third, p);

    begin(s);
    WORKS(cuEventRecord(forked, s));
    WORKS(cuStreamWaitEvent(side, forked, 0));
    GIVES(CUDA_ERROR_STREAM_CAPTURE_UNMATCHED, cuStreamEndCapture(side, &g));
    cuStreamEndCapture(s, &g);
}

// ---- streams
static CUdeviceptr zeros(size_t bytes = BYTES) {
    CUdeviceptr p = memory(bytes);
    WORKS(cuMemsetD8(p, 0, bytes));
    WORKS(cuCtxSynchronize());
    return p;
}
// Of launches of `append` which may all run at once, of as many blocks each.
struct Log {
    static const int BLOCKS = 20;
    CUdeviceptr numbers = zeros(3 * BLOCKS * sizeof(int)), length = zeros(sizeof(int));
    CUresult append(CUstream s, int number) { return launch(s, "append", 64 * BLOCKS, numbers, length, number); }
    // Read when all has been waited for: how often the number changes from one to the next.
    int changes() {
        int v[3 * BLOCKS], n = 0, changes = 0;
        WORKS(cuMemcpyDtoH(&n, length, sizeof n));
        WORKS(cuMemcpyDtoH(v, numbers, n * sizeof(int)));
        for (int i = 1; i < n; ++i) changes += v[i] != v[i - 1];
        return changes;
    }
    // Two launches ran at once: in turns, where the order isn't random.
    void overlapped() {
        if (!soft) return;
        const char* order = getenv("SOFTGPU_SCHED");
        int n = changes();
        EXPECT(order && atoi(order) > 1 ? n > 5 : n == 2 * BLOCKS - 1);
    }
};

static void streams_overlap() {
    CUstream s = stream_with(), other = stream_with();
    Log log;
    WORKS(log.append(s, 0));
    WORKS(log.append(other, 1));
    WORKS(cuStreamSynchronize(s));
    WORKS(cuStreamSynchronize(other));
    log.overlapped();
}

static void threads_overlap_on_their_own_streams() {
    Log log;
    std::atomic<int> given(0);
    auto run = [&](int number) {
        CUcontext context;
        cuDevicePrimaryCtxRetain(&context, 0);
        cuCtxSetCurrent(context);
        WORKS(log.append(CU_STREAM_PER_THREAD, number));
        for (++given; given < 2;) std::this_thread::yield();
        WORKS(cuStreamSynchronize(CU_STREAM_PER_THREAD));
    };
    std::thread a(run, 0), b(run, 1);
    a.join();
    b.join();
    log.overlapped();
}

static void replays_overlap_with_other_streams() {
    CUstream s = stream_with(), other = stream_with();
    Log log;
    begin(s);
    WORKS(log.append(s, 0));
    CUgraphExec e = instantiate(end(s));
    WORKS(cuGraphLaunch(e, s));
    WORKS(log.append(other, 1));
    WORKS(cuCtxSynchronize());
    log.overlapped();
}

static void work_runs_in_order_in_a_stream() {
    CUstream s = stream_with();
    Log log;
    WORKS(log.append(s, 0));
    WORKS(log.append(s, 1));
    WORKS(log.append(s, 2));
    CUdeviceptr p = zeros();
    int want = 0;
    for (int i = 0; i < 40; ++i) {
        WORKS(launch(s, "step", N, p, i, N));
        want = (int)(2u * want + i);
    }
    EXPECT(holds(p, want, s));
    EXPECT(log.changes() == 2);
    // a stream's work runs without its handle, and that of a thread without the thread
    WORKS(launch(s, "fill", N, p, 1, N));
    WORKS(cuStreamDestroy(s));
    std::thread([&] {
        CUcontext context;
        cuDevicePrimaryCtxRetain(&context, 0);
        cuCtxSetCurrent(context);
        WORKS(cuCtxSynchronize());
        WORKS(launch(CU_STREAM_PER_THREAD, "step", N, p, 1, N));
    }).join();
    WORKS(cuCtxSynchronize());
    EXPECT(holds(p, 3, stream_with()));
}

static void streams_are_ordered_by_events_and_waits() {
    CUstream s = stream_with(), other = stream_with(), blocking = stream_with(CU_STREAM_DEFAULT);
    CUevent e = event_with();
    CUdeviceptr p = zeros();
    for (int i = 0; i < 5; ++i) {
        WORKS(launch(s, "fill", N, p, 7, N));
        WORKS(cuEventRecord(e, s));
        WORKS(cuStreamWaitEvent(other, e, 0));
        WORKS(launch(other, "step", N, p, 1, N));
        EXPECT(holds(p, 15, other));  // which waits
        WORKS(launch(s, "step", N, p, 1, N));
        WORKS(cuEventRecord(e, s));
        WORKS(cuEventSynchronize(e));
        WORKS(cuMemcpyDtoD(p, p, BYTES));
        WORKS(launch(nullptr, "step", N, p, 2, N));
        WORKS(launch(blocking, "step", N, p, 3, N));  // the legacy stream and blocking streams wait for each other
        WORKS(launch(nullptr, "step", N, p, 4, N));
        WORKS(launch(CU_STREAM_PER_THREAD, "step", N, p, 5, N));
        WORKS(cuMemsetD8(p + 4, 1, 4));
        int v[2];
        WORKS(cuMemcpyDtoH(v, p, sizeof v));
        EXPECT(v[0] == 2 * (2 * (2 * (2 * 31 + 2) + 3) + 4) + 5 && v[1] == 0x01010101);
        WORKS(launch(blocking, "step", N, p, 6, N));
        WORKS(cuCtxSynchronize());
    }
    CUdeviceptr q;
    WORKS(cuMemAllocAsync(&q, BYTES, s));
    WORKS(launch(s, "fill", N, q, 7, N));
    WORKS(cuEventRecord(e, s));
    WORKS(cuStreamWaitEvent(other, e, 0));
    WORKS(launch(other, "step", N, q, 1, N));
    WORKS(cuMemFreeAsync(q, other));
    WORKS(cuCtxSynchronize());
}

static void atomics_of_two_streams_are_no_race() {
    CUstream s = stream_with(), other = stream_with();
    CUdeviceptr sum = zeros(sizeof(int));
    WORKS(launch(s, "add_to_total", 200, sum, 200));
    WORKS(launch(other, "add_to_total", 200, sum, 200));
    WORKS(cuCtxSynchronize());
    int n;
    WORKS(cuMemcpyDtoH(&n, sum, sizeof n));
    EXPECT(n == 400);
    // nor are reads
    CUdeviceptr p = zeros(), q = zeros(), r = zeros();
    WORKS(cuMemcpyDtoDAsync(q, p, BYTES, s));
    WORKS(launch(other, "move_if", N, q, p, r, 0));
    WORKS(cuMemcpyDtoDAsync(r, p, BYTES, other));
    WORKS(cuCtxSynchronize());
}

// Works of two streams that may not overlap.
static void race(std::function<void(CUstream, CUstream, CUdeviceptr)> put) {
    if (!soft) return;
    CUstream s = stream_with(), other = stream_with();
    put(s, other, zeros());
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuCtxSynchronize());
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuStreamSynchronize(s));
}
static void kernels_race() {
    race([](CUstream s, CUstream other, CUdeviceptr p) {
        WORKS(launch(s, "fill", N, p, 7, N));
        WORKS(launch(other, "step", N, p, 7, N));
    });
}
static void a_read_races_with_a_later_write() {
    race([](CUstream s, CUstream other, CUdeviceptr p) {
        WORKS(launch(s, "move_if", N, p, p, zeros(), N));
        WORKS(launch(other, "fill", N, p, 7, N));
    });
}
static void memsets_race() {
    race([](CUstream s, CUstream other, CUdeviceptr p) {
        WORKS(cuMemsetD8Async(p, 0, BYTES, s));
        WORKS(launch(other, "step", N, p, 7, N));
    });
}
static void copies_race() {
    race([](CUstream s, CUstream other, CUdeviceptr p) {
        WORKS(launch(s, "fill", N, p, 7, N));
        WORKS(cuMemcpyDtoDAsync(zeros(), p, BYTES, other));  // which waits first, for all
        WORKS(launch(s, "fill", N, p, 7, N));
        std::vector<char> host(BYTES);
        WORKS(cuMemcpyHtoDAsync(p, host.data(), BYTES, other));
    });
}
static void replays_race() {
    race([](CUstream s, CUstream other, CUdeviceptr p) {
        begin(s);
        WORKS(launch(s, "fill", N, p, 7, N));
        WORKS(cuGraphLaunch(instantiate(end(s)), s));
        WORKS(cuMemsetD8Async(p, 0, BYTES, other));
    });
}
static void waiting_for_an_earlier_event_is_not_enough() {
    race([](CUstream s, CUstream other, CUdeviceptr p) {
        CUevent e = event_with();
        WORKS(cuEventRecord(e, s));
        WORKS(launch(s, "fill", N, p, 7, N));
        WORKS(cuStreamWaitEvent(other, e, 0));
        WORKS(launch(other, "step", N, p, 7, N));
    });
}
static void a_free_races_with_use() {
    race([](CUstream s, CUstream other, CUdeviceptr p) {
        WORKS(cuMemAllocAsync(&p, BYTES, s));
        WORKS(launch(s, "fill", N, p, 7, N));
        WORKS(cuMemFreeAsync(p, other));
    });
}
static void use_races_with_a_free() {
    race([](CUstream s, CUstream other, CUdeviceptr p) {
        CUevent e = event_with();
        WORKS(cuMemAllocAsync(&p, BYTES, s));
        WORKS(cuEventRecord(e, s));
        WORKS(cuStreamWaitEvent(other, e, 0));
        WORKS(cuMemFreeAsync(p, s));
        WORKS(launch(other, "fill", N, p, 7, N));
    });
}
static void use_races_with_an_allocation() {
    race([](CUstream s, CUstream other, CUdeviceptr p) {
        WORKS(cuMemAllocAsync(&p, BYTES, s));
        WORKS(launch(other, "fill", N, p, 7, N));
    });
}

static void errors_come_with_a_wait() {
    if (!soft) return;
    CUstream s = stream_with();
    CUdeviceptr p = memory();
    CUevent before = event_with(), e = event_with();
    float ms;
    WORKS(cuEventRecord(before, s));
    WORKS(launch(s, "fill", N + 1, p, 7, N + 1));
    WORKS(launch(s, "fill", N, p, 7, N));
    WORKS(cuEventRecord(e, s));
    GIVES(CUDA_ERROR_NOT_READY, cuEventElapsedTime(&ms, before, e));
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuEventSynchronize(e));
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, launch(s, "fill", N, p, 7, N));
    WORKS(cuMemFree(p));
}

static void prefetches_have_addresses() {
    if (!soft) return;
    CUstream s = stream_with();
    CUdeviceptr p = memory();
    WORKS(launch(s, "fetch", 1, p, N - 1));
    WORKS(cuStreamSynchronize(s));
    WORKS(launch(s, "fetch", 1, p, N));
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuStreamSynchronize(s));
}

static void work_that_is_left_runs_at_the_end() {
    if (!soft) return;
    CUstream s = stream_with();
    CUdeviceptr p = memory();
    int said[2];
    EXPECT(pipe(said) == 0);
    for (bool fails : {false, true}) {
        if (!fork()) {
            auto say = [](void* to) { EXPECT(write(*(int*)to, "x", 1) == 1); };
            WORKS(launch(s, "fill", N + fails, p, 7, N + fails));
            WORKS(cuLaunchHostFunc(s, say, &said[1]));
            exit(failures);
        }
        int status;
        wait(&status);
        EXPECT(WIFEXITED(status) && WEXITSTATUS(status) == fails);
    }
    close(said[1]);
    char x[3];
    EXPECT(read(said[0], x, sizeof x) == 1);
}

static void streams_have_numbers() {
    std::set<unsigned long long> numbers;
    auto number = [](CUstream s) {
        unsigned long long n = 0;
        WORKS(cuStreamGetId(s, &n));
        return n;
    };
    CUstream kept = stream_with();
    for (CUstream s : {(CUstream) nullptr, CU_STREAM_PER_THREAD, kept}) EXPECT(numbers.insert(number(s)).second);
    for (int i = 0; i < 9; ++i) {  // handles may come again
        CUstream s = stream_with();
        EXPECT(numbers.insert(number(s)).second);
        WORKS(cuStreamDestroy(s));
        std::thread([&] {
            CUcontext context;
            cuDevicePrimaryCtxRetain(&context, 0);
            cuCtxSetCurrent(context);
            EXPECT(numbers.insert(number(CU_STREAM_PER_THREAD)).second);
        }).join();
    }
    EXPECT(numbers.count(number(kept)) && number(nullptr) == number(CU_STREAM_LEGACY));
}

// ---- memory, events, launches
static cuuint64_t pool_bytes(CUmemoryPool pool, CUmemPool_attribute a) {
    cuuint64_t v = 0;
    WORKS(cuMemPoolGetAttribute(pool, a, &v));
    return v;
}
static void the_pool_has_attributes() {
    CUmemoryPool pool, current;
    WORKS(cuDeviceGetDefaultMemPool(&pool, 0));
    WORKS(cuDeviceGetMemPool(&current, 0));
    EXPECT(pool == current);
    CUstream s = stream_with();
    auto used = [&] { return pool_bytes(pool, CU_MEMPOOL_ATTR_USED_MEM_CURRENT); };
    auto reserved = [&] { return pool_bytes(pool, CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT); };
    EXPECT(pool_bytes(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD) == 0);
    size_t free_before, free_within, total;
    WORKS(cuMemGetInfo(&free_before, &total));
    const size_t MB = 1 << 20;
    CUdeviceptr p;
    cuuint64_t start = used(), all = ~0ull, zero = 0;
    for (bool keep : {false, true}) {
        cuuint64_t threshold = keep ? all : 0;
        WORKS(cuMemPoolSetAttribute(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, &threshold));
        EXPECT(pool_bytes(pool, CU_MEMPOOL_ATTR_RELEASE_THRESHOLD) == threshold);
        WORKS(cuMemAllocAsync(&p, 40 * MB, s));
        EXPECT(used() == start + 40 * MB && reserved() >= used());
        WORKS(cuMemGetInfo(&free_within, &total));
        EXPECT(free_within + 40 * MB <= free_before);
        WORKS(cuMemFreeAsync(p, s));
        WORKS(cuStreamSynchronize(s));
        EXPECT(used() == start && (reserved() >= 40 * MB) == keep);
    }
    EXPECT(pool_bytes(pool, CU_MEMPOOL_ATTR_USED_MEM_HIGH) >= start + 40 * MB);
    EXPECT(pool_bytes(pool, CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH) >= 40 * MB);
    WORKS(cuMemPoolTrimTo(pool, 0));
    EXPECT(reserved() < 40 * MB);
    WORKS(cuMemPoolSetAttribute(pool, CU_MEMPOOL_ATTR_USED_MEM_HIGH, &zero));
    EXPECT(pool_bytes(pool, CU_MEMPOOL_ATTR_USED_MEM_HIGH) == start);
    GIVES(CUDA_ERROR_INVALID_VALUE, cuMemPoolSetAttribute(pool, CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH, &all));
    int reuse = 0, got = 1;
    WORKS(cuMemPoolSetAttribute(pool, CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC, &reuse));
    WORKS(cuMemPoolGetAttribute(pool, CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC, &got));
    EXPECT(got == 0);
    CUdeviceptr huge;
    GIVES(CUDA_ERROR_OUT_OF_MEMORY, cuMemAllocAsync(&huge, 2 * total, s));
}

static void events_measure_time() {
    CUstream s = stream_with();
    CUevent a = event_with(), b = event_with(), c = event_with(), untimed = event_with(CU_EVENT_DISABLE_TIMING);
    CUdeviceptr out = memory();
    float ab = -1, bc = -1, ac = -1;
    GIVES(CUDA_ERROR_INVALID_HANDLE, cuEventElapsedTime(&ab, a, b));
    WORKS(cuEventQuery(a));
    WORKS(cuEventRecord(a, s));
    WORKS(launch(s, "spin", 1, out, 10000));
    WORKS(cuEventRecord(b, s));
    WORKS(cuStreamSynchronize(s));
    usleep(20000);
    WORKS(cuEventRecord(c, s));
    WORKS(cuEventRecord(untimed, s));
    WORKS(cuEventSynchronize(c));
    WORKS(cuEventElapsedTime(&ab, a, b));
    WORKS(cuEventElapsedTime(&bc, b, c));
    WORKS(cuEventElapsedTime(&ac, a, c));
    EXPECT(ab > 0 && ab < 5000 && bc >= 19 && bc < 5000);
    EXPECT(std::fabs(ac - ab - bc) < 0.1);
    GIVES(CUDA_ERROR_INVALID_HANDLE, cuEventElapsedTime(&ab, a, untimed));
}

static void refused_launches_leave_the_context_usable() {
    CUstream s = stream_with();
    CUdeviceptr p = memory();
    int one = 1;
    CUfunction f;
    WORKS(cuModuleGetFunction(&f, module, "spin"));
    void* params[] = {&p, &one};
    auto with = [&](unsigned blocks, unsigned threads, unsigned shared) {
        return cuLaunchKernel(f, blocks, 1, 1, threads, 1, 1, shared, s, params, nullptr);
    };
    EXPECT(with(1, 257, 0) != CUDA_SUCCESS);
    EXPECT(with(0, 1, 0) != CUDA_SUCCESS);
    EXPECT(with(1, 1, 49 << 10) != CUDA_SUCCESS);
    WORKS(with(1, 1, 0));
    WORKS(cuStreamSynchronize(s));
}

static void clusters_find_room() {
    if (!soft) return;  // of what an H100 is taken to be
    CUfunction f, own;
    WORKS(cuModuleGetFunction(&f, module, "places"));
    WORKS(cuModuleGetFunction(&own, module, "ranks"));
    CUlaunchAttribute a[2] = {};
    a[0].id = CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
    a[1].id = CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
    a[1].value.programmaticStreamSerializationAllowed = 1;
    CUlaunchConfig c = {};
    c.gridDimX = 16, c.gridDimY = c.gridDimZ = c.blockDimY = c.blockDimZ = 1;
    c.attrs = a, c.numAttrs = 2, c.hStream = stream_with();
    CUdeviceptr out = memory(2 * 16 * sizeof(int));
    void* params[] = {&out};
    auto holds = [&](CUfunction f, unsigned size, unsigned threads, unsigned shared) {
        a[0].value.clusterDim.x = size, a[0].value.clusterDim.y = a[0].value.clusterDim.z = 1;
        c.blockDimX = threads, c.sharedMemBytes = shared;
        int n = -1;
        CUresult r = cuOccupancyMaxActiveClusters(&n, f, &c);
        return r ? -(int)r : n;
    };
    auto start = [&](CUfunction f, unsigned size) {
        holds(f, size, 64, 0);
        return cuLaunchKernelEx(&c, f, params, nullptr);
    };
    EXPECT(holds(f, 1, 1024, 0) == 264 && holds(f, 8, 1024, 0) == 32 && holds(own, 2, 1024, 0) == 132);
    GIVES(CUDA_ERROR_INVALID_CLUSTER_SIZE, start(f, 16));
    EXPECT(holds(f, 16, 64, 0) == -CUDA_ERROR_INVALID_CLUSTER_SIZE);
    WORKS(cuFuncSetAttribute(f, CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1));
    WORKS(cuFuncSetAttribute(f, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, 200 << 10));
    EXPECT(holds(f, 16, 64, 200 << 10) == 8 && holds(f, 4, 64, 200 << 10) == 32);
    EXPECT(holds(f, 32, 64, 0) == -CUDA_ERROR_INVALID_CLUSTER_SIZE);
    EXPECT(holds(own, 4, 64, 0) == -CUDA_ERROR_INVALID_CLUSTER_SIZE);
    GIVES(CUDA_ERROR_INVALID_CLUSTER_SIZE, start(own, 4));
    int size;
    WORKS(cuOccupancyMaxPotentialClusterSize(&size, f, &c));
    EXPECT(size == 16);
    for (unsigned size : {4, 16}) {
        WORKS(start(f, size));
        unsigned v[32];
        WORKS(cuMemcpyDtoHAsync(v, out, sizeof v, c.hStream));
        for (unsigned i = 0; i < 16; ++i) EXPECT(v[2 * i] == i % size && v[2 * i + 1] == size);
    }
    setenv("SOFTGPU_CLUSTER", "4", 1);
    EXPECT(holds(f, 4, 1024, 0) == 66 && holds(f, 8, 1024, 0) == 0);
    WORKS(start(f, 4));
    GIVES(CUDA_ERROR_INVALID_CLUSTER_SIZE, start(f, 8));
    WORKS(cuOccupancyMaxPotentialClusterSize(&size, f, &c));
    EXPECT(size == 4);
    a[1].id = CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
    GIVES(CUDA_ERROR_NOT_SUPPORTED, start(f, 4));
    WORKS(cuStreamSynchronize(c.hStream));
}

static void machine_code_is_refused() {
    if (!soft) return;
    CUmodule m;
    const char* name;
    char cubin[64] = "\177ELF\2\1\1";
    GIVES(CUDA_ERROR_NO_BINARY_FOR_GPU, cuModuleLoadData(&m, cubin));
    WORKS(cuGetErrorName(CUDA_ERROR_NO_BINARY_FOR_GPU, &name));
    EXPECT(!strcmp(name, "CUDA_ERROR_NO_BINARY_FOR_GPU"));
    WORKS(cuModuleLoadData(&m, text.c_str()));
}

// ---- cuBLAS
static void products_are_recorded_and_checked() {
    if (!soft) return;
    void *lib = dlopen("libcublas.so.13", RTLD_NOW), *h;
    EXPECT(lib);
    // of cublas_v2.h, which the CUDA compiler comes without
    typedef int Gemm(void*, int, int, int, int, int, const void*, const void*, int, int, const void*, int, int,
                     const void*, void*, int, int, int, int);
    auto gemm = (Gemm*)dlsym(lib, "cublasGemmEx");
    EXPECT(((int (*)(void**))dlsym(lib, "cublasCreate_v2"))(&h) == 0);
    CUstream s = stream_with();
    EXPECT(((int (*)(void*, void*))dlsym(lib, "cublasSetStream_v2"))(h, s) == 0);
    std::vector<float> a(6), b(6), c(4);
    for (int i = 0; i < 6; ++i) a[i] = i + 1, b[i] = i - 2;
    CUdeviceptr pa = memory(24), pb = memory(24), pc = memory(16);
    WORKS(cuMemcpyHtoD(pa, a.data(), 24));
    WORKS(cuMemcpyHtoD(pb, b.data(), 24));
    float one = 1, zero = 0;
    auto product = [&](int rows, int lda, const float& kept) {  // C = A B of (2, 3) and (3, 2), column by column
        const int F32 = 0, COMPUTE_F32 = 68;
        return gemm(h, 0, 0, rows, 2, 3, &one, (void*)pa, F32, lda, (void*)pb, F32, 3, &kept, (void*)pc, F32, rows,
                    COMPUTE_F32, -1);
    };
    begin(s);
    EXPECT(product(2, 2, zero) == 0);
    EXPECT(product(2, 2, one) == 0);
    CUgraphExec e = instantiate(end(s));
    one = 100;  // scalars are copied
    for (int i = 0; i < 2; ++i) {
        WORKS(cuMemsetD8Async(pc, 0, 16, s));
        WORKS(cuGraphLaunch(e, s));
        WORKS(cuMemcpyDtoHAsync(c.data(), pc, 16, s));
        for (int j = 0; j < 4; ++j) {
            float want = 0;
            for (int l = 0; l < 3; ++l) want += 2 * a[j % 2 + 2 * l] * b[l + 3 * (j / 2)];
            EXPECT(c[j] == want);
        }
    }
    EXPECT(product(2, 1, zero) == 7 /* INVALID_VALUE */);
    EXPECT(product(2, 3, zero) == 0);  // A would have 8 elements
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuStreamSynchronize(s));
}

// In that mode a stream reads a product's scalars when it gets there, also in each replay of a graph.
static void products_read_scalars_from_the_device() {
    if (!soft) return;
    void *lib = dlopen("libcublas.so.13", RTLD_NOW), *h;
    EXPECT(lib);
    typedef int Gemm(void*, int, int, int, int, int, const double*, const double*, int, long long, const double*, int,
                     long long, const double*, double*, int, long long, int);
    auto gemm = (Gemm*)dlsym(lib, "cublasDgemmStridedBatched");
    auto set_mode = (int (*)(void*, int))dlsym(lib, "cublasSetPointerMode_v2");
    auto get_mode = (int (*)(void*, int*))dlsym(lib, "cublasGetPointerMode_v2");
    EXPECT(((int (*)(void**))dlsym(lib, "cublasCreate_v2"))(&h) == 0);
    CUstream s = stream_with();
    EXPECT(((int (*)(void*, void*))dlsym(lib, "cublasSetStream_v2"))(h, s) == 0);
    int mode = -1;
    EXPECT(get_mode(h, &mode) == 0 && mode == 0 /* HOST */);
    EXPECT(set_mode(h, 2) == 7 /* INVALID_VALUE */);
    EXPECT(set_mode(h, 1 /* DEVICE */) == 0);
    EXPECT(get_mode(h, &mode) == 0 && mode == 1);
    // C of one element, which nobody has written where beta is 0: 2 factors and 2 numbers
    CUdeviceptr scalars = memory(16), a = memory(8), b = memory(8), c = memory(8);
    double numbers[] = {3, 0}, x = 5, y = 7, got;
    WORKS(cuMemcpyHtoD(a, &x, 8));
    WORKS(cuMemcpyHtoD(b, &y, 8));
    auto product = [&] {
        return gemm(h, 0, 0, 1, 1, 1, (const double*)scalars, (const double*)a, 1, 0, (const double*)b, 1, 0,
                    (const double*)(scalars + 8), (double*)c, 1, 0, 1);
    };
    begin(s);
    EXPECT(product() == 0);
    CUgraphExec e = instantiate(end(s));
    for (double factor : {3.0, -2.0}) {
        numbers[0] = factor;
        WORKS(cuMemcpyHtoD(scalars, numbers, 16));
        WORKS(cuGraphLaunch(e, s));
        WORKS(cuMemcpyDtoHAsync(&got, c, 8, s));
        EXPECT(got == factor * 35);
    }
    numbers[1] = 10;  // beta
    WORKS(cuMemcpyHtoD(scalars, numbers, 16));
    EXPECT(product() == 0);
    WORKS(cuMemcpyDtoHAsync(&got, c, 8, s));
    EXPECT(got == -2 * 35 - 70 * 10);
    scalars = memory(16);
    EXPECT(product() == 0);  // by a factor that nobody has written
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuStreamSynchronize(s));
}

// ---- instructions
template <class T>
static std::vector<T> computed(const char* kernel, const std::vector<T>& x, const std::vector<T>& y, int each) {
    std::vector<T> z(x.size() * each);
    int n = (int)x.size();
    CUdeviceptr px = memory(n * sizeof(T)), py = memory(n * sizeof(T)), pz = memory(z.size() * sizeof(T));
    WORKS(cuMemcpyHtoD(px, x.data(), n * sizeof(T)));
    WORKS(cuMemcpyHtoD(py, y.data(), n * sizeof(T)));
    WORKS(launch(nullptr, kernel, n, px, py, pz, n));
    WORKS(cuMemcpyDtoH(z.data(), pz, z.size() * sizeof(T)));
    return z;
}
static std::mt19937_64 rng(1);
static double uniform(double from, double to) { return std::uniform_real_distribution<double>(from, to)(rng); }

// What is queued has the numbers of its call, whatever seed comes later, and when the generator is gone.
static void numbers_outlive_their_generator() {
    if (!soft) return;
    void *lib = dlopen("libcurand.so.10", RTLD_NOW), *g;
    EXPECT(lib);
    auto seed = (int (*)(void*, unsigned long long))dlsym(lib, "curandSetPseudoRandomGeneratorSeed");
    auto numbers = [&](unsigned long long later, bool wait) {
        CUstream s = stream_with();
        CUdeviceptr p = memory(64);
        EXPECT(((int (*)(void**, int))dlsym(lib, "curandCreateGenerator"))(&g, 100) == 0);
        EXPECT(((int (*)(void*, void*))dlsym(lib, "curandSetStream"))(g, s) == 0);
        EXPECT(seed(g, 1) == 0);
        EXPECT(((int (*)(void*, float*, size_t))dlsym(lib, "curandGenerateUniform"))(g, (float*)p, 16) == 0);
        if (wait) WORKS(cuStreamSynchronize(s));
        EXPECT(seed(g, later) == 0);
        EXPECT(((int (*)(void*))dlsym(lib, "curandDestroyGenerator"))(g) == 0);
        WORKS(cuStreamSynchronize(s));
        std::vector<float> out(16);
        WORKS(cuMemcpyDtoH(out.data(), p, 64));
        return out;
    };
    EXPECT(numbers(2, false) == numbers(2, true));
}

static void pow_is_right() {
    std::vector<double> x, y;
    const double special[] = {0.0, -0.0, 1, -1, INFINITY, -INFINITY, NAN, 2, 0.5, 3, 1e308, 5e-324, 0.3};
    for (double a : special)
        for (double b : special) x.push_back(a), y.push_back(b);
    for (int i = 0; i < 5000; ++i) {
        x.push_back((i % 3 ? 1 : -1) * std::exp(i % 2 ? uniform(-5, 5) : uniform(-300, 300)));
        y.push_back(i % 3 ? uniform(-9, 9) : std::floor(uniform(-9, 9)));
    }
    std::vector<double> z = computed("powers", x, y, 1);
    for (size_t i = 0; i < x.size(); ++i) {
        double want = std::pow(x[i], y[i]);
        bool same = want != want                    ? z[i] != z[i]
                    : want == 0 || std::isinf(want) ? z[i] == want && std::signbit(z[i]) == std::signbit(want)
                                                    : std::fabs(z[i] - want) <= 1e-15 * std::fabs(want) + 1e-315;
        if (!same) printf("main.cpp: pow(%.17g, %.17g) = %.17g\n", x[i], y[i], z[i]);
        EXPECT(same);
    }
}

static float half_rounded(float f) {  // in the current rounding mode; in the range of normal and subnormal numbers
    int exponent;
    std::frexp(f, &exponent);
    volatile float unit = std::ldexp(1.0f, std::max(exponent - 11, -24));
    volatile float scaled = f / unit;
    return std::nearbyint(scaled) * unit;
}
static void rounding_modes_are_right() {
    std::vector<double> x, y;
    for (int i = 0; i < 1000; ++i) x.push_back(std::exp(uniform(-9, 9))), y.push_back(uniform(-9, 9));
    std::vector<double> z = computed("directed", x, y, 32);
    const int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_UPWARD, FE_DOWNWARD};
    for (size_t i = 0; i < x.size(); ++i)
        for (int mode = 0; mode < 4; ++mode) {
            volatile float f = (float)x[i], g = (float)y[i];  // volatile: computed in the mode
            volatile double a = x[i], b = y[i];
            volatile long long whole = (long long)(a * 1e15);
            fesetround(modes[mode]);
            volatile double want[8] = {std::sqrt(a), 1 / a,        a / b, std::fma(a, b, b),
                                       (float)a,     (float)whole, f * g, half_rounded(f)};
            fesetround(FE_TONEAREST);
            for (int k = 0; k < 8; ++k) {
                double got = z[32 * i + 8 * mode + k];
                if (got != want[k])
                    printf("main.cpp: %d in mode %d of %.17g, %.17g: %.17g\n", k, mode, x[i], y[i], got);
                EXPECT(got == want[k]);
            }
        }
}

static void integers_are_right() {
    std::vector<long long> x = {0, -1, 1, INT32_MAX, INT32_MIN}, y = {5, INT32_MAX, INT64_MIN, 1, -1};
    for (int i = 0; i < 1000; ++i) x.push_back(rng() >> rng() % 64), y.push_back(rng() >> rng() % 64);
    std::vector<long long> z = computed("integers", x, y, 8);
    for (size_t i = 0; i < x.size(); ++i) {
        unsigned __int128 product = (unsigned __int128)(unsigned long long)x[i] * (unsigned long long)y[i];
        unsigned __int128 sum = product + (unsigned long long)y[i];
        int a = (int)x[i], b = (int)y[i];
        unsigned magnitude = a < 0 ? ~a : a;
        long long wide = (long long)a + b;
        double d = x[i] ? (double)y[i] * 1e3 : NAN;
        auto clamp = [&](double low, double high, long long lowest, long long highest) {
            return d != d || d <= low ? lowest : d >= high ? highest : (long long)d;
        };
        long long want[8] = {(long long)sum,
                             (long long)(sum >> 64),
                             __builtin_ffs(a),
                             __builtin_ffsll(x[i]),
                             magnitude ? 31 - __builtin_clz(magnitude) : -1,
                             std::min<long long>(std::max<long long>(wide, INT32_MIN), INT32_MAX),
                             clamp(-0x1p31, 0x1p31, INT32_MIN, INT32_MAX),
                             clamp(-0x1p63, 0x1p63, INT64_MIN, INT64_MAX)};
        for (int k = 0; k < 8; ++k) {
            if (z[8 * i + k] != want[k]) printf("main.cpp: %d of %lld, %lld: %lld\n", k, x[i], y[i], z[8 * i + k]);
            EXPECT(z[8 * i + k] == want[k]);
        }
    }
}

static void approximations_err_by_as_much_as_is_asked() {
    if (!soft) return;
    const int most = getenv("SOFTGPU_ULP") ? atoi(getenv("SOFTGPU_ULP")) : 0;
    std::vector<float> x = {1, 2, 4, 0.25f, 9, 3, 0, 100, INFINITY, -3, 1e-38f, 0.0625f, 7, 0x1p-126f, 90, 0};
    std::vector<float> y = {3, 4, -8, 0.5f, 7, INFINITY, 3, 16, 2, 4, 1e30f, -1, NAN, 1, 0.25f, 0};
    for (int i = 0; i < 500; ++i) x.push_back((float)std::exp(uniform(-9, 3))), y.push_back((float)uniform(-9, 9));
    std::vector<float> z = computed("approximate", x, y, 16);
    bool up[11] = {}, down[11] = {}, exact[11] = {};
    auto step = [](float value, float from) {  // how many units in the last place, of numbers of one sign
        int a, b;
        memcpy(&a, &value, 4), memcpy(&b, &from, 4);
        return a - b;
    };
    auto power_of_2 = [](float v) {
        int e;
        return std::fabs(std::frexp(v, &e)) == 0.5f;
    };
    for (size_t i = 0; i < x.size(); ++i) {
        float a = x[i], b = y[i], s = std::sqrt(a), *got = &z[16 * i];
        float want[11] = {exp2f(a), log2f(a), 1 / a, (float)(1 / std::sqrt((double)a)), s, tanhf(a), a / b, a / b,
                          1 / a,    s,        a / b};
        bool is_exact[11] = {a == std::floor(a),
                             power_of_2(a),
                             power_of_2(a),
                             power_of_2(a) && power_of_2(s),
                             (double)s * s == a,
                             false,
                             power_of_2(b),
                             power_of_2(b),
                             true,
                             true,
                             true};
        for (int k = 0; k < 11; ++k) {
            if (want[k] == 0 || !std::isfinite(want[k])) {
                EXPECT(want[k] != want[k] ? got[k] != got[k] : got[k] == want[k]);
                continue;
            }
            if ((k == 2 || k == 7) && (std::fpclassify(a) == FP_SUBNORMAL || std::fpclassify(want[k]) == FP_SUBNORMAL))
                continue;  // flushed
            int error = step(got[k], want[k]) * (want[k] < 0 ? -1 : 1);
            if (std::abs(error) > (is_exact[k] ? 0 : most))
                printf("main.cpp: %d of %.9g, %.9g: %.9g, %d from %.9g\n", k, a, b, got[k], error, want[k]);
            EXPECT(std::abs(error) <= (is_exact[k] ? 0 : most));
            EXPECT(std::signbit(got[k]) == std::signbit(want[k]) && std::isfinite(got[k]) && (k != 5 || got[k] <= 1));
            up[k] |= error > 0, down[k] |= error < 0, exact[k] |= is_exact[k];
        }
        for (int k : {11, 13}) {  // of halves
            double e = std::exp2((double)got[k]), unit = std::ldexp(1.0, std::ilogb(e) - 10);
            auto place = [](double half) {  // among the halves
                return std::ldexp(half, 10 - std::ilogb(half)) + 1024 * std::ilogb(half);
            };
            if (e < 65504 && e > 0x1p-14)
                EXPECT(std::fabs(place(got[k + 1]) - place(std::nearbyint(e / unit) * unit)) <=
                       (got[k] == std::floor(got[k]) ? 0 : most));
        }
        EXPECT(std::fabs(got[15] - std::tanh(got[11])) <= 0x1p-11f * (most + 0.5f) * 1.01f && got[15] <= 1);
    }
    for (int k = 0; k < 11; ++k) {
        EXPECT(up[k] == (most > 0 && k < 8) && down[k] == (most > 0 && k < 8));
        EXPECT(exact[k] || k == 5);
    }
}

static void blocks_vote() {
    CUdeviceptr px = memory(64 * sizeof(int)), pz = memory(3 * sizeof(int));
    for (int positive : {0, 40, 64}) {
        int x[64], z[3];
        for (int i = 0; i < 64; ++i) x[i] = i < positive;
        WORKS(cuMemcpyHtoD(px, x, sizeof x));
        WORKS(launch(nullptr, "votes", 64, px, pz));
        WORKS(cuMemcpyDtoH(z, pz, sizeof z));
        EXPECT(z[0] == positive && z[1] == (positive == 64) && z[2] == (positive > 0));
    }
}

// ---- each test in its own process, as a failed kernel leaves none usable
struct Test {
    const char* name;
    void (*run)();
    std::vector<const char*> says;  // what the software GPU has to say on stderr
};
#define TEST(name, ...)              \
    {                                \
        #name, name, { __VA_ARGS__ } \
    }
static const Test TESTS[] = {
    TEST(records_and_replays_in_order),
    TEST(launches_with_attributes_are_recorded),
    TEST(memory_may_outlive_a_replay, "has not been freed", "free of a graph's memory that is not allocated"),
    TEST(memory_is_fresh_in_each_replay, "never written"),
    TEST(memory_is_dead_before_a_replay, "memset: in memory of a graph", "fill: global write", "twice in one capture"),
    TEST(memory_is_dead_after_a_replay, "of 400) before its allocation node or after its free"),
    TEST(memory_is_dead_after_its_free_node, "in memory of a graph"),
    TEST(waits_and_host_copies_invalidate_a_capture, "nothing has run", "read the host's memory",
         "outside of the capture"),
    TEST(relaxed_captures_allow_unsafe_calls),
    TEST(captures_begin_and_end_in_their_stream, "legacy stream", "another thread", "not allocated in this capture"),
    TEST(streams_fork_and_join_in_a_capture, "did not wait for", "between two captures"),
    TEST(streams_overlap),
    TEST(threads_overlap_on_their_own_streams),
    TEST(replays_overlap_with_other_streams),
    TEST(work_runs_in_order_in_a_stream),
    TEST(streams_are_ordered_by_events_and_waits),
    TEST(atomics_of_two_streams_are_no_race),
    TEST(kernels_race, "race on global memory byte", "fill", "step", "block (0,0,0) thread", "PTX line",
         "not ordered: different streams without an event or a wait between them"),
    TEST(a_read_races_with_a_later_write, "race on global memory byte", "fill", "move_if"),
    TEST(memsets_race, "race on global memory byte", "step"),
    TEST(copies_race, "race on global memory byte", "fill"),
    TEST(replays_race, "race on global memory byte", "fill"),
    TEST(waiting_for_an_earlier_event_is_not_enough, "race on global memory byte", "fill", "step"),
    TEST(a_free_races_with_use, "free: of memory that was", "not ordered"),
    TEST(use_races_with_a_free, "memory that was ", "`", "not ordered"),
    TEST(use_races_with_an_allocation, "allocated by `cuMemAllocAsync` in another stream"),
    TEST(errors_come_with_a_wait, "fill: global write of 4 bytes out of bounds"),
    TEST(prefetches_have_addresses, "fetch: prefetch of address", "in no allocation"),
    TEST(work_that_is_left_runs_at_the_end, "at the end of the program failed"),
    TEST(streams_have_numbers),
    TEST(the_pool_has_attributes, "no memory for"),
    TEST(events_measure_time, "was not recorded", "without timing"),
    TEST(refused_launches_leave_the_context_usable, "block of 257 threads", "without cuFuncSetAttribute"),
    TEST(clusters_find_room, "at most 16 are possible", "compiled for", "SOFTGPU_CLUSTER", "launch attribute 2"),
    TEST(machine_code_is_refused),
    TEST(products_are_recorded_and_checked, "gemm, A: an operand is not inside", "leading dimensions"),
    TEST(products_read_scalars_from_the_device, "gemm, alpha"),
    TEST(numbers_outlive_their_generator),
    TEST(pow_is_right),
    TEST(rounding_modes_are_right),
    TEST(integers_are_right),
    TEST(approximations_err_by_as_much_as_is_asked),
    TEST(blocks_vote),
};

static int run(const Test& t, const char* errors) {
    freopen(errors, "w", stderr);
    CUcontext context;
    char name[100] = "";
    WORKS(cuInit(0));
    WORKS(cuDevicePrimaryCtxRetain(&context, 0));
    WORKS(cuCtxSetCurrent(context));
    WORKS(cuDeviceGetName(name, sizeof name, 0));
    soft = !strncmp(name, "softgpu", 7);
    WORKS(cuModuleLoadData(&module, text.c_str()));
    if (!failures) t.run();
    fflush(stderr);
    std::stringstream said;
    said << std::ifstream(errors).rdbuf();
    for (const char* s : t.says)
        if (soft && said.str().find(s) == std::string::npos) {
            printf("not said: %s\nbut:\n%s", s, said.str().c_str());
            ++failures;
        }
    fflush(stdout);
    return failures != 0;
}

int main(int, char** argv) {
    std::stringstream ptx;
    ptx << std::ifstream(argv[1]).rdbuf();
    text = ptx.str();
    int failed = 0, ran = 0;
    for (const Test& t : TESTS) {
        if (argv[3] && strcmp(argv[3], t.name)) continue;
        ++ran;
        fflush(stdout);
        pid_t child = fork();
        if (!child) _exit(run(t, argv[2]));
        int status = 0;
        waitpid(child, &status, 0);
        printf("%s %s\n", status ? "FAILED" : "ok    ", t.name);
        failed += status != 0;
    }
    if (failed || !ran) printf("%d of %d tests failed\n", failed, ran);
    return failed || !ran;
}
