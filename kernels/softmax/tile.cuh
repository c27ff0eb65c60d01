// Passes over many rows of few adjacent classes, with no gaps between the rows.
//
// A block takes a tile of whole rows, which is one piece of memory: it comes to shared memory in aligned windows of 16
// bytes wherever the rows begin, 1 to 8 lanes work on each row there, and a gradient goes back the same way. What a row
// takes beside its classes is shared by all classes of a lane, so that a row has as few lanes as there are rows enough
// for. Bytes: `reduce` reads E; `emit` and `fused` read E and write E.
#pragma once

#include "rows.cuh"

namespace fused_loss {
namespace softmax {

constexpr int TILE_THREADS = 256;
// Classes that a lane takes at a time.
constexpr int TILE_DEPTH = 8;

// One tile: rows of `classes` elements side by side, with the alignment that they have in global memory.
template <class T> struct Tile {
    static constexpr int N = LANES_16B<T>;

    T *data; // in shared memory: the first row's class 0, behind as many others as in a word of global memory
    int size;

    // Loads a tile; all threads of the block call it, and meet at a barrier before they use it.
    __device__ __forceinline__ void load(uint4 *shared, const T *from) {
        data = reinterpret_cast<T *>(shared) + phase_of<T, N>(from);
        const Windows<T> w(from, size);
        constexpr int U = 4;
        for (int i = threadIdx.x; i < w.count; i += U * blockDim.x) {
            Window<T> windows[U];
            load_windows(w.words(), 0, i, blockDim.x, w.count, windows);
#pragma unroll
            for (int u = 0; u < U; u++) {
                const int j = i + u * blockDim.x;
                if (j < w.count) *reinterpret_cast<uint4 *>(data + w.first(j)) = windows[u].bits();
            }
        }
        for (int i = threadIdx.x; i < w.edges; i += blockDim.x) data[w.edge(i)] = from[w.edge(i)];
    }

    // Stores the tile; all threads of the block call it, after a barrier.
    __device__ __forceinline__ void store(T *to) const {
        const Windows<T> w(to, size);
        const bool alike = phase_of<T, N>(data) == phase_of<T, N>(to);
        for (int i = threadIdx.x; i < w.count; i += blockDim.x) {
            const T *from = data + w.first(i);
            Pack<T, N> window;
            if (alike) {
                window = Pack<T, N>::load(from);
            } else {
#pragma unroll
                for (int k = 0; k < N; k++) window.at[k] = from[k];
            }
            store_word(to + w.first(i), window);
        }
        for (int i = threadIdx.x; i < w.edges; i += blockDim.x) to[w.edge(i)] = data[w.edge(i)];
    }
};

// A thread's place in a tile. It has the classes lane, lane + lanes, … of its row. Where the rows of a warp would meet
// in the same banks of shared memory, lanes begin at different ones of their classes (`Params::rotated`), so that at
// most two addresses of an access are in one bank: `rotation` in src/softmax/cuda/plan.rs.
template <class T> struct Lane {
    int64_t row;
    bool exists;
    T *logits; // in shared memory: class 0 of the row
    int lane, lanes;
    int count; // of its classes
    int first; // of its classes, the one that it begins at

    __device__ __forceinline__ explicit Lane(const Params &p) : lane(threadIdx.x % p.team), lanes(p.team) {
        count = (p.classes - lane + lanes - 1) / lanes;
        first = lane;
        if (p.rotated && count > 0) first += static_cast<int>(threadIdx.x) * p.rotated / 32 % count * lanes;
    }
    // The class behind class c.
    __device__ __forceinline__ int next(const Params &p, int c) const {
        return c + lanes < p.classes ? c + lanes : lane;
    }
};

// The rows of a tile, or what is left of them.
__device__ __forceinline__ int rows_from(const Params &p, int64_t first) {
    const int rows = blockDim.x / p.team;
    return p.rows - first < rows ? static_cast<int>(p.rows - first) : rows;
}

// Has the tile from a row on fetched to the second-level cache.
template <class T> __device__ __forceinline__ void prefetch_tile(const Params &p, const T *x, int64_t first) {
    const Windows<T> w(x + first * p.classes, rows_from(p, first) * p.classes);
    constexpr int STEP = SECTOR / 16;
    for (int i = threadIdx.x * STEP; i < w.count; i += blockDim.x * STEP)
        prefetch(w.first_word() + static_cast<int64_t>(i) * Windows<T>::N);
}

// Applies f(lane) to each tile of a block; a gradient that f leaves in shared memory goes to `out`. All threads call f
// alike.
template <class T, class F> __device__ __forceinline__ void for_each_tile(const Params &p, const T *x, T *out, F f) {
    extern __shared__ uint4 slots[];
    Lane<T> lane(p);
    const int rows = blockDim.x / lane.lanes, row = threadIdx.x / lane.lanes;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows; first < p.rows;
         first += static_cast<int64_t>(gridDim.x) * rows) {
        const int count = rows_from(p, first);
        Tile<T> tile;
        tile.size = count * p.classes;
        prefetch_later(p, first, rows, [&](int64_t later) { prefetch_tile(p, x, later); });
        tile.load(slots, x + first * p.classes);
        __syncthreads();
        lane.row = first + row;
        lane.exists = row < count;
        lane.logits = in_shared_register(tile.data + row * p.classes);
        f(lane);
        __syncthreads();
        if (!out) continue;
        tile.store(out + first * p.classes);
        __syncthreads();
    }
}

// Reduces a row; all lanes of the warp call it, and the row's lanes get its state and its own logit after scale and
// cap.
template <Detail D, class T>
__device__ __forceinline__ State<Acc<T>, D> reduce_lane(const Params &p, const Operands<Acc<T>> &o, const Lane<T> &l,
                                                        const Target<Acc<T>> &target, Acc<T> &x_t) {
    using A = Acc<T>;
    State<A, D> state = State<A, D>::empty();
    x_t = A(0);
    // only the lane that will overwrite the own logit reads it
    const int owner = max(0, target.index) % l.lanes;
    if (l.exists && owner == l.lane) x_t = own_logit<D>(p, l.logits, target);
    x_t = __shfl_sync(ALL_LANES, x_t, owner, l.lanes);
    if (l.exists && target.kind == Kind::LIVE) {
        int c = l.first;
#pragma unroll 1
        for (int i = 0; i < l.count; i += TILE_DEPTH) {
            A x[TILE_DEPTH];
#pragma unroll
            for (int u = 0; u < TILE_DEPTH; u++) {
                x[u] = i + u < l.count ? widen<A>(l.logits[c]) : -infinity<A>();
                c = l.next(p, c);
            }
            const State<A, D> part = state_of_logits<D, T>(p, x, [&](int u) { return i + u < l.count; });
            state = i == 0 ? part : merge<T>(p, state, part);
        }
    }
    return merge_lanes<T>(p, state, l.lanes);
}

// Replaces a row's logits by the rule's values.
template <class Rule, class T>
__device__ __forceinline__ void emit_lane(const Params &p, const Operands<Acc<T>> &o, const RowScalars<Acc<T>> &s,
                                          const Lane<T> &l) {
    using A = Acc<T>;
    // the own class is written once more, from what its logit was
    A own = A(0);
    const bool owner = Rule::OWN && s.kind == Kind::LIVE && s.target >= 0 && s.target % l.lanes == l.lane;
    if constexpr (Rule::OWN) {
        if (owner) own = Rule::template own_value<T>(p, s, widen<A>(l.logits[s.target]));
    }
    int c = l.first;
#pragma unroll 4
    for (int i = 0; i < l.count; i++) {
        A y[1] = {dead_value<A>(s.kind)};
        if (s.kind == Kind::LIVE) {
            const A x[1] = {widen<A>(l.logits[c])};
            Rule::template emit<T>(p, o, s, c, x, y);
        }
        l.logits[c] = narrow<T>(y[0]);
        c = l.next(p, c);
    }
    if (owner) l.logits[s.target] = narrow<T>(own);
}

// Forward. Reads E.
template <Detail D, class T>
__device__ __forceinline__ void reduce_tiles(const Params &p, const T *x, const Targets<Acc<T>> &targets,
                                             const Outputs<Acc<T>> &out) {
    using A = Acc<T>;
    __shared__ double scratch[WARP];
    double2 total = {0, 0};
    for_each_tile(p, x, static_cast<T *>(nullptr), [&](const Lane<T> &l) {
        const int64_t row = l.exists ? l.row : 0;
        const Target<A> target = read_target(p, targets, row);
        A x_t;
        const State<A, D> state = reduce_lane<D>(p, operands_of(p, targets, row), l, target, x_t);
        if (!l.exists || l.lane != 0) return;
        const double2 one = finish_row<D>(p, targets, out, target, x_t, state, row);
        total.x += one.x, total.y += one.y;
    });
    if (out.partials || out.result || out.denominator)
        finish_block(p, targets, out, total.x, total.y, scratch, blockIdx.x, gridDim.x);
}

// Backward. Reads E, writes E.
template <class Rule, class T>
__device__ __forceinline__ void emit_tiles(const Params &p, const T *x, const Targets<Acc<T>> &targets,
                                           const GradientInputs<Acc<T>> &in, T *out) {
    for_each_tile(p, x ? x : out, out, [&](const Lane<T> &l) {
        if (!l.exists) return;
        const auto s = saved_scalars<Rule>(p, targets, in, l.row);
        emit_lane<Rule>(p, operands_of(p, targets, l.row), s, l);
    });
}

// Loss and gradient; the gradient may replace the logits (x null). Reads E, writes E.
template <class Rule, class T>
__device__ __forceinline__ void fused_tiles(const Params &p, const T *x, T *to, const Targets<Acc<T>> &targets,
                                            const double *counts, const Outputs<Acc<T>> &out) {
    using A = Acc<T>;
    constexpr Detail D = Rule::DETAIL;
    __shared__ double scratch[WARP];
    if (!x) x = to;
    prefetch_tile(p, x, static_cast<int64_t>(blockIdx.x) * (blockDim.x / p.team));
    const A upstream = over(A(p.grad_scale), denominator_of(p, targets, counts, scratch));
    double2 total = {0, 0};
    for_each_tile(p, x, to, [&](const Lane<T> &l) {
        const int64_t row = l.exists ? l.row : 0;
        const Target<A> target = read_target(p, targets, row);
        const Operands<A> o = operands_of(p, targets, row);
        A x_t;
        const State<A, D> state = reduce_lane<D>(p, o, l, target, x_t);
        if (!l.exists) return;
        if (l.lane == 0) {
            const double2 one = finish_row<D>(p, targets, out, target, x_t, state, row);
            total.x += one.x, total.y += one.y;
        }
        emit_lane<Rule>(p, o, reduced_scalars(p, targets, row, target, x_t, state, upstream), l);
    });
    if (out.partials || out.result) finish_block(p, targets, out, total.x, total.y, scratch, blockIdx.x, gridDim.x);
}

// log-softmax. Reads E, writes E.
template <class T>
__device__ __forceinline__ void log_softmax_tiles(const Params &p, const T *x, T *to, Acc<T> *statistics) {
    using A = Acc<T>;
    const Operands<A> none = {{nullptr, nullptr}, 0};
    const Target<A> live = {Kind::LIVE, -1, A(0), A(0)};
    for_each_tile(p, x, to, [&](const Lane<T> &l) {
        A x_t;
        const State<A, PLAIN> state = reduce_lane<PLAIN>(p, none, l, live, x_t);
        if (!l.exists) return;
        if (l.lane == 0) write_statistics<PLAIN>(p, statistics, l.row, state);
        emit_lane<LogProbs>(p, none, RowScalars<A>::of(state.max, state.rest), l);
    });
}

} // namespace softmax
} // namespace fused_loss
