// Passes over rows that fit into the registers of a part of a warp: class indices with one q for all classes, up to 8
// KB a row.
//
// `Params::team` lanes, 8 to 32, share a row, each with up to W aligned windows of it and two of its edges. The row's
// maximum is known before the first exponential, so that lanes exchange two numbers and merge nothing. A block takes
// rows in turn, and fetches the next ones before it works on those it has: their targets two turns ahead, their logits
// one turn ahead where the registers allow, so that the memory is busy while the block computes. Those of short rows
// are prefetched further ahead. Bytes: `reduce` reads E; `fused` and `log_softmax` read E and write E.
#pragma once

#include "rows.cuh"

namespace fused_loss {
namespace softmax {

// Whether a thread has registers for the windows of two rows.
template <int W> constexpr bool AHEAD = W <= 8;

// A lane's share of a row.
template <class T, int W> struct Share {
    static constexpr int EDGES = 2;
    Window<T> windows[W];
    T edges[EDGES];

    // All of it -inf where the row is not `wanted`.
    __device__ __forceinline__ Share(const Windows<T> &w, int lane, int lanes, bool wanted) {
        load_windows(w.words(), 0, lane, lanes, wanted ? w.count : 0, windows);
#pragma unroll
        for (int e = 0; e < EDGES; e++) {
            const int i = lane + e * lanes;
            edges[e] = wanted && i < w.edges ? w.row[w.edge(i)] : narrow<T>(-infinity<float>());
        }
    }

    // How many of the lane's windows or edges begin to end are not there, where the row has `count` of them.
    __device__ __forceinline__ static int missing(int begin, int end, int lane, int lanes, int count) {
        int n = 0;
        for (int i = begin; i < end; i++) n += lane + i * lanes >= count;
        return n;
    }

    // The state of the lane's windows, U at a time.
    template <Detail D, int U>
    __device__ __forceinline__ State<float, D> reduce_windows(const Params &p, const Windows<T> &w, int lane,
                                                              int lanes) const {
        State<float, D> state;
#pragma unroll
        for (int u = 0; u < W; u += U) {
            const int classes = Window<T>::N * missing(u, u + U, lane, lanes, w.count);
            const State<float, D> part = state_of_windows<D, T, U>(p, windows, u, classes);
            state = u == 0 ? part : merge<T>(p, state, part);
        }
        return state;
    }

    // The row's state; all lanes of the warp call it, and a row's lanes get it.
    template <Detail D> __device__ __forceinline__ State<float, D> reduce(const Params &p, const Windows<T> &w) const {
        // fewer at a time where the registers are full of windows; capped ones are in small groups anyhow, but on sm_75
        // each logit of a group takes a register
        constexpr int U = D == UNIFORM && W == 16 ? 2 : BATCH<D>;
        const int lanes = p.team, lane = threadIdx.x % WARP, first = lane % lanes;
        State<float, D> state = ARCH >= 800 && D == UNIFORM && p.capped ? reduce_windows<D, W>(p, w, first, lanes)
                                                                        : reduce_windows<D, U>(p, w, first, lanes);
        if (w.edges != 0) {
            Unit<float> units[EDGES];
#pragma unroll
            for (int e = 0; e < EDGES; e++) units[e] = {widen<float>(edges[e])};
            state = merge<T>(p, state, state_of<D, T>(p, units, missing(0, EDGES, first, lanes, w.edges)));
        }
        const Moved<float> moved = merge_maxima<D, T>(p, state, lanes);
        if constexpr (D == UNIFORM) {
            if (p.capped) {
                if (state.mass != 0.0f) state.linear = fmaf(state.mass, moved.shift, state.linear);
                state.linear = lanes_reduce<Sum>(state.linear, lanes);
            } else if (p.spread != 0.0) {
                state.linear = 0;
                const float reference = reference_of(state.max);
                float mass = 0;
                sum_windows(windows, reference, [&](int u) { return first + u * lanes < w.count; }, state.linear, mass);
                if (SUM_FIRST<T>) state.linear = fmaf(-mass, reference, state.linear);
#pragma unroll
                for (int e = 0; e < EDGES; e++) {
                    if (first + e * lanes < w.edges)
                        state.linear = fmaf(widen<float>(edges[e]) - reference, UNIT, state.linear);
                }
                state.linear = lanes_reduce<Sum>(state.linear, lanes);
            }
        }
        return state;
    }
};

// Writes the rule's values for a row that is aligned as its logits are.
template <class Rule, class T, int W>
__device__ __forceinline__ void emit_share(const Params &p, const Windows<T> &w, const RowScalars<float> &s,
                                           const Share<T, W> &share, float x_t, T *out, int lane, int lanes) {
    constexpr int N = Window<T>::N;
    if (s.kind != Kind::LIVE) {
        fill_windows(w, dead_value<float>(s.kind), out, lane, lanes, 0, w.count);
        return;
    }
    const Operands<float> none = {{nullptr, nullptr}, 0};
    T *to = in_register(out + w.head);
#pragma unroll
    for (int u = 0; u < W; u++) {
        const int i = lane + u * lanes;
        if (i < w.count) emit_window<Rule>(p, none, s, w.first(i), share.windows[u], to + i * N);
    }
#pragma unroll
    for (int e = 0; e < Share<T, W>::EDGES; e++) {
        const int i = lane + e * lanes;
        if (i >= w.edges) continue;
        const float x[1] = {widen<float>(share.edges[e])};
        float y[1];
        Rule::template emit<T>(p, none, s, w.edge(i), x, y);
        out[w.edge(i)] = narrow<T>(y[0]);
    }
    if constexpr (Rule::OWN) {
        // once more, by the lane that has just written it
        if (s.target >= 0 && w.thread_of(s.target, 0, w.count, lanes) == lane)
            out[s.target] = narrow<T>(Rule::template own_value<T>(p, s, x_t));
    }
}

// Consecutive rows are `Params::x.outer_stride` apart.
//
// Applies f(row, whether it exists, its windows, lane, share, target, own logit) to each row; all threads call f alike,
// and before that `prepare` once, with the first loads on their way. Without TARGETS all rows count.
template <bool TARGETS, int W, class T, class G, class F>
__device__ __forceinline__ void for_each_share(const Params &p, const T *x, const Targets<float> &targets, G prepare,
                                               F f) {
    const int lanes = p.team, lane = threadIdx.x % lanes, teams = blockDim.x / lanes;
    const int64_t step = static_cast<int64_t>(gridDim.x) * teams;
    const auto target_of = [&](int64_t row) -> Target<float> {
        if (row >= p.rows) return {Kind::IGNORED, -1, 0, 0};
        if (!TARGETS) return {Kind::LIVE, -1, 0, 0};
        return read_target(p, targets, row);
    };
    const auto windows_of = [&](int64_t row) { return Windows<T>(x + row * p.x.outer_stride, p.classes); };
    const auto own = [&](int64_t row, const Target<float> &target) {
        return target.index < 0 ? 0.0f : widen<float>(x[row * p.x.outer_stride + target.index]);
    };

    int64_t first = static_cast<int64_t>(blockIdx.x) * teams;
    int64_t row = first + threadIdx.x / lanes;
    Target<float> target = target_of(row), next = target_of(row + step);
    // the first logits do not wait for their target
    Share<T, W> share(windows_of(row), lane, lanes, row < p.rows);
    float x_t = own(row, target);
    prepare();
    for (; first < p.rows; first += step, row += step) {
        if constexpr (W == 4) {
            // a sector for each lane
            prefetch_later(p, first, teams, [&](int64_t later) {
                const int64_t row = later + in_place(threadIdx.x) / p.team;
                const int c = min(lane * static_cast<int>(SECTOR / sizeof(T)), p.classes - 1);
                if (row < p.rows) prefetch(x + row * p.x.outer_stride + c);
            });
        }
        const Target<float> after = target_of(row + 2 * step);
        if constexpr (AHEAD<W>) {
            const Share<T, W> fetched(windows_of(row + step), lane, lanes, next.kind == Kind::LIVE);
            const float fetched_x_t = own(row + step, next);
            f(row, row < p.rows, windows_of(row), lane, share, target, x_t);
            share = fetched;
            x_t = fetched_x_t;
        } else {
            f(row, row < p.rows, windows_of(row), lane, share, target, x_t);
            share = Share<T, W>(windows_of(row + step), lane, lanes, next.kind == Kind::LIVE);
            x_t = own(row + step, next);
        }
        target = next, next = after;
    }
}

// Forward. Reads E.
template <Detail D, int W, class T>
__device__ __forceinline__ void reduce_registers(const Params &p, const T *x, const Targets<float> &targets,
                                                 const Outputs<float> &out) {
    __shared__ double scratch[WARP];
    double2 total = {0, 0};
    for_each_share<true, W>(
        p, x, targets, [] {},
        [&](int64_t row, bool exists, const Windows<T> &w, int lane, const Share<T, W> &share,
            const Target<float> &target, float x_t) {
            const State<float, D> state = share.template reduce<D>(p, w);
            if (!exists || lane != 0) return;
            const double2 one = finish_row<D>(p, targets, out, target, value_of<D>(p, x_t), state, row);
            total.x += one.x, total.y += one.y;
        });
    if (out.partials || out.result || out.denominator)
        finish_block(p, targets, out, total.x, total.y, scratch, blockIdx.x, gridDim.x);
}

// Loss and gradient, whose rows are aligned alike; the gradient may replace the logits (x null), as a row's are in
// registers before its gradient is written. Reads E, writes E.
template <class Rule, int W, class T>
__device__ __forceinline__ void fused_registers(const Params &p, const T *x, T *to, const Targets<float> &targets,
                                                const double *counts, const Outputs<float> &out) {
    constexpr Detail D = Rule::DETAIL;
    __shared__ double scratch[WARP];
    float upstream = 0;
    double2 total = {0, 0};
    const auto prepare = [&] {
        upstream = over(static_cast<float>(p.grad_scale), denominator_of(p, targets, counts, scratch));
    };
    for_each_share<true, W>(p, x ? x : to, targets, prepare,
                            [&](int64_t row, bool exists, const Windows<T> &w, int lane, const Share<T, W> &share,
                                const Target<float> &target, float x_t) {
                                const State<float, D> state = share.template reduce<D>(p, w);
                                if (!exists) return;
                                if (lane == 0) {
                                    const double2 one =
                                        finish_row<D>(p, targets, out, target, value_of<D>(p, x_t), state, row);
                                    total.x += one.x, total.y += one.y;
                                }
                                const auto s =
                                    reduced_scalars(p, targets, row, target, value_of<D>(p, x_t), state, upstream);
                                T *gradient = to + row * (x ? p.classes : p.x.outer_stride);
                                emit_share<Rule>(p, w, s, share, x_t, gradient, lane, p.team);
                            });
    if (out.partials || out.result) finish_block(p, targets, out, total.x, total.y, scratch, blockIdx.x, gridDim.x);
}

// log-softmax, whose rows are aligned as the logits'. Reads E, writes E.
template <int W, class T>
__device__ __forceinline__ void log_softmax_registers(const Params &p, const T *x, T *to, float *statistics) {
    for_each_share<false, W>(
        p, x, {nullptr, nullptr}, [] {},
        [&](int64_t row, bool exists, const Windows<T> &w, int lane, const Share<T, W> &share, const Target<float> &,
            float) {
            const State<float, PLAIN> state = share.template reduce<PLAIN>(p, w);
            if (!exists) return;
            if (lane == 0) write_statistics<PLAIN>(p, statistics, row, state);
            emit_share<LogProbs>(p, w, RowScalars<float>::of(state.max, state.rest), share, 0.0f, to + row * p.classes,
                                 lane, p.team);
        });
}

} // namespace softmax
} // namespace fused_loss
