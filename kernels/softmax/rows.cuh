// Passes over rows of adjacent classes.
//
// A row is cut into aligned windows of 16 bytes, whatever the row's own alignment: with 50257 classes each row begins
// somewhere else. A window is moved by one access; the few classes before the first and behind the last one, the edges,
// go one to a thread. Where logits and gradient are not aligned alike, all classes of the gradient are edges.
// `Params::team` threads share a row: a part of a warp, so that a block has several rows, or a block.
//
// Bytes, with E those of the logits: `reduce` reads E; `emit` (the backward) reads E and writes E; `fused` and
// `log_softmax` read E, keep it in shared memory and write E, the least that is possible. What of a row shared memory
// does not hold is read a second time.
#pragma once

#include "state.cuh"

namespace fused_loss {
namespace softmax {

// Windows that a thread loads before it uses the first, so that the memory is kept busy. A pass that only reads needs
// more bytes in flight than one that writes as much as it reads.
template <Detail D> constexpr int BATCH = D <= UNIFORM ? 4 : 1;
// UNIFORM keeps f32 logits in registers until their maximum is known.
template <Detail D, class T>
constexpr int READ_BATCH = BATCH<D> * (D <= UNIFORM && sizeof(T) < (D == PLAIN ? 8 : 4) ? 2 : 1);

// The windows in flight of a thread in the general kernels, which compute so long on each window that they use one at a
// time.
template <Detail D> constexpr int QUEUE = D == GENERAL ? 4 : 2;

// 16 bytes of logits in registers.
template <class T> struct alignas(16) Window {
    static constexpr int N = LANES_16B<T>, UNITS = N / Unit<T>::LOGITS;
    Unit<T> at[UNITS];

    __device__ __forceinline__ static Window of(uint4 bits) {
        Window w;
        *reinterpret_cast<uint4 *>(w.at) = bits;
        return w;
    }
    __device__ __forceinline__ uint4 bits() const { return *reinterpret_cast<const uint4 *>(at); }
    __device__ __forceinline__ static Window load(const T *p) { return of(*reinterpret_cast<const uint4 *>(p)); }
    __device__ __forceinline__ static Window lowest() {
        Window w;
#pragma unroll
        for (int i = 0; i < UNITS; i++) w.at[i] = Unit<T>::lowest();
        return w;
    }
    __device__ __forceinline__ Acc<T> logit(int k) const { return at[k / Unit<T>::LOGITS].logit(k % Unit<T>::LOGITS); }
};

// Stores a window in one access: left to itself, the compiler sometimes makes four of it.
template <class T, int N> __device__ __forceinline__ void store_window(T *to, const Pack<T, N> &window) {
    static_assert(sizeof(window.at) == 16, "a window is 16 bytes");
    const uint4 v = *reinterpret_cast<const uint4 *>(window.at);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
}

// The same pointer into global memory, made opaque so that the compiler keeps it: left to itself, it recomputes the
// pointer for every access.
template <class P> __device__ __forceinline__ P *in_register(P *p) {
    size_t address = __cvta_generic_to_global(p);
    asm("" : "+l"(address));
    return static_cast<P *>(__cvta_global_to_generic(address));
}

// One row as windows and edges.
template <class T> struct Windows {
    static constexpr int N = LANES_16B<T>;

    const T *row; // class 0
    int head;     // classes before window 0
    int count;    // windows
    int edges;    // classes before window 0 and behind the last one

    __device__ __forceinline__ Windows(const T *row, int classes) : row(row) {
        head = min((N - phase_of<T, N>(row)) % N, classes);
        count = (classes - head) / N;
        edges = classes - count * N;
    }

    // The windows for a pass that writes a row of as many classes to `out`.
    __device__ __forceinline__ Windows written_to(const T *out) const {
        Windows w = *this;
        if (phase_of<T, N>(row) != phase_of<T, N>(out)) {
            w.edges += w.count * N;
            w.head = w.count = 0;
        }
        return w;
    }

    // A window's first class, and an edge's class.
    __device__ __forceinline__ int first(int window) const { return head + window * N; }
    __device__ __forceinline__ int edge(int i) const { return i < head ? i : i + count * N; }

    // Which of `threads` threads, a power of two, handles a class if they share the windows from `begin` to `end` and,
    // if `begin` is 0, the edges; -1 if the class is in none of these.
    __device__ __forceinline__ int thread_of(int index, int begin, int end, int threads) const {
        const int window = (index - head) / N;
        if (index < head || window >= count)
            return begin == 0 ? (index < head ? index : index - count * N) & (threads - 1) : -1;
        return window >= begin && window < end ? (window - begin) & (threads - 1) : -1;
    }
};

// The windows i, i + step, … below `end`, and -inf behind it; `body` is window 0. All loads are issued before one is
// waited for.
template <class T, int U>
__device__ __forceinline__ void load_windows(const T *body, int i, int step, int end, Window<T> (&to)[U]) {
#pragma unroll
    for (int u = 0; u < U; u++) {
        to[u] = Window<T>::lowest();
        if (i + u * step < end) to[u] = Window<T>::load(body + static_cast<int64_t>(i + u * step) * Window<T>::N);
    }
}

// The windows that a thread keeps in shared memory: slot j of all threads side by side, so that neighbouring threads
// never meet in a bank, and no thread waits for another.
struct Kept {
    uint4 *slots; // this thread's slot 0
    int count;    // all windows of the thread, or a multiple of any batch

    __device__ __forceinline__ uint4 &at(int j) const { return slots[j * blockDim.x]; }
};

// Whether UNIFORM's `linear` comes from the sum of the logits themselves, in one multiply-add each, before their
// maximum is known. The sum of thousands of 16-bit logits is exact in 24 bits where all are about as large as the
// maximum; where they are not, its rounding is small beside their differences from the maximum.
template <class T> constexpr bool SUM_FIRST = sizeof(T) == 2;

// Adds UNIT (x - reference) of the windows' logits to `sum`, and UNIT for each of them to `mass`; `exists(i)` says
// whether window i is there or filled with -inf.
template <class T, int U, class F>
__device__ __forceinline__ void sum_windows(const Window<T> (&windows)[U], float reference, F exists, float &sum,
                                            float &mass) {
    constexpr int N = Window<T>::N;
#pragma unroll
    for (int u = 0; u < U; u++) {
        if (!exists(u)) continue;
        mass += N * UNIT;
#pragma unroll
        for (int k = 0; k < N; k++)
            sum = fmaf(SUM_FIRST<T> ? windows[u].logit(k) : windows[u].logit(k) - reference, UNIT, sum);
    }
}

// The state of U windows from `first` on, but for `linear` and `mass`.
template <Detail D, class T, int U, int W>
__device__ __forceinline__ State<float, D> state_of_windows(const Params &p, const Window<T> (&windows)[W],
                                                            int first = 0) {
    constexpr int UNITS = Window<T>::UNITS;
    Unit<T> units[U * UNITS];
#pragma unroll
    for (int i = 0; i < U * UNITS; i++) units[i] = windows[first + i / UNITS].at[i % UNITS];
    return state_of<D, T>(p, units);
}

// Reduces the windows begin + thread, begin + thread + step, … below `end`, U at a time (GENERAL: see QUEUE); with the
// first window, the edges.
template <Detail D, int U, class T>
__device__ __forceinline__ State<Acc<T>, D> reduce_windows(const Params &p, const Operands<Acc<T>> &o,
                                                           const Windows<T> &w, int thread, int step, int begin,
                                                           int end, Kept kept) {
    constexpr int N = Windows<T>::N;
    State<Acc<T>, D> state = State<Acc<T>, D>::empty();
    const T *body = in_register(w.row + w.head);
    if constexpr (D >= GENERAL) {
        constexpr int Q = QUEUE<D>;
        Window<T> next[Q];
        load_windows(body, begin + thread, step, end, next);
#pragma unroll 1
        for (int i = begin + thread, j = 0; i < end; i += step, j++) {
            const Window<T> window = next[0];
#pragma unroll
            for (int u = 1; u < Q; u++) next[u - 1] = next[u];
            if (i + Q * step < end) next[Q - 1] = Window<T>::load(body + static_cast<int64_t>(i + Q * step) * N);
            if (j < kept.count) kept.at(j) = window.bits();
            absorb<D, T, 1, N>(state, p, o, w.first(i), 0, [&](int, int k) { return window.logit(k); });
        }
    } else {
        for (int i = begin + thread, j = 0; i < end; i += U * step, j += U) {
            Window<T> windows[U];
            load_windows(body, i, step, end, windows);
#pragma unroll
            for (int u = 0; u < U; u++) {
                if (j + u < kept.count) kept.at(j + u) = windows[u].bits();
            }
            if constexpr (D <= UNIFORM && sizeof(Acc<T>) == sizeof(float)) {
                float sum = 0, mass = 0;
                const auto exists = [&](int u) { return i + u * step < end; };
                const bool summed = D == UNIFORM && p.spread != 0.0;
                if (SUM_FIRST<T> && summed) sum_windows(windows, 0.0f, exists, sum, mass);
                State<float, D> part = state_of_windows<D, T, U>(p, windows);
                const float reference = reference_of(part.max);
                if (!SUM_FIRST<T> && summed) sum_windows(windows, reference, exists, sum, mass);
                if constexpr (D == UNIFORM)
                    part.linear = SUM_FIRST<T> ? fmaf(-mass, reference, sum) : sum, part.mass = mass;
                state = merge<T>(p, state, part);
            } else {
                absorb<D, T, U, N>(state, p, o, w.first(i), step * N,
                                   [&](int u, int k) { return windows[u].logit(k); });
            }
        }
    }
    if (begin == 0) {
        for (int i = thread; i < w.edges; i += step) {
            const int c = w.edge(i);
            const Acc<T> x = widen<Acc<T>>(w.row[c]);
            absorb<D, T, 1, 1>(state, p, o, c, 0, [&](int, int) { return x; });
        }
    }
    return state;
}

// Fills the windows and edges of a row that doesn't count.
template <class T>
__device__ __forceinline__ void fill_windows(const Windows<T> &w, T value, T *out, int thread, int step, int begin,
                                             int end) {
    Pack<T, Windows<T>::N> pack;
#pragma unroll
    for (int k = 0; k < Windows<T>::N; k++) pack.at[k] = value;
    for (int i = begin + thread; i < end; i += step) store_window(out + w.first(i), pack);
    if (begin == 0) {
        for (int i = thread; i < w.edges; i += step) out[w.edge(i)] = value;
    }
}

// Writes the rule's values for a window whose first class is `first`; element by element where `to` is not aligned.
template <class Rule, class T>
__device__ __forceinline__ void emit_window(const Params &p, const Operands<Acc<T>> &o, const RowScalars<Acc<T>> &s,
                                            int first, const Window<T> &window, T *to, bool aligned = true) {
    constexpr int N = Window<T>::N;
    Acc<T> x[N], y[N];
#pragma unroll
    for (int k = 0; k < N; k++) x[k] = window.logit(k);
    Rule::template emit<T>(p, o, s, first, x, y);
    Pack<T, N> written;
#pragma unroll
    for (int k = 0; k < N; k++) written.at[k] = narrow<T>(y[k]);
    if (aligned) {
        store_window(to, written);
    } else {
#pragma unroll
        for (int k = 0; k < N; k++) to[k] = written.at[k];
    }
}

// Writes the windows begin + thread, begin + thread + step, … below `end`; with the first window, the edges. From the
// last to the first, as the last ones are still in the cache if the row was read before; the first ones from shared
// memory where they were kept.
template <class Rule, class T>
__device__ __forceinline__ void emit_windows(const Params &p, const Operands<Acc<T>> &o, const Windows<T> &w,
                                             const RowScalars<Acc<T>> &s, T *out, int thread, int step, int begin,
                                             int end, Kept kept) {
    constexpr int U = BATCH<Rule::DETAIL>, N = Windows<T>::N;
    if (s.kind != Kind::LIVE) {
        fill_windows(w, narrow<T>(dead_value<Acc<T>>(s.kind)), out, thread, step, begin, end);
        return;
    }
    // the thread that writes the own class's window (or edge) afterwards writes that class once more
    const bool owner = Rule::OWN && s.target >= 0 && w.thread_of(s.target, begin, end, step) == thread;
    T own = narrow<T>(Acc<T>(0));
    if constexpr (Rule::OWN) {
        // before this thread overwrites the logit
        if (owner) own = narrow<T>(Rule::template own_value<T>(p, s, widen<Acc<T>>(w.row[s.target])));
    }
    const T *logits = in_register(w.row + w.head);
    T *to = in_register(out + w.head);
    const int mine = begin + thread < end ? (end - begin - thread + step - 1) / step : 0;
    for (int j = (mine + U - 1) / U * U - U; j >= 0; j -= U) {
        const int i = begin + thread + j * step;
        Window<T> windows[U];
        if (j < kept.count) {
#pragma unroll
            for (int u = 0; u < U; u++) {
                if (j + u < mine) windows[u] = Window<T>::of(kept.at(j + u));
            }
        } else {
            load_windows(logits, i, step, end, windows);
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (j + u < mine)
                emit_window<Rule>(p, o, s, w.first(i + u * step), windows[u],
                                  to + static_cast<int64_t>(i + u * step) * N);
        }
    }
    if (begin == 0) {
        for (int i = thread; i < w.edges; i += step) {
            const int c = w.edge(i);
            const Acc<T> x[1] = {widen<Acc<T>>(w.row[c])};
            Acc<T> y[1];
            Rule::template emit<T>(p, o, s, c, x, y);
            out[c] = narrow<T>(y[0]);
        }
    }
    if (owner) out[s.target] = own;
}

// The own class's logit after scale and cap.
template <Detail D, class T>
__device__ __forceinline__ Acc<T> own_logit(const Params &p, const T *row, const Target<Acc<T>> &target) {
    using A = Acc<T>;
    if (target.index < 0) return A(0);
    const A x = widen<A>(row[target.index * p.x.class_stride]);
    if constexpr (D >= GENERAL) {
        A slope;
        return transform(p, x, slope);
    }
    return x;
}

template <class A>
__device__ __forceinline__ Operands<A> operands_of(const Params &p, const Targets<A> &targets, int64_t row) {
    return {targets, is_index(p.target) ? 0 : p.t.start(row)};
}

// Merges the states of a team's threads: all threads of the block call it, all get their team's state, and the scratch
// memory of a state for each warp may be used again.
template <class T, class A, Detail D>
__device__ __forceinline__ State<A, D> merge_team(const Params &p, State<A, D> state, int team, State<A, D> *scratch) {
    state = merge_lanes<T>(p, state, min(team, WARP));
    if (team <= WARP) return state;
    const int lane = threadIdx.x % WARP;
    if (lane == 0) scratch[threadIdx.x / WARP] = state;
    __syncthreads();
    state = lane < team / WARP ? scratch[lane] : State<A, D>::empty();
    __syncthreads();
    return merge_lanes<T>(p, state, WARP);
}

// Ends a row whose state is known, in one thread of its team: writes the loss and the statistics that the backward
// needs.
template <Detail D, class A>
__device__ __forceinline__ double2 finish_row(const Params &p, const Outputs<A> &out, const Target<A> &target, A x_t,
                                              const State<A, D> &state, int64_t row) {
    const A loss = loss_of<D>(p, target, x_t, state);
    if (out.loss) out.loss[row] = loss;
    write_statistics<D>(p, out.statistics, row, state);
    return {static_cast<double>(loss), static_cast<double>(target.weight)};
}

// Forward. Each team takes rows in turn; with gridDim.y > 1 a team of a whole block takes that part of its row, and
// leaves the state for `merge_splits`. Reads E.
template <Detail D, class T>
__device__ __forceinline__ void reduce_rows(const Params &p, const T *x, const Targets<Acc<T>> &targets, Acc<T> *splits,
                                            const Outputs<Acc<T>> &out) {
    using A = Acc<T>;
    __shared__ double scratch[WARP];
    __shared__ State<A, D> states[WARP];
    const int team = p.team, thread = threadIdx.x % team, teams = blockDim.x / team;
    double2 total = {0, 0};
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * teams; first < p.rows;
         first += static_cast<int64_t>(gridDim.x) * teams) {
        const int64_t row = first + threadIdx.x / team;
        const bool exists = row < p.rows;
        State<A, D> state = State<A, D>::empty();
        Target<A> target = {Kind::IGNORED, -1, A(0), A(0)};
        A x_t = A(0);
        if (exists) {
            target = read_target(p, targets, row);
            const T *logits = x + p.x.start(row);
            x_t = own_logit<D>(p, logits, target);
            const Windows<T> w(logits, p.classes);
            const int part = (w.count + gridDim.y - 1) / gridDim.y;
            // only the first part begins at 0, also where there is no window at all
            const int begin = blockIdx.y == 0 ? 0 : max(1, min(w.count, static_cast<int>(blockIdx.y) * part));
            const int end = min(w.count, begin + part);
            if (target.kind == Kind::LIVE) {
                state = reduce_windows<D, READ_BATCH<D, T>>(p, operands_of(p, targets, row), w, thread, team, begin,
                                                            end, {nullptr, 0});
            }
        }
        state = merge_team<T>(p, state, team, states);
        if (!exists || thread != 0) continue;
        if (gridDim.y > 1) {
            state.each([&](auto field, int i) { splits[(row * gridDim.y + blockIdx.y) * 4 + i] = field; });
            continue;
        }
        const double2 one = finish_row<D>(p, out, target, x_t, state, row);
        total.x += one.x, total.y += one.y;
    }
    if (gridDim.y == 1 && (out.partials || out.result || out.denominator))
        finish_block(p, out, total.x, total.y, scratch, blockIdx.x, gridDim.x);
}

// The second stage of a forward whose rows were split over blocks, in one block: a warp merges the states of a row.
template <Detail D, class T>
__device__ __forceinline__ void merge_splits(const Params &p, const T *x, const Targets<Acc<T>> &targets,
                                             const Acc<T> *splits, int count, const Outputs<Acc<T>> &out) {
    using A = Acc<T>;
    __shared__ double scratch[WARP];
    const int lane = threadIdx.x % WARP;
    double2 total = {0, 0};
    for (int64_t row = threadIdx.x / WARP; row < p.rows; row += blockDim.x / WARP) {
        State<A, D> state = State<A, D>::empty();
        for (int i = lane; i < count; i += WARP) {
            State<A, D> part;
            part.each([&](auto &field, int f) { field = splits[(row * count + i) * 4 + f]; });
            state = merge<T>(p, state, part);
        }
        state = merge_lanes<T>(p, state, WARP);
        if (lane != 0) continue;
        const Target<A> target = read_target(p, targets, row);
        const double2 one = finish_row<D>(p, out, target, own_logit<D>(p, x + p.x.start(row), target), state, row);
        total.x += one.x, total.y += one.y;
    }
    finish_block(p, out, total.x, total.y, scratch, blockIdx.x, gridDim.x);
}

// The forward with more numbers for each row.
template <class A> struct StatisticsOutputs {
    A *loss, *lse, *z_loss, *entropy;
    uint32_t *argmax;
    float *correct, *counted;
};

template <class A>
__device__ __forceinline__ void write_row_statistics(const Params &p, const StatisticsOutputs<A> &out,
                                                     const Target<A> &target, A loss, const State<A, STATISTICS> &state,
                                                     int64_t row) {
    const A log_sum = log_sum_of(state.max, state.rest);
    const A lse = scaled<STATISTICS>(p, state.max) + log_sum;
    const bool kept = target.kind != Kind::IGNORED;
    const int own = is_index(p.target) ? target.index : state.top_class;
    const int argmax = state.argmax == NO_CLASS ? 0 : state.argmax;
    out.loss[row] = loss;
    out.lse[row] = kept ? lse : A(0);
    out.z_loss[row] = kept ? z_loss_of(p, lse) : A(0);
    out.entropy[row] = kept ? log_sum - scaled<STATISTICS>(p, state.moment) / (A(1) + state.rest) : A(0);
    out.argmax[row] = argmax;
    out.correct[row] = kept && own == argmax ? 1.0f : 0.0f;
    out.counted[row] = kept ? 1.0f : 0.0f;
}

template <class T>
__device__ __forceinline__ void statistics_rows(const Params &p, const T *x, const Targets<Acc<T>> &targets,
                                                const Outputs<Acc<T>> &out, const StatisticsOutputs<Acc<T>> &numbers) {
    using A = Acc<T>;
    __shared__ double scratch[WARP];
    __shared__ State<A, STATISTICS> states[WARP];
    const int team = p.team, thread = threadIdx.x % team, teams = blockDim.x / team;
    double2 total = {0, 0};
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * teams; first < p.rows;
         first += static_cast<int64_t>(gridDim.x) * teams) {
        const int64_t row = first + threadIdx.x / team;
        const bool exists = row < p.rows;
        State<A, STATISTICS> state = State<A, STATISTICS>::empty();
        Target<A> target = {Kind::IGNORED, -1, A(0), A(0)};
        A x_t = A(0);
        if (exists) {
            target = read_target(p, targets, row);
            const T *logits = x + p.x.start(row);
            x_t = own_logit<STATISTICS>(p, logits, target);
            const Windows<T> w(logits, p.classes);
            state = reduce_windows<STATISTICS, BATCH<STATISTICS>>(p, operands_of(p, targets, row), w, thread, team, 0,
                                                                  w.count, {nullptr, 0});
        }
        state = merge_team<T>(p, state, team, states);
        if (!exists || thread != 0) continue;
        const double2 one = finish_row<STATISTICS>(p, out, target, x_t, state, row);
        write_row_statistics(p, numbers, target, A(one.x), state, row);
        total.x += one.x, total.y += one.y;
    }
    if (out.partials || out.result || out.denominator)
        finish_block(p, out, total.x, total.y, scratch, blockIdx.x, gridDim.x);
}

// The operands of a backward beside the logits and their targets.
template <class A> struct GradientInputs {
    const A *statistics;  // the numbers of each row that the forward saved
    const A *denominator; // the divisor of the forward
    const A *upstream;    // a number for each row or one for all; null: the grad scale
};

// A row's scalars in the backward.
template <class Rule, class A>
__device__ __forceinline__ RowScalars<A> saved_scalars(const Params &p, const Target<A> &target,
                                                       const GradientInputs<A> &in, int64_t row) {
    const A g = over(in.upstream ? in.upstream[p.upstream_rows ? row : 0] : A(p.grad_scale), *in.denominator);
    const A mass = Rule::DETAIL >= UNIFORM ? read_mass(p, in.statistics, row) : A(0);
    const A max = in.statistics[row], rest = in.statistics[p.rows + row];
    return RowScalars<A>::template gradient<Rule::DETAIL>(p, target, max, rest, mass, g);
}

// The backward: upstream / denominator * (slope p - q). Reads E, writes E, one launch. A team
// has a row; with gridDim.y > 1 a part of it. The gradient may replace the logits (x null).
template <class Rule, class T>
__device__ __forceinline__ void emit_rows(const Params &p, const T *x, const Targets<Acc<T>> &targets,
                                          const GradientInputs<Acc<T>> &in, T *out) {
    using A = Acc<T>;
    if (!x) x = out;
    const int team = p.team, thread = threadIdx.x % team, teams = blockDim.x / team;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * teams; first < p.rows;
         first += static_cast<int64_t>(gridDim.x) * teams) {
        const int64_t row = first + threadIdx.x / team;
        if (row >= p.rows) continue;
        const Target<A> target = read_target(p, targets, row);
        const RowScalars<A> s = saved_scalars<Rule>(p, target, in, row);
        T *to = out + row * p.classes;
        const Windows<T> w = Windows<T>(x + p.x.start(row), p.classes).written_to(to);
        const int part = (w.count + gridDim.y - 1) / gridDim.y;
        // only the first part begins at 0, also where there is no window at all
        const int begin = blockIdx.y == 0 ? 0 : max(1, min(w.count, static_cast<int>(blockIdx.y) * part));
        const int end = min(w.count, begin + part);
        emit_windows<Rule>(p, operands_of(p, targets, row), w, s, to, thread, team, begin, end, {nullptr, 0});
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
__device__ __forceinline__ unsigned cluster_size() {
    unsigned n;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(n));
    return n;
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
// A build without clusters has no kernel that calls these; they let one source serve all architectures.
__device__ __forceinline__ unsigned cluster_rank() { return 0; }
__device__ __forceinline__ unsigned cluster_size() { return 1; }
__device__ __forceinline__ void cluster_sync() {}
__device__ __forceinline__ uint32_t cluster_address(const void *, unsigned) { return 0; }
template <class A> __device__ __forceinline__ void cluster_load(A &, uint32_t) {}
#endif

// The shared memory of a block that the other blocks of its cluster read.
template <class A, Detail D> struct Exchange {
    State<A, D> state;
    A own_logit;
};

// Merges the states of the `blocks` blocks of a cluster, a power of two up to 16, and fetches the own logit from the
// block that read it: all threads of all its blocks call it and get both, the same bits. The blocks' `shared` may be
// used again.
template <class T, class A, Detail D>
__device__ __forceinline__ void merge_cluster(const Params &p, State<A, D> &state, A &own_logit, int owner, int blocks,
                                              Exchange<A, D> *shared) {
    if (threadIdx.x == 0) {
        shared->state = state;
        shared->own_logit = own_logit;
    }
    cluster_sync();
    cluster_load(own_logit, cluster_address(&shared->own_logit, owner));
    // neighbouring lanes fetch a block's state each, in one trip, and exchange them
    const unsigned rank = threadIdx.x & (blocks - 1);
    state.each([&](auto &field, int) {
        // a field has the same offset in the other block as in this one
        const ptrdiff_t offset = reinterpret_cast<const char *>(&field) - reinterpret_cast<const char *>(&state);
        cluster_load(field, cluster_address(reinterpret_cast<const char *>(&shared->state) + offset, rank));
    });
    state = merge_lanes<T>(p, state, blocks);
    // no block overwrites its state, or exits, while others read it
    cluster_sync();
}

// Loss and gradient in one pass. A team (or, with CLUSTER, a cluster of blocks) reads its row once, keeps
// `Params::kept` windows a thread in shared memory, merges the states, and writes the gradient from the kept windows.
// The other windows are read a second time, the most recent first, which the second-level cache serves.
//
// The gradient may replace the logits (x null): a window is read, and written, by one thread alone, and the own logits
// are read before the barriers (or the shuffles) of the merge.
template <class Rule, bool CLUSTER, class T>
__device__ __forceinline__ void fused_rows(const Params &p, const T *x, T *to, const Targets<Acc<T>> &targets,
                                           const double *counts, const Outputs<Acc<T>> &out) {
    using A = Acc<T>;
    constexpr Detail D = Rule::DETAIL;
    extern __shared__ uint4 slots[];
    __shared__ double scratch[WARP];
    __shared__ State<A, D> states[WARP];
    __shared__ Exchange<A, D> exchange;
    if (!x) x = to;
    const Kept kept = {slots + threadIdx.x, p.kept};
    const int team = p.team, teams = blockDim.x / team;
    const int size = CLUSTER ? cluster_size() : 1, rank = CLUSTER ? cluster_rank() : 0;
    const int blocks = gridDim.x / size, block = blockIdx.x / size;
    const int thread = threadIdx.x % team + rank * blockDim.x, threads = team * size;
    const A upstream = over(A(p.grad_scale), denominator_of(p, targets, counts, scratch));
    double2 total = {0, 0};
    for (int64_t first = static_cast<int64_t>(block) * teams; first < p.rows;
         first += static_cast<int64_t>(blocks) * teams) {
        const int64_t row = first + threadIdx.x / team;
        const bool exists = row < p.rows;
        State<A, D> state = State<A, D>::empty();
        Target<A> target = {Kind::IGNORED, -1, A(0), A(0)};
        A x_t = A(0);
        int owner = 0;
        const int64_t at = exists ? row : 0;
        const T *logits = x + p.x.start(at);
        T *gradient = to + at * p.classes;
        const Windows<T> w(logits, p.classes);
        const Operands<A> o = operands_of(p, targets, at);
        if (exists) {
            target = read_target(p, targets, row);
            // in a cluster, by the block that will overwrite it
            owner = w.thread_of(max(0, target.index), 0, w.count, threads) / blockDim.x;
            if (!CLUSTER || owner == rank) x_t = own_logit<D>(p, logits, target);
            if (target.kind == Kind::LIVE)
                state = reduce_windows<D, BATCH<D>>(p, o, w, thread, threads, 0, w.count, kept);
        }
        state = merge_team<T>(p, state, team, states);
        if constexpr (CLUSTER) merge_cluster<T>(p, state, x_t, owner, size, &exchange);
        if (!exists) continue;
        if (thread == 0) {
            const double2 one = finish_row<D>(p, out, target, x_t, state, row);
            total.x += one.x, total.y += one.y;
        }
        RowScalars<A> s =
            RowScalars<A>::template gradient<D>(p, target, state.max, state.rest, mass_of(p, state), upstream);
        const Windows<T> written = w.written_to(gradient);
        emit_windows<Rule>(p, o, written, s, gradient, thread, threads, 0, written.count, kept);
    }
    // in a cluster, the first block has the losses
    if (rank == 0 && (out.partials || out.result)) finish_block(p, out, total.x, total.y, scratch, block, blocks);
}

// log-softmax: x - m - log-sum, and what its backward needs. As `fused_rows` with another rule.
template <class T>
__device__ __forceinline__ void log_softmax_rows(const Params &p, const T *x, T *to, Acc<T> *statistics) {
    using A = Acc<T>;
    extern __shared__ uint4 slots[];
    __shared__ State<A, PLAIN> states[WARP];
    const Kept kept = {slots + threadIdx.x, p.kept};
    const Operands<A> none = {{nullptr, nullptr}, 0};
    const int team = p.team, thread = threadIdx.x % team, teams = blockDim.x / team;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * teams; first < p.rows;
         first += static_cast<int64_t>(gridDim.x) * teams) {
        const int64_t row = first + threadIdx.x / team;
        const bool exists = row < p.rows;
        const int64_t at = exists ? row : 0;
        T *result = to + at * p.classes;
        const Windows<T> w(x + p.x.start(at), p.classes);
        State<A, PLAIN> state = State<A, PLAIN>::empty();
        if (exists) state = reduce_windows<PLAIN, BATCH<PLAIN>>(p, none, w, thread, team, 0, w.count, kept);
        state = merge_team<T>(p, state, team, states);
        if (!exists) continue;
        if (thread == 0) write_statistics<PLAIN>(p, statistics, row, state);
        const Windows<T> written = w.written_to(result);
        emit_windows<LogProbs>(p, none, written, RowScalars<A>::of(state.max, state.rest), result, thread, team, 0,
                               written.count, kept);
    }
}

} // namespace softmax
} // namespace fused_loss
