// Passes over rows whose classes lie apart: (N, C, d…) with its class axis in the middle, transposed logits.
//
// A block is blockDim.x threads wide and blockDim.y deep. Neighbouring threads (x) have neighbouring rows, which lie
// next to each other in memory where the class axis is in the middle, so that a warp's accesses are coalesced without a
// copy; the threads of one x share the classes of their rows. A thread takes two rows of 16-bit logits at a time, in
// one access for both where they lie in pairs. Bytes: `reduce` reads E, `emit` reads E and writes E, `fused` reads its
// rows a second time (from the first- or second-level cache, as a block's rows are small) and writes E.
#pragma once

#include "rows.cuh"

namespace fused_loss {
namespace softmax {

constexpr int STRIDED_THREADS = 256;
// Whether a pass works on units of logits, which are those of neighbouring rows here.
template <Detail D, class T> constexpr bool IN_UNITS = D <= UNIFORM && sizeof(Acc<T>) == sizeof(float);
// The rows that a thread takes at a time. The general kernels have no registers for the states of two.
template <Detail D, class T> constexpr int ROWS_AT_ONCE = IN_UNITS<D, T> ? Unit<T>::LOGITS : 1;
// Classes that a thread loads before it uses the first: with three blocks on a multiprocessor, 33 KB on their way. The
// general kernels have their numbers q on the way too.
constexpr int UNITS_BATCH = 11;
template <Detail D, class T>
constexpr int STRIDED_BATCH = IN_UNITS<D, T>                      ? UNITS_BATCH
                              : sizeof(T) == 8 || D == STATISTICS ? 4
                              : sizeof(T) == 4                    ? 8
                                                                  : 12;
// Classes of a row that a thread has on their way, with those that it has prefetched where it has no registers for so
// many. 0: none is prefetched.
template <class T> constexpr int CLASSES_IN_FLIGHT = IN_FLIGHT / static_cast<int>(sizeof(T));
template <Detail D, class T> constexpr int PREFETCHED = IN_UNITS<D, T> ? 0 : CLASSES_IN_FLIGHT<T>;

// Where a row's gradient is written: in the order (outer, class, inner), or (outer, inner, class).
struct Written {
    int64_t start, stride;

    __device__ __forceinline__ Written(const Params &p, int64_t row) {
        const Strides to = {p.x.inner, p.classes * p.x.inner, 1, p.x.inner};
        start = p.class_last ? row * p.classes : to.start(row);
        stride = p.class_last ? 1 : to.class_stride;
    }
};

// Whether rows lie side by side in groups of R, which begin at multiples of R logits in all classes.
template <int R, class T> __device__ __forceinline__ bool in_groups(const Params &p, const T *x) {
    const bool one_axis = p.x.inner == 1;
    const int64_t apart = one_axis ? p.x.outer_stride : p.x.inner_stride, length = one_axis ? p.rows : p.x.inner;
    const int64_t others = p.x.class_stride | (one_axis ? 0 : p.x.outer_stride);
    return R > 1 && apart == 1 && (length | others) % R == 0 && phase_of<T, R>(x) == 0;
}

// The rows that a thread takes at a time: neighbours where they are `grouped`, so that one access serves all of them;
// otherwise blockDim.x apart, so that the accesses of a warp are side by side.
template <class T, int R> struct ThreadRows {
    bool grouped;
    int64_t row[R];
    bool exists[R];
    const T *logits[R];

    __device__ __forceinline__ ThreadRows(const Params &p, const T *x, int64_t first, bool grouped) : grouped(grouped) {
#pragma unroll
        for (int k = 0; k < R; k++) {
            row[k] = first + k * static_cast<int64_t>(grouped ? 1 : blockDim.x);
            exists[k] = row[k] < p.rows;
            // a place costs a division
            logits[k] = k > 0 && grouped ? logits[0] + k : x + p.x.start(row[k]);
        }
    }
    // One row whose place is known.
    __device__ __forceinline__ ThreadRows(const Params &p, int64_t first, const T *place)
        : grouped(false), row{first}, exists{first < p.rows}, logits{place} {
        static_assert(R == 1, "one row");
    }
};

// The number of a thread's classes: threadIdx.y, threadIdx.y + blockDim.y, … The block's depth is a power of two.
__device__ __forceinline__ int share_of_classes(const Params &p, int y) {
    const int depth = blockDim.y;
    return ((p.classes - 1 - y) >> (31 - __clz(depth))) + 1;
}

// Prefetches a thread's classes FROM to TO, of the `left` ones that are `step` apart. A fetch is one of SECTOR bytes,
// with those of neighbouring threads, R of each: each of these has another class fetched, for all of them.
template <int FROM, int TO, int R, class T>
__device__ __forceinline__ void prefetch_classes(const T *at, int64_t step, int left) {
    constexpr int THREADS = SECTOR / sizeof(T) / R;
    unsigned lane;
    asm("mov.u32 %0, %%laneid;" : "=r"(lane));
#pragma unroll
    for (int first = FROM; first < TO; first += THREADS) {
        const int u = first + static_cast<int>(lane % THREADS);
        if (u < min(TO, left)) prefetch(at + u * step);
    }
}

// Prefetches the first COUNT of a thread's classes of the row at `row`, and of R - 1 behind it.
template <int COUNT, int R, class T>
__device__ __forceinline__ void prefetch_first(const Params &p, const T *row, int64_t class_stride, bool exists) {
    const int y = in_place(threadIdx.y);
    prefetch_classes<0, COUNT, R>(row + y * class_stride, blockDim.y * class_stride,
                                  exists ? share_of_classes(p, threadIdx.y) : 0);
}

// Calls f with the rows of each thread in turn, and has the first COUNT classes of the next turn's rows prefetched or,
// where these are few bytes, rows of later waves, of `g` with the strides `Params::t` too. All threads of the block
// call it alike.
template <int R, int COUNT, class T, class F>
__device__ __forceinline__ void for_thread_rows(const Params &p, const T *x, F f, const T *g = nullptr) {
    const bool grouped = in_groups<R>(p, x);
    const int width = blockDim.x * R, mine = threadIdx.x * (grouped ? R : 1);
    const int64_t step = static_cast<int64_t>(gridDim.x) * width;
    // at most so many where `Params::ahead` is not 0
    constexpr int FEW = COUNT > 0 ? COUNT : UNITS_BATCH;
    const auto prefetch_few = [&](int64_t later) {
        const ThreadRows<T, R> rows(p, x, later + mine, grouped);
        if (R > 1 && grouped) return prefetch_first<FEW, R>(p, rows.logits[0], p.x.class_stride, rows.exists[0]);
#pragma unroll
        for (int k = 0; k < R; k++) {
            prefetch_first<FEW, 1>(p, rows.logits[k], p.x.class_stride, rows.exists[k]);
            if (g) prefetch_first<FEW, 1>(p, g + p.t.start(rows.row[k]), p.t.class_stride, rows.exists[k]);
        }
    };
    int64_t first = static_cast<int64_t>(blockIdx.x) * width;
    if constexpr (COUNT == 0) {
        for (; first < p.rows; first += step) {
            prefetch_later(p, first, width, prefetch_few);
            f(ThreadRows<T, R>(p, x, first + mine, grouped));
        }
    } else {
        const auto prefetched = [&](int64_t row) {
            const T *logits = x + p.x.start(row);
            if (p.ahead == 0) prefetch_first<COUNT, 1>(p, logits, p.x.class_stride, row < p.rows);
            return logits;
        };
        const T *logits = prefetched(first + mine);
        for (; first < p.rows; first += step) {
            prefetch_later(p, first, width, prefetch_few);
            const T *next = prefetched(first + step + mine);
            f(ThreadRows<T, 1>(p, first + mine, logits));
            logits = next;
        }
    }
}

// Reads a thread's classes of its rows, U at a time, of which the first COUNT have been prefetched, and has those
// behind them prefetched in time.
template <class T, int R, int U, int COUNT> struct Reader {
    const T *at[R];
    int64_t step;
    int left[R];
    bool grouped;

    __device__ __forceinline__ Reader(const Params &p, const ThreadRows<T, R> &rows) : grouped(rows.grouped) {
        step = blockDim.y * p.x.class_stride;
#pragma unroll
        for (int k = 0; k < R; k++) {
            at[k] = in_register(rows.logits[k] + threadIdx.y * p.x.class_stride);
            left[k] = rows.exists[k] ? share_of_classes(p, threadIdx.y) : 0;
        }
    }
    // Those of one row, of `share` classes of a thread.
    __device__ __forceinline__ Reader(const T *row, int64_t class_stride, int share) : grouped(false) {
        static_assert(R == 1, "one row");
        step = blockDim.y * class_stride;
        at[0] = in_register(row + threadIdx.y * class_stride);
        left[0] = share;
    }
    // The next U classes; `missing` behind the last one. All loads are issued before one is waited for.
    __device__ __forceinline__ void next(Pack<T, R> (&x)[U], T missing = narrow<T>(-infinity<Acc<T>>())) {
        if constexpr (COUNT > 0) prefetch_classes<COUNT, COUNT + U, 1>(at[0], step, left[0]);
#pragma unroll
        for (int u = 0; u < U; u++) {
#pragma unroll
            for (int k = 0; k < R; k++) x[u].at[k] = missing;
        }
        if (grouped) {
#pragma unroll
            for (int u = 0; u < U; u++, at[0] += step) {
                if (u < left[0]) x[u] = Pack<T, R>::load(at[0]);
            }
        } else {
#pragma unroll
            for (int u = 0; u < U; u++) {
#pragma unroll
                for (int k = 0; k < R; k++) {
                    if (u < left[k]) x[u].at[k] = *at[k];
                    at[k] += step;
                }
            }
        }
#pragma unroll
        for (int k = 0; k < R; k++) left[k] -= U;
    }
};

// The state of U classes of each of a unit's rows; `exists(u)` says whether class u is there or -inf.
template <Detail D, class T, int U, int R, class F>
__device__ __forceinline__ void state_of_rows(const Params &p, const Pack<T, R> (&x)[U], F exists,
                                              State<float, D> (&states)[R]) {
    if (D == UNIFORM && p.capped) {
        // a few at a time, as they take many registers; what is not there is counted
        constexpr int COUNT = 4;
#pragma unroll
        for (int k = 0; k < R; k++) {
            states[k] = State<float, D>::empty();
#pragma unroll
            for (int first = 0; first < U; first += COUNT) {
                Unit<float> logits[COUNT];
                int missing = 0;
#pragma unroll
                for (int i = 0; i < COUNT; i++) {
                    const int u = first + i;
                    logits[i] = Unit<float>::lowest();
                    if (u < U) logits[i] = {widen<float>(x[u].at[k])};
                    missing += u >= U || !exists(u);
                }
                states[k] = merge<T>(p, states[k], state_of<D, T>(p, logits, missing));
            }
        }
        return;
    }
    constexpr int SUMS = 4;
    Unit<T> units[U];
#pragma unroll
    for (int u = 0; u < U; u++) units[u] = *reinterpret_cast<const Unit<T> *>(&x[u]);
    const bool summed = D == UNIFORM && p.spread != 0.0;
    float linear[R] = {}, mass = 0;
    const auto sum = [&](int k, float reference) {
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (exists(u)) linear[k] = fmaf(widen<float>(x[u].at[k]) - reference, UNIT, linear[k]);
        }
    };
    if (summed) {
#pragma unroll
        for (int u = 0; u < U; u++) mass += exists(u) ? UNIT : 0.0f;
#pragma unroll
        for (int k = 0; k < R && SUM_FIRST<T>; k++) sum(k, 0.0f);
    }
    // a tournament in each row at once: see `tournament`
#pragma unroll
    for (int step = 1; step < U; step *= 2) {
#pragma unroll
        for (int u = 0; u + step < U; u += 2 * step) match(units[u], units[u + step]);
    }
#pragma unroll
    for (int k = 0; k < R; k++) {
        const float winner = units[0].logit(k);
        const bool nan = winner != winner;
        State<float, D> &state = states[k];
        state.max = nan ? -infinity<float>() : winner;
        const float reference = reference_of(state.max);
        float sums[SUMS] = {};
        if (nan) sums[0] = quiet_nan<float>();
#pragma unroll
        for (int u = 1; u < U; u++) sums[u % SUMS] += exp_of<D, T>(p, units[u].logit(k) - reference);
        state.rest = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        if constexpr (D == UNIFORM) {
            if (summed && !SUM_FIRST<T>) sum(k, reference);
            state.linear = SUM_FIRST<T> ? fmaf(-mass, reference, linear[k]) : linear[k];
            state.mass = mass;
        }
    }
}

// This thread's share of its rows. The first logits are on their way while `meanwhile` runs.
template <Detail D, class T, int R, class F>
__device__ __forceinline__ void reduce_classes(const Params &p, const Targets<Acc<T>> &targets,
                                               const ThreadRows<T, R> &rows, State<Acc<T>, D> (&states)[R],
                                               F meanwhile) {
    constexpr int U = STRIDED_BATCH<D, T>;
    Pack<T, R> x[U];
    Reader<T, R, U, PREFETCHED<D, T>> reader(p, rows);
    reader.next(x);
    meanwhile();
    const Operands<Acc<T>> o = operands_of(p, targets, rows.exists[0] ? rows.row[0] : 0);
#pragma unroll
    for (int k = 0; k < R; k++) states[k] = State<Acc<T>, D>::empty();
    const int share = share_of_classes(p, threadIdx.y);
    for (int j = 0; j < share;) {
        if constexpr (IN_UNITS<D, T>) {
            State<float, D> parts[R];
            state_of_rows(p, x, [&](int u) { return j + u < share; }, parts);
#pragma unroll
            for (int k = 0; k < R; k++) states[k] = j == 0 ? parts[k] : merge<T>(p, states[k], parts[k]);
        } else if constexpr (D == GENERAL && sizeof(Acc<T>) == sizeof(float)) {
            constexpr int L = Unit<T>::LOGITS;
            Unit<T> units[U / L];
#pragma unroll
            for (int i = 0; i < U / L; i++) {
                Pack<T, L> unit;
#pragma unroll
                for (int k = 0; k < L; k++) unit.at[k] = x[i * L + k].at[0];
                units[i] = *reinterpret_cast<const Unit<T> *>(&unit);
            }
            absorb_units<T, U, 1>(
                states[0], p, o, threadIdx.y + j * blockDim.y, blockDim.y, [&](int u) { return j + u < share; }, units);
        } else {
            absorb<D, T, U, 1>(states[0], p, o, threadIdx.y + j * blockDim.y, blockDim.y,
                               [&](int u, int) { return widen<Acc<T>>(x[u].at[0]); });
        }
        j += U;
        if (j < share) reader.next(x);
    }
}

// Merges the states of the threads of one x, for each of their rows: all threads of the block call it, all get their
// rows' states, and the scratch memory of a state for each thread may be used again.
template <class T, class A, Detail D, int R>
__device__ __forceinline__ void merge_columns(const Params &p, State<A, D> (&states)[R], State<A, D> *scratch) {
    if (blockDim.y == 1) return;
    State<A, D> *column = scratch + threadIdx.x;
#pragma unroll
    for (int k = 0; k < R; k++) {
        column[threadIdx.y * blockDim.x] = states[k];
        __syncthreads();
        for (int half = blockDim.y / 2; half > 0; half /= 2) {
            if (threadIdx.y < half) {
                states[k] = merge<T>(p, states[k], column[(threadIdx.y + half) * blockDim.x]);
                column[threadIdx.y * blockDim.x] = states[k];
            }
            __syncthreads();
        }
        states[k] = column[0];
        __syncthreads();
    }
}

// The targets of a thread's rows, and their own logits before scale and cap.
template <class T, int R> struct OwnClasses {
    Target<Acc<T>> target[R];
    Acc<T> x_t[R];

    __device__ __forceinline__ void read(const Params &p, const Targets<Acc<T>> &targets,
                                         const ThreadRows<T, R> &rows) {
#pragma unroll
        for (int k = 0; k < R; k++) {
            target[k] = {Kind::IGNORED, -1, Acc<T>(0), Acc<T>(0)};
            if (rows.exists[k]) target[k] = read_target(p, targets, rows.row[k]);
        }
#pragma unroll
        for (int k = 0; k < R; k++) x_t[k] = own_logit<PLAIN>(p, rows.logits[k], target[k]);
    }
};

// Whether this thread has a class of its rows among its own.
__device__ __forceinline__ bool owns_class(int index) {
    return index >= 0 && (index & (blockDim.y - 1)) == threadIdx.y;
}

// Writes this thread's share of its rows. The first logits are on their way while `scalars` fills in the rows' scalars
// and, where the rule wants them, their own logits.
template <class Rule, class T, int R, class F>
__device__ __forceinline__ void emit_classes(const Params &p, const Targets<Acc<T>> &targets,
                                             const ThreadRows<T, R> &rows, T *out, F scalars) {
    using A = Acc<T>;
    constexpr int U = STRIDED_BATCH<Rule::DETAIL, T>;
    Pack<T, R> x[U];
    Reader<T, R, U, PREFETCHED<Rule::DETAIL, T>> reader(p, rows);
    reader.next(x);
    RowScalars<A> s[R];
    A x_t[R];
    scalars(s, x_t);
    T own[R];
    if constexpr (Rule::OWN) {
#pragma unroll
        for (int k = 0; k < R; k++) own[k] = narrow<T>(Rule::template own_value<T>(p, s[k], x_t[k]));
    }
    const Operands<A> o = operands_of(p, targets, rows.exists[0] ? rows.row[0] : 0);
    const int64_t stride = Written(p, 0).stride, step = blockDim.y * stride;
    const bool grouped = rows.grouped && !p.class_last && phase_of<T, R>(out) == 0;
    // opaque where it would stay in a register that the loop is short of
    const int share = share_of_classes(p, Rule::DETAIL == UNIFORM ? in_place(threadIdx.y) : threadIdx.y);
    T *to[R];
#pragma unroll
    for (int k = 0; k < R; k++) {
        T *row = out + Written(p, rows.row[k]).start;
        to[k] = k > 0 && grouped ? to[0] + k : in_register(row + threadIdx.y * stride);
    }
    int j = 0;
    while (j < share) {
        const int first = threadIdx.y + j * blockDim.y;
        // before the first store, which no load may pass
        A q[U][1];
        if constexpr (READS_Q<Rule>) load_q(p, o, first, blockDim.y, [&](int u) { return j + u < share; }, q);
#pragma unroll
        for (int u = 0; u < U; u++) {
            // the general rules have branches of their own
            if (!IN_UNITS<Rule::DETAIL, T> && j + u >= share) continue;
            Pack<T, R> written;
#pragma unroll
            for (int k = 0; k < R; k++) {
                const A v[1] = {widen<A>(x[u].at[k])};
                A y[1];
                if constexpr (READS_Q<Rule>) {
                    Rule::template emit<T>(p, q[u], s[k], first + u * blockDim.y, v, y);
                } else {
                    Rule::template emit<T>(p, o, s[k], first + u * blockDim.y, v, y);
                }
                written.at[k] = narrow<T>(s[k].kind == Kind::LIVE ? y[0] : dead_value<A>(s[k].kind));
            }
            if (grouped && j + u < share && rows.exists[0]) written.store(to[0]);
#pragma unroll
            for (int k = 0; k < R; k++) {
                if (!grouped && j + u < share && rows.exists[k]) *to[k] = written.at[k];
                to[k] += step;
            }
        }
        j += U;
        if (j < share) reader.next(x);
    }
    if constexpr (Rule::OWN) {
        // once more, by the thread that has just written it
#pragma unroll
        for (int k = 0; k < R; k++) {
            if (owns_class(s[k].target))
                to[k][(s[k].target - static_cast<int>(threadIdx.y + j * blockDim.y)) * stride] = own[k];
        }
    }
}

// Reduces the rows of a thread and ends them: all threads of the block call it alike and get their rows' own classes
// and states. Adds the losses and weights to `total`.
template <Detail D, class T, int R, class A>
__device__ __forceinline__ void finish_rows(const Params &p, const Targets<A> &targets, const ThreadRows<T, R> &rows,
                                            const Outputs<A> &out, OwnClasses<T, R> &own, State<A, D> (&states)[R],
                                            State<A, D> *merging, double2 &total) {
    reduce_classes<D>(p, targets, rows, states, [&] { own.read(p, targets, rows); });
    merge_columns<T>(p, states, merging);
#pragma unroll
    for (int k = 0; k < R; k++) {
        if (!rows.exists[k] || threadIdx.y != 0) continue;
        const double2 one =
            finish_row<D>(p, targets, out, own.target[k], value_of<D>(p, own.x_t[k]), states[k], rows.row[k]);
        total.x += one.x, total.y += one.y;
    }
}

// Forward. Reads E, of rows that do not count too: their logits are on their way before that is known.
template <Detail D, class T>
__device__ __forceinline__ void reduce_strided(const Params &p, const T *x, const Targets<Acc<T>> &targets,
                                               const Outputs<Acc<T>> &out) {
    using A = Acc<T>;
    constexpr int R = ROWS_AT_ONCE<D, T>;
    __shared__ double scratch[WARP];
    __shared__ State<A, D> merging[STRIDED_THREADS];
    double2 total = {0, 0};
    for_thread_rows<R, PREFETCHED<D, T>>(p, x, [&](const ThreadRows<T, R> &rows) {
        OwnClasses<T, R> own;
        State<A, D> states[R];
        finish_rows(p, targets, rows, out, own, states, merging, total);
    });
    if (out.partials || out.result || out.denominator)
        finish_block(p, targets, out, total.x, total.y, scratch, blockIdx.x, gridDim.x);
}

template <class T>
__device__ __forceinline__ void statistics_strided(const Params &p, const T *x, const Targets<Acc<T>> &targets,
                                                   const Outputs<Acc<T>> &out,
                                                   const StatisticsOutputs<Acc<T>> &numbers) {
    using A = Acc<T>;
    __shared__ double scratch[WARP];
    __shared__ State<A, STATISTICS> merging[STRIDED_THREADS];
    double2 total = {0, 0};
    for_thread_rows<1, PREFETCHED<STATISTICS, T>>(p, x, [&](const ThreadRows<T, 1> &rows) {
        OwnClasses<T, 1> own;
        State<A, STATISTICS> states[1];
        reduce_classes<STATISTICS>(p, targets, rows, states, [&] { own.read(p, targets, rows); });
        merge_columns<T>(p, states, merging);
        if (rows.exists[0] && threadIdx.y == 0) {
            const double2 one = finish_row<STATISTICS>(p, targets, out, own.target[0],
                                                       value_of<STATISTICS>(p, own.x_t[0]), states[0], rows.row[0]);
            write_row_statistics(p, numbers, own.target[0], A(one.x), states[0], rows.row[0]);
            total.x += one.x, total.y += one.y;
        }
    });
    if (out.partials || out.result || out.denominator)
        finish_block(p, targets, out, total.x, total.y, scratch, blockIdx.x, gridDim.x);
}

// Backward. Reads E, writes E.
template <class Rule, class T>
__device__ __forceinline__ void emit_strided(const Params &p, const T *x, const Targets<Acc<T>> &targets,
                                             const GradientInputs<Acc<T>> &in, T *out) {
    using A = Acc<T>;
    constexpr int R = ROWS_AT_ONCE<Rule::DETAIL, T>;
    for_thread_rows<R, PREFETCHED<Rule::DETAIL, T>>(p, x ? x : out, [&](const ThreadRows<T, R> &rows) {
        emit_classes<Rule>(p, targets, rows, out, [&](RowScalars<A>(&s)[R], A(&x_t)[R]) {
#pragma unroll
            for (int k = 0; k < R; k++) {
                const int64_t row = rows.exists[k] ? rows.row[k] : 0;
                s[k] = saved_scalars<Rule>(p, targets, in, row);
                if (!rows.exists[k]) s[k].target = -1;
                // another thread may have overwritten the logit if it owns the class
                x_t[k] = owns_class(s[k].target) ? widen<A>(rows.logits[k][s[k].target * p.x.class_stride]) : A(0);
            }
        });
    });
}

// Loss and gradient. The gradient may replace the logits (x null): all logits are read once before the barriers of the
// merge, and after them each logit is read only by the thread that overwrites it.
template <class Rule, class T>
__device__ __forceinline__ void fused_strided(const Params &p, const T *x, T *to, const Targets<Acc<T>> &targets,
                                              const double *counts, const Outputs<Acc<T>> &out) {
    using A = Acc<T>;
    constexpr Detail D = Rule::DETAIL;
    constexpr int R = ROWS_AT_ONCE<D, T>;
    __shared__ double scratch[WARP];
    __shared__ State<A, D> merging[STRIDED_THREADS];
    LazyDivisor<A> divisor;
    double2 total = {0, 0};
    for_thread_rows<R, PREFETCHED<D, T>>(p, x ? x : to, [&](const ThreadRows<T, R> &rows) {
        OwnClasses<T, R> own;
        State<A, D> states[R];
        finish_rows(p, targets, rows, out, own, states, merging, total);
        const A upstream = over(A(p.grad_scale), divisor.get(p, targets, counts, scratch));
        emit_classes<Rule>(p, targets, rows, to, [&](RowScalars<A>(&s)[R], A(&x_t)[R]) {
#pragma unroll
            for (int k = 0; k < R; k++) {
                const int64_t row = rows.exists[k] ? rows.row[k] : 0;
                s[k] = reduced_scalars(p, targets, row, own.target[k], value_of<D>(p, own.x_t[k]), states[k], upstream);
                x_t[k] = own.x_t[k];
            }
        });
    });
    if (out.partials || out.result) finish_block(p, targets, out, total.x, total.y, scratch, blockIdx.x, gridDim.x);
}

// log-softmax. Reads E (twice where it does not stay in the cache), writes E.
template <class T>
__device__ __forceinline__ void log_softmax_strided(const Params &p, const T *x, T *to, Acc<T> *statistics) {
    using A = Acc<T>;
    constexpr int R = ROWS_AT_ONCE<PLAIN, T>;
    __shared__ State<A, PLAIN> merging[STRIDED_THREADS];
    const Targets<A> none = {nullptr, nullptr};
    for_thread_rows<R, PREFETCHED<PLAIN, T>>(p, x, [&](const ThreadRows<T, R> &rows) {
        State<A, PLAIN> states[R];
        reduce_classes<PLAIN>(p, none, rows, states, [] {});
        merge_columns<T>(p, states, merging);
        emit_classes<LogProbs>(p, none, rows, to, [&](RowScalars<A>(&s)[R], A(&)[R]) {
#pragma unroll
            for (int k = 0; k < R; k++) {
                if (rows.exists[k] && threadIdx.y == 0) write_statistics<PLAIN>(p, statistics, rows.row[k], states[k]);
                s[k] = RowScalars<A>::of(states[k].max, states[k].rest);
            }
        });
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// Passes that are rare enough to have one form for all layouts

// Classes that a thread of these passes loads at a time where it writes as many.
constexpr int ANY_BATCH = 8;

// Writes value(u, class) for the classes of a thread, of which `load()` loads the next ones.
template <class To, class L, class F>
__device__ __forceinline__ void write_classes(const Params &p, int64_t row, To *out, L load, F value) {
    const Written written(p, row);
    const int64_t step = blockDim.y * written.stride;
    const int share = share_of_classes(p, threadIdx.y);
    To *to = out + written.start + threadIdx.y * written.stride;
    for (int j = 0; j < share; j += ANY_BATCH) {
        load();
#pragma unroll
        for (int u = 0; u < ANY_BATCH; u++, to += step) {
            if (j + u < share) *to = narrow<To>(value(u, threadIdx.y + (j + u) * blockDim.y));
        }
    }
}

// log-softmax backward: see `LogSoftmaxGradient`. `p.t` are the strides of g. Reads x once and g twice (the second time
// from a cache), writes E.
template <class T>
__device__ __forceinline__ void log_softmax_backward_any(const Params &p, const T *x, const Acc<T> *statistics,
                                                         const T *g, T *out) {
    using A = Acc<T>;
    __shared__ double sums[STRIDED_THREADS];
    const auto of_rows = [&](const ThreadRows<T, 1> &rows) {
        const int64_t row = rows.exists[0] ? rows.row[0] : 0;
        const T *upstream = g + p.t.start(row);
        const int share = rows.exists[0] ? share_of_classes(p, threadIdx.y) : 0;
        // with 1024 threads, 32 KB on their way
        constexpr int U = sizeof(T) == 2 ? 16 : 8;
        Reader<T, 1, U, 0> summed(upstream, p.t.class_stride, share);
        double sum = 0;
        for (int j = 0; j < share; j += U) {
            Pack<T, 1> of_g[U];
            summed.next(of_g, narrow<T>(A(0)));
#pragma unroll
            for (int u = 0; u < U; u++) sum += widen<A>(of_g[u].at[0]);
        }
        double *column = sums + threadIdx.x;
        column[threadIdx.y * blockDim.x] = sum;
        __syncthreads();
        for (int half = blockDim.y / 2; half > 0; half /= 2) {
            if (threadIdx.y < half) column[threadIdx.y * blockDim.x] += column[(threadIdx.y + half) * blockDim.x];
            __syncthreads();
        }
        const A mass = A(column[0]);
        __syncthreads();
        if (!rows.exists[0]) return;
        const LogSoftmaxGradient<A> rule(p, statistics, row, mass);
        Reader<T, 1, ANY_BATCH, CLASSES_IN_FLIGHT<T>> of_logits(p, rows);
        Reader<T, 1, ANY_BATCH, 0> of_upstream(upstream, p.t.class_stride, share);
        Pack<T, 1> of_x[ANY_BATCH], of_g[ANY_BATCH];
        const auto load = [&] { of_logits.next(of_x), of_upstream.next(of_g); };
        write_classes(p, row, out, load, [&](int u, int) {
            return rule.template value<T>(p, widen<A>(of_x[u].at[0]), widen<A>(of_g[u].at[0]));
        });
    };
    for_thread_rows<1, CLASSES_IN_FLIGHT<T>>(p, x, of_rows, g);
}

// The gradient of probability targets: see `TargetGradient`. It is written in the order of the logits' gradient.
template <class T, class To>
__device__ __forceinline__ void target_gradient_strided(const Params &p, const T *x, const Targets<Acc<T>> &targets,
                                                        const GradientInputs<Acc<T>> &in, To *out) {
    using A = Acc<T>;
    const Operands<A> o = {targets, 0};
    for_thread_rows<1, CLASSES_IN_FLIGHT<T>>(p, x, [&](const ThreadRows<T, 1> &rows) {
        if (!rows.exists[0]) return;
        const RowScalars<A> s = target_scalars(p, targets, in, rows.row[0]);
        if (s.kind != Kind::LIVE) return write_classes(p, rows.row[0], out, [] {}, [](int, int) { return A(0); });
        Reader<T, 1, ANY_BATCH, CLASSES_IN_FLIGHT<T>> of_logits(p, rows);
        Pack<T, 1> of_x[ANY_BATCH];
        write_classes(
            p, rows.row[0], out, [&] { of_logits.next(of_x); },
            [&](int u, int c) {
                const A x_c[1] = {widen<A>(of_x[u].at[0])};
                A y[1];
                TargetGradient::emit<T>(p, o, s, c, x_c, y);
                return y[0];
            });
    });
}

} // namespace softmax
} // namespace fused_loss
