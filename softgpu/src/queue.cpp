// queue.cpp - the work of streams: what is ordered before what, and which of it runs next. Putting work in a stream
// only queues it; it runs, a step of one stream after a step of another, when a call of the host has to wait.
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <random>

#include "driver.h"

namespace softgpu {
struct Item {
    ptxsim::Job job;
    std::string name;
    Work work;
    std::shared_ptr<void> state;  // of the work, between its steps
};

void merge(Clock& into, const Clock& from) {
    if (into.size() < from.size()) into.resize(from.size());
    for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}
}  // namespace softgpu

namespace {
const size_t MOST_PENDING = 16;  // in one stream
uint32_t& at(Clock& c, uint32_t stream) {
    if (c.size() <= stream) c.resize(stream + 1);
    return c[stream];
}
uint32_t at(const Clock& c, uint32_t stream) { return stream < c.size() ? c[stream] : 0; }

// None of these is ever destroyed: other threads may still run when the program ends.
auto& queues = *new std::vector<std::shared_ptr<Queue>>;         // by id; the legacy stream's first
auto& active = *new std::map<uint32_t, std::shared_ptr<Queue>>;  // those with items, by id
// What a thread of the host has waited for is ordered before all that is given later, whoever gives it: threads may
// tell each other in ways that can't be seen here.
auto& host = *new Clock;

// What the next item of the stream comes after, besides earlier ones.
void catch_up(Queue& q) {
    merge(q.clock, host);
    for (auto& other : queues)
        if (q.legacy ? other->blocking : other->legacy && q.blocking) merge(q.clock, other->clock);
}
bool has_run(const Clock& c) {
    return std::none_of(active.begin(), active.end(),
                        [&](auto& a) { return at(c, a.first) >= a.second->items.front()->job.position; });
}
void drop_all() {
    auto dropped = std::move(active);
    active.clear();
    for (auto& [id, q] : dropped) q->items.clear();
}
std::shared_ptr<Queue> pick(const std::vector<std::shared_ptr<Queue>>& able) {
    static const int order = getenv("SOFTGPU_SCHED") ? atoi(getenv("SOFTGPU_SCHED")) : 0;
    static auto& rng = *new std::mt19937(order);
    static uint32_t last = 0;
    if (order > 1) return able[rng() % able.size()];
    std::shared_ptr<Queue> next = order ? able.back() : able.front();
    if (order) {
        for (auto& q : able)
            if (q->id < last) next = q;
    } else {
        auto after = std::find_if(able.begin(), able.end(), [](auto& q) { return q->id > last; });
        if (after != able.end()) next = *after;
    }
    last = next->id;
    return next;
}
// One step of an item that may run: there is one, as items come after what was given before them.
void step() {
    std::vector<std::shared_ptr<Queue>> able;
    for (auto& [id, q] : active) {
        Item& i = *q->items.front();
        if (i.state || has_run(i.job.before)) able.push_back(q);
    }
    std::shared_ptr<Queue> q = pick(able);
    std::shared_ptr<Item> item = q->items.front();
    ptxsim::current = &item->job;
    CUresult r = item->work(item->state);
    ptxsim::current = nullptr;
    if (r == CUDA_ERROR_NOT_READY) return;
    if (r && !sticky) fatal(CUDA_ERROR_ILLEGAL_ADDRESS, item->name + " failed when the stream came to it");
    if (sticky) drop_all();
    else {
        q->items.pop_front();
        if (q->items.empty()) active.erase(q->id);
    }
}
template <class F>
CUresult run_until(F&& done) {
    while (!sticky && !done()) {
        step();
        turns.let_others();
    }
    return sticky;
}
}  // namespace

namespace softgpu {
// ---- the lock
void Turns::lock() {
    std::unique_lock<std::mutex> l(m);
    if (depth && owner == std::this_thread::get_id()) {
        ++depth;
        return;
    }
    uint64_t mine = next++;
    changed.wait(l, [&] { return now == mine; });
    owner = std::this_thread::get_id();
    depth = 1;
}
void Turns::unlock() {
    std::unique_lock<std::mutex> l(m);
    if (--depth) return;
    ++now;
    changed.notify_all();
}
void Turns::let_others() {
    int held = depth;
    {
        std::unique_lock<std::mutex> l(m);
        if (next == now + 1) return;
        depth = 0;
        ++now;
        changed.notify_all();
    }
    lock();
    depth = held;
}
Turns& turns = *new Turns;

// ---- queues
std::shared_ptr<Queue> new_queue(bool legacy, bool blocking) {
    // The id of a destroyed stream is given again when all is known to come after its work; positions go on counting.
    auto free = std::find_if(queues.begin(), queues.end(), [](auto& q) {
        return q.use_count() == 1 && q->items.empty() && at(host, q->id) >= q->given;
    });
    if (free == queues.end()) {
        queues.push_back(std::make_shared<Queue>());
        free = queues.end() - 1;
        (*free)->id = (uint32_t)(queues.size() - 1);
    }
    (*free)->legacy = legacy;
    (*free)->blocking = blocking;
    return *free;
}
const Clock& clock_of(Queue& q) {
    catch_up(q);
    return q.clock;
}
uint32_t take_position(Queue& q, const std::string& name, ptxsim::Job* job) {
    ptxsim::Job made{0, q.id, q.given + 1, clock_of(q)};
    made.id = ptxsim::new_job(made.stream, made.position, name);
    at(q.clock, q.id) = ++q.given;
    uint32_t id = made.id;
    if (job) *job = std::move(made);
    return id;
}
void push(const std::shared_ptr<Queue>& q, const std::string& name, Work work) {
    auto item = std::make_shared<Item>();
    item->name = name;
    item->work = std::move(work);
    take_position(*q, name, &item->job);
    q->items.push_back(std::move(item));
    active[q->id] = q;
}
CUresult settle(std::shared_ptr<Queue> q) {
    static const bool wait = getenv("CUDA_LAUNCH_BLOCKING") && atoi(getenv("CUDA_LAUNCH_BLOCKING"));
    return wait ? wait_for(q->clock) : run_until([&] { return q->items.size() <= MOST_PENDING; });
}
CUresult run_for(Clock clock) {
    return run_until([&] { return has_run(clock); });
}
CUresult run_all_of(std::shared_ptr<Queue> q) {
    return run_until([&] { return q->items.empty(); });
}
CUresult wait_for(Clock clock) {
    if (CUresult r = run_for(clock)) return r;
    host_knows(clock);
    return CUDA_SUCCESS;
}
CUresult wait_for_all() {
    Clock all;
    for (auto& q : queues) merge(all, q->clock);
    return wait_for(std::move(all));
}
void host_knows(const Clock& clock) { merge(host, clock); }
void finish() {
    Lock lock;
    if (sticky || !run_until([] { return active.empty(); })) return;
    fprintf(stderr, "softgpu: work that was still in streams at the end of the program failed\n");
    fflush(nullptr);
    _exit(1);
}
}  // namespace softgpu
