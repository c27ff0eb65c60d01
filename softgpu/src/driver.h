// driver.h - what the files of the software GPU's driver share. See cuda.h for the functions that they define.
#pragma once
#include <cuda.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "ptxsim.h"
#define EXPORT extern "C" __attribute__((visibility("default")))
#define API EXPORT CUresult

namespace softgpu {
extern std::recursive_mutex mu;  // held by every function that touches what is below
extern CUresult sticky;          // the failure that made the context unusable
struct Lock {
    std::lock_guard<std::recursive_mutex> lock{mu};
};
#define CHECK() \
    Lock lock_; \
    if (sticky) return sticky

bool log_on();
#define LOG(...)                                      \
    do {                                              \
        if (log_on()) {                               \
            fprintf(stderr, "softgpu: " __VA_ARGS__); \
            fputc('\n', stderr);                      \
        }                                             \
    } while (0)
// reports an error on stderr and returns it
CUresult bad(CUresult error, const std::string& message);
// the same for one that makes the context unusable, as a failing kernel does on a GPU
CUresult fatal(CUresult error, const std::string& message);
const uint64_t TOTAL_BYTES = 8ull << 30;

// ---- memory.cpp
// An address range of a graph's own memory: there is memory in it while an execution of the graph put some there.
struct Place {
    CUdeviceptr p;
    size_t bytes;
    explicit Place(size_t n) : p((CUdeviceptr)ptxsim::mem_reserve(n)), bytes(n) {}
    ~Place() { ptxsim::mem_release((void*)p); }
};
CUresult place(const std::shared_ptr<Place>& range);
CUresult release(CUdeviceptr p);
bool is_live(CUdeviceptr p);
// What a host wait does to the pool: it gives memory above its threshold back.
void pool_waited();

// ---- stream.cpp
struct Capture;
struct Stream;
// Positions in streams of a capture up to which work is known to have ended.
typedef std::map<const Stream*, int> Seen;
struct Stream {
    bool legacy = false, blocking = true;
    std::shared_ptr<Capture> capture;  // in progress, or invalidated and not ended
    Seen seen;                         // in the capture
    ~Stream();
};
typedef std::function<CUresult()> Work;
// Where the work of a stream goes: `*capture` is null where it has to run now. Refuses what can't be put in the stream.
CUresult enter(CUstream stream, Stream** to, Capture** capture);
void record(Stream& stream, CUgraphNodeType type, Work work);
// Runs the work now, or records it where the stream captures; it has to own what it needs.
template <class F>
CUresult enqueue(CUstream handle, CUgraphNodeType type, F&& work) {
    CHECK();
    Stream* stream;
    Capture* capture;
    if (CUresult r = enter(handle, &stream, &capture)) return r;
    if (!capture) return work();
    record(*stream, type, std::forward<F>(work));
    return CUDA_SUCCESS;
}
// Refuses a copy between host and device in a stream that captures, which invalidates the capture.
CUresult refuse_host_copy(CUstream stream, const char* what, const char* why);
// Refuses what isn't seen by captures that forbid it, which invalidates them.
CUresult refuse_unsafe(const char* what);
// Refuses what the legacy stream would do while a blocking stream captures.
CUresult refuse_legacy(const char* what);
// Refuses what waits for this thread's own capture, whatever its mode.
CUresult refuse_own(const char* what);
// Refuses a wait for all streams while one of them captures.
CUresult refuse_any(const char* what);
// In a capture, memory is given and freed by nodes.
CUresult capture_alloc(Stream& stream, CUdeviceptr* p, size_t bytes);
CUresult capture_free(Stream& stream, CUdeviceptr p);
}  // namespace softgpu
using namespace softgpu;
