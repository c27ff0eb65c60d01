// Passes over rows of adjacent classes.
//
// A row is cut into windows of 16 bytes, whatever the row's own alignment: with 50257 classes each row begins somewhere
// else. A pass that writes a value for each class has its windows aligned where it writes, any other where it reads;
// such a window is moved by one access. Where logits and gradient are not aligned alike, a window of logits is made of
// the two aligned words that it touches. The few classes before the first window and behind the last one, the edges, go
// one to a thread. `Params::team` threads share a row: a part of a warp, so that a block has several rows, or a block,
// or with clusters all threads of neighbouring blocks.
//
// Bytes, with E those of the logits: `reduce` reads E; `emit` (the backward) reads E and writes E; `fused` and
// `log_softmax` read E, keep it in shared memory and write E, the least that is possible; `log_softmax_backward` reads
// E twice and writes E. What of a row shared memory does not hold is read a second time.
#pragma once

#include "state.cuh"

namespace fused_loss {
namespace softmax {

// Windows that a thread loads before it uses the first, so that the memory is kept busy. A pass that only reads needs
// more bytes in flight than one that writes as much as it reads.
template <Detail D> constexpr int BATCH = D <= UNIFORM ? 4 : D == GENERAL ? 2 : 1;
// UNIFORM keeps f32 logits in registers until their maximum is known.
template <Detail D, class T>
constexpr int READ_BATCH = BATCH<D> * (D <= UNIFORM && sizeof(T) < (D == PLAIN ? 8 : 4) ? 2 : 1);

// Bytes of logits that a thread should have on their way at least: with two blocks of 256 threads, 32 KB in a
// multiprocessor. Kernels without registers for them have what they load later fetched to the second-level cache.
constexpr int IN_FLIGHT = 64;
// The same in windows.
constexpr int WINDOWS_AHEAD = IN_FLIGHT / 16;
// Bytes that a fetch brings.
constexpr int SECTOR = 32;

__device__ __forceinline__ void prefetch(const void *p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(p)));
}

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

// Stores 16 bytes in one access: left to itself, the compiler sometimes makes four of it.
template <class T, int N> __device__ __forceinline__ void store_word(T *to, const Pack<T, N> &pack) {
    static_assert(sizeof(pack.at) == 16, "a word is 16 bytes");
    const uint4 v = *reinterpret_cast<const uint4 *>(pack.at);
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
}

// Stores the values of a window.
template <class T, class A, int N> __device__ __forceinline__ void store_values(T *to, const A (&values)[N]) {
    constexpr int M = LANES_16B<T>;
#pragma unroll
    for (int i = 0; i < N; i += M) {
        Pack<T, M> pack;
#pragma unroll
        for (int k = 0; k < M; k++) pack.at[k] = narrow<T>(values[i + k]);
        store_word(to + i, pack);
    }
}

// The same pointer into global memory, made opaque so that the compiler keeps it: left to itself, it recomputes the
// pointer for every access.
template <class P> __device__ __forceinline__ P *in_register(P *p) {
    size_t address = __cvta_generic_to_global(p);
    asm("" : "+l"(address));
    return static_cast<P *>(__cvta_global_to_generic(address));
}

// The same for a pointer into shared memory.
template <class P> __device__ __forceinline__ P *in_shared_register(P *p) {
    size_t address = __cvta_generic_to_shared(p);
    asm("" : "+l"(address));
    return static_cast<P *>(__cvta_shared_to_generic(address));
}

// The same number, made opaque: what is computed of it is computed in its place, and not ahead of a loop, in which it
// would take registers.
__device__ __forceinline__ int in_place(int i) {
    asm volatile("" : "+r"(i));
    return i;
}

// One row as windows and edges.
template <class T> struct Windows {
    static constexpr int N = LANES_16B<T>;

    const T *row; // class 0
    int head;     // classes before window 0
    int count;    // windows
    int edges;    // classes before window 0 and behind the last one
    int shift;    // how many classes behind a word of 16 bytes a window begins

    // Windows that are words of the row.
    __device__ __forceinline__ Windows(const T *row, int classes) : row(row), shift(0) {
        head = min((N - phase_of<T, N>(row)) % N, classes);
        count = (classes - head) / N;
        edges = classes - count * N;
    }

    // Windows that are words of `to`, where a value for each class is written.
    template <class To> __device__ __forceinline__ Windows(const T *row, const To *to, int classes) : row(row) {
        constexpr int M = LANES_16B<To> < N ? LANES_16B<To> : N;
        head = min((M - phase_of<To, M>(to)) % M, classes);
        shift = phase_of<T, N>(row + head);
        // behind the row, where the second word of a last window might reach, the tensor may end
        count = max(0, classes - head - (shift == 0 ? 0 : N - shift)) / N;
        edges = classes - count * N;
    }

    // The word that window 0 begins in.
    __device__ __forceinline__ const T *first_word() const { return row + head - shift; }
    // The same, for many accesses.
    __device__ __forceinline__ const T *words() const { return in_register(first_word()); }

    // Leaves at most `most` windows.
    __device__ __forceinline__ void limit(int classes, int most) {
        count = min(count, most);
        edges = classes - count * N;
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

// The elements shift, shift + 1, … of two words.
template <class T> __device__ __forceinline__ Window<T> joined(uint4 low, uint4 high, int shift) {
    const int bytes = shift * static_cast<int>(sizeof(T));
    uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 6; i++) w[i] = bytes & 8 ? w[i + 2] : w[i];
#pragma unroll
    for (int i = 0; i < 5; i++) w[i] = bytes & 4 ? w[i + 1] : w[i];
    if constexpr (sizeof(T) < 4) {
#pragma unroll
        for (int i = 0; i < 4; i++) w[i] = __funnelshift_r(w[i], w[i + 1], bytes % 4 * 8);
    }
    return Window<T>::of({w[0], w[1], w[2], w[3]});
}

// The windows i, i + step, … below `end`, and -inf behind it, where window 0 begins `shift` elements behind the word at
// `words`. All words that windows begin in are on their way before one is waited for.
template <class T, int U>
__device__ __forceinline__ void load_windows(const T *words, int shift, int i, int step, int end, Window<T> (&to)[U]) {
    constexpr int N = Window<T>::N;
#pragma unroll
    for (int u = 0; u < U; u++) {
        to[u] = Window<T>::lowest();
        if (i + u * step < end) to[u] = Window<T>::load(words + static_cast<int64_t>(i + u * step) * N);
    }
    if (shift == 0) return;
#pragma unroll
    for (int u = 0; u < U; u++) {
        if (i + u * step >= end) continue;
        const Window<T> high = Window<T>::load(words + static_cast<int64_t>(i + u * step) * N + N);
        to[u] = joined<T>(to[u].bits(), high.bits(), shift);
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

// The state of U windows from `first` on; see `state_of`.
template <Detail D, class T, int U, int W>
__device__ __forceinline__ State<float, D> state_of_windows(const Params &p, const Window<T> (&windows)[W],
                                                            int first = 0, int missing = 0) {
    constexpr int UNITS = Window<T>::UNITS;
    Unit<T> units[U * UNITS];
#pragma unroll
    for (int i = 0; i < U * UNITS; i++) units[i] = windows[first + i / UNITS].at[i % UNITS];
    return state_of<D, T>(p, units, missing);
}

// Has the windows first, first + step, … below `end` fetched to the second-level cache, U of them: without registers
// for them, and whatever has to be waited for until they are read.
template <int U, class T>
__device__ __forceinline__ void prefetch_windows(const T *words, int first, int step, int end) {
#pragma unroll
    for (int u = 0; u < U; u++) {
        if (first + u * step < end) prefetch(words + static_cast<int64_t>(first + u * step) * Windows<T>::N);
    }
}

// The windows that `reduce_windows` wants to be prefetched before it begins, which may be ahead of what decides whether
// they are read.
template <int U> constexpr int FIRST_WINDOWS = U > WINDOWS_AHEAD ? U : WINDOWS_AHEAD;

// Reduces the windows begin + thread, begin + thread + step, … below `end`, U at a time, and with the first window the
// edges.
template <Detail D, int U, class T>
__device__ __forceinline__ State<Acc<T>, D> reduce_windows(const Params &p, const Operands<Acc<T>> &o,
                                                           const Windows<T> &w, int thread, int step, int begin,
                                                           int end, Kept kept) {
    constexpr int N = Windows<T>::N;
    State<Acc<T>, D> state = State<Acc<T>, D>::empty();
    const T *words = w.words();
    if constexpr (D >= GENERAL && !(D == GENERAL && sizeof(Acc<T>) == sizeof(float))) {
        // so long a computation that one window at a time, and the next one on its way, are enough
        Window<T> next[1];
        load_windows(words, w.shift, begin + thread, step, end, next);
#pragma unroll 1
        for (int i = begin + thread, j = 0; i < end; i += step, j++) {
            const Window<T> window = next[0];
            load_windows(words, w.shift, i + step, step, end, next);
            prefetch_windows<1>(words, i + WINDOWS_AHEAD * step, step, end);
            if (j < kept.count) kept.at(j) = window.bits();
            absorb<D, T, 1, N>(state, p, o, w.first(i), 0, [&](int, int k) { return window.logit(k); });
        }
    } else {
        for (int i = begin + thread, j = 0; i < end; i += U * step, j += U) {
            Window<T> windows[U];
            load_windows(words, w.shift, i, step, end, windows);
            if constexpr (U < WINDOWS_AHEAD) prefetch_windows<U>(words, i + WINDOWS_AHEAD * step, step, end);
#pragma unroll
            for (int u = 0; u < U; u++) {
                if (j + u < kept.count) kept.at(j + u) = windows[u].bits();
            }
            if constexpr (D <= UNIFORM && sizeof(Acc<T>) == sizeof(float)) {
                float sum = 0, mass = 0;
                const auto exists = [&](int u) { return i + u * step < end; };
                const bool summed = D == UNIFORM && p.spread != 0.0 && !p.capped;
                if (SUM_FIRST<T> && summed) sum_windows(windows, 0.0f, exists, sum, mass);
                int missing = 0;
#pragma unroll
                for (int u = 0; u < U; u++) missing += exists(u) ? 0 : N;
                State<float, D> part = state_of_windows<D, T, U>(p, windows, 0, missing);
                const float reference = reference_of(part.max);
                if (!SUM_FIRST<T> && summed) sum_windows(windows, reference, exists, sum, mass);
                if constexpr (D == UNIFORM) {
                    if (summed) part.linear = SUM_FIRST<T> ? fmaf(-mass, reference, sum) : sum, part.mass = mass;
                }
                state = merge<T>(p, state, part);
            } else if constexpr (D == GENERAL) {
                Unit<T> units[U * Window<T>::UNITS];
#pragma unroll
                for (int k = 0; k < U * Window<T>::UNITS; k++)
                    units[k] = windows[k / Window<T>::UNITS].at[k % Window<T>::UNITS];
                absorb_units<T, U, N>(
                    state, p, o, w.first(i), step * N, [&](int u) { return i + u * step < end; }, units);
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
template <class T, class To>
__device__ __forceinline__ void fill_windows(const Windows<T> &w, Acc<T> value, To *out, int thread, int step,
                                             int begin, int end) {
    Acc<T> values[Windows<T>::N];
#pragma unroll
    for (Acc<T> &v : values) v = value;
    for (int i = begin + thread; i < end; i += step) store_values(out + w.first(i), values);
    if (begin == 0) {
        for (int i = thread; i < w.edges; i += step) out[w.edge(i)] = narrow<To>(value);
    }
}

// Writes the rule's values for a window whose first class is `first`, from the row's operands or from numbers q.
template <class Rule, class T, class O, class To>
__device__ __forceinline__ void emit_window(const Params &p, const O &o, const RowScalars<Acc<T>> &s, int first,
                                            const Window<T> &window, To *to) {
    constexpr int N = Window<T>::N;
    Acc<T> x[N], y[N];
#pragma unroll
    for (int k = 0; k < N; k++) x[k] = window.logit(k);
    Rule::template emit<T>(p, o, s, first, x, y);
    store_values(to, y);
}

// A thread's turns through the windows begin + thread, begin + thread + step, … below `end`, U at a time and from the
// last to the first, as the last ones are still in the cache if the row was read before.
template <int U> struct Turns {
    int begin, end, step; // of the thread
    int count;            // its windows

    __device__ __forceinline__ Turns(int thread, int step, int begin, int end)
        : begin(begin + thread), end(end), step(step),
          count(begin + thread < end ? (end - begin - thread + step - 1) / step : 0) {}

    // How many of its windows lie before the first turn's. A turn follows U below, and the last one is 0.
    __device__ __forceinline__ int first() const { return (count + U - 1) / U * U - U; }
    __device__ __forceinline__ int window(int j) const { return begin + j * step; }

    // Prefetches a turn's windows where they were not kept in shared memory; there is no turn below 0.
    template <class T> __device__ __forceinline__ void prefetch_turn(const T *words, int j, Kept kept) const {
        if (j >= kept.count) prefetch_windows<U>(words, window(j), step, end);
    }
    // A turn's windows, from shared memory where they were kept.
    template <class T>
    __device__ __forceinline__ void load(const T *words, int shift, int j, Kept kept, Window<T> (&to)[U]) const {
        if (j < kept.count) {
#pragma unroll
            for (int u = 0; u < U; u++) {
                if (j + u < count) to[u] = Window<T>::of(kept.at(j + u));
            }
        } else {
            load_windows(words, shift, window(j), step, end, to);
        }
    }
};

// Windows that a rule's pass loads at a time.
template <class Rule> constexpr int EMIT_BATCH = BATCH<Rule::DETAIL>;
template <> constexpr int EMIT_BATCH<TargetGradient> = 4;
// Whether a rule takes the numbers q of a window's classes.
template <class Rule> constexpr bool READS_Q = false;
template <> constexpr bool READS_Q<GeneralGradient> = true;

// Writes the rule's values for the windows begin + thread, begin + thread + step, … below `end`; if `begin` is 0, the
// edges.
template <class Rule, class T, class To>
__device__ __forceinline__ void emit_windows(const Params &p, const Operands<Acc<T>> &o, const Windows<T> &w,
                                             const RowScalars<Acc<T>> &s, To *out, int thread, int step, int begin,
                                             int end, Kept kept) {
    constexpr int U = EMIT_BATCH<Rule>, N = Windows<T>::N;
    if (s.kind != Kind::LIVE) {
        fill_windows(w, dead_value<Acc<T>>(s.kind), out, thread, step, begin, end);
        return;
    }
    // the thread that writes the own class's window (or edge) afterwards writes that class once more
    const bool owner = Rule::OWN && s.target >= 0 && w.thread_of(s.target, begin, end, step) == thread;
    To own = narrow<To>(Acc<T>(0));
    if constexpr (Rule::OWN) {
        // before this thread overwrites the logit
        if (owner) own = narrow<To>(Rule::template own_value<T>(p, s, widen<Acc<T>>(w.row[s.target])));
    }
    const T *logits = w.words();
    To *to = in_register(out + w.head);
    const Turns<U> turns(thread, step, begin, end);
    for (int j = turns.first(); j >= 0; j -= U) {
        Window<T> windows[U];
        turns.load(logits, w.shift, j, kept, windows);
        if constexpr (U < WINDOWS_AHEAD) turns.prefetch_turn(logits, j - U, kept);
        // before the first store, which no load may pass
        Acc<T> q[U][N];
        if constexpr (READS_Q<Rule>)
            load_q(p, o, w.first(turns.window(j)), step * N, [&](int u) { return j + u < turns.count; }, q);
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (j + u >= turns.count) continue;
            const int i = turns.window(j + u);
            To *at = to + static_cast<int64_t>(i) * N;
            if constexpr (READS_Q<Rule>) {
                emit_window<Rule>(p, q[u], s, w.first(i), windows[u], at);
            } else {
                emit_window<Rule>(p, o, s, w.first(i), windows[u], at);
            }
        }
    }
    if (begin == 0) {
        for (int i = thread; i < w.edges; i += step) {
            const int c = w.edge(i);
            const Acc<T> x[1] = {widen<Acc<T>>(w.row[c])};
            Acc<T> y[1];
            Rule::template emit<T>(p, o, s, c, x, y);
            out[c] = narrow<To>(y[0]);
        }
    }
    if (owner) out[s.target] = own;
}

// The own class's logit after scale and cap.
template <Detail D, class T>
__device__ __forceinline__ Acc<T> own_logit(const Params &p, const T *row, const Target<Acc<T>> &target) {
    using A = Acc<T>;
    if (target.index < 0) return A(0);
    return value_of<D>(p, widen<A>(row[target.index * p.x.class_stride]));
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
__device__ __forceinline__ double2 finish_row(const Params &p, const Targets<A> &targets, const Outputs<A> &out,
                                              const Target<A> &target, A x_t, const State<A, D> &state, int64_t row) {
    A loss = loss_of<D>(p, target, x_t, state);
    if (target.kind == Kind::LIVE) loss = times_row_weight(p, targets, row, loss);
    if (out.loss) out.loss[row] = loss;
    write_statistics<D>(p, out.statistics, row, state);
    if constexpr (D >= UNIFORM) {
        if (p.row_transform != NO_TRANSFORM && out.statistics)
            out.statistics[slope_at(p, row)] = transformed(p, nll_of(p, x_t, state)).slope;
    }
    return {static_cast<double>(loss), static_cast<double>(target.weight)};
}

// ---------------------------------------------------------------------------------------------------------------------
// Who works on what

// The threads that share a row: some neighbouring threads of a block or, in a cluster, all threads of its blocks.
struct Team {
    int blocks, rank;    // blocks that share a row, and this block's place among them
    int lanes;           // threads of a block that share a row
    int thread, threads; // this thread's place among all that share a row, and their number

    __device__ __forceinline__ Team(const Params &p, int blocks = 1, int rank = 0)
        : blocks(blocks), rank(rank), lanes(p.team), thread(threadIdx.x % p.team + rank * blockDim.x),
          threads(p.team * blocks) {}

    // The teams of a grid, without those of parts of a row, and this one's block or cluster among them.
    __device__ __forceinline__ int count() const { return gridDim.x / blocks; }
    __device__ __forceinline__ int block() const { return blockIdx.x / blocks; }
};

// Has the rows of a later block prefetched where a block's own ones are too few bytes: of the block that is worked on
// `Params::ahead` waves later, and by the blocks of the first wave of all those in between. A block has `rows` rows
// from `first` on; prefetch(row) has those from a row on fetched.
template <class F>
__device__ __forceinline__ void prefetch_later(const Params &p, int64_t first, int rows, F prefetch) {
    if (p.ahead == 0) return;
    const int64_t wave = static_cast<int64_t>(p.wave) * rows;
#pragma unroll 1
    for (int i = first < wave ? 1 : p.ahead; i <= p.ahead; i++) {
        const int64_t later = first + i * wave;
        if (later < p.rows) prefetch(later);
    }
}

// Has a row of less than IN_FLIGHT bytes fetched to the second-level cache.
template <class T> __device__ __forceinline__ void prefetch_row(const Params &p, const T *row) {
    constexpr int STEP = SECTOR / sizeof(T);
    prefetch(row);
    if (p.classes > STEP) prefetch(row + STEP);
    prefetch(row + (p.classes - 1));
}

// The rows of a team in turn: f(row, whether it exists), called by all threads of a block alike. Where a thread has a
// row of few bytes for itself, those of `x`, and of `g` with the strides `Params::t`, are prefetched.
template <class T, class F>
__device__ __forceinline__ void for_each_row(const Params &p, const Team &team, const T *x, F f, const T *g = nullptr) {
    const int teams = blockDim.x / team.lanes;
    const int64_t step = static_cast<int64_t>(team.count()) * teams;
    for (int64_t first = static_cast<int64_t>(team.block()) * teams; first < p.rows; first += step) {
        prefetch_later(p, first, teams, [&](int64_t later) {
            const int64_t row = later + in_place(threadIdx.x);
            if (row >= p.rows) return;
            prefetch_row(p, x + p.x.start(row));
            if (g) prefetch_row(p, g + p.t.start(row));
        });
        const int64_t row = first + threadIdx.x / team.lanes;
        f(row < p.rows ? row : 0, row < p.rows);
    }
}

// Where a row of values begins: in the place of its logits, or behind the row before it.
__device__ __forceinline__ int64_t written_start(const Params &p, bool in_place, int64_t row) {
    return in_place ? p.x.start(row) : row * p.classes;
}

// A block's part of the windows of a row: all of them unless the grid has several blocks for a row. Only the first part
// begins at 0, also where there is no window at all.
struct Part {
    int begin, end;

    __device__ __forceinline__ explicit Part(int windows) {
        const int part = (windows + gridDim.y - 1) / gridDim.y;
        begin = blockIdx.y == 0 ? 0 : max(1, min(windows, static_cast<int>(blockIdx.y) * part));
        end = min(windows, begin + part);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Passes that read

// Forward. Each team takes rows in turn; with gridDim.y > 1 a team of a whole block takes that part of its row, and
// leaves the state for `merge_splits`. Reads E.
template <Detail D, class T>
__device__ __forceinline__ void reduce_rows(const Params &p, const T *x, const Targets<Acc<T>> &targets, Acc<T> *splits,
                                            const Outputs<Acc<T>> &out) {
    using A = Acc<T>;
    constexpr int U = READ_BATCH<D, T>;
    __shared__ double scratch[WARP];
    __shared__ State<A, D> states[WARP];
    const Team team(p);
    double2 total = {0, 0};
    for_each_row(p, team, x, [&](int64_t row, bool exists) {
        State<A, D> state = State<A, D>::empty();
        Target<A> target = {Kind::IGNORED, -1, A(0), A(0)};
        A x_t = A(0);
        if (exists) {
            const T *logits = x + p.x.start(row);
            const Windows<T> w(logits, p.classes);
            const Part part(w.count);
            prefetch_windows<FIRST_WINDOWS<U>>(w.first_word(), part.begin + team.thread, team.threads, part.end);
            target = read_target(p, targets, row);
            x_t = own_logit<D>(p, logits, target);
            if (target.kind == Kind::LIVE) {
                state = reduce_windows<D, U>(p, operands_of(p, targets, row), w, team.thread, team.threads, part.begin,
                                             part.end, {nullptr, 0});
            }
        }
        state = merge_team<T>(p, state, team.lanes, states);
        if (!exists || team.thread != 0) return;
        if (gridDim.y > 1) {
            state.each([&](auto field, int i) { splits[(row * gridDim.y + blockIdx.y) * 4 + i] = field; });
            return;
        }
        const double2 one = finish_row<D>(p, targets, out, target, x_t, state, row);
        total.x += one.x, total.y += one.y;
    });
    if (gridDim.y == 1 && (out.partials || out.result || out.denominator))
        finish_block(p, targets, out, total.x, total.y, scratch, blockIdx.x, gridDim.x);
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
        const double2 one =
            finish_row<D>(p, targets, out, target, own_logit<D>(p, x + p.x.start(row), target), state, row);
        total.x += one.x, total.y += one.y;
    }
    finish_block(p, targets, out, total.x, total.y, scratch, blockIdx.x, gridDim.x);
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
    constexpr int U = BATCH<STATISTICS>;
    __shared__ double scratch[WARP];
    __shared__ State<A, STATISTICS> states[WARP];
    const Team team(p);
    double2 total = {0, 0};
    for_each_row(p, team, x, [&](int64_t row, bool exists) {
        State<A, STATISTICS> state = State<A, STATISTICS>::empty();
        Target<A> target = {Kind::IGNORED, -1, A(0), A(0)};
        A x_t = A(0);
        if (exists) {
            const T *logits = x + p.x.start(row);
            const Windows<T> w(logits, p.classes);
            prefetch_windows<FIRST_WINDOWS<U>>(w.first_word(), team.thread, team.threads, w.count);
            target = read_target(p, targets, row);
            x_t = own_logit<STATISTICS>(p, logits, target);
            state = reduce_windows<STATISTICS, U>(p, operands_of(p, targets, row), w, team.thread, team.threads, 0,
                                                  w.count, {nullptr, 0});
        }
        state = merge_team<T>(p, state, team.lanes, states);
        if (!exists || team.thread != 0) return;
        const double2 one = finish_row<STATISTICS>(p, targets, out, target, x_t, state, row);
        write_row_statistics(p, numbers, target, A(one.x), state, row);
        total.x += one.x, total.y += one.y;
    });
    if (out.partials || out.result || out.denominator)
        finish_block(p, targets, out, total.x, total.y, scratch, blockIdx.x, gridDim.x);
}

// ---------------------------------------------------------------------------------------------------------------------
// Passes that write from what a forward saved

// The operands of a backward beside the logits and their targets.
template <class A> struct GradientInputs {
    const A *statistics;  // the numbers of each row that the forward saved
    const A *denominator; // the divisor of the forward
    const A *upstream;    // a number for each row or one for all; null: the grad scale
};

// A row's scalars in the backward.
template <class Rule, class A>
__device__ __forceinline__ RowScalars<A> saved_scalars(const Params &p, const Targets<A> &targets,
                                                       const GradientInputs<A> &in, int64_t row) {
    const A of_row = times_row_weight(p, targets, row, A(1));
    Target<A> target = read_target(p, targets, row, of_row);
    const A upstream = over(in.upstream ? in.upstream[p.upstream_rows ? row : 0] : A(p.grad_scale), *in.denominator);
    if constexpr (Rule::DETAIL >= UNIFORM) {
        if (p.row_transform != NO_TRANSFORM) target.own *= in.statistics[slope_at(p, row)];
    }
    const A mass = Rule::DETAIL >= UNIFORM ? read_mass(p, in.statistics, row) : A(0);
    const A max = in.statistics[row], rest = in.statistics[p.rows + row];
    return RowScalars<A>::template gradient<Rule::DETAIL>(p, target, max, rest, mass, upstream * of_row);
}

// A row's scalars for the gradient of its probability target.
template <class A>
__device__ __forceinline__ RowScalars<A> target_scalars(const Params &p, const Targets<A> &targets,
                                                        const GradientInputs<A> &in, int64_t row) {
    RowScalars<A> s = RowScalars<A>::of(in.statistics[row], in.statistics[p.rows + row]);
    const A of_row = times_row_weight(p, targets, row, A(1));
    s.kind = of_row == A(0) ? Kind::IGNORED : Kind::LIVE;
    s.upstream = of_row * over(in.upstream[p.upstream_rows ? row : 0], *in.denominator);
    return s;
}

// The values of a rule, whose scalars `scalars(row)` reads, for each class. Reads E, writes E, one launch. A team has a
// row; with gridDim.y > 1 a part of it. The values replace the logits, or are written elsewhere.
template <class Rule, class T, class To, class F>
__device__ __forceinline__ void emit_rows_by(const Params &p, const T *x, const Targets<Acc<T>> &targets, To *out,
                                             bool in_place, F scalars) {
    constexpr int U = EMIT_BATCH<Rule>;
    const Team team(p);
    for_each_row(p, team, x, [&](int64_t row, bool exists) {
        if (!exists) return;
        To *to = out + written_start(p, in_place, row);
        const Windows<T> w(x + p.x.start(row), to, p.classes);
        const Part part(w.count);
        const Turns<U> turns(team.thread, team.threads, part.begin, part.end);
        turns.prefetch_turn(w.first_word(), turns.first(), {nullptr, 0});
        emit_windows<Rule>(p, operands_of(p, targets, row), w, scalars(row), to, team.thread, team.threads, part.begin,
                           part.end, {nullptr, 0});
    });
}

// The backward: upstream / denominator * (slope p - q).
template <class Rule, class T>
__device__ __forceinline__ void emit_rows(const Params &p, const T *x, const Targets<Acc<T>> &targets,
                                          const GradientInputs<Acc<T>> &in, T *out) {
    emit_rows_by<Rule>(p, x ? x : out, targets, out, !x,
                       [&](int64_t row) { return saved_scalars<Rule>(p, targets, in, row); });
}

// The gradient of probability targets.
template <class T, class To>
__device__ __forceinline__ void target_gradient_rows(const Params &p, const T *x, const Targets<Acc<T>> &targets,
                                                     const GradientInputs<Acc<T>> &in, To *out) {
    emit_rows_by<TargetGradient>(p, x, targets, out, false,
                                 [&](int64_t row) { return target_scalars(p, targets, in, row); });
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

// The team of a kernel that may run in clusters.
__device__ __forceinline__ Team cluster_team(const Params &p) {
    return Team(p, static_cast<int>(cluster_size()), static_cast<int>(cluster_rank()));
}

// The shared memory of a block that the other blocks of its cluster read.
template <class A, Detail D> struct Exchange {
    State<A, D> state;
    A own_logit;
};

// Merges the states of the blocks of a cluster, a power of two up to 16, and fetches the own logit from the block that
// read it: all threads of all its blocks call it and get both, the same bits. The blocks' `shared` may be used again.
template <class T, class A, Detail D>
__device__ __forceinline__ void merge_cluster(const Params &p, const Team &team, State<A, D> &state, A &own_logit,
                                              int owner, Exchange<A, D> *shared) {
    if (threadIdx.x == 0) {
        shared->state = state;
        shared->own_logit = own_logit;
    }
    cluster_sync();
    cluster_load(own_logit, cluster_address(&shared->own_logit, owner));
    // neighbouring lanes fetch a block's state each, in one trip, and exchange them
    const unsigned rank = threadIdx.x & (team.blocks - 1);
    state.each([&](auto &field, int) {
        // a field has the same offset in the other block as in this one
        const ptrdiff_t offset = reinterpret_cast<const char *>(&field) - reinterpret_cast<const char *>(&state);
        cluster_load(field, cluster_address(reinterpret_cast<const char *>(&shared->state) + offset, rank));
    });
    state = merge_lanes<T>(p, state, team.blocks);
    // no block overwrites its state, or exits, while others read it
    cluster_sync();
}

// The sum of the numbers of the threads that share a row: all threads of the block, and of its cluster, call it and get
// it. `scratch` may be used again at once.
__device__ __forceinline__ double sum_row(const Team &team, double sum, double *scratch) {
    sum = team_reduce<Sum>(sum, team.lanes, in_shared_register(scratch));
    if (team.blocks == 1) return sum;
    if (threadIdx.x == 0) *scratch = sum;
    cluster_sync();
    cluster_load(sum, cluster_address(scratch, threadIdx.x & (team.blocks - 1)));
    sum = lanes_reduce<Sum>(sum, team.blocks);
    cluster_sync();
    return sum;
}

// ---------------------------------------------------------------------------------------------------------------------
// Passes that keep a row

// Loss and gradient in one pass. The threads of a team read their row once, keep `Params::kept` windows each in shared
// memory, merge their states, and write the gradient from the kept windows. The other windows are read a second time,
// the most recent first, which the second-level cache serves.
//
// The gradient may replace the logits (x null), wherever the rows are: a window is read, and written, by one thread
// alone, and the own logits are read before the barriers (or the shuffles) of the merge.
template <class Rule, class T>
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
    const Team team = cluster_team(p);
    LazyDivisor<A> divisor;
    double2 total = {0, 0};
    for_each_row(p, team, x, [&](int64_t row, bool exists) {
        State<A, D> state = State<A, D>::empty();
        Target<A> target = {Kind::IGNORED, -1, A(0), A(0)};
        A x_t = A(0);
        int owner = 0;
        const T *logits = x + p.x.start(row);
        T *gradient = to + written_start(p, x == to, row);
        const Windows<T> w(logits, gradient, p.classes);
        const Operands<A> o = operands_of(p, targets, row);
        if (exists) {
            prefetch_windows<FIRST_WINDOWS<BATCH<D>>>(w.first_word(), team.thread, team.threads, w.count);
            target = read_target(p, targets, row);
            // by the block that will overwrite it
            owner = w.thread_of(max(0, target.index), 0, w.count, team.threads) / blockDim.x;
            if (team.blocks == 1 || owner == team.rank) x_t = own_logit<D>(p, logits, target);
            if (target.kind == Kind::LIVE) {
                state = reduce_windows<D, BATCH<D>>(p, o, w, team.thread, team.threads, 0, w.count, kept);
            }
        }
        state = merge_team<T>(p, state, team.lanes, states);
        if (team.blocks > 1) merge_cluster<T>(p, team, state, x_t, owner, &exchange);
        const A upstream = over(A(p.grad_scale), divisor.get(p, targets, counts, scratch));
        if (!exists) return;
        if (team.thread == 0) {
            const double2 one = finish_row<D>(p, targets, out, target, x_t, state, row);
            total.x += one.x, total.y += one.y;
        }
        const auto s = reduced_scalars(p, targets, row, target, x_t, state, upstream);
        emit_windows<Rule>(p, o, w, s, gradient, team.thread, team.threads, 0, w.count, kept);
    });
    // in a cluster, the first block has the losses
    if (team.rank == 0 && (out.partials || out.result))
        finish_block(p, targets, out, total.x, total.y, scratch, team.block(), team.count());
}

// log-softmax: x - m - log-sum, and what its backward needs. As `fused_rows` with another rule.
template <class T>
__device__ __forceinline__ void log_softmax_rows(const Params &p, const T *x, T *to, Acc<T> *statistics) {
    using A = Acc<T>;
    extern __shared__ uint4 slots[];
    __shared__ State<A, PLAIN> states[WARP];
    __shared__ Exchange<A, PLAIN> exchange;
    const Kept kept = {slots + threadIdx.x, p.kept};
    const Operands<A> none = {{nullptr, nullptr}, 0};
    const Team team = cluster_team(p);
    for_each_row(p, team, x, [&](int64_t row, bool exists) {
        T *result = to + row * p.classes;
        const Windows<T> w(x + p.x.start(row), result, p.classes);
        State<A, PLAIN> state = State<A, PLAIN>::empty();
        if (exists) {
            state = reduce_windows<PLAIN, BATCH<PLAIN>>(p, none, w, team.thread, team.threads, 0, w.count, kept);
        }
        state = merge_team<T>(p, state, team.lanes, states);
        A unused = A(0);
        if (team.blocks > 1) merge_cluster<T>(p, team, state, unused, 0, &exchange);
        if (!exists) return;
        if (team.thread == 0) write_statistics<PLAIN>(p, statistics, row, state);
        emit_windows<LogProbs>(p, none, w, RowScalars<A>::of(state.max, state.rest), result, team.thread, team.threads,
                               0, w.count, kept);
    });
}

// log-softmax backward: g - p sum(g); see `LogSoftmaxGradient`. A team reads its row of g for the sum and keeps it,
// then reads its logits.
template <class T>
__device__ __forceinline__ void log_softmax_backward_rows(const Params &p, const T *x, const Acc<T> *statistics,
                                                          const T *g, T *to) {
    using A = Acc<T>;
    // the second loop has windows of both operands
    constexpr int U = BATCH<PLAIN>, HALF = U / 2, N = Window<T>::N;
    extern __shared__ uint4 slots[];
    __shared__ double scratch[WARP];
    const Kept kept = {slots + threadIdx.x, p.kept};
    const Team team = cluster_team(p);
    const auto of_row = [&](int64_t row, bool exists) {
        T *out = to + row * p.classes;
        Windows<T> wx(x + p.x.start(row), out, p.classes), wg(g + p.t.start(row), out, p.classes);
        wx.limit(p.classes, wg.count), wg.limit(p.classes, wx.count);
        const T *logits = wx.words(), *upstream = wg.words();
        const Turns<HALF> turns(team.thread, team.threads, 0, wx.count);
        double sum = 0;
        if (exists) {
            for (int j = 0; j < turns.count; j += U) {
                Window<T> of_g[U];
                load_windows(upstream, wg.shift, turns.window(j), team.threads, turns.end, of_g);
                // short sums in the arithmetic dtype
                A sums[4] = {};
#pragma unroll
                for (int u = 0; u < U; u++) {
                    if (j + u < kept.count) kept.at(j + u) = of_g[u].bits();
                    if (j + u >= turns.count) continue;
#pragma unroll
                    for (int k = 0; k < N; k++) sums[k % 4] += of_g[u].logit(k);
                }
                sum += static_cast<double>((sums[0] + sums[1]) + (sums[2] + sums[3]));
            }
            for (int i = team.thread; i < wg.edges; i += team.threads) sum += widen<A>(wg.row[wg.edge(i)]);
            turns.prefetch_turn(logits, turns.first(), {nullptr, 0});
        }
        const A mass = A(sum_row(team, sum, scratch));
        if (!exists) return;
        const LogSoftmaxGradient<A> rule(p, statistics, row, mass);
        T *values = in_register(out + wx.head);
        for (int j = turns.first(); j >= 0; j -= HALF) {
            Window<T> of_x[HALF], of_g[HALF];
            turns.load(logits, wx.shift, j, {nullptr, 0}, of_x);
            turns.load(upstream, wg.shift, j, kept, of_g);
            turns.prefetch_turn(logits, j - HALF, {nullptr, 0});
#pragma unroll
            for (int u = 0; u < HALF; u++) {
                if (j + u >= turns.count) continue;
                A y[N];
#pragma unroll
                for (int k = 0; k < N; k++) y[k] = rule.template value<T>(p, of_x[u].logit(k), of_g[u].logit(k));
                store_values(values + static_cast<int64_t>(turns.window(j + u)) * N, y);
            }
        }
        for (int i = team.thread; i < wx.edges; i += team.threads) {
            const int c = wx.edge(i);
            out[c] = narrow<T>(rule.template value<T>(p, widen<A>(wx.row[c]), widen<A>(wg.row[c])));
        }
    };
    for_each_row(p, team, x, of_row, g);
}

} // namespace softmax
} // namespace fused_loss
