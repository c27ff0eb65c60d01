// memory.cpp - allocations, the memory pool, copies and memsets.
#include <algorithm>

#include "driver.h"

namespace {
enum Owner { PLAIN, POOL, GRAPH };
struct Allocation {
    size_t bytes;
    Owner owner;
    std::shared_ptr<Place> range;  // of a graph's memory, which may outlive the graph
};
auto& live = *new std::map<CUdeviceptr, Allocation>;  // never destroyed, as in stream.cpp
uint64_t live_bytes[3], graph_high;

// The device's one pool. It holds what is used in pieces of 32 MiB, as the driver's does.
struct Pool {
    uint64_t threshold = 0, used_high = 0, reserved = 0, reserved_high = 0;
    int reuse[3] = {1, 1, 1};
    static uint64_t pieces(uint64_t n) { return (n + (32 << 20) - 1) >> 25 << 25; }
    void grown() {
        reserved = std::max(reserved, pieces(live_bytes[POOL]));
        used_high = std::max(used_high, live_bytes[POOL]);
        reserved_high = std::max(reserved_high, reserved);
    }
    void trim(uint64_t keep) { reserved = std::max(pieces(live_bytes[POOL]), pieces(std::min(reserved, keep))); }
} pool;
CUmemoryPool const POOL_HANDLE = (CUmemoryPool)0x3000;

uint64_t all_live() { return live_bytes[PLAIN] + live_bytes[POOL] + live_bytes[GRAPH]; }

void added(CUdeviceptr p, Allocation a) {
    live_bytes[a.owner] += a.bytes;
    graph_high = std::max(graph_high, live_bytes[GRAPH]);
    live.emplace(p, std::move(a));
    pool.grown();
}

CUresult allocate(CUdeviceptr* p, size_t n, Owner owner, Queue* queue = nullptr) {
    void* m = n > TOTAL_BYTES - all_live() ? nullptr : ptxsim::mem_alloc(n);
    if (m && queue) ptxsim::mem_allocated(m, take_position(*queue, "cuMemAllocAsync"));
    if (!m)
        return bad(CUDA_ERROR_OUT_OF_MEMORY, "no memory for " + std::to_string(n) +
                                                 " bytes: " + std::to_string(all_live()) + " of " +
                                                 std::to_string(TOTAL_BYTES) + " are in use");
    *p = (CUdeviceptr)m;
    added(*p, {n, owner, nullptr});
    return CUDA_SUCCESS;
}

CUresult inside(CUdeviceptr p, size_t n, const char* what) {
    if (ptxsim::mem_contains((void*)p, n)) return CUDA_SUCCESS;
    return bad(CUDA_ERROR_INVALID_VALUE,
               std::string(what) + (ptxsim::mem_reserved((void*)p)
                                        ? ": in memory of a graph before its allocation node or after its free"
                                        : ": not inside one allocation"));
}

// The same at the call, where the stream doesn't capture. Graphs that are still to run may place memory there first.
CUresult inside_in(CUstream handle, CUdeviceptr p, size_t n, const char* what) {
    Stream* stream;
    Capture* capture;
    if (CUresult r = enter(handle, &stream, &capture)) return r;
    if (capture) return CUDA_SUCCESS;
    if (!ptxsim::mem_contains((void*)p, n) && ptxsim::mem_reserved((void*)p))
        if (CUresult r = run_for(clock_of(*stream->queue))) return r;
    return inside(p, n, what);
}
// When the stream comes to it.
CUresult touch(CUdeviceptr p, size_t n, bool write, const char* what) {
    if (CUresult r = inside(p, n, what)) return fatal(CUDA_ERROR_ILLEGAL_ADDRESS, std::string(what) + " failed"), r;
    std::string race = ptxsim::mem_access((void*)p, n, write);
    return race.empty() ? CUDA_SUCCESS : fatal(CUDA_ERROR_ILLEGAL_ADDRESS, std::string(what) + ": " + race);
}
CUresult set(CUdeviceptr d, unsigned char v, size_t n) {
    if (CUresult r = touch(d, n, true, "memset")) return r;
    memset((void*)d, v, n);
    ptxsim::mem_written((void*)d, n);
    return CUDA_SUCCESS;
}
CUresult copy(CUdeviceptr d, CUdeviceptr s, size_t n) {
    if (CUresult r = touch(s, n, false, "device copy, source")) return r;
    if (CUresult r = touch(d, n, true, "device copy, destination")) return r;
    ptxsim::mem_copy((void*)d, (void*)s, n);
    return CUDA_SUCCESS;
}
CUresult upload(CUdeviceptr d, const void* s, size_t n) {
    if (CUresult r = touch(d, n, true, "copy to device")) return r;
    memcpy((void*)d, s, n);
    ptxsim::mem_written((void*)d, n);
    return CUDA_SUCCESS;
}
CUresult download(void* d, CUdeviceptr s, size_t n) {
    if (CUresult r = touch(s, n, false, "copy from device")) return r;
    memcpy(d, (void*)s, n);
    return CUDA_SUCCESS;
}
// Puts work in the stream and waits for it.
CUresult do_in(CUstream handle, const char* name, Work work) {
    Stream* stream;
    Capture* capture;
    if (CUresult r = enter(handle, &stream, &capture)) return r;
    push(stream->queue, name, std::move(work));
    return wait_for(stream->queue->clock);
}
CUresult unknown(CUdeviceptr p) {
    return bad(CUDA_ERROR_INVALID_VALUE, ptxsim::mem_reserved((void*)p)
                                             ? "free of a graph's memory that is not allocated now"
                                             : "free of an unknown pointer");
}
// Takes the memory out of what is accounted for.
Allocation forget(CUdeviceptr p) {
    auto it = live.find(p);
    Allocation a = std::move(it->second);
    live_bytes[a.owner] -= a.bytes;
    live.erase(it);
    return a;
}
CUresult remove(CUdeviceptr p, const Allocation& a) {
    std::string race = ptxsim::mem_freed((void*)p);
    if (!race.empty()) return fatal(CUDA_ERROR_ILLEGAL_ADDRESS, "free: " + race);
    if (a.owner == GRAPH) ptxsim::mem_remove((void*)p);
    else ptxsim::mem_free((void*)p);
    return CUDA_SUCCESS;
}

const char* const READS_LATER = "each replay would read the host's memory as it is by then";
const char* const WRITES_LATER = "nothing has run that could be copied";
}  // namespace

namespace softgpu {
bool is_live(CUdeviceptr p) { return live.count(p); }
CUresult place(const std::shared_ptr<Place>& range) {
    if (range->bytes > TOTAL_BYTES - all_live()) return fatal(CUDA_ERROR_OUT_OF_MEMORY, "no memory for a graph");
    ptxsim::mem_place((void*)range->p);
    added(range->p, {range->bytes, GRAPH, range});
    return CUDA_SUCCESS;
}
CUresult release(CUdeviceptr p) { return is_live(p) ? remove(p, forget(p)) : unknown(p); }
CUresult release_in(const std::shared_ptr<Queue>& q, CUdeviceptr p) {
    if (!is_live(p)) return unknown(p);
    push(q, "cuMemFreeAsync", once([p, a = forget(p)] { return remove(p, a); }));
    return CUDA_SUCCESS;
}
void pool_waited() {
    if (pool.reserved > pool.threshold) pool.trim(pool.threshold);
}
}  // namespace softgpu

API cuMemAlloc_v2(CUdeviceptr* p, size_t n) {
    CHECK();
    if (CUresult r = refuse_unsafe("cuMemAlloc")) return r;
    return n ? allocate(p, n, PLAIN) : CUDA_ERROR_INVALID_VALUE;
}
API cuMemFree_v2(CUdeviceptr p) {
    Lock lock;
    if (CUresult r = refuse_unsafe("cuMemFree")) return r;
    if (!p) return CUDA_SUCCESS;
    CUresult waited = sticky ? CUDA_SUCCESS : wait_for_all();
    CUresult r = release(p);
    return waited ? waited : r;
}
API cuMemAllocAsync(CUdeviceptr* p, size_t n, CUstream handle) {  // candle relies on zero bytes being accepted here
    CHECK();
    Stream* stream;
    Capture* capture;
    if (CUresult r = enter(handle, &stream, &capture)) return r;
    return capture ? capture_alloc(*stream, p, n) : allocate(p, n, POOL, stream->queue.get());
}
API cuMemFreeAsync(CUdeviceptr p, CUstream handle) {
    Lock lock;  // also when the context is unusable
    if (!p) return CUDA_SUCCESS;
    Stream* stream;
    Capture* capture;
    if (CUresult r = enter(handle, &stream, &capture)) return r;
    if (capture) return capture_free(*stream, p);
    if (sticky) return release(p);
    std::shared_ptr<Queue> queue = stream->queue;
    if (!is_live(p) && ptxsim::mem_reserved((void*)p))  // a graph that is still to run may place it
        if (CUresult r = run_for(clock_of(*queue))) return r;
    if (CUresult r = release_in(queue, p)) return r;
    return settle(queue);
}
API cuMemGetInfo_v2(size_t* f, size_t* t) {
    Lock lock;
    *t = TOTAL_BYTES;
    *f = TOTAL_BYTES - all_live();
    return CUDA_SUCCESS;
}

API cuDeviceGetDefaultMemPool(CUmemoryPool* p, CUdevice) {
    *p = POOL_HANDLE;
    return CUDA_SUCCESS;
}
API cuDeviceGetMemPool(CUmemoryPool* p, CUdevice d) { return cuDeviceGetDefaultMemPool(p, d); }
API cuDeviceSetMemPool(CUdevice, CUmemoryPool p) {
    return p == POOL_HANDLE ? CUDA_SUCCESS : bad(CUDA_ERROR_INVALID_VALUE, "the default memory pool is the only one");
}
API cuMemPoolTrimTo(CUmemoryPool p, size_t keep) {
    Lock lock;
    if (p != POOL_HANDLE) return CUDA_ERROR_INVALID_VALUE;
    pool.trim(keep);
    return CUDA_SUCCESS;
}
API cuMemPoolSetAttribute(CUmemoryPool p, CUmemPool_attribute a, void* v) {
    Lock lock;
    if (p != POOL_HANDLE) return CUDA_ERROR_INVALID_VALUE;
    switch (a) {
        case CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES:
        case CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC:
        case CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES:
            pool.reuse[a - CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES] = *(int*)v;
            return CUDA_SUCCESS;
        case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD: pool.threshold = *(cuuint64_t*)v; return CUDA_SUCCESS;
        case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH:
        case CU_MEMPOOL_ATTR_USED_MEM_HIGH:
            if (*(cuuint64_t*)v) return CUDA_ERROR_INVALID_VALUE;
            if (a == CU_MEMPOOL_ATTR_USED_MEM_HIGH) pool.used_high = live_bytes[POOL];
            else pool.reserved_high = pool.reserved;
            return CUDA_SUCCESS;
        default: return CUDA_ERROR_INVALID_VALUE;
    }
}
API cuMemPoolGetAttribute(CUmemoryPool p, CUmemPool_attribute a, void* v) {
    Lock lock;
    if (p != POOL_HANDLE) return CUDA_ERROR_INVALID_VALUE;
    cuuint64_t* bytes = (cuuint64_t*)v;
    switch (a) {
        case CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES:
        case CU_MEMPOOL_ATTR_REUSE_ALLOW_OPPORTUNISTIC:
        case CU_MEMPOOL_ATTR_REUSE_ALLOW_INTERNAL_DEPENDENCIES:
            *(int*)v = pool.reuse[a - CU_MEMPOOL_ATTR_REUSE_FOLLOW_EVENT_DEPENDENCIES];
            return CUDA_SUCCESS;
        case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD: *bytes = pool.threshold; return CUDA_SUCCESS;
        case CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT: *bytes = pool.reserved; return CUDA_SUCCESS;
        case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH: *bytes = pool.reserved_high; return CUDA_SUCCESS;
        case CU_MEMPOOL_ATTR_USED_MEM_CURRENT: *bytes = live_bytes[POOL]; return CUDA_SUCCESS;
        case CU_MEMPOOL_ATTR_USED_MEM_HIGH: *bytes = pool.used_high; return CUDA_SUCCESS;
        default: return CUDA_ERROR_INVALID_VALUE;
    }
}
API cuDeviceGetGraphMemAttribute(CUdevice, CUgraphMem_attribute a, void* v) {
    Lock lock;
    bool current = a == CU_GRAPH_MEM_ATTR_USED_MEM_CURRENT || a == CU_GRAPH_MEM_ATTR_RESERVED_MEM_CURRENT;
    *(cuuint64_t*)v = current ? live_bytes[GRAPH] : graph_high;
    return CUDA_SUCCESS;
}

API cuMemcpyHtoD_v2(CUdeviceptr d, const void* s, size_t n) {
    CHECK();
    if (CUresult r = refuse_unsafe("cuMemcpyHtoD")) return r;
    if (CUresult r = inside_in(CU_STREAM_LEGACY, d, n, "copy to device")) return r;
    return do_in(CU_STREAM_LEGACY, "cuMemcpyHtoD", once([=] { return upload(d, s, n); }));
}
API cuMemcpyDtoH_v2(void* d, CUdeviceptr s, size_t n) {
    CHECK();
    if (CUresult r = refuse_own("cuMemcpyDtoH")) return r;
    if (CUresult r = refuse_unsafe("cuMemcpyDtoH")) return r;
    if (CUresult r = inside_in(CU_STREAM_LEGACY, s, n, "copy from device")) return r;
    return do_in(CU_STREAM_LEGACY, "cuMemcpyDtoH", once([=] { return download(d, s, n); }));
}
API cuMemcpyHtoDAsync_v2(CUdeviceptr d, const void* s, size_t n, CUstream stream) {
    CHECK();
    if (CUresult r = refuse_host_copy(stream, "cuMemcpyHtoDAsync", READS_LATER)) return r;
    auto bytes = std::make_shared<std::vector<char>>((const char*)s, (const char*)s + n);  // as they are at the call
    if (CUresult r = inside_in(stream, d, n, "copy to device")) return r;
    return enqueue(stream, CU_GRAPH_NODE_TYPE_MEMCPY, "cuMemcpyHtoDAsync",
                   once([=] { return upload(d, bytes->data(), n); }));
}
API cuMemcpyDtoHAsync_v2(void* d, CUdeviceptr s, size_t n, CUstream stream) {  // the host's memory is pageable: waits
    CHECK();
    if (CUresult r = refuse_host_copy(stream, "cuMemcpyDtoHAsync", WRITES_LATER)) return r;
    if (CUresult r = inside_in(stream, s, n, "copy from device")) return r;
    return do_in(stream, "cuMemcpyDtoHAsync", once([=] { return download(d, s, n); }));
}
API cuMemcpyDtoDAsync_v2(CUdeviceptr d, CUdeviceptr s, size_t n, CUstream stream) {
    CHECK();
    if (CUresult r = inside_in(stream, s, n, "device copy, source")) return r;
    if (CUresult r = inside_in(stream, d, n, "device copy, destination")) return r;
    return enqueue(stream, CU_GRAPH_NODE_TYPE_MEMCPY, "cuMemcpyDtoDAsync", once([=] { return copy(d, s, n); }));
}
API cuMemcpyDtoD_v2(CUdeviceptr d, CUdeviceptr s, size_t n) { return cuMemcpyDtoDAsync_v2(d, s, n, CU_STREAM_LEGACY); }
API cuMemcpyPeerAsync(CUdeviceptr d, CUcontext, CUdeviceptr s, CUcontext, size_t n, CUstream stream) {
    return cuMemcpyDtoDAsync_v2(d, s, n, stream);
}
API cuMemsetD8Async(CUdeviceptr d, unsigned char v, size_t n, CUstream stream) {
    CHECK();
    if (CUresult r = inside_in(stream, d, n, "memset")) return r;
    return enqueue(stream, CU_GRAPH_NODE_TYPE_MEMSET, "cuMemsetD8Async", once([=] { return set(d, v, n); }));
}
API cuMemsetD8_v2(CUdeviceptr d, unsigned char v, size_t n) { return cuMemsetD8Async(d, v, n, CU_STREAM_LEGACY); }

// ---- for the libraries of libs.cpp
static int library(const char* who, const void* p, size_t n, bool write) {
    Lock lock;
    static bool init = !getenv("SOFTGPU_INIT") || atoi(getenv("SOFTGPU_INIT"));
    auto failed = [&](const std::string& what) {
        return fatal(CUDA_ERROR_ILLEGAL_ADDRESS, std::string(who) + ": " + what);
    };
    if (!ptxsim::mem_contains(p, n))
        return failed(std::string(write ? "the result" : "an operand") + " is not inside one allocation");
    std::string race = ptxsim::mem_access(p, n, write);
    if (!race.empty()) return failed(race);
    if (init && !write && !ptxsim::mem_is_written(p, n)) return failed("read of memory that was never written");
    return 0;
}
EXPORT int softgpu_readable(const char* who, const void* p, size_t n) { return library(who, p, n, false); }
EXPORT int softgpu_writable(const char* who, const void* p, size_t n) { return library(who, p, n, true); }
EXPORT void softgpu_written(const void* p, size_t n) { ptxsim::mem_written(p, n); }
