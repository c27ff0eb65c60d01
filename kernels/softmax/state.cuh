// The softmax family, which computes something for each row of classes: the definitions that all of its passes share.
//
//   own      the target class, and its logit x[t] and weight w[t]
//   m        the row's largest logit
//   rest     sum exp(x - m) without the term of one maximum
//   log-sum  log sum exp(x - m) = log1p(rest)
//   p        exp(x - m) / (1 + rest), the probability of a class
//   q        the weighted and smoothed target distribution, without the own class's w[t]
//   mass     sum q
//   linear   sum q (x - m)
//   loss     w[t] (log-sum - (x[t] - m)) and, with label smoothing or probability targets, mass log-sum - linear
//   upstream the gradient of the final result with respect to the loss
//   gradient upstream / denominator * (slope p - q), where q and mass include the own class's w[t], and
//            slope = mass + 2 z lse
//
// Leaving one maximum out of the sum keeps the relative accuracy of a confident row, however small its loss log1p(rest)
// is, and 1 - p = rest / (1 + rest) in the gradient at its most probable class.
// The files
//   state.cuh       options, targets, the state of a row and how states merge, the value written for a logit
//   rows.cuh        passes over rows of adjacent classes, in aligned windows of 16 bytes
//   registers.cuh   passes over rows that fit into the registers of a part of a warp
//   strided.cuh     passes over rows whose classes lie apart, neighbouring threads on neighbouring rows
//   tile.cuh        passes over tiles of many short rows
//   entry.cuh       the kernels' names and launch bounds
#pragma once

#include "../targets.cuh"

namespace fused_loss {
namespace softmax {

// ---------------------------------------------------------------------------------------------------------------------
// Options: mirrored by `SoftmaxParams` in src/softmax/cuda/params.rs

struct Params : RowParams {
    Strides x;      // the logits
    Strides t;      // probability targets
    double spread;  // label smoothing / classes
    double mass;    // the sum of q without the own class, unless `row_mass`
    double scale;   // the logit scale ahead of a soft cap; without one, its sign
    double factor;  // what is left of the scale: a factor of differences of logits
    double softcap; // the soft cap and scale / softcap, if `capped`
    double cap_scale;
    double z_loss;
    double transform_parameter; // of the row transform
    int row_transform;          // a `RowTransform`
    int row_mass;               // whether the sum of q without the own class differs between rows
    int capped;                 // whether there is a soft cap
    int team;                   // threads that share a row: a power of two up to 32, or the whole block
    int kept;          // windows of a row that a thread keeps in shared memory between its two passes over them
    int upstream_rows; // whether the upstream gradient has a number for each row, or one for all
    int rotated;       // how many of its classes further on each thread of a tile begins than the one before, in 32nds
    int wave;          // blocks that are worked on at a time, or all of those that take rows in turn
    int ahead;         // how many waves ahead of its own a block has rows prefetched: see `prefetch_later`
    int class_last;    // gradients are written in the order (outer, inner, class), else (outer, class, inner)
    // the same for f32 arithmetic, and as exponents of 2: exp2(factor_exponent d) = exp(factor d),
    // exp2(cap_rate x) = exp(2 scale x / softcap), exp2(cap_exponent) = exp(softcap)
    float softcap_f32, cap_scale_f32, factor_exponent, cap_rate, cap_exponent;
};

// ---------------------------------------------------------------------------------------------------------------------
// Elementary functions

constexpr float LOG2_E = 1.44269504f;

// exp2(x): a relative error of 2^-22 or so, and 0 below the normal numbers.
__device__ __forceinline__ float exp2_approx(float x) {
    float e;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x));
    return e;
}

// exp(d) for a difference d = x - m <= 0 of logits of type T.
//
// The subtraction comes first and is exact or nearly so; exp2(x log2e - m log2e) in one fused multiply-add would save
// an instruction, but lose all accuracy where the logits have a large offset in common. For 16-bit logits: one
// multiplication and one ex2, a relative error of |d| 2^-24 or so. For f32 there is time for CUDA's expf, which stays
// within 2 ulp.
template <class T> __device__ __forceinline__ float exp_below(float d) { return exp2_approx(d * LOG2_E); }
template <> __device__ __forceinline__ float exp_below<float>(float d) { return expf(d); }
template <class T> __device__ __forceinline__ double exp_below(double d) { return exp(d); }
template <class A> __device__ __forceinline__ bool is_finite(A x) { return x - x == A(0); }

// log sum exp(x - m), NaN where the row has no finite maximum.
template <class A> __device__ __forceinline__ A log_sum_of(A max, A rest) {
    return is_finite(max) ? log1p_(rest) : quiet_nan<A>();
}

// tanh(x), and 1 - tanh(x)^2 computed without cancellation.
__device__ __forceinline__ float tanh_and_slope(float x, float &slope) {
    const float e = expf(-2.0f * fabsf(x)), s = 1.0f + e, x2 = x * x;
    // the denominators are in [1, 4], where the fast division is within 2 ulp
    slope = __fdividef(4.0f * e, s * s);
    // below 1/4, where 1 - e cancels, the Taylor series, whose next term is below 1e-8
    const float series = fmaf(x2, fmaf(x2, fmaf(x2, fmaf(x2, 62.0f / 2835, -17.0f / 315), 2.0f / 15), -1.0f / 3), 1.0f);
    return fabsf(x) < 0.25f ? x * series : copysignf(__fdividef(1.0f - e, s), x);
}
__device__ __forceinline__ double tanh_and_slope(double x, double &slope) {
    const double e = exp(-2.0 * fabs(x)), s = 1.0 + e;
    slope = 4.0 * e / (s * s);
    return tanh(x);
}

// A logit after `Params::scale` and soft cap, and the soft cap's derivative.
template <class A> __device__ __forceinline__ A transform(const Params &p, A x, A &slope) {
    if (p.capped) {
        const bool single = sizeof(A) == sizeof(float);
        const A cap = single ? p.softcap_f32 : p.softcap, scale = single ? p.cap_scale_f32 : p.cap_scale;
        return cap * tanh_and_slope(x * scale, slope);
    }
    slope = A(1);
    return p.scale == 1.0 ? x : x * A(p.scale);
}
template <class A> __device__ __forceinline__ A transform(const Params &p, A x) {
    A slope;
    return transform(p, x, slope);
}

// The smaller of two numbers, NaN if either is.
__device__ __forceinline__ float min_nan(float a, float b) {
#if __CUDA_ARCH__ >= 800
    float least;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(least) : "f"(a), "f"(b));
    return least;
#else
    return a < b || a != a ? a : b;
#endif
}

// a[k] <- 1 / a[k] with one division for all G numbers, whose product is below 2^126.
template <int G> __device__ __forceinline__ void invert(float *a) {
    if constexpr (G == 1) {
        asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(a[0]));
    } else {
        // pairs of a number of each half: (a b)^-1 b = a^-1
        float products[G / 2];
#pragma unroll
        for (int k = 0; k < G / 2; k++) products[k] = a[k] * a[k + G / 2];
        invert<G / 2>(products);
#pragma unroll
        for (int k = 0; k < G / 2; k++) {
            const float first = a[k];
            a[k] = a[k + G / 2] * products[k];
            a[k + G / 2] = first * products[k];
        }
    }
}

// The soft cap of 16-bit logits, whose tanh may have an absolute error: for y = scale x / softcap,
//
//   e = exp(2 y), r = 2 / (1 + e), capped logit = softcap (1 - r), its derivative = e r^2
//
// G logits share a division: the special-function unit has time for two and a half operations for each logit that is
// read. A capped logit is off by softcap 2^-23 or so, which is why src/softmax/cuda/detail.rs has a limit for the cap.
template <int G> struct Caps {
    // the largest exponent of 2 for an e, so that the product of G numbers 1 / r is below 2^126
    static constexpr float MOST = G == 4 ? 31 : 62;
    static_assert(G == 2 || G == 4, "pairs or fours");

    float e[G], r[G];

    __device__ __forceinline__ Caps(const Params &p, const float *x) {
#pragma unroll
        for (int k = 0; k < G; k++) {
            e[k] = exp2_approx(min_nan(x[k] * p.cap_rate, MOST));
            r[k] = fmaf(e[k], 0.5f, 0.5f);
        }
        invert<G>(r);
    }
};

// exp(softcap (1 - r) - max) as an exponent of 2, where `top` is (softcap - max) log2(e).
__device__ __forceinline__ float exponent_below(const Params &p, float r, float top) {
    return fmaf(-p.cap_exponent, r, top);
}

// ---------------------------------------------------------------------------------------------------------------------
// The state of a row

// The numbers that a pass reduces each row to.
enum Detail : int {
    PLAIN,      // maximum and rest: class indices without smoothing, z-loss, scale or cap
    UNIFORM,    // linear and mass too: class indices with one q for all classes, and a positive scale; see below
    GENERAL,    // the same for every option: a q of each class, any cap, any scale
    STATISTICS, // entropy and arg max too
};

// Without a soft cap, maxima are those of the logits before the scale, which becomes part of the exponentials' factor:
// exp(factor (x - m)). A difference does not overflow where a product would, and loses nothing under a common offset.
//
// UNIFORM adds label smoothing without class weights, z-loss, a logit scale and a soft cap to PLAIN, in f32 arithmetic.
// Until the
// loss is computed, `linear` and `mass` have UNIT in place of q. UNIT is a power of two, so that products with it are
// exact, and small, so that logits such as the lowest of bf16 can be summed.
constexpr float UNIT = 1.0f / 4294967296.0f;

// exp of a difference of logits: for 16-bit ones no more work with a factor than without.
template <Detail D, class T, class A> __device__ __forceinline__ A exp_of(const Params &p, A d) {
    if constexpr (D < UNIFORM) {
        return exp_below<T>(d);
    } else if constexpr (sizeof(T) == 2) {
        return exp2_approx(d * p.factor_exponent);
    } else {
        return exp_below<T>(d * A(p.factor));
    }
}

// A difference of logits after the scale.
template <Detail D, class A> __device__ __forceinline__ A scaled(const Params &p, A d) {
    return D >= UNIFORM ? A(p.factor) * d : d;
}

// A logit as the state of its row has it: after a soft cap, without the scale that is part of `exp_of`.
template <Detail D, class A> __device__ __forceinline__ A value_of(const Params &p, A x) {
    return D >= UNIFORM ? transform(p, x) : x;
}

constexpr int NO_CLASS = 0x7fffffff;

// The state of some classes of a row. Fields that `Detail` does not need are never touched, and cost nothing.
template <class A, Detail D> struct State {
    A max, rest;    // rest: sum exp(x - max) without the term of one maximum; 0 while all is -inf, NaN after a NaN
    A linear, mass; // sum q (x - max), sum q
    A moment;       // sum exp(x - max) (x - max)
    A top;          // the largest probability of the target
    int argmax, top_class;

    State() = default;
    __device__ __forceinline__ State(const State &from) { *this = from; }
    __device__ __forceinline__ State &operator=(const State &from) {
        max = from.max, rest = from.rest;
        if constexpr (D >= UNIFORM) linear = from.linear, mass = from.mass;
        if constexpr (D >= STATISTICS)
            moment = from.moment, top = from.top, argmax = from.argmax, top_class = from.top_class;
        return *this;
    }

    __device__ __forceinline__ static State empty() {
        State s;
        s.max = -infinity<A>();
        s.rest = A(0);
        if constexpr (D >= UNIFORM) s.linear = s.mass = A(0);
        if constexpr (D >= STATISTICS) {
            s.moment = A(0);
            s.top = -infinity<A>();
            s.argmax = s.top_class = NO_CLASS;
        }
        return s;
    }

    // Applies f to each field, with its place among the fields.
    template <class F> __device__ __forceinline__ void each(F f) {
        f(max, 0);
        f(rest, 1);
        if constexpr (D >= UNIFORM) f(linear, 2), f(mass, 3);
        if constexpr (D >= STATISTICS) f(moment, 4), f(top, 5), f(argmax, 6), f(top_class, 7);
    }
};

// The state of two sets of classes. It is commutative to the bit, so that all lanes of a butterfly end with the same
// bits.
template <class T, class A, Detail D>
__device__ __forceinline__ State<A, D> merge(const Params &p, const State<A, D> &a, const State<A, D> &b) {
    const A max = max_(a.max, b.max);
    const bool a_at = a.max == max, b_at = b.max == max;
    // how far the lower maximum lies below the higher one: never -inf - -inf, but -inf where that is more than the
    // largest number
    const A low = a_at ? b.max : a.max;
    const A shift = low == -infinity<A>() ? A(0) : low - max;
    const A shrink = low == -infinity<A>() ? A(0) : exp_of<D, T>(p, shift);
    State<A, D> s;
    s.max = max;
    // the lower side's maximum becomes a term of rest again; a NaN in a rest survives the product
    const A from_a = a_at ? a.rest : (A(1) + a.rest) * shrink;
    const A from_b = b_at ? b.rest : (A(1) + b.rest) * shrink;
    // where both sides have the maximum, only one of the two is left out
    s.rest = (from_a + from_b) + (a_at && b_at && max != -infinity<A>() ? A(1) : A(0));
    if constexpr (D >= UNIFORM) {
        const A moved_a = a_at || a.mass == A(0) ? A(0) : a.mass * shift;
        const A moved_b = b_at || b.mass == A(0) ? A(0) : b.mass * shift;
        s.linear = (a.linear + moved_a) + (b.linear + moved_b);
        s.mass = a.mass + b.mass;
    }
    if constexpr (D >= STATISTICS) {
        const A moment_a = a_at ? a.moment : from_a == A(0) ? A(0) : shrink * a.moment + from_a * shift;
        const A moment_b = b_at ? b.moment : from_b == A(0) ? A(0) : shrink * b.moment + from_b * shift;
        s.moment = moment_a + moment_b;
        s.argmax = min(a_at ? a.argmax : NO_CLASS, b_at ? b.argmax : NO_CLASS);
        s.top = max_(a.top, b.top);
        s.top_class = min(a.top == s.top ? a.top_class : NO_CLASS, b.top == s.top ? b.top_class : NO_CLASS);
    }
    return s;
}

// The sum of q without the own class.
template <class A, Detail D> __device__ __forceinline__ A mass_of(const Params &p, const State<A, D> &s) {
    if constexpr (D >= GENERAL) return s.mass;
    return D == UNIFORM ? A(p.mass) : A(0);
}

// What became of a lane's numbers when they were moved to the largest maximum.
template <class A> struct Moved {
    bool at;         // the lane has that maximum
    A shift, shrink; // how far the lane's own one is below, and the exponential of that
    A sum;           // what the lane added to the rest
};

// Merges maximum and rest of `width` neighbouring lanes, a power of two up to 32; all lanes of the warp call it and all
// get it. The largest maximum comes first, so that each lane's numbers are moved by one exponential, with its error
// once.
template <Detail D, class T, class A>
__device__ __forceinline__ Moved<A> merge_maxima(const Params &p, State<A, D> &s, int width) {
    const A max = lanes_reduce<Max>(s.max, width);
    Moved<A> m = {s.max == max, A(0), A(0), A(0)};
    if (s.max != -infinity<A>()) {
        // never -inf - -inf, but -inf where that is more than the largest number
        m.shift = s.max - max;
        m.shrink = exp_of<D, T>(p, m.shift);
    }
    // of the lanes that have the maximum, the first leaves it out; lower maxima become terms of the rest again, and a
    // NaN in a rest survives the product
    const unsigned lane = threadIdx.x % WARP;
    const unsigned before = __ballot_sync(ALL_LANES, m.at) >> (lane & -width) & ((1u << (lane & (width - 1))) - 1);
    const A counted = (m.at && before == 0) || max == -infinity<A>() ? A(0) : A(1);
    m.sum = m.at ? counted + s.rest : (counted + s.rest) * m.shrink;
    s.max = max;
    s.rest = lanes_reduce<Sum>(m.sum, width);
    return m;
}

// Merges the states of `width` lanes, as `merge_maxima`.
template <class T, class A, Detail D>
__device__ __forceinline__ State<A, D> merge_lanes(const Params &p, State<A, D> s, int width) {
    if (width == 1) return s;
    const Moved<A> m = merge_maxima<D, T>(p, s, width);
    if constexpr (D >= UNIFORM) {
        s.linear = lanes_reduce<Sum>(m.at || s.mass == A(0) ? s.linear : s.linear + s.mass * m.shift, width);
        s.mass = lanes_reduce<Sum>(s.mass, width);
    }
    if constexpr (D >= STATISTICS) {
        const A moment = m.sum == A(0) ? A(0) : m.shrink * s.moment + m.sum * m.shift;
        s.moment = lanes_reduce<Sum>(m.at ? s.moment : moment, width);
        s.argmax = lanes_reduce<Min>(m.at ? s.argmax : NO_CLASS, width);
        const A top = lanes_reduce<Max>(s.top, width);
        s.top_class = lanes_reduce<Min>(s.top == top ? s.top_class : NO_CLASS, width);
        s.top = top;
    }
    return s;
}

// The operands that passes read beside a row's logits.
template <class A> struct Operands : Targets<A> {
    int64_t t_start; // where the row's probabilities begin
};

// U groups of N numbers, `stride` apart, the groups `step` numbers apart; 0 where exists(u) is false. Where the numbers
// are adjacent and aligned, 16 bytes at a time; `step` is then a multiple of N. All loads are issued before one is
// waited for.
template <class A, int U, int N, class Q, class F>
__device__ __forceinline__ void load_groups(const Q *from, int64_t stride, int64_t step, F exists, A (&to)[U][N]) {
    using Group = Pack<Q, N>;
    if (N > 1 && stride == 1 && reinterpret_cast<uintptr_t>(from) % Group::ALIGN == 0) {
        Group groups[U] = {};
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (exists(u)) groups[u] = Group::load_const(from + u * step);
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
#pragma unroll
            for (int k = 0; k < N; k++) to[u][k] = widen<A>(groups[u].at[k]);
        }
    } else {
#pragma unroll
        for (int u = 0; u < U; u++) {
#pragma unroll
            for (int k = 0; k < N; k++) to[u][k] = exists(u) ? widen<A>(from[(u * step + k) * stride]) : A(0);
        }
    }
}

// The probabilities of U groups of N neighbouring classes, the first of which are first, first + step, …; 0 where
// exists(u) is false.
template <class A, int U, int N, class F>
__device__ __forceinline__ void load_probabilities(const Params &p, const Operands<A> &o, int first, int step, F exists,
                                                   A (&q)[U][N]) {
    const auto load = [&](auto t) {
        const int64_t stride = p.t.class_stride;
        load_groups<A>(t + o.t_start + first * stride, stride, step, exists, q);
    };
    switch (p.target) {
    case DType::F16: return load(static_cast<const f16 *>(o.t));
    case DType::BF16: return load(static_cast<const bf16 *>(o.t));
    case DType::F32: return load(static_cast<const float *>(o.t));
    case DType::F64: return load(static_cast<const double *>(o.t));
    case DType::U8:
    case DType::U32:
    case DType::I16:
    case DType::I32:
    case DType::I64: return; // class indices: no caller asks for their probabilities
    }
}

// The numbers q of U groups of N neighbouring classes, as `load_probabilities`.
template <class A, int U, int N, class F>
__device__ __forceinline__ void load_q(const Params &p, const Operands<A> &o, int first, int step, F exists,
                                       A (&q)[U][N]) {
    const A keep = A(p.keep), spread = A(p.spread);
    const bool index = is_index(p.target);
    if (!index) load_probabilities(p, o, first, step, exists, q);
    // without smoothing a 0 stays 0 and a 1 stays 1
    if (index || keep != A(1) || spread != A(0)) {
#pragma unroll
        for (int u = 0; u < U; u++) {
#pragma unroll
            for (int k = 0; k < N; k++) q[u][k] = !exists(u) ? A(0) : index ? spread : fma_(keep, q[u][k], spread);
        }
    }
    if (o.weight && !(index && spread == A(0))) {
        A weight[U][N];
        load_groups(o.weight + first, 1, step, exists, weight);
#pragma unroll
        for (int u = 0; u < U; u++) {
#pragma unroll
            for (int k = 0; k < N; k++) q[u][k] *= weight[u][k];
        }
    }
}

// Logits in a register: a pair of 16-bit ones, for which there are instructions, or a single one.
template <class X> struct Unit {
    static constexpr int LOGITS = 1;
    X bits;

    __device__ __forceinline__ Acc<X> logit(int) const { return bits; }
    __device__ __forceinline__ Unit larger(Unit other) const { return {max_(bits, other.bits)}; }
    __device__ __forceinline__ static Unit lowest() { return {-infinity<X>()}; }
};
template <class X, class Pair, uint32_t LOWEST> struct PairUnit {
    static constexpr int LOGITS = 2;
    uint32_t bits;

    __device__ __forceinline__ Pair pair() const { return *reinterpret_cast<const Pair *>(&bits); }
    __device__ __forceinline__ Unit<X> larger(PairUnit other) const { return of(__hmax2(pair(), other.pair())); }
    __device__ __forceinline__ static Unit<X> of(Pair pair) { return {*reinterpret_cast<const uint32_t *>(&pair)}; }
    __device__ __forceinline__ static Unit<X> lowest() { return {LOWEST}; }
};
template <> struct Unit<f16> : PairUnit<f16, __half2, 0xfc00fc00u> {
    __device__ __forceinline__ float logit(int k) const { return k ? __high2float(pair()) : __low2float(pair()); }
};
template <> struct Unit<bf16> : PairUnit<bf16, __nv_bfloat162, 0xff80ff80u> {
    __device__ __forceinline__ float logit(int k) const { return __uint_as_float(k ? bits & 0xffff0000u : bits << 16); }
};

// A match: the larger logit wins, as does a number against a NaN; the loser is NaN if either of the two is.
__device__ __forceinline__ void match(Unit<float> &winner, Unit<float> &other) {
    const float a = winner.bits, b = other.bits;
    winner.bits = fmaxf(a, b);
    other.bits = min_nan(a, b);
}
template <class X> __device__ __forceinline__ void match(Unit<X> &winner, Unit<X> &other) {
    const auto a = winner.pair(), b = other.pair();
    winner = Unit<X>::of(__hmax2(a, b));
    other = Unit<X>::of(__hmin2_nan(a, b));
}

// The largest of some logits and, for units of two, the logit that lost the last match against it.
struct Winner {
    float logit, loser;
    bool nan; // all logits are NaN
};

// A tournament: returns the winner (-inf in place of a NaN) and leaves the losers in x[1], x[2], …: all logits but one
// maximum. The comparisons that find the maximum also take it out of the sum.
template <class X, int COUNT> __device__ __forceinline__ Winner tournament(Unit<X> (&x)[COUNT]) {
#pragma unroll
    for (int step = 1; step < COUNT; step *= 2) {
#pragma unroll
        for (int i = 0; i + step < COUNT; i += 2 * step) match(x[i], x[i + step]);
    }
    Unit<float> winner = {x[0].logit(0)}, loser = Unit<float>::lowest();
    if constexpr (Unit<X>::LOGITS == 2) {
        loser = {x[0].logit(1)};
        match(winner, loser);
    }
    const bool nan = winner.bits != winner.bits;
    return {nan ? -infinity<float>() : winner.bits, loser.bits, nan};
}

// sum exp(x - reference) of a tournament's losers, for logits of type T; in sums that do not wait for each other.
template <Detail D, class T, class X, int COUNT>
__device__ __forceinline__ float sum_losers(const Params &p, const Winner &winner, const Unit<X> (&x)[COUNT],
                                            float reference) {
    constexpr int SUMS = 4;
    float sums[SUMS] = {};
    if constexpr (Unit<X>::LOGITS == 2) sums[0] = exp_of<D, T>(p, winner.loser - reference);
    if (winner.nan) sums[0] = quiet_nan<float>();
#pragma unroll
    for (int i = 1; i < COUNT; i++) {
#pragma unroll
        for (int k = 0; k < Unit<X>::LOGITS; k++) sums[i % SUMS] += exp_of<D, T>(p, x[i].logit(k) - reference);
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// Sums over capped logits v: of exp(v - max) and of v - max.
struct CapSums {
    float exps = 0, differences = 0;

    // Adds logits of type T.
    template <class T, int COUNT>
    __device__ __forceinline__ void add(const Params &p, float max, const float (&x)[COUNT]) {
        constexpr int G = 4;
        // of f32 logits with the accurate tanh, for which there is time; else as exponents of 2
        constexpr bool ACCURATE = sizeof(T) == sizeof(float);
        const float top = (p.softcap_f32 - max) * LOG2_E;
#pragma unroll
        for (int i = 0; i < COUNT; i += G) {
            float d[G] = {}, e[G] = {};
            if constexpr (ACCURATE) {
#pragma unroll
                for (int k = 0; k < G && i + k < COUNT; k++) {
                    d[k] = transform(p, x[i + k]) - max;
                    e[k] = exp_below<T>(d[k]);
                }
            } else {
                float group[G];
#pragma unroll
                for (int k = 0; k < G; k++) group[k] = i + k < COUNT ? x[i + k] : -infinity<float>();
                const Caps<G> caps(p, group);
#pragma unroll
                for (int k = 0; k < G && i + k < COUNT; k++) {
                    d[k] = exponent_below(p, caps.r[k], top);
                    e[k] = exp2_approx(d[k]);
                }
            }
            exps += (e[0] + e[1]) + (e[2] + e[3]);
            differences += ((d[0] + d[1]) + (d[2] + d[3])) * (ACCURATE ? 1.0f : 1 / LOG2_E);
        }
    }
};

// The state of logits of type T, stored as X, after a soft cap. `missing` of them are -inf because they are not there.
//
// They and the -inf that the tournaments begin with are summed as the lowest capped logit and subtracted again: no term
// of a row is below that one, so that the difference keeps its digits. The largest logit is capped alone, as the own
// one is; a cap does not change the order. The tournaments are small, for want of registers.
template <class T, class X, int COUNT>
__device__ __forceinline__ State<float, UNIFORM> capped_state_of(const Params &p, const Unit<X> (&x)[COUNT],
                                                                 int missing) {
    constexpr int L = Unit<X>::LOGITS, SIZE = COUNT < 4 ? COUNT : sizeof(T) == 4 ? 2 : 4;
    static_assert(COUNT % SIZE == 0, "tournaments of one size");
    State<float, UNIFORM> state = State<float, UNIFORM>::empty();
    if (missing == COUNT * L) return state;
    Unit<X> largest = Unit<X>::lowest();
#pragma unroll
    for (int i = 0; i < COUNT; i++) largest = largest.larger(x[i]);
    state.max = transform(p, fmaxf(largest.logit(0), largest.logit(L - 1)));
    CapSums sums;
    Unit<float> best = Unit<float>::lowest();
#pragma unroll
    for (int i = 0; i < COUNT; i += SIZE) {
        Unit<X> part[SIZE];
#pragma unroll
        for (int k = 0; k < SIZE; k++) part[k] = x[i + k];
        const Winner winner = tournament(part);
        Unit<float> other = {winner.nan ? quiet_nan<float>() : winner.logit};
        match(best, other);
        float losers[SIZE * L];
        losers[0] = other.bits;
        if constexpr (L == 2) losers[1] = winner.loser;
#pragma unroll
        for (int k = L; k < SIZE * L; k++) losers[k] = part[k / L].logit(k % L);
        sums.add<T>(p, state.max, losers);
    }
    const int there = COUNT * L - missing;
    const float lowest = -p.softcap_f32 - state.max;
    // nothing is left of a single logit, or NaN
    state.rest = there == 1 ? 0.0f * sums.exps : sums.exps - (missing + 1) * exp_below<T>(lowest);
    state.linear = there == 1 ? 0.0f : UNIT * (sums.differences - (missing + 1) * lowest);
    state.mass = UNIT * there;
    return state;
}

// The number that is subtracted ahead of exponentials: the maximum, or 0 where all logits are -inf.
template <class A> __device__ __forceinline__ A reference_of(A max) { return max == -infinity<A>() ? A(0) : max; }

// The state of logits of type T, stored as X, but for `linear` and `mass` unless there is a soft cap: one exponential
// each. `missing` of them are -inf because they are not there, which UNIFORM has to know: with a soft cap, -inf has a
// probability. The logits are lost.
template <Detail D, class T, class X, int COUNT>
__device__ __forceinline__ State<float, D> state_of(const Params &p, Unit<X> (&x)[COUNT], int missing = 0) {
    if constexpr (D == UNIFORM) {
        if (p.capped) {
#if __CUDA_ARCH__ >= 800
            return capped_state_of<T>(p, x, missing);
#else
            // one by one where pairs take many instructions to compare
            constexpr int L = Unit<X>::LOGITS;
            Unit<float> single[COUNT * L];
#pragma unroll
            for (int i = 0; i < COUNT * L; i++) single[i] = {x[i / L].logit(i % L)};
            return capped_state_of<T>(p, single, missing);
#endif
        }
    }
    const Winner winner = tournament(x);
    State<float, D> state = State<float, D>::empty();
    state.max = winner.logit;
    state.rest = sum_losers<D, T>(p, winner, x, reference_of(winner.logit));
    return state;
}

// As `state_of`, with `linear` and `mass`; logits x[i] for which exists(i) is false are -inf.
template <Detail D, class T, int COUNT, class F>
__device__ __forceinline__ State<float, D> state_of_logits(const Params &p, const float (&x)[COUNT], F exists) {
    Unit<float> units[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; i++) units[i] = {x[i]};
    int missing = 0;
    if constexpr (D == UNIFORM) {
#pragma unroll
        for (int i = 0; i < COUNT; i++) missing += !exists(i);
    }
    State<float, D> state = state_of<D, T>(p, units, missing);
    if constexpr (D == UNIFORM) {
        if (p.spread != 0.0 && !p.capped) {
#pragma unroll
            for (int i = 0; i < COUNT; i++) {
                if (exists(i))
                    state.linear = fmaf(x[i] - reference_of(state.max), UNIT, state.linear), state.mass += UNIT;
            }
        }
    }
    return state;
}

// Whether there is a q other than the own class's.
__device__ __forceinline__ bool has_q(const Params &p) { return !is_index(p.target) || p.spread != 0.0; }

// Adds `linear` and `mass` of logits x to the state that they have without these, in sums that do not wait for each
// other.
template <int U, int N, class A, Detail D>
__device__ __forceinline__ void add_targets(State<A, D> &state, const A (&x)[U][N], const A (&q)[U][N]) {
    constexpr int SUMS = sizeof(A) == sizeof(float) ? 4 : 2;
    const A reference = reference_of(state.max);
    A linear[SUMS] = {}, mass[SUMS] = {};
#pragma unroll
    for (int i = 0; i < U * N; i++) {
        const A of_class = q[i / N][i % N], d = x[i / N][i % N] - reference;
        // a probability of 0 at a logit of -inf counts as 0
        if (of_class != A(0)) linear[i % SUMS] = fma_(of_class, d, linear[i % SUMS]);
        mass[i % SUMS] += of_class;
    }
#pragma unroll
    for (int step = SUMS / 2; step > 0; step /= 2) {
#pragma unroll
        for (int i = 0; i < step; i++) linear[i] += linear[i + step], mass[i] += mass[i + step];
    }
    state.linear = linear[0], state.mass = mass[0];
}

// Adds U groups of N classes to a thread's state, as `absorb`, from units of logits.
template <class T, int U, int N, class F>
__device__ __forceinline__ void absorb_units(State<float, GENERAL> &state, const Params &p, const Operands<float> &o,
                                             int first, int step, F exists,
                                             const Unit<T> (&units)[U * N / Unit<T>::LOGITS]) {
    constexpr int L = Unit<T>::LOGITS;
    float q[U][N];
    if (has_q(p)) load_q(p, o, first, step, exists, q);
    float x[U][N];
#pragma unroll
    for (int i = 0; i < U * N; i++) x[i / N][i % N] = units[i / L].logit(i % L);
    State<float, GENERAL> part;
    if (p.capped || p.scale != 1.0) {
        Unit<float> values[U * N];
#pragma unroll
        for (int i = 0; i < U * N; i++) {
            float &v = x[i / N][i % N];
            v = exists(i / N) ? transform(p, v) : -infinity<float>();
            values[i] = {v};
        }
        part = state_of<GENERAL, T>(p, values);
    } else {
        Unit<T> values[U * N / L];
#pragma unroll
        for (int i = 0; i < U * N / L; i++) values[i] = units[i];
        part = state_of<GENERAL, T>(p, values);
    }
    if (has_q(p)) add_targets(part, x, q);
    state = merge<T>(p, state, part);
}

// Adds U groups of N classes to a thread's state; group u begins at class first + u * step. `logit(u, k)` is a logit of
// group u, -inf behind the row's end.
//
// The maximum comes first, then one exponential for each logit relative to it, then one merge for all of them.
template <Detail D, class T, int U, int N, class A, class F>
__device__ __forceinline__ void absorb(State<A, D> &state, const Params &p, const Operands<A> &o, int first, int step,
                                       F logit) {
    // doubles take another register for each comparison's result, and are bound by their arithmetic anyway
    if constexpr (D <= UNIFORM && sizeof(A) == sizeof(float)) {
        A logits[U * N];
#pragma unroll
        for (int i = 0; i < U * N; i++) logits[i] = logit(i / N, i % N);
        state =
            merge<T>(p, state,
                     state_of_logits<D, T>(p, logits, [&](int i) { return first + i / N * step + i % N < p.classes; }));
        return;
    }
    State<A, D> part = State<A, D>::empty();
    A x[U][N];
#pragma unroll
    for (int u = 0; u < U; u++) {
#pragma unroll
        for (int k = 0; k < N; k++) {
            A slope;
            const bool there = D == PLAIN || first + u * step < p.classes;
            x[u][k] = !there ? -infinity<A>() : D == PLAIN ? logit(u, k) : transform(p, logit(u, k), slope);
        }
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
#pragma unroll
        for (int k = 0; k < N; k++) {
            if constexpr (D >= STATISTICS) {
                if (x[u][k] > part.max) part.argmax = first + u * step + k;
            }
            part.max = max_(part.max, x[u][k]);
        }
    }
    const A reference = reference_of(part.max);
    A ties = part.max == -infinity<A>() ? A(0) : A(-1);
#pragma unroll
    for (int u = 0; u < U; u++) {
#pragma unroll
        for (int k = 0; k < N; k++) {
            const A d = x[u][k] - reference;
            if (d == A(0)) {
                ties += A(1);
            } else {
                const A e = exp_of<D, T>(p, d);
                part.rest += e;
                if constexpr (D >= STATISTICS) part.moment += e == A(0) ? A(0) : e * d;
            }
        }
    }
    part.rest += ties;
    const auto exists = [&](int u) { return first + u * step < p.classes; };
    if constexpr (D >= GENERAL) {
        A q[U][N];
        if (has_q(p)) {
            load_q(p, o, first, step, exists, q);
            add_targets(part, x, q);
        }
    }
    if constexpr (D >= STATISTICS) {
        if (!is_index(p.target)) {
            A t[U][N];
            load_probabilities(p, o, first, step, exists, t);
#pragma unroll
            for (int u = 0; u < U; u++) {
#pragma unroll
                for (int k = 0; k < N; k++) {
                    if (exists(u) && t[u][k] > part.top) part.top = t[u][k], part.top_class = first + u * step + k;
                }
            }
        }
    }
    state = merge<T>(p, state, part);
}

// ---------------------------------------------------------------------------------------------------------------------
// A row's loss and the scalars of its gradient

// What becomes of the own class's negative log-likelihood n, where p = exp(-n) and u = 1 - p; o is the parameter.
enum RowTransform : int {
    NO_TRANSFORM,   // n
    FOCAL,          // u^o n
    POLY1,          // n + o u
    DFT,            // p n, with p a constant
    GENERALIZED_CE, // (1 - p^o) / o
};

template <class A> struct Transformed {
    A value, slope; // the slope by n
};

template <class A> __device__ __forceinline__ Transformed<A> transformed(const Params &params, A n) {
    const A o = A(params.transform_parameter);
    const A p = exp_(-n), u = -expm1_(-n);
    switch (params.row_transform) {
    case FOCAL: {
        const A power = o == A(2) ? u * u : pow_(u, o);
        // p n / u: 1 where u is 0, and 0 where the own class is at -inf
        const A ratio = p == A(0) ? A(0) : u == A(0) ? A(1) : p * n / u;
        return {power * n, power * fma_(o, ratio, A(1))};
    }
    case POLY1: return {fma_(o, u, n), fma_(o, p, A(1))};
    case DFT: return {p == A(0) ? A(0) : p * n, p};
    case GENERALIZED_CE: return {-expm1_(-o * n) / o, exp_(-o * n)};
    default: return {n, A(1)};
    }
}

// The negative log-likelihood of a row's own class, of which `x_t` is the logit after scale and cap.
template <Detail D, class A> __device__ __forceinline__ A nll_of(const Params &p, A x_t, const State<A, D> &state) {
    return log_sum_of(state.max, state.rest) - scaled<D>(p, x_t - state.max);
}

// z lse^2
template <class A> __device__ __forceinline__ A z_loss_of(const Params &p, A lse) {
    return p.z_loss == 0.0 ? A(0) : A(p.z_loss) * lse * lse;
}

// The loss of a row; `x_t` is its own class's logit after scale and cap.
template <Detail D, class A>
__device__ __forceinline__ A loss_of(const Params &p, const Target<A> &target, A x_t, const State<A, D> &state) {
    if (target.kind == Kind::IGNORED) return A(0);
    if (target.kind == Kind::BAD) return quiet_nan<A>();
    const A log_sum = log_sum_of(state.max, state.rest);
    // a weight of 0 still gives NaN in a row without a softmax
    A loss = A(0) * log_sum;
    if (target.own != A(0)) {
        A n = nll_of(p, x_t, state);
        if constexpr (D >= UNIFORM) {
            if (p.row_transform != NO_TRANSFORM) n = transformed(p, n).value;
        }
        loss = target.own * n;
    }
    if constexpr (D == UNIFORM) {
        if (p.spread != 0.0) loss += A(p.mass) * log_sum - A(p.spread / UNIT * p.factor) * state.linear;
    }
    if constexpr (D >= GENERAL) {
        if (!is_index(p.target) || p.spread != 0.0) loss += state.mass * log_sum - scaled<D>(p, state.linear);
    }
    if constexpr (D >= UNIFORM) loss += z_loss_of(p, scaled<D>(p, state.max) + log_sum);
    return loss;
}

template <class A> struct RowScalars {
    Kind kind;
    int target; // own class, or -1
    A own;
    A max;
    A inverse;     // 1 / sum exp(x - m)
    A log_sum;     // log sum exp(x - m)
    A slope, mass; // the factor of p, and the sum of the row's q
    A at_peak;     // slope p - mass at the largest logit, without cancellation
    A upstream;    // upstream gradient over the denominator, times the logit scale

    __device__ __forceinline__ static RowScalars of(A max, A rest) {
        RowScalars s;
        s.kind = Kind::LIVE;
        s.target = -1;
        // a row of only -inf, or with +inf, has no softmax
        s.max = is_finite(max) ? max : quiet_nan<A>();
        s.inverse = A(1) / (A(1) + rest);
        s.log_sum = log_sum_of(max, rest);
        s.own = A(0);
        s.upstream = A(1);
        s.set_slope(A(0), A(0), rest);
        return s;
    }

    // The factor of p: the sum of q, and what is beyond that.
    __device__ __forceinline__ void set_slope(A sum, A beyond, A rest) {
        mass = sum;
        slope = sum + beyond;
        at_peak = beyond * inverse - sum * (rest / (A(1) + rest));
    }

    // `mass` is the sum of q without the own class, `upstream` already over the denominator.
    template <Detail D>
    __device__ __forceinline__ static RowScalars gradient(const Params &p, const Target<A> &target, A max, A rest,
                                                          A mass, A upstream) {
        RowScalars s = of(max, rest);
        s.kind = target.kind;
        s.target = target.index;
        s.own = target.own;
        s.upstream = upstream;
        A beyond = A(0);
        if constexpr (D >= UNIFORM) {
            s.upstream *= A(p.scale * p.factor);
            if (p.z_loss != 0.0) beyond = A(2.0 * p.z_loss) * (scaled<D>(p, s.max) + s.log_sum);
        }
        s.set_slope(D >= UNIFORM ? target.own + mass : target.own, beyond, rest);
        return s;
    }
};

// A row's scalars in a pass that has just reduced it; `x_t` is its own class's logit after scale and cap.
template <Detail D, class A>
__device__ __forceinline__ RowScalars<A> reduced_scalars(const Params &p, const Targets<A> &targets, int64_t row,
                                                         Target<A> target, A x_t, const State<A, D> &state,
                                                         A upstream) {
    if constexpr (D >= UNIFORM) {
        if (p.row_transform != NO_TRANSFORM) target.own *= transformed(p, nll_of(p, x_t, state)).slope;
    }
    return RowScalars<A>::template gradient<D>(p, target, state.max, state.rest, mass_of(p, state),
                                               times_row_weight(p, targets, row, upstream));
}

// upstream (slope p - q), within a few units in the last place of the larger of slope p and q.
template <Detail D, class T, class A>
__device__ __forceinline__ A gradient_value(const Params &params, const RowScalars<A> &s, A x, A q) {
    const A p = exp_of<D, T>(params, x - s.max) * s.inverse;
    // p > 1/2: exact where q is nearly all of the mass, so that the gradient of a confident row keeps its digits. For
    // smaller p, the mass is larger than both terms.
    const bool peak = x == s.max && s.inverse > A(0.5);
    return s.upstream * (peak ? (s.mass - q) + s.at_peak : s.slope * p - q);
}

// A rule computes the values that a pass writes for N neighbouring logits x, the first of which is of class `first`,
// from the scalars of their row. `DETAIL` says which numbers of the row it needs. With `OWN` it leaves the own class to
// `own_value`, which one thread calls once a row.

// upstream (p - onehot) w[t]: for a class that is not the own one a subtraction, an exponential and a multiplication
struct PlainGradient {
    static constexpr Detail DETAIL = PLAIN;
    static constexpr bool OWN = true;
    template <class T, int N, class A>
    __device__ __forceinline__ static void emit(const Params &, const Operands<A> &, const RowScalars<A> &s, int,
                                                const A (&x)[N], A (&y)[N]) {
        const A factor = s.upstream * s.slope * s.inverse;
#pragma unroll
        for (int k = 0; k < N; k++) y[k] = exp_below<T>(x[k] - s.max) * factor;
    }
    template <class T, class A>
    __device__ __forceinline__ static A own_value(const Params &p, const RowScalars<A> &s, A x) {
        return gradient_value<PLAIN, T>(p, s, x, s.own);
    }
};

// upstream (slope p - q) with one q, to which the own class adds its weight: a subtraction, an exponential and a
// multiply-add. Classes other than the own one need no care at the largest logit: where p > 1/2, their q is at most
// half of the mass, so that nearly nothing cancels.
struct UniformGradient {
    static constexpr Detail DETAIL = UNIFORM;
    static constexpr bool OWN = true;
    template <class T, int N, class A>
    __device__ __forceinline__ static void emit(const Params &p, const Operands<A> &, const RowScalars<A> &s, int,
                                                const A (&x)[N], A (&y)[N]) {
        const A factor = s.upstream * s.slope * s.inverse, q = s.upstream * A(p.spread);
        if (p.capped) {
            capped<T>(p, s, factor, q, x, y);
            return;
        }
#pragma unroll
        for (int k = 0; k < N; k++) y[k] = fma_(exp_of<UNIFORM, T>(p, x[k] - s.max), factor, -q);
    }

    // The same with a soft cap, times its derivative.
    template <class T, int N, class A>
    __device__ __forceinline__ static void capped(const Params &p, const RowScalars<A> &s, A factor, A q,
                                                  const A (&x)[N], A (&y)[N]) {
        if constexpr (sizeof(T) == 2 && N % 2 == 0) {
            const float top = (p.softcap_f32 - s.max) * LOG2_E;
            // the largest e is 2^62, where e r^2 is 2^-60: from 2^-59 on it is 0, as it is for an infinite logit
            constexpr float LEAST = 1.0f / (1ull << 59);
#pragma unroll
            for (int i = 0; i < N; i += 2) {
                const Caps<2> caps(p, x + i);
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    const float r = caps.r[k];
                    const float value = fmaf(exp2_approx(exponent_below(p, r, top)), factor, -q);
                    y[i + k] = value * __saturatef(fmaf(caps.e[k] * r, r, -LEAST));
                }
            }
        } else {
#pragma unroll
            for (int k = 0; k < N; k++) {
                A slope;
                const A v = transform(p, x[k], slope);
                y[k] = fma_(exp_below<T>(v - s.max), factor, -q) * slope;
            }
        }
    }

    template <class T, class A>
    __device__ __forceinline__ static A own_value(const Params &p, const RowScalars<A> &s, A x) {
        A slope;
        const A v = transform(p, x, slope);
        return gradient_value<UNIFORM, T>(p, s, v, s.own + A(p.spread)) * slope;
    }
};

// upstream (slope p - q) and the soft cap's derivative
struct GeneralGradient {
    static constexpr Detail DETAIL = GENERAL;
    static constexpr bool OWN = false;
    template <class T, int N, class A>
    __device__ __forceinline__ static void emit(const Params &p, const Operands<A> &o, const RowScalars<A> &s,
                                                int first, const A (&x)[N], A (&y)[N]) {
        A q[1][N];
        load_q(p, o, first, 0, [](int) { return true; }, q);
        emit<T>(p, q[0], s, first, x, y);
    }

    // With the numbers q.
    template <class T, int N, class A>
    __device__ __forceinline__ static void emit(const Params &p, const A (&q)[N], const RowScalars<A> &s, int first,
                                                const A (&x)[N], A (&y)[N]) {
        A of_class[N];
#pragma unroll
        for (int k = 0; k < N; k++) of_class[k] = q[k];
        if (s.target >= 0) {
#pragma unroll
            for (int k = 0; k < N; k++) of_class[k] += first + k == s.target ? s.own : A(0);
        }
        if (p.capped || p.scale != 1.0) {
#pragma unroll
            for (int k = 0; k < N; k++) {
                A slope;
                const A v = transform(p, x[k], slope);
                y[k] = gradient_value<GENERAL, T>(p, s, v, of_class[k]) * slope;
            }
        } else if (s.inverse > A(0.5)) {
#pragma unroll
            for (int k = 0; k < N; k++) y[k] = gradient_value<GENERAL, T>(p, s, x[k], of_class[k]);
        } else {
            // no class has p > 1/2
            const A factor = s.slope * s.inverse;
#pragma unroll
            for (int k = 0; k < N; k++)
                y[k] = s.upstream * fma_(exp_of<GENERAL, T>(p, x[k] - s.max), factor, -of_class[k]);
        }
    }
};

// (x - m) - log-sum: log-softmax
struct LogProbs {
    static constexpr Detail DETAIL = PLAIN;
    static constexpr bool OWN = false;
    template <class T, int N, class A>
    __device__ __forceinline__ static void emit(const Params &, const Operands<A> &, const RowScalars<A> &s, int,
                                                const A (&x)[N], A (&y)[N]) {
#pragma unroll
        for (int k = 0; k < N; k++) y[k] = (x[k] - s.max) - s.log_sum;
    }
};

// upstream / denominator * keep * w (lse - x): the gradient of a probability target. `upstream` has all factors but w.
struct TargetGradient {
    static constexpr Detail DETAIL = GENERAL;
    static constexpr bool OWN = false;
    template <class T, int N, class A>
    __device__ __forceinline__ static void emit(const Params &p, const Operands<A> &o, const RowScalars<A> &s,
                                                int first, const A (&x)[N], A (&y)[N]) {
#pragma unroll
        for (int k = 0; k < N; k++) {
            A slope;
            const A v = transform(p, x[k], slope);
            const A w = o.weight ? A(p.keep) * o.weight[first + k] : A(p.keep);
            y[k] = w == A(0) ? A(0) : s.upstream * w * (s.log_sum - scaled<GENERAL>(p, v - s.max));
        }
    }
};

// g - p sum(g): the gradient of log-softmax, from the logits and what the forward saved, so that p has no rounding to
// 16 bits in it. It is the gradient of cross-entropy for probabilities g, with an upstream gradient of -1.
template <class A> struct LogSoftmaxGradient {
    RowScalars<A> s;

    __device__ __forceinline__ LogSoftmaxGradient(const Params &p, const A *statistics, int64_t row, A sum) {
        const A rest = statistics[p.rows + row];
        s = RowScalars<A>::of(statistics[row], rest);
        s.set_slope(sum, A(0), rest);
        s.upstream = A(-1);
    }
    template <class T> __device__ __forceinline__ A value(const Params &p, A x, A g) const {
        return gradient_value<PLAIN, T>(p, s, x, g);
    }
};

// The value for all classes of a row that is ignored, whatever its logits are, or that has a bad target.
template <class A> __device__ __forceinline__ A dead_value(Kind kind) {
    return kind == Kind::IGNORED ? A(0) : quiet_nan<A>();
}

// ---------------------------------------------------------------------------------------------------------------------
// The statistics that a forward saves of a row: maximum and rest; with `row_mass` the mass; with a row transform its
// slope

template <Detail D, class A>
__device__ __forceinline__ void write_statistics(const Params &p, A *statistics, int64_t row,
                                                 const State<A, D> &state) {
    if (!statistics) return;
    statistics[row] = state.max;
    statistics[p.rows + row] = state.rest;
    if constexpr (D >= GENERAL) {
        if (p.row_mass) statistics[2 * p.rows + row] = state.mass;
    }
}

// The place of a row transform's slope behind them.
__device__ __forceinline__ int64_t slope_at(const Params &p, int64_t row) { return (2 + p.row_mass) * p.rows + row; }

// The sum of a row's q without its own class, in the backward.
template <class A> __device__ __forceinline__ A read_mass(const Params &p, const A *statistics, int64_t row) {
    return p.row_mass ? statistics[2 * p.rows + row] : A(p.mass);
}

} // namespace softmax
} // namespace fused_loss
