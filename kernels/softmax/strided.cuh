// Passes over rows whose classes lie apart: (N, C, d…) with its class axis in the middle, transposed logits.
//
// A block is blockDim.x rows wide and blockDim.y deep. Neighbouring threads (x) have neighbouring rows, which lie next
// to each other in memory where the class axis is in the middle, so that a warp's accesses are coalesced without a
// copy; the threads of one x share the classes of their row. Bytes: `reduce` reads E, `emit` reads E and writes E,
// `fused` reads its rows a second time (from the first- or second-level cache, as a block's rows are small) and writes
// E.
#pragma once

#include "rows.cuh"

namespace fused_loss {
namespace softmax {

constexpr int STRIDED_THREADS = 256;
// Classes that a thread loads before it uses the first.
template <Detail D> constexpr int STRIDED_BATCH = D <= UNIFORM ? 4 : 2;

// Where a row's gradient is written: in the order (outer, class, inner), or (outer, inner, class).
struct Written {
    int64_t start, stride;

    __device__ __forceinline__ Written(const Params &p, int64_t row) {
        const int64_t inner = p.x.inner;
        start = p.class_last ? row * p.classes : row / inner * p.classes * inner + row % inner;
        stride = p.class_last ? 1 : inner;
    }
};

template <int U, class T>
__device__ __forceinline__ void load_classes(const Params &p, const T *row, int first, Acc<T> (&x)[U][1]) {
#pragma unroll
    for (int u = 0; u < U; u++) {
        const int c = first + u * blockDim.y;
        x[u][0] = c < p.classes ? widen<Acc<T>>(row[c * p.x.class_stride]) : -infinity<Acc<T>>();
    }
}

// This thread's share of a row.
template <Detail D, class T>
__device__ __forceinline__ State<Acc<T>, D> reduce_classes(const Params &p, const Operands<Acc<T>> &o, const T *row) {
    constexpr int U = STRIDED_BATCH<D>;
    State<Acc<T>, D> state = State<Acc<T>, D>::empty();
    for (int c = threadIdx.y; c < p.classes; c += U * blockDim.y) {
        Acc<T> x[U][1];
        load_classes(p, row, c, x);
        absorb<D, T, U, 1>(state, p, o, c, blockDim.y, [&](int u, int k) { return x[u][k]; });
    }
    return state;
}

// Merges the states of the threads of one x: all threads of the block call it, all get their row's state, and the
// scratch memory of a state for each thread may be used again.
template <class T, class A, Detail D>
__device__ __forceinline__ State<A, D> merge_column(const Params &p, State<A, D> state, State<A, D> *scratch) {
    State<A, D> *column = scratch + threadIdx.x;
    column[threadIdx.y * blockDim.x] = state;
    __syncthreads();
    for (int half = blockDim.y / 2; half > 0; half /= 2) {
        if (threadIdx.y < half) {
            state = merge<T>(p, state, column[(threadIdx.y + half) * blockDim.x]);
            column[threadIdx.y * blockDim.x] = state;
        }
        __syncthreads();
    }
    state = column[0];
    __syncthreads();
    return state;
}

// Writes this thread's share of a row.
template <class Rule, class T>
__device__ __forceinline__ void emit_classes(const Params &p, const Operands<Acc<T>> &o, const RowScalars<Acc<T>> &s,
                                             const T *row, T *out, const Written &written) {
    using A = Acc<T>;
    constexpr int U = STRIDED_BATCH<Rule::DETAIL>;
    const bool live = s.kind == Kind::LIVE;
    for (int c = threadIdx.y; c < p.classes; c += U * blockDim.y) {
        A x[U][1];
        if (live) load_classes(p, row, c, x);
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int at = c + u * blockDim.y;
            if (at >= p.classes) continue;
            A y[1] = {dead_value<A>(s.kind)};
            if (live) Rule::template emit<T>(p, o, s, at, x[u], y);
            if constexpr (Rule::OWN) {
                if (live && at == s.target) y[0] = Rule::template own_value<T>(p, s, x[u][0]);
            }
            out[written.start + at * written.stride] = narrow<T>(y[0]);
        }
    }
}

// The rows of a block in turn: f(row, whether it exists), called by all threads alike.
template <class F> __device__ __forceinline__ void for_strided_rows(const Params &p, F f) {
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x; first < p.rows; first += step) {
        const int64_t row = first + threadIdx.x;
        f(row < p.rows ? row : 0, row < p.rows);
    }
}

// Forward. Reads E.
template <Detail D, class T>
__device__ __forceinline__ void reduce_strided(const Params &p, const T *x, const Targets<Acc<T>> &targets,
                                               const Outputs<Acc<T>> &out) {
    using A = Acc<T>;
    __shared__ double scratch[WARP];
    __shared__ State<A, D> states[STRIDED_THREADS];
    double2 total = {0, 0};
    for_strided_rows(p, [&](int64_t row, bool exists) {
        State<A, D> state = State<A, D>::empty();
        const Target<A> target = read_target(p, targets, row);
        const T *logits = x + p.x.start(row);
        const A x_t = own_logit<D>(p, logits, target);
        if (exists && target.kind == Kind::LIVE) {
            state = reduce_classes<D>(p, operands_of(p, targets, row), logits);
        }
        state = merge_column<T>(p, state, states);
        if (exists && threadIdx.y == 0) {
            const double2 one = finish_row<D>(p, out, target, x_t, state, row);
            total.x += one.x, total.y += one.y;
        }
    });
    if (out.partials || out.result || out.denominator)
        finish_block(p, out, total.x, total.y, scratch, blockIdx.x, gridDim.x);
}

template <class T>
__device__ __forceinline__ void statistics_strided(const Params &p, const T *x, const Targets<Acc<T>> &targets,
                                                   const Outputs<Acc<T>> &out,
                                                   const StatisticsOutputs<Acc<T>> &numbers) {
    using A = Acc<T>;
    __shared__ double scratch[WARP];
    __shared__ State<A, STATISTICS> states[STRIDED_THREADS];
    double2 total = {0, 0};
    for_strided_rows(p, [&](int64_t row, bool exists) {
        State<A, STATISTICS> state = State<A, STATISTICS>::empty();
        const Target<A> target = read_target(p, targets, row);
        const T *logits = x + p.x.start(row);
        const A x_t = own_logit<STATISTICS>(p, logits, target);
        if (exists) state = reduce_classes<STATISTICS>(p, operands_of(p, targets, row), logits);
        state = merge_column<T>(p, state, states);
        if (exists && threadIdx.y == 0) {
            const double2 one = finish_row<STATISTICS>(p, out, target, x_t, state, row);
            write_row_statistics(p, numbers, target, A(one.x), state, row);
            total.x += one.x, total.y += one.y;
        }
    });
    if (out.partials || out.result || out.denominator)
        finish_block(p, out, total.x, total.y, scratch, blockIdx.x, gridDim.x);
}

// Backward. Reads E, writes E.
template <class Rule, class T>
__device__ __forceinline__ void emit_strided(const Params &p, const T *x, const Targets<Acc<T>> &targets,
                                             const GradientInputs<Acc<T>> &in, T *out) {
    if (!x) x = out;
    for_strided_rows(p, [&](int64_t row, bool exists) {
        if (!exists) return;
        const auto target = read_target(p, targets, row);
        const auto s = saved_scalars<Rule>(p, target, in, row);
        emit_classes<Rule>(p, operands_of(p, targets, row), s, x + p.x.start(row), out, Written(p, row));
    });
}

// Loss and gradient. The gradient may replace the logits (x null): all logits are read once before the barriers of the
// merge, and after them each logit is read only by the thread that overwrites it.
template <class Rule, class T>
__device__ __forceinline__ void fused_strided(const Params &p, const T *x, T *to, const Targets<Acc<T>> &targets,
                                              const double *counts, const Outputs<Acc<T>> &out) {
    using A = Acc<T>;
    constexpr Detail D = Rule::DETAIL;
    __shared__ double scratch[WARP];
    __shared__ State<A, D> states[STRIDED_THREADS];
    if (!x) x = to;
    const A upstream = over(A(p.grad_scale), denominator_of(p, targets, counts, scratch));
    double2 total = {0, 0};
    for_strided_rows(p, [&](int64_t row, bool exists) {
        State<A, D> state = State<A, D>::empty();
        Target<A> target = {Kind::IGNORED, -1, A(0), A(0)};
        A x_t = A(0);
        const T *logits = x + p.x.start(row);
        const Operands<A> o = operands_of(p, targets, row);
        if (exists) {
            target = read_target(p, targets, row);
            x_t = own_logit<D>(p, logits, target);
            if (target.kind == Kind::LIVE) state = reduce_classes<D>(p, o, logits);
        }
        state = merge_column<T>(p, state, states);
        if (!exists) return;
        if (threadIdx.y == 0) {
            const double2 one = finish_row<D>(p, out, target, x_t, state, row);
            total.x += one.x, total.y += one.y;
        }
        const auto s =
            RowScalars<A>::template gradient<D>(p, target, state.max, state.rest, mass_of(p, state), upstream);
        emit_classes<Rule>(p, o, s, logits, to, Written(p, row));
    });
    if (out.partials || out.result) finish_block(p, out, total.x, total.y, scratch, blockIdx.x, gridDim.x);
}

// log-softmax. Reads E (twice where it does not stay in the cache), writes E.
template <class T>
__device__ __forceinline__ void log_softmax_strided(const Params &p, const T *x, T *to, Acc<T> *statistics) {
    using A = Acc<T>;
    __shared__ State<A, PLAIN> states[STRIDED_THREADS];
    const Operands<A> none = {{nullptr, nullptr}, 0};
    for_strided_rows(p, [&](int64_t row, bool exists) {
        State<A, PLAIN> state = State<A, PLAIN>::empty();
        const T *logits = x + p.x.start(row);
        if (exists) state = reduce_classes<PLAIN>(p, none, logits);
        state = merge_column<T>(p, state, states);
        if (!exists) return;
        if (threadIdx.y == 0) write_statistics<PLAIN>(p, statistics, row, state);
        emit_classes<LogProbs>(p, none, RowScalars<A>::of(state.max, state.rest), logits, to, Written(p, row));
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Passes that are rare enough to have one form for all layouts

// log-softmax backward: see `LogSoftmaxGradient`. `p.t` are the strides of g. Reads x once and g twice (the second time
// from a cache), writes E.
template <class T>
__device__ __forceinline__ void log_softmax_backward_any(const Params &p, const T *x, const Acc<T> *statistics,
                                                         const T *g, T *out) {
    using A = Acc<T>;
    __shared__ double sums[STRIDED_THREADS];
    for_strided_rows(p, [&](int64_t row, bool exists) {
        const T *upstream = g + p.t.start(row);
        const T *logits = x + p.x.start(row);
        double sum = 0;
        for (int c = threadIdx.y; exists && c < p.classes; c += blockDim.y)
            sum += widen<A>(upstream[c * p.t.class_stride]);
        double *column = sums + threadIdx.x;
        column[threadIdx.y * blockDim.x] = sum;
        __syncthreads();
        for (int half = blockDim.y / 2; half > 0; half /= 2) {
            if (threadIdx.y < half) column[threadIdx.y * blockDim.x] += column[(threadIdx.y + half) * blockDim.x];
            __syncthreads();
        }
        const A mass = A(column[0]);
        __syncthreads();
        if (!exists) return;
        const LogSoftmaxGradient<A> rule(p, statistics, row, mass);
        const Written written(p, row);
        for (int c = threadIdx.y; c < p.classes; c += blockDim.y) {
            const A v = rule.template value<T>(p, widen<A>(logits[c * p.x.class_stride]),
                                               widen<A>(upstream[c * p.t.class_stride]));
            out[written.start + c * written.stride] = narrow<T>(v);
        }
    });
}

// The gradient of probability targets: see `TargetGradient`. It is written in the arithmetic dtype and in the order of
// the logits' gradient.
template <class T>
__device__ __forceinline__ void target_gradient_strided(const Params &p, const T *x, const Acc<T> *weight,
                                                        const GradientInputs<Acc<T>> &in, Acc<T> *out) {
    using A = Acc<T>;
    const Operands<A> o = {{nullptr, weight}, 0};
    for_strided_rows(p, [&](int64_t row, bool exists) {
        if (!exists) return;
        const RowScalars<A> s = target_scalars(p, in, row);
        const T *logits = x + p.x.start(row);
        const Written written(p, row);
        for (int c = threadIdx.y; c < p.classes; c += blockDim.y) {
            const A x_c[1] = {widen<A>(logits[c * p.x.class_stride])};
            A y[1];
            TargetGradient::emit<T>(p, o, s, c, x_c, y);
            out[written.start + c * written.stride] = y[0];
        }
    });
}

} // namespace softmax
} // namespace fused_loss
