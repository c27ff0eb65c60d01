// Passes over rows of adjacent classes.
//
// A row is cut into windows of 16 bytes that are aligned in the tensor at hand, whatever the row's own alignment: with 50257
// classes each row begins somewhere else. Windows inside of the row are moved by one access; the one or two at its edges
// element by element. `Problem::team` threads share a row: a part of a warp, so that a block has several rows, or a block.
//
// Bytes, with E those of the logits: `reduce` reads E; `emit` (the backward) reads E and writes E; `fused` reads E once,
// keeps it in shared memory and writes E. None of them can do with less.
#pragma once

#include "softmax.cuh"

namespace fused_loss {
namespace softmax {

// Windows that a thread loads before it uses the first: what keeps the memory busy.
template <Detail D> constexpr int BATCH = D == PLAIN ? 4 : 1;

// One row as windows.
template <class T> struct Windows {
    static constexpr int N = LANES_16B<T>;
    using Window = Pack<T, N>;

    const T *row;  // class 0
    int classes;
    int phase;     // by how many classes window 0 begins before class 0
    int count;
    bool aligned;  // whether the windows are aligned in `row`

    // The windows of `row` that are aligned in `like`, a row of as many classes.
    __device__ __forceinline__ Windows(const T *row, const T *like, int classes) : row(row), classes(classes) {
        phase = phase_of<T, N>(like);
        count = (phase + classes + N - 1) / N;
        aligned = phase_of<T, N>(row) == phase;
    }

    __device__ __forceinline__ int first(int window) const { return window * N - phase; }
    __device__ __forceinline__ int window_of(int index) const { return (index + phase) / N; }
    __device__ __forceinline__ bool inside(int window) const { return first(window) >= 0 && first(window) + N <= classes; }

    // The windows i, i + step, … below `end`; -inf behind it and outside of the row.
    template <int U> __device__ __forceinline__ void load(int i, int step, int end, Window (&to)[U]) const {
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int window = i + u * step;
#pragma unroll
            for (int k = 0; k < N; k++) to[u].at[k] = narrow<T>(-infinity<Acc<T>>());
            if (aligned && window < end && inside(window)) to[u] = Window::load(row + first(window));
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int window = i + u * step;
            if (window < end && !(aligned && inside(window))) {
                const int at = first(window);
                to[u] = Window::load_masked(row + at, -at, classes - at, narrow<T>(-infinity<Acc<T>>()));
            }
        }
    }

    // Stores a window of the output row by which the windows are aligned.
    __device__ __forceinline__ void store(T *out, int window, const Window &v) const {
        const int at = first(window);
        if (inside(window)) {
            v.store(out + at);
        } else {
            v.store_masked(out + at, -at, classes - at);
        }
    }
};

template <class T, int N> __device__ __forceinline__ void widen_window(const Pack<T, N> &from, Acc<T> (&to)[N]) {
#pragma unroll
    for (int k = 0; k < N; k++) to[k] = widen<Acc<T>>(from.at[k]);
}

// The windows that a thread keeps in shared memory: slot j of all threads side by side, so that neighbouring threads never
// meet in a bank, and no thread waits for another.
struct Kept {
    uint4 *slots;  // this thread's slot 0
    int count;     // all windows of the thread, or a multiple of any BATCH

    __device__ __forceinline__ uint4 &at(int j) const { return slots[j * blockDim.x]; }
};

// Reduces the windows thread, thread + step, … below `end`.
template <Detail D, class T>
__device__ __forceinline__ State<Acc<T>, D> reduce_windows(const Problem &p, const Operands<Acc<T>> &o, const Windows<T> &w, int thread, int step, int end, Kept kept) {
    constexpr int U = BATCH<D>, N = Windows<T>::N;
    State<Acc<T>, D> state = State<Acc<T>, D>::empty();
    for (int i = thread, j = 0; i < end; i += U * step, j += U) {
        Pack<T, N> packs[U];
        w.load(i, step, end, packs);
        Acc<T> x[U][N];
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (j + u < kept.count) kept.at(j + u) = *reinterpret_cast<const uint4 *>(packs[u].at);
            widen_window(packs[u], x[u]);
        }
        absorb<D, T>(state, p, o, w.first(i), step * N, x);
    }
    return state;
}

// Writes the windows thread, thread + step, … below `end`, from the last to the first, as the last ones are still in the
// cache if the row was read before; the first ones from shared memory where they were kept.
template <class Rule, class T>
__device__ __forceinline__ void emit_windows(const Problem &p, const Operands<Acc<T>> &o, const Windows<T> &w, const RowScalars<Acc<T>> &s, T *out, int thread, int step, int end, Kept kept) {
    constexpr int U = BATCH<Rule::DETAIL>, N = Windows<T>::N;
    const int mine = thread < end ? (end - thread + step - 1) / step : 0;
    for (int j = (mine - 1) / U * U; j >= 0 && mine > 0; j -= U) {
        Pack<T, N> packs[U];
        if (s.kind != Kind::LIVE || (Rule::DETAIL >= GENERAL && p.log_probs)) {
            // no logit of this row counts
        } else if (j < kept.count) {
#pragma unroll
            for (int u = 0; u < U; u++) {
                if (j + u < mine) *reinterpret_cast<uint4 *>(packs[u].at) = kept.at(j + u);
            }
        } else {
            w.load(thread + j * step, step, end, packs);
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int window = thread + (j + u) * step;
            if (window >= end) continue;
            Acc<T> x[N], y[N];
            widen_window(packs[u], x);
            emit_live<Rule, T>(p, o, s, w.first(window), x, y);
            Pack<T, N> result;
#pragma unroll
            for (int k = 0; k < N; k++) result.at[k] = narrow<T>(y[k]);
            w.store(out, window, result);
        }
    }
}

// A row's operands, and its own class's logit after scale and cap.
template <Detail D, class T>
__device__ __forceinline__ Acc<T> own_logit(const Problem &p, const T *row, const Target<Acc<T>> &target) {
    using A = Acc<T>;
    if (target.index < 0) return A(0);
    const A x = widen<A>(row[target.index * p.x.class_stride]);
    if constexpr (D >= GENERAL) {
        A slope;
        return p.log_probs ? x : transform(p, x, slope);
    }
    return x;
}

template <class A> __device__ __forceinline__ Operands<A> operands_of(const Problem &p, const void *t, const A *weight, int64_t row) {
    return {t, weight, is_index(p.target) ? 0 : p.t.start(row)};
}

// Merges the states of a team's threads: all threads of the block call it, all get their team's state, and the scratch
// memory of a state for each warp may be used again.
template <class T, class A, Detail D>
__device__ __forceinline__ State<A, D> merge_team(State<A, D> state, int team, State<A, D> *scratch) {
    state = merge_lanes<T>(state, min(team, WARP));
    if (team <= WARP) return state;
    const int lane = threadIdx.x % WARP;
    if (lane == 0) scratch[threadIdx.x / WARP] = state;
    __syncthreads();
    state = lane < team / WARP ? scratch[lane] : State<A, D>::empty();
    __syncthreads();
    return merge_lanes<T>(state, WARP);
}

// What a pass does for a row once its state is known, in one thread of its team: the loss, and what the backward needs.
template <Detail D, class A>
__device__ __forceinline__ double2 finish_row(const Problem &p, const Outputs<A> &out, const Target<A> &target, A x_t, const State<A, D> &state, int64_t row) {
    const A loss = loss_of<D>(p, target, x_t, state);
    if (out.loss) out.loss[row] = loss;
    write_statistics<D>(p, out.statistics, row, state);
    return {static_cast<double>(loss), static_cast<double>(target.weight)};
}

// Forward. Each team takes rows in turn; with gridDim.y > 1 a team of a whole block takes that part of its row, and leaves
// the state for `merge_splits`. Reads E.
template <Detail D, class T>
__device__ __forceinline__ void reduce_rows(const Problem &p, const T *x, const void *t, const Acc<T> *weight, Acc<T> *splits, const Outputs<Acc<T>> &out) {
    using A = Acc<T>;
    __shared__ double scratch[WARP];
    __shared__ State<A, D> states[WARP];
    const int team = p.team, thread = threadIdx.x % team, teams = blockDim.x / team;
    double2 total = {0, 0};
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * teams; first < p.rows; first += static_cast<int64_t>(gridDim.x) * teams) {
        const int64_t row = first + threadIdx.x / team;
        const bool exists = row < p.rows;
        State<A, D> state = State<A, D>::empty();
        Target<A> target = {Kind::IGNORED, -1, A(0), A(0)};
        A x_t = A(0);
        if (exists) {
            target = read_target(p, t, weight, row);
            const T *logits = x + p.x.start(row);
            x_t = own_logit<D>(p, logits, target);
            const Windows<T> w(logits, logits, p.classes);
            const int part = (w.count + gridDim.y - 1) / gridDim.y;
            const int begin = min(w.count, static_cast<int>(blockIdx.y) * part), end = min(w.count, begin + part);
            if (target.kind == Kind::LIVE && !(D >= GENERAL && p.log_probs)) {
                state = reduce_windows<D>(p, operands_of(p, t, weight, row), w, begin + thread, team, end, {nullptr, 0});
            }
        }
        state = merge_team<T>(state, team, states);
        if (!exists || thread != 0) continue;
        if (gridDim.y > 1) {
            state.each([&](auto field, int i) { splits[(row * gridDim.y + blockIdx.y) * 4 + i] = field; });
            continue;
        }
        const double2 one = finish_row<D>(p, out, target, x_t, state, row);
        total.x += one.x, total.y += one.y;
    }
    if (gridDim.y == 1 && (out.partials || out.result || out.denominator)) finish_block(p, out, total.x, total.y, scratch);
}

// The second stage of a forward whose rows were split over blocks, in one block: a warp merges the states of a row.
template <Detail D, class T>
__device__ __forceinline__ void merge_splits(const Problem &p, const T *x, const void *t, const Acc<T> *weight, const Acc<T> *splits, int count, const Outputs<Acc<T>> &out) {
    using A = Acc<T>;
    __shared__ double scratch[WARP];
    const int lane = threadIdx.x % WARP;
    double2 total = {0, 0};
    for (int64_t row = threadIdx.x / WARP; row < p.rows; row += blockDim.x / WARP) {
        State<A, D> state = State<A, D>::empty();
        for (int i = lane; i < count; i += WARP) {
            State<A, D> part;
            part.each([&](auto &field, int f) { field = splits[(row * count + i) * 4 + f]; });
            state = merge<T>(state, part);
        }
        state = merge_lanes<T>(state, WARP);
        if (lane != 0) continue;
        const Target<A> target = read_target(p, t, weight, row);
        const double2 one = finish_row<D>(p, out, target, own_logit<D>(p, x + p.x.start(row), target), state, row);
        total.x += one.x, total.y += one.y;
    }
    finish_block(p, out, total.x, total.y, scratch);
}

// Row statistics: as the forward, with six numbers for each row.
template <class A> struct StatisticsOutputs {
    A *loss, *lse, *z_loss, *entropy;
    uint32_t *argmax;
    uint8_t *correct;
};

template <class A>
__device__ __forceinline__ void write_row_statistics(const Problem &p, const StatisticsOutputs<A> &out, const Target<A> &target, A x_t, const State<A, STATISTICS> &state, int64_t row) {
    const A log_sum = log_sum_of(state.max, state.rest);
    const A lse = state.max + log_sum;
    const bool kept = target.kind != Kind::IGNORED;
    const int own = is_index(p.target) ? target.index : state.top_class;
    const int argmax = state.argmax == NO_CLASS ? 0 : state.argmax;
    out.loss[row] = loss_of<STATISTICS>(p, target, x_t, state);
    out.lse[row] = kept ? lse : A(0);
    out.z_loss[row] = kept ? z_loss_of(p, lse) : A(0);
    out.entropy[row] = kept ? log_sum - state.moment / (A(1) + state.rest) : A(0);
    out.argmax[row] = argmax;
    out.correct[row] = kept && own == argmax;
}

template <class T>
__device__ __forceinline__ void statistics_rows(const Problem &p, const T *x, const void *t, const Acc<T> *weight, const StatisticsOutputs<Acc<T>> &out) {
    using A = Acc<T>;
    __shared__ State<A, STATISTICS> states[WARP];
    const int team = p.team, thread = threadIdx.x % team, teams = blockDim.x / team;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * teams; first < p.rows; first += static_cast<int64_t>(gridDim.x) * teams) {
        const int64_t row = first + threadIdx.x / team;
        const bool exists = row < p.rows;
        State<A, STATISTICS> state = State<A, STATISTICS>::empty();
        Target<A> target = {Kind::IGNORED, -1, A(0), A(0)};
        A x_t = A(0);
        if (exists) {
            target = read_target(p, t, weight, row);
            const T *logits = x + p.x.start(row);
            x_t = own_logit<STATISTICS>(p, logits, target);
            const Windows<T> w(logits, logits, p.classes);
            state = reduce_windows<STATISTICS>(p, operands_of(p, t, weight, row), w, thread, team, w.count, {nullptr, 0});
        }
        state = merge_team<T>(state, team, states);
        if (exists && thread == 0) write_row_statistics(p, out, target, x_t, state, row);
    }
}

// A row's numbers in the backward.
template <class Rule, class A>
__device__ __forceinline__ RowScalars<A> saved_scalars(const Problem &p, const Target<A> &target, const A *statistics, const A *denominator, const A *upstream, int64_t row) {
    const A g = (upstream ? upstream[p.upstream_rows ? row : 0] : A(1)) / *denominator;
    if (Rule::DETAIL >= GENERAL && p.log_probs) return RowScalars<A>::template gradient<Rule::DETAIL>(p, target, A(0), A(0), A(0), g);
    const A mass = Rule::DETAIL >= GENERAL ? read_mass(p, statistics, row) : A(0);
    return RowScalars<A>::template gradient<Rule::DETAIL>(p, target, statistics[row], statistics[p.rows + row], mass, g);
}

// Cross-entropy backward: upstream / denominator * (softmax - onehot) * weight. Reads E, writes E, one launch. A team has a
// row; with gridDim.y > 1 a part of it. Windows are aligned in the gradient, which may replace the logits (x null).
template <class Rule, class T>
__device__ __forceinline__ void emit_rows(const Problem &p, const T *x, const void *t, const Acc<T> *weight, const Acc<T> *statistics, const Acc<T> *denominator, const Acc<T> *upstream, T *out) {
    using A = Acc<T>;
    if (!x) x = out;
    const int team = p.team, thread = threadIdx.x % team, teams = blockDim.x / team;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * teams; first < p.rows; first += static_cast<int64_t>(gridDim.x) * teams) {
        const int64_t row = first + threadIdx.x / team;
        if (row >= p.rows) continue;
        const Target<A> target = read_target(p, t, weight, row);
        const RowScalars<A> s = saved_scalars<Rule>(p, target, statistics, denominator, upstream, row);
        T *to = out + row * p.classes;
        const Windows<T> w(x + p.x.start(row), to, p.classes);
        const int part = (w.count + gridDim.y - 1) / gridDim.y;
        const int begin = min(w.count, static_cast<int>(blockIdx.y) * part), end = min(w.count, begin + part);
        emit_windows<Rule>(p, operands_of(p, t, weight, row), w, s, to, begin + thread, team, end, {nullptr, 0});
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Clusters: blocks of neighbouring multiprocessors that read each other's shared memory

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ unsigned cluster_rank() {
    unsigned r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The address of a shared variable in another block of the cluster.
__device__ __forceinline__ uint32_t cluster_address(const void *local, unsigned rank) {
    uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(local)), remote;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    return remote;
}
__device__ __forceinline__ void cluster_load(float &v, uint32_t address) {
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(address) : "memory");
}
__device__ __forceinline__ void cluster_load(int &v, uint32_t address) {
    asm volatile("ld.shared::cluster.s32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
}
__device__ __forceinline__ void cluster_load(double &v, uint32_t address) {
    asm volatile("ld.shared::cluster.f64 %0, [%1];" : "=d"(v) : "r"(address) : "memory");
}
#else
// Without clusters these are never launched; they compile so that one source serves all architectures.
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_sync() {}
__device__ __forceinline__ uint32_t cluster_address(const void *, unsigned) { return 0; }
template <class A> __device__ __forceinline__ void cluster_load(A &, uint32_t) {}
#endif

// What a block of a cluster shows to the others.
template <class A, Detail D> struct Exchange {
    State<A, D> state;
    A own_logit;
};

// Merges the states of the blocks of a cluster, in the order of their ranks, and fetches the own logit from the block that
// read it: all threads of all its blocks call it and get both. The blocks' `shared` may be used again.
template <int CLUSTER, class T, class A, Detail D>
__device__ __forceinline__ void merge_cluster(State<A, D> &state, A &own_logit, int owner, Exchange<A, D> *shared) {
    if (threadIdx.x == 0) {
        shared->state = state;
        shared->own_logit = own_logit;
    }
    cluster_sync();
    cluster_load(own_logit, cluster_address(&shared->own_logit, owner));
    state = State<A, D>::empty();
    for (int rank = 0; rank < CLUSTER; rank++) {
        State<A, D> part;
        part.each([&](auto &field, int) {
            // a field's address in the other block is that in this one
            const ptrdiff_t offset = reinterpret_cast<const char *>(&field) - reinterpret_cast<const char *>(&part);
            cluster_load(field, cluster_address(reinterpret_cast<const char *>(&shared->state) + offset, rank));
        });
        state = merge<T>(state, part);
    }
    // nobody overwrites or leaves while others read
    cluster_sync();
}

// Loss and gradient in one pass. A team (or a cluster of blocks) reads its row once, keeps `Problem::kept` windows a thread
// in shared memory, merges the states, and writes the gradient from what it kept. What does not fit is read a second time,
// most recent first, which the second-level cache serves. Reads E, writes E.
//
// The gradient may replace the logits (x null): a window is read, and written, by one thread alone, and the own logits are
// read before the barriers (or the shuffles) of the merge.
template <class Rule, int CLUSTER, class T>
__device__ __forceinline__ void fused_rows(const Problem &p, const T *x, T *to, const void *t, const Acc<T> *weight, const double *counts, const Outputs<Acc<T>> &out) {
    using A = Acc<T>;
    constexpr Detail D = Rule::DETAIL;
    extern __shared__ uint4 slots[];
    __shared__ double scratch[WARP];
    __shared__ State<A, D> states[WARP];
    __shared__ Exchange<A, D> exchange;
    if (!x) x = to;
    const Kept kept = {slots + threadIdx.x, p.kept};
    const int team = p.team, teams = blockDim.x / team;
    const int blocks = gridDim.x / CLUSTER;
    const int rank = CLUSTER > 1 ? cluster_rank() : 0;
    const int thread = threadIdx.x % team + rank * blockDim.x, threads = team * CLUSTER;
    const A upstream = A(1) / denominator_of(p, t, weight, counts, scratch);
    double2 total = {0, 0};
    for (int64_t first = static_cast<int64_t>(blockIdx.x / CLUSTER) * teams; first < p.rows; first += static_cast<int64_t>(blocks) * teams) {
        const int64_t row = first + threadIdx.x / team;
        const bool exists = row < p.rows;
        State<A, D> state = State<A, D>::empty();
        Target<A> target = {Kind::IGNORED, -1, A(0), A(0)};
        A x_t = A(0);
        int owner = 0;
        const int64_t at = exists ? row : 0;
        const T *logits = x + p.x.start(at);
        T *gradient = to + at * p.classes;
        const Windows<T> w(logits, gradient, p.classes);
        const Operands<A> o = operands_of(p, t, weight, at);
        if (exists) {
            target = read_target(p, t, weight, row);
            // in a cluster, by the block that will overwrite it
            owner = max(0, w.window_of(target.index)) % threads / blockDim.x;
            if (CLUSTER == 1 || owner == rank) x_t = own_logit<D>(p, logits, target);
            if (target.kind == Kind::LIVE && !(D >= GENERAL && p.log_probs)) state = reduce_windows<D>(p, o, w, thread, threads, w.count, kept);
        }
        state = merge_team<T>(state, team, states);
        if constexpr (CLUSTER > 1) merge_cluster<CLUSTER, T>(state, x_t, owner, &exchange);
        if (!exists) continue;
        if (thread == 0) {
            const double2 one = finish_row<D>(p, out, target, x_t, state, row);
            total.x += one.x, total.y += one.y;
        }
        RowScalars<A> s = RowScalars<A>::template gradient<D>(p, target, state.max, state.rest, mass_of(state), upstream);
        emit_windows<Rule>(p, o, w, s, gradient, thread, threads, w.count, kept);
    }
    if (out.partials || out.result) finish_block(p, out, total.x, total.y, scratch);
}

// log-softmax: x - m - log-sum. Reads E once, writes E; as `fused_rows` with another rule.
template <class T>
__device__ __forceinline__ void log_softmax_rows(const Problem &p, const T *x, T *to) {
    using A = Acc<T>;
    extern __shared__ uint4 slots[];
    __shared__ State<A, PLAIN> states[WARP];
    const Kept kept = {slots + threadIdx.x, p.kept};
    const Operands<A> none = {nullptr, nullptr, 0};
    const int team = p.team, thread = threadIdx.x % team, teams = blockDim.x / team;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * teams; first < p.rows; first += static_cast<int64_t>(gridDim.x) * teams) {
        const int64_t row = first + threadIdx.x / team;
        const bool exists = row < p.rows;
        const int64_t at = exists ? row : 0;
        T *result = to + at * p.classes;
        const Windows<T> w(x + p.x.start(at), result, p.classes);
        State<A, PLAIN> state = State<A, PLAIN>::empty();
        if (exists) state = reduce_windows<PLAIN>(p, none, w, thread, team, w.count, kept);
        state = merge_team<T>(state, team, states);
        if (exists) emit_windows<LogProbs>(p, none, w, RowScalars<A>::of(state.max, state.rest), result, thread, team, w.count, kept);
    }
}

} // namespace softmax
} // namespace fused_loss
