// The element-wise family: losses that are one term for each element (terms.cuh), over any layout of their operands.
//
// Traffic of an element of b bytes, with the target in the input's dtype: the loss reads 2b; with the gradient it reads
// 2b and writes b, as does the backward alone. That is the minimum: every operand is read once, every result written
// once, and nothing in between touches memory but 8 bytes for each block.
//
// How the work is split. The elements, in row-major order of the input's shape, are cut into spans. A team of
// neighbouring threads (blockDim.x of them, blockDim.y teams a block) takes one span. If losses averaged over rows are
// returned, a span is a row; otherwise a team is a block, and the block that finishes last adds the sums of the spans,
// in a fixed order.
//
// Every pass has two variants, of which the host picks one (src/elementwise/cuda/plan.rs).
// - `dense`: input and target are contiguous, of one dtype, aligned alike, and alone. Each thread moves 16 bytes at a
//   time, two windows in flight. The elements before the first and behind the last window of a span are taken one by
//   one. The terms of FOR_EACH_DENSE_TERM have their own kernels; f64 has none, as its arithmetic takes longer than any
//   way of loading.
// - `any`: weights, masks, every stride, dtype and alignment. Neighbouring threads take neighbouring elements, so that
//   contiguous operands are still read in whole sectors; four elements of a thread are in flight. All terms share a
//   kernel, which has a loop for each.
#pragma once

#include "terms.cuh"

namespace fused_loss {

constexpr int MAX_AXES = 8;
constexpr int MAX_THREADS = 256;

// The operands that may be views, in the order of `OPERANDS` in src/elementwise/cuda/plan.rs.
enum Operand { INPUT, TARGET, WEIGHT, POS_WEIGHT, MASK, OPERANDS };

// A divisor, and the multiplication that replaces the division by it, as src/elementwise/cuda/divisor.rs computes it:
// (mulhi(n, magic) + n) >> shift, in 32 bits for dividends below 2^31 and in 64 bits for all others.
struct Divisor {
    int64_t value;
    uint64_t wide_magic;
    uint32_t magic;
    uint32_t shift;
};

// All sizes and options of a launch: `ElementParams` in src/elementwise/cuda/params.rs, field for field.
struct ElementParams {
    int64_t elements;
    int64_t span;
    double smooth_scale, smooth_shift;  // target <- scale * target + shift
    double grad_scale;                  // of the gradient that comes with the loss
    double parameters[TERM_PARAMETERS]; // of the term
    double normalizer;                  // what the sum is divided by, unless `counted` or a pointer says otherwise
    TermNumber term;                    // of the kernels that all terms share
    int counted;                        // divide by the number of elements that the mask leaves
    DType target_dtype;
    DType mask_dtype;
    int unit_target;   // where the target is not in [0, 1], an element is NaN
    int small;         // elements < 2^31: divide in 32 bits
    int phase;         // dense: elements from the last 16-byte boundary to the first element
    int upstream_each; // the upstream gradient has a value for each group, not one for all
    int contiguous;    // bit i: operand i is contiguous, its strides are not looked at
    int axes;          // of the other operands together, outermost first
    Divisor group;     // neighbouring elements whose losses are averaged
    Divisor size[MAX_AXES];
    int64_t stride[OPERANDS][MAX_AXES];
};

__device__ __forceinline__ int64_t divide(int64_t n, const Divisor &d, int small) {
    const uint64_t wide = static_cast<uint64_t>(n);
    if (!small) return static_cast<int64_t>((__umul64hi(wide, d.wide_magic) + wide) >> d.shift);
    const uint32_t v = static_cast<uint32_t>(n);
    return (__umulhi(v, d.magic) + v) >> d.shift;
}

// The same value, of which the compiler cannot know that it is the same in every round of a loop. Otherwise it would
// write out the loop twice, for either value; the driver has to compile all those loops when it loads the module.
__device__ __forceinline__ bool opaque(bool value) {
    int v = value;
    asm volatile("" : "+r"(v));
    return v;
}

// The pointers of the operands, null where absent.
template <class In> struct Arrays {
    const In *input;
    const void *target;
    const Acc<In> *weight;
    const Acc<In> *pos_weight;
    const void *mask;
};

template <class A> __device__ __forceinline__ bool in_unit(A v) { return v >= A(0) && v <= A(1); }

// A term with its parameters, the range of its target and the smoothing of it. FLOATS: the target holds floats.
template <class Term, class A, bool FLOATS> struct TermAt {
    TermParameters<A> parameters;
    bool unit_target;
    A scale, shift;

    __device__ __forceinline__ explicit TermAt(const ElementParams &params)
        : unit_target(params.unit_target), scale(static_cast<A>(params.smooth_scale)),
          shift(static_cast<A>(params.smooth_shift)) {
#pragma unroll
        for (int i = 0; i < TERM_PARAMETERS; i++) parameters.p[i] = static_cast<A>(params.parameters[i]);
    }

    // Whether input and target are in range.
    __device__ __forceinline__ bool valid(A x, A t) const {
        if (Term::PROBABILITIES) return in_unit(x) && in_unit(t);
        return FLOATS || !opaque(unit_target) || in_unit(t);
    }

    __device__ __forceinline__ Value<A> at(A x, A t, A p) const {
        if (!valid(x, t)) return {quiet_nan<A>(), quiet_nan<A>()};
        return Term::at(x, fma_(scale, t, shift), p, parameters);
    }

    __device__ __forceinline__ A by_target(A x, A t, A p) const {
        if (!valid(x, t)) return quiet_nan<A>();
        return scale * Term::by_target(x, fma_(scale, t, shift), p, parameters);
    }
};

// The elements of one team.
struct Span {
    int64_t index, first, last;

    __device__ __forceinline__ explicit Span(const ElementParams &params) {
        index = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
        first = index * params.span;
        last = first + params.span < params.elements ? first + params.span : params.elements;
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Walking a span

// Calls windows(k-th window's start, which of them are in the span) with IN_FLIGHT windows of N elements at a time,
// then single(i) with each element outside of the windows. Windows start where i + phase is a multiple of N.
template <int N, int IN_FLIGHT, class Windows, class Single>
__device__ __forceinline__ void walk_dense(const Span &span, int phase, Windows windows, Single single) {
    const int team = blockDim.x;
    if (span.first >= span.last) return;
    int64_t body = span.first + (N - (span.first + phase) % N) % N;
    if (body > span.last) body = span.last;
    const int64_t count = (span.last - body) / N;
#pragma unroll 1
    for (int64_t w = threadIdx.x; w < count; w += static_cast<int64_t>(team) * IN_FLIGHT) {
        int64_t start[IN_FLIGHT];
        bool in[IN_FLIGHT];
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; k++) {
            const int64_t index = w + static_cast<int64_t>(k) * team;
            in[k] = k == 0 || index < count;
            start[k] = body + index * N;
        }
        windows(start, in);
    }
    const int head = static_cast<int>(body - span.first);
    const int tail = static_cast<int>(span.last - body - count * N);
#pragma unroll 1
    for (int i = threadIdx.x; i < head + tail; i += team)
        single(i < head ? span.first + i : span.last - (head + tail) + i);
}

// Where an element lies in each operand.
struct Offsets {
    int64_t of[OPERANDS];

    __device__ __forceinline__ Offsets(const ElementParams &params, int64_t element) {
#pragma unroll
        for (int o = 0; o < OPERANDS; o++) of[o] = params.contiguous >> o & 1 ? element : 0;
        int64_t rest = element;
#pragma unroll 1
        for (int axis = params.axes - 1; axis >= 0; axis--) {
            // the outermost axis takes the rest
            const int64_t outer = axis == 0 ? 0 : divide(rest, params.size[axis], params.small);
            const int64_t at = rest - outer * params.size[axis].value;
            rest = outer;
#pragma unroll
            for (int o = 0; o < OPERANDS; o++) {
                if (!(params.contiguous >> o & 1)) of[o] += at * params.stride[o][axis];
            }
        }
    }
};

// Up to U elements of a thread, in the arithmetic type.
template <class In, int U> struct Loaded {
    using A = Acc<In>;
    A x[U], t[U], w[U], p[U];
    bool in[U];   // the element is in the span
    bool on[U];   // ... and its mask is not 0
    bool live[U]; // ... and neither is its weight: else loss and gradient are 0, whatever is there

    // The elements first, first + step, ... before `last`.
    __device__ __forceinline__ Loaded(const Arrays<In> &a, const ElementParams &params, int64_t first, int64_t last,
                                      int step) {
        In input[U];
        int64_t target[U], mask[U];
#pragma unroll
        for (int k = 0; k < U; k++) {
            const int64_t i = first + static_cast<int64_t>(k) * step;
            in[k] = on[k] = i < last;
            input[k] = In{};
            w[k] = p[k] = A(1);
            t[k] = A(0);
            target[k] = mask[k] = 0;
            if (!in[k]) continue;
            const Offsets offsets(params, i);
            input[k] = a.input[offsets.of[INPUT]];
            if (opaque(a.weight)) w[k] = a.weight[offsets.of[WEIGHT]];
            if (opaque(a.pos_weight)) p[k] = a.pos_weight[offsets.of[POS_WEIGHT]];
            target[k] = offsets.of[TARGET];
            mask[k] = offsets.of[MASK];
        }
        with_dtype(params.target_dtype, [&](auto *type) {
#pragma unroll
            for (int k = 0; k < U; k++) {
                if (in[k]) t[k] = widen<A>(static_cast<decltype(type)>(a.target)[target[k]]);
            }
        });
        if (a.mask) {
            with_dtype(params.mask_dtype, [&](auto *type) {
#pragma unroll
                for (int k = 0; k < U; k++) {
                    if (in[k]) on[k] = widen<float>(static_cast<decltype(type)>(a.mask)[mask[k]]) != 0.0f;
                }
            });
        }
#pragma unroll
        for (int k = 0; k < U; k++) x[k] = widen<A>(input[k]), live[k] = on[k] && w[k] != A(0);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// The loss, alone or with its gradient

// Where a loss goes: `each`, `rows` or `loss`.
template <class A> struct Losses {
    A *each; // every element's
    A *rows; // every span's mean
    // with more than one span: memory for every span's sum, and behind them, if elements are counted, every count
    double *sums;
    unsigned *ticket;         // ... and the counter of `is_last_block`
    const double *normalizer; // the number that their sum is divided by, if it is in memory
    A *loss;                  // the result
    A *denominator;           // ... and what it was divided by
};

// The sum of an earlier kernel's partial counts, in all threads of the block.
__device__ __forceinline__ long long sum_counts(const long long *parts, int n, long long *scratch) {
    long long count = 0;
    const int threads = blockDim.x * blockDim.y;
#pragma unroll 1
    for (int i = threadIdx.x + blockDim.x * threadIdx.y; i < n; i += threads) count += parts[i];
    return block_reduce<Sum>(count, scratch);
}

// The number of elements from `first` on whose mask is not 0, in all threads of the one-dimensional block.
__device__ __forceinline__ long long count_elements(const void *mask, const ElementParams &params, int64_t first,
                                                    int64_t last, int thread, int threads, long long *scratch) {
    constexpr int U = 4;
    long long count = 0;
#pragma unroll 1
    for (int64_t at = first + thread; at < last; at += static_cast<int64_t>(threads) * U) {
        int64_t offset[U];
        bool in[U];
#pragma unroll
        for (int k = 0; k < U; k++) {
            const int64_t i = at + static_cast<int64_t>(k) * threads;
            in[k] = i < last;
            offset[k] = in[k] ? Offsets(params, i).of[MASK] : 0;
        }
        with_dtype(params.mask_dtype, [&](auto *type) {
#pragma unroll
            for (int k = 0; k < U; k++) {
                if (in[k]) count += widen<float>(static_cast<decltype(type)>(mask)[offset[k]]) != 0.0f;
            }
        });
    }
    return block_reduce<Sum>(count, scratch);
}

// What the sum of the losses is divided by where elements are not counted: a number in memory, of which the host knows
// nothing, or the one in the parameters.
__device__ __forceinline__ double given_divisor(const double *normalizer, const ElementParams &params) {
    return normalizer ? *normalizer : params.normalizer;
}

// The factor of the gradient that comes with the loss: the upstream gradient grad_scale over the denominator, 0 where
// that is 0. All threads of the block call it. `counts`: the partial counts of the elements that the mask leaves; null
// where there is no need to know them, or where each block counts by itself.
template <class A>
__device__ __forceinline__ A fused_scale(const void *mask, const long long *counts, int count_parts,
                                         const double *normalizer, const ElementParams &params) {
    __shared__ long long scratch[WARP];
    double divisor;
    if (counts) wait_for_last_launch();
    if (mask && params.counted) {
        const long long left = counts
                                   ? sum_counts(counts, count_parts, scratch)
                                   : count_elements(mask, params, 0, params.elements, threadIdx.x, blockDim.x, scratch);
        divisor = static_cast<double>(left);
    } else {
        divisor = given_divisor(normalizer, params);
    }
    if (divisor == 0.0) return A(0);
    return static_cast<A>(params.grad_scale / (divisor * static_cast<double>(params.group.value)));
}

// The sums of a thread.
template <class A> struct LossSums {
    A loss = A(0);
    int count = 0; // of elements that the mask leaves
};

// LossSums of losses become the result; `counting`: divided by the sum of the counts. All threads of the block call it.
template <class A>
__device__ __forceinline__ void write_losses(const LossSums<A> &sums, bool counting, const Losses<A> &to,
                                             const Span &span, const ElementParams &params) {
    __shared__ double scratch[WARP];
    __shared__ long long count_scratch[WARP];
    const bool leader = threadIdx.x == 0;
    if (to.each || to.rows) {
        if (to.denominator && leader && span.index == 0) *to.denominator = A(1);
        if (to.each) return;
    }
    double total = team_reduce<Sum>(static_cast<double>(sums.loss), blockDim.x, scratch);
    if (to.rows) {
        if (leader && span.first < params.elements)
            to.rows[span.index] = static_cast<A>(total / static_cast<double>(params.group.value));
        return;
    }
    // exact in a double as long as there are fewer than 2^53 elements
    double counted =
        counting ? static_cast<double>(team_reduce<Sum>(static_cast<long long>(sums.count), blockDim.x, count_scratch))
                 : 0.0;
    if (to.sums) {
        if (leader) {
            to.sums[span.index] = total;
            if (counting) to.sums[gridDim.x + span.index] = counted;
        }
        if (!is_last_block(to.ticket, gridDim.x)) return;
        total = counted = 0;
#pragma unroll 4
        for (int i = threadIdx.x; i < gridDim.x; i += blockDim.x) {
            total += __ldcg(to.sums + i);
            if (counting) counted += __ldcg(to.sums + gridDim.x + i);
        }
        total = block_reduce<Sum>(total, scratch);
        if (counting) counted = block_reduce<Sum>(counted, scratch);
    }
    if (!leader) return;
    const double divisor = counting ? counted : given_divisor(to.normalizer, params);
    *to.loss = static_cast<A>(total / static_cast<double>(params.group.value) / divisor);
    if (to.denominator) *to.denominator = static_cast<A>(divisor);
}

// `grad`, with GRAD: the gradient for an upstream gradient of grad_scale everywhere.
template <class Term, class In, bool GRAD>
__device__ __forceinline__ void dense_loss_pass(const In *input, const In *target, const Losses<Acc<In>> &to, In *grad,
                                                const ElementParams &params) {
    using A = Acc<In>;
    constexpr int N = LANES_16B<In>;
    // ahead of all else, as a division of doubles is a subroutine
    const A grad_scale = GRAD ? fused_scale<A>(nullptr, nullptr, 0, to.normalizer, params) : A(1);
    const TermAt<Term, A, true> term(params);
    const Span span(params);
    LossSums<A> sums;
    walk_dense<N, 2>(
        span, params.phase,
        [&](const int64_t (&start)[2], const bool (&in)[2]) {
            Pack<In, N> x[2], t[2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                if (in[k]) x[k] = Pack<In, N>::load_const(input + start[k]);
                if (in[k]) t[k] = Pack<In, N>::load_const(target + start[k]);
            }
#pragma unroll
            for (int k = 0; k < 2; k++) {
                if (!in[k]) continue;
                Pack<In, N> grads;
#pragma unroll
                for (int first = 0; first < N; first += LANES_16B<A>) {
                    // by 16 bytes of losses: the branch behind them keeps a window of 16-bit inputs from taking all
                    // registers
                    Pack<A, LANES_16B<A>> losses;
#pragma unroll
                    for (int l = 0; l < LANES_16B<A>; l++) {
                        const int i = first + l;
                        const Value<A> v = term.at(widen<A>(x[k].at[i]), widen<A>(t[k].at[i]), A(1));
                        losses.at[l] = v.loss;
                        sums.loss += v.loss;
                        if (GRAD) grads.at[i] = narrow<In>(v.grad * grad_scale);
                    }
                    if (opaque(to.each)) losses.store(to.each + start[k] + first);
                }
                if (GRAD) grads.store(grad + start[k]);
            }
        },
        [&](int64_t i) {
            const Value<A> v = term.at(widen<A>(input[i]), widen<A>(target[i]), A(1));
            sums.loss += v.loss;
            if (opaque(to.each)) to.each[i] = v.loss;
            if (GRAD) grad[i] = narrow<In>(v.grad * grad_scale);
        });
    write_losses(sums, false, to, span, params);
}

// `grad`, where it is not null: as above. `counts`: as for `fused_scale`.
template <class In>
__device__ __forceinline__ void any_loss_pass(const Arrays<In> &a, const long long *counts, int count_parts,
                                              const Losses<Acc<In>> &to, In *grad, const ElementParams &params) {
    using A = Acc<In>;
    constexpr int U = 4;
    A grad_scale = A(1);
    if (grad) grad_scale = fused_scale<A>(a.mask, counts, count_parts, to.normalizer, params);
    const Span span(params);
    const int team = blockDim.x;
    LossSums<A> sums;
    with_term(params.term, [&](auto type) {
        const TermAt<decltype(type), A, false> term(params);
#pragma unroll 1
        for (int64_t at = span.first + threadIdx.x; at < span.last; at += static_cast<int64_t>(team) * U) {
            const Loaded<In, U> e(a, params, at, span.last, team);
#pragma unroll
            for (int k = 0; k < U; k++) {
                if (!e.in[k]) continue;
                const int64_t i = at + static_cast<int64_t>(k) * team;
                const Value<A> v = term.at(e.x[k], e.t[k], e.p[k]);
                const A loss = e.live[k] ? times(e.w[k], v.loss) : A(0);
                sums.loss += loss;
                sums.count += e.on[k];
                if (opaque(to.each)) to.each[i] = loss;
                if (opaque(grad)) grad[i] = narrow<In>(e.live[k] ? times(e.w[k], v.grad) * grad_scale : A(0));
            }
        }
    });
    write_losses(sums, params.counted, to, span, params);
}

// The number of the span's elements whose mask is not 0, one number for each block.
__device__ __forceinline__ void count_pass(const void *mask, long long *counts, const ElementParams &params) {
    __shared__ long long scratch[WARP];
    const Span span(params);
    let_next_launch_begin();
    const long long count = count_elements(mask, params, span.first, span.last, threadIdx.x, blockDim.x, scratch);
    if (threadIdx.x == 0) counts[blockIdx.x] = count;
}

// ---------------------------------------------------------------------------------------------------------------------
// The gradient, from the upstream gradient and the denominator that the loss's pass wrote

// The factor of all gradients: 0 where the denominator is, so that no gradient goes out of such a loss.
template <class A>
__device__ __forceinline__ A upstream_scale(const A *upstream, const A *denominator, const ElementParams &params) {
    if (*denominator == A(0)) return A(0);
    const A scale = A(1) / (*denominator * static_cast<A>(params.group.value));
    return params.upstream_each ? scale : scale * *upstream;
}

// Of the input.
template <class Term, class In>
__device__ __forceinline__ void dense_grad_pass(const In *input, const In *target, const Acc<In> *upstream,
                                                const Acc<In> *denominator, In *grad, const ElementParams &params) {
    using A = Acc<In>;
    constexpr int N = LANES_16B<In>;
    const TermAt<Term, A, true> term(params);
    const A scale = upstream_scale(upstream, denominator, params);
    walk_dense<N, 2>(
        Span(params), params.phase,
        [&](const int64_t (&start)[2], const bool (&in)[2]) {
            Pack<In, N> x[2], t[2];
#pragma unroll
            for (int k = 0; k < 2; k++) {
                if (in[k]) x[k] = Pack<In, N>::load_const(input + start[k]);
                if (in[k]) t[k] = Pack<In, N>::load_const(target + start[k]);
            }
#pragma unroll
            for (int k = 0; k < 2; k++) {
                if (!in[k]) continue;
                Pack<A, N> g;
                Pack<In, N> grads;
                if (params.upstream_each) g = Pack<A, N>::load_const(upstream + start[k]);
#pragma unroll
                for (int i = 0; i < N; i++) {
                    const A v = term.at(widen<A>(x[k].at[i]), widen<A>(t[k].at[i]), A(1)).grad;
                    grads.at[i] = narrow<In>(v * (params.upstream_each ? g.at[i] * scale : scale));
                }
                grads.store(grad + start[k]);
            }
        },
        [&](int64_t i) {
            const A v = term.at(widen<A>(input[i]), widen<A>(target[i]), A(1)).grad;
            grad[i] = narrow<In>(v * (params.upstream_each ? upstream[i] * scale : scale));
        });
}

// Of the input in its dtype, or BY_TARGET of the target in the arithmetic type.
template <class In, bool BY_TARGET, class Out>
__device__ __forceinline__ void any_grad_pass(const Arrays<In> &a, const Acc<In> *upstream, const Acc<In> *denominator,
                                              Out *grad, const ElementParams &params) {
    using A = Acc<In>;
    constexpr int U = 4;
    const Span span(params);
    const A scale = upstream_scale(upstream, denominator, params);
    const int team = blockDim.x;
    with_term(params.term, [&](auto type) {
        const TermAt<decltype(type), A, false> term(params);
#pragma unroll 1
        for (int64_t at = span.first + threadIdx.x; at < span.last; at += static_cast<int64_t>(team) * U) {
            const Loaded<In, U> e(a, params, at, span.last, team);
#pragma unroll
            for (int k = 0; k < U; k++) {
                if (!e.in[k]) continue;
                const int64_t i = at + static_cast<int64_t>(k) * team;
                const A g = params.upstream_each ? upstream[divide(i, params.group, params.small)] * scale : scale;
                const A v = BY_TARGET ? term.by_target(e.x[k], e.t[k], e.p[k]) : term.at(e.x[k], e.t[k], e.p[k]).grad;
                grad[i] = narrow<Out>(e.live[k] ? times(e.w[k], v) * g : A(0));
            }
        }
    });
}

// ---------------------------------------------------------------------------------------------------------------------
// The check, for operands that have a range

// The lowest index of an element that counts and whose input or target is out of range; `bad` stays as it is where
// there is none.
template <class In>
__device__ __forceinline__ void check_pass(const Arrays<In> &a, unsigned long long *bad, const ElementParams &params) {
    const Span span(params);
#pragma unroll 1
    for (int64_t i = span.first + threadIdx.x; i < span.last; i += blockDim.x) {
        const Loaded<In, 1> e(a, params, i, span.last, 1);
        bool good = !e.live[0];
        with_term(params.term,
                  [&](auto type) { good |= TermAt<decltype(type), Acc<In>, false>(params).valid(e.x[0], e.t[0]); });
        if (good) continue;
        // an integer's minimum does not depend on the order
        atomicMin(bad, static_cast<unsigned long long>(i));
        return;
    }
}

} // namespace fused_loss

// ---------------------------------------------------------------------------------------------------------------------
// Entry points, in one module for each dtype

// Blocks that a multiprocessor has room for: left to itself, the compiler spills a register or two to fit one more. A
// window of 16-bit inputs is twice as many numbers as one of floats; with the gradient three such blocks fit in the
// code for sm_8x and sm_90.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 1000
#define ELEMENT_FUSED_BLOCKS 3
#else
#define ELEMENT_FUSED_BLOCKS 2
#endif
#define ELEMENT_DENSE(FUSED)                                                                                     \
    extern "C" __global__ void __launch_bounds__(fused_loss::MAX_THREADS, sizeof(In) == 4 ? 4                    \
                                                                          : (FUSED)       ? ELEMENT_FUSED_BLOCKS \
                                                                                          : 3)
#define ELEMENT_ANY extern "C" __global__ void __launch_bounds__(fused_loss::MAX_THREADS, sizeof(A) == 8 ? 2 : 3)

// The parameters that kernels have in common. src/elementwise/cuda/params.rs passes them in this order.
#define ELEMENT_OPERANDS const In *input, const void *target, const A *weight, const A *pos_weight, const void *mask
#define ELEMENT_LOSSES                                                                          \
    const long long *counts, int count_parts, A *each, A *rows, double *sums, unsigned *ticket, \
        const double *normalizer, A *loss, A *denominator
#define ELEMENT_PARAMS const __grid_constant__ fused_loss::ElementParams params

#define ELEMENT_DENSE_LOSS(NAME, Term, GRAD)                                                                         \
    ELEMENT_DENSE(GRAD) NAME(ELEMENT_OPERANDS, ELEMENT_LOSSES, In *grad, ELEMENT_PARAMS) {                           \
        fused_loss::dense_loss_pass<fused_loss::Term, In, GRAD>(                                                     \
            input, static_cast<const In *>(target), {each, rows, sums, ticket, normalizer, loss, denominator}, grad, \
            params);                                                                                                 \
    }

#define ELEMENT_DENSE_KERNELS(Term, LOSS, FUSED, GRAD)                                                               \
    ELEMENT_DENSE_LOSS(LOSS, Term, false)                                                                            \
    ELEMENT_DENSE_LOSS(FUSED, Term, true)                                                                            \
    ELEMENT_DENSE(false) GRAD(ELEMENT_OPERANDS, const A *upstream, const A *denominator, In *grad, ELEMENT_PARAMS) { \
        fused_loss::dense_grad_pass<fused_loss::Term, In>(input, static_cast<const In *>(target), upstream,          \
                                                          denominator, grad, params);                                \
    }

#define ELEMENT_ANY_GRAD(NAME, BY_TARGET, Out)                                                               \
    ELEMENT_ANY NAME(ELEMENT_OPERANDS, const A *upstream, const A *denominator, Out *grad, ELEMENT_PARAMS) { \
        fused_loss::any_grad_pass<In, BY_TARGET, Out>({input, target, weight, pos_weight, mask}, upstream,   \
                                                      denominator, grad, params);                            \
    }

// The kernels of a dtype `In`, which the including file has defined: those of all dtypes, and those of all but f64.
#define ELEMENT_ANY_KERNELS                                                                                     \
    using A = fused_loss::Acc<In>;                                                                              \
    ELEMENT_ANY loss_any(ELEMENT_OPERANDS, ELEMENT_LOSSES, In *grad, ELEMENT_PARAMS) {                          \
        fused_loss::any_loss_pass<In>({input, target, weight, pos_weight, mask}, counts, count_parts,           \
                                      {each, rows, sums, ticket, normalizer, loss, denominator}, grad, params); \
    }                                                                                                           \
    ELEMENT_ANY_GRAD(grad_any, false, In)                                                                       \
    ELEMENT_ANY_GRAD(target_grad_any, true, A)                                                                  \
    ELEMENT_ANY check_any(ELEMENT_OPERANDS, unsigned long long *bad, ELEMENT_PARAMS) {                          \
        fused_loss::check_pass<In>({input, target, weight, pos_weight, mask}, bad, params);                     \
    }
#define ELEMENT_KERNELS \
    ELEMENT_ANY_KERNELS \
    FOR_EACH_DENSE_TERM(ELEMENT_DENSE_KERNELS)
