// driver.h - what the files of the software GPU's driver share. See cuda.h for the functions that they define.
#pragma once
#include <cuda.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
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
// Held by every function that touches what is below: recursive, and taken in the order of asking, so that a thread
// which runs work step by step can let others give more of it.
class Turns {
    std::mutex m;
    std::condition_variable changed;
    uint64_t next = 0, now = 0;  // tickets: the next to be given, and whose turn it is
    std::thread::id owner;
    int depth = 0;

   public:
    void lock();
    void unlock();
    void let_others();  // however often it is held; it is held as often afterwards
};
extern Turns& turns;
extern CUresult sticky;  // the failure that made the context unusable
struct Lock {
    Lock() { turns.lock(); }
    ~Lock() { turns.unlock(); }
    Lock(const Lock&) = delete;
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

// ---- queue.cpp
using ptxsim::Clock;
void merge(Clock& into, const Clock& from);
// Runs work, or a step of it: CUDA_ERROR_NOT_READY where there is more. The state is null at first, then what the work
// puts there.
typedef std::function<CUresult(std::shared_ptr<void>& state)> Work;
template <class F>
Work once(F f) {
    return [f = std::move(f)](std::shared_ptr<void>&) -> CUresult { return f(); };
}
struct Item;
// The work of a stream that has not ended. It stays when the stream's handle or thread ends.
struct Queue {
    uint32_t id, given = 0;  // the position of the last that was given
    bool legacy, blocking;
    Clock clock;  // up to which position of each stream all is ordered before the next item
    std::deque<std::shared_ptr<Item>> items;
};
std::shared_ptr<Queue> new_queue(bool legacy, bool blocking);
// What the stream's next item comes after, by now.
const Clock& clock_of(Queue& q);
// A position for what happens at once, or for an item; returns the number by which the race checks know it.
uint32_t take_position(Queue& q, const std::string& name, ptxsim::Job* job = nullptr);
// Puts work in a stream. `settle` has to follow, which may run some; others may have the lock meanwhile, as in all that
// follow here: nothing may be held across them that can end, such as a Stream.
void push(const std::shared_ptr<Queue>& q, const std::string& name, Work work);
CUresult settle(std::shared_ptr<Queue> q);
CUresult run_for(Clock clock);  // until all that is in it has run
CUresult run_all_of(std::shared_ptr<Queue> q);
CUresult wait_for(Clock clock);  // the same for the host, which knows then that it has
CUresult wait_for_all();
void host_knows(const Clock& clock);
void finish();  // at the end of the program

// ---- memory.cpp
// An address range of a graph's own memory: there is memory in it while an execution of the graph put some there.
struct Place {
    CUdeviceptr p;
    size_t bytes;
    explicit Place(size_t n) : p((CUdeviceptr)ptxsim::mem_reserve(n)), bytes(n) {}
    ~Place() { ptxsim::mem_release((void*)p); }
};
CUresult place(const std::shared_ptr<Place>& range);
CUresult release(CUdeviceptr p);  // at once
// Frees memory when the stream gets there; it counts as free from now on.
CUresult release_in(const std::shared_ptr<Queue>& q, CUdeviceptr p);
bool is_live(CUdeviceptr p);
// What a host wait does to the pool: it gives memory above its threshold back.
void pool_waited();

// ---- stream.cpp
struct Capture;
struct Stream;
// Positions in streams of a capture up to which work is known to have ended.
typedef std::map<const Stream*, int> Seen;
struct Stream {
    bool legacy, blocking;
    std::shared_ptr<Queue> queue = new_queue(legacy, blocking);
    unsigned long long id = ++last_id;
    std::shared_ptr<Capture> capture;  // in progress, or invalidated and not ended
    Seen seen;                         // in the capture
    Stream(bool legacy, bool blocking) : legacy(legacy), blocking(blocking) {}
    ~Stream();
    static unsigned long long last_id;
};
// Where the work of a stream goes: `*capture` is null where it is queued to run. Refuses what can't be put in the
// stream.
CUresult enter(CUstream stream, Stream** to, Capture** capture);
void record(Stream& stream, CUgraphNodeType type, const std::string& name, Work work);
// Puts the work in the stream, or records it where that captures; it has to own what it needs.
CUresult enqueue(CUstream handle, CUgraphNodeType type, const std::string& name, Work work);
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
