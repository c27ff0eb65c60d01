// Tests of the software GPU: graphs, the memory pool, events, and instructions that once were wrong. What it expects of
// the driver is meant to hold for CUDA's own too, so it also runs on a GPU; only there it doesn't expect what the
// checker finds.
#include <cuda.h>
#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cfenv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <random>
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
    if (!soft) return;
    values[0] = 0, values[1] = 1;
    WORKS(cuMemcpyHtoD(flags, values, sizeof values));
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuGraphLaunch(e, s));
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
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, launch(s, "fill", N, p, 7, N));
}
static void memory_is_dead_after_a_replay() {
    CUstream s = stream_with();
    CUgraphExec e;
    CUdeviceptr p = graph_memory(s, &e);
    WORKS(cuGraphLaunch(e, s));
    WORKS(cuGraphLaunch(e, s));
    if (soft) GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, launch(s, "fill", N, p, 7, N));
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
    GIVES(CUDA_ERROR_ILLEGAL_ADDRESS, cuGraphLaunch(e, s));
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
    EXPECT(product(2, 3, zero) == 13 /* EXECUTION_FAILED */);  // A would have 8 elements
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
    TEST(the_pool_has_attributes, "no memory for"),
    TEST(events_measure_time, "was not recorded", "without timing"),
    TEST(refused_launches_leave_the_context_usable, "block of 257 threads", "without cuFuncSetAttribute"),
    TEST(products_are_recorded_and_checked, "gemm, A: an operand is not inside", "leading dimensions"),
    TEST(pow_is_right),
    TEST(rounding_modes_are_right),
    TEST(integers_are_right),
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
