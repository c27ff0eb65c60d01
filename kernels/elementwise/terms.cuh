// The formulas of the element-wise family: one struct for each loss, over one element.
//
// A term has
//   PROBABILITIES    whether input and target have to be in [0, 1]; where one is not, the kernels write NaN in place of
//                    the term's values
//   at(x, t, p, o)   the loss and its derivative with respect to the input x
//   by_target(...)   the loss's derivative with respect to the target t, before label smoothing
// where t is the smoothed target, p the positive class's weight (1 without) and o the term's parameters. A kernel that
// needs only the loss or only the derivative calls `at` all the same: the compiler drops the other half.
//
// A new term is one more struct here and one more line in FOR_EACH_TERM at the end.
#pragma once

#include "../common.cuh"

namespace fused_loss {

// How many parameters a term has at most: the same number in src/elementwise/problem.rs.
constexpr int TERM_PARAMETERS = 3;

// The parameters of a term, in the order of its `parameters` in src/elementwise/problem.rs. A term with parameters
// names their places in an enum.
template <class A> struct TermParameters {
    A p[TERM_PARAMETERS];
};

template <class A> struct Value {
    A loss;
    A grad;
};

// a * b, where 0 times infinity is 0; NaN only from NaN. Without a branch.
template <class A> __device__ __forceinline__ A times(A a, A b) {
    const A product = a * b;
    const bool made_nan = is_nan(product) & !(is_nan(a) | is_nan(b));
    return made_nan ? A(0) : product;
}

// ln(1 + z) for z in [0, 1] within 2 ulp: z + z^2 f(z), without the rounding of 1 + z, without a division and in one
// piece. f has the least relative error that a polynomial of its degree can give the result, 2^-24.8.
__device__ __forceinline__ float log1p_unit(float z) {
    float f = 5.3648185e-3f;
    f = fmaf(f, z, -3.0065769e-2f);
    f = fmaf(f, z, 7.9204500e-2f);
    f = fmaf(f, z, -1.3753799e-1f);
    f = fmaf(f, z, 1.9153653e-1f);
    f = fmaf(f, z, -2.4857163e-1f);
    f = fmaf(f, z, 3.3321324e-1f);
    f = fmaf(f, z, -4.9999648e-1f);
    return fmaf(z * z, f, z);
}
__device__ __forceinline__ double log1p_unit(double z) { return log1p(z); }

// 1 / v for v in [1, 2], within 1 ulp.
__device__ __forceinline__ float reciprocal(float v) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
    return r;
}
__device__ __forceinline__ double reciprocal(double v) { return 1.0 / v; }

// The parts of the losses on logits, from one exponential. With z = exp(-|x|) nothing overflows, and nothing cancels:
// each of the four has the relative accuracy of its parts, for logits of any size.
template <class A> struct Logit {
    A part;         // ln(1 + z), which both softplus share
    A softplus;     // ln(1 + exp(x)) = -ln sigmoid(-x)
    A softplus_neg; // ln(1 + exp(-x)) = -ln sigmoid(x)
    A sigmoid;      // 1 / (1 + exp(-x))
    A sigmoid_neg;  // 1 / (1 + exp(x))

    __device__ __forceinline__ explicit Logit(A x) {
        const A z = exp_(-abs_(x));
        part = log1p_unit(z);
        // for a NaN the maxima are 0, but z is NaN
        softplus = max_(x, A(0)) + part;
        softplus_neg = max_(-x, A(0)) + part;
        const A large = reciprocal(A(1) + z);
        const A small = z * large;
        sigmoid = x < A(0) ? small : large;
        sigmoid_neg = x < A(0) ? large : small;
    }
};

// -(t max(ln x, -100) + (1 - t) max(ln(1 - x), -100)) for a probability x.
struct Bce {
    static constexpr bool PROBABILITIES = true;

    template <class A> __device__ __forceinline__ static Value<A> at(A x, A t, A, const TermParameters<A> &) {
        const A yes = max_(log_(x), A(-100));
        const A no = max_(log1p_(-x), A(-100));
        return {-fma_(t, yes, (A(1) - t) * no), (x - t) / max_(x * (A(1) - x), A(1e-12))};
    }

    template <class A> __device__ __forceinline__ static A by_target(A x, A, A, const TermParameters<A> &) {
        return max_(log1p_(-x), A(-100)) - max_(log_(x), A(-100));
    }
};

// t p softplus(-x) + (1 - t) softplus(x) for a logit x: with z = exp(-|x|), each softplus has ln(1 + z), and the one of
// the class that x speaks against has |x| besides. The derivative (1 - t) sigmoid(x) - t p sigmoid(-x) is the
// difference of the two classes' parts, so that a confident and right logit keeps its tiny gradient. The CPU, which is
// not short of instructions, adds up the four parts of `Logit` instead.
struct BceWithLogits {
    static constexpr bool PROBABILITIES = false;

    template <class A> __device__ __forceinline__ static Value<A> at(A x, A t, A p, const TermParameters<A> &) {
        const A z = exp_(-abs_(x));
        const A yes = times(t, p), no = A(1) - t;
        const bool positive = x >= A(0);
        const A wrong = positive ? no : yes, right = positive ? yes : no;
        // 0 * inf counts as 0: the label that agrees with an infinite logit
        const A far = wrong == A(0) ? A(0) : abs_(x);
        const A slope = fma_(-right, z, wrong) * reciprocal(A(1) + z);
        return {fma_(wrong, far, (yes + no) * log1p_unit(z)), positive ? slope : -slope};
    }

    template <class A> __device__ __forceinline__ static A by_target(A x, A, A p, const TermParameters<A> &) {
        // p softplus(-x) - softplus(x), with the shared part taken out so that p = 1 gives -x exactly
        const Logit<A> l(x);
        return times(p - A(1), l.part) + (times(p, max_(-x, A(0))) - max_(x, A(0)));
    }
};

// a u^gamma ce with ce = t softplus(-x) + (1 - t) softplus(x), the probability of being wrong u = t sigmoid(-x) +
// (1 - t) sigmoid(x) and the weights of the classes a = positive t + negative (1 - t), for a logit x.
//
// By x: a [u^gamma ce' + gamma u^gamma (u' / u) ce], where ce' = sigmoid(x) - t. For a label of exactly 0 or 1, u' / u
// is sigmoid(-x) or -sigmoid(x): no division, so nothing is lost where u underflows, whatever gamma is.
struct Focal {
    static constexpr bool PROBABILITIES = false;

    enum Parameter { POSITIVE, NEGATIVE, GAMMA };

    template <class A> __device__ __forceinline__ static A wrong(const Logit<A> &l, A t) {
        return fma_(t, l.sigmoid_neg, (A(1) - t) * l.sigmoid);
    }

    // u^gamma; 1 for gamma = 0, also of u = 0
    template <class A> __device__ __forceinline__ static A power(const Logit<A> &l, A t, A u, A gamma) {
        if (gamma == A(2)) return u * u;
        if (gamma == A(0)) return A(1);
        // ln u for the labels 0 and 1 without the rounding of u
        const A ln = t == A(0) ? -l.softplus_neg : t == A(1) ? -l.softplus : log_(u);
        return exp_(gamma * ln);
    }

    template <class A> __device__ __forceinline__ static A balance(A t, const TermParameters<A> &o) {
        return fma_(o.p[POSITIVE], t, o.p[NEGATIVE] * (A(1) - t));
    }

    template <class A> __device__ __forceinline__ static Value<A> at(A x, A t, A, const TermParameters<A> &o) {
        const Logit<A> l(x);
        const A no = A(1) - t;
        const A ce = times(t, l.softplus_neg) + times(no, l.softplus);
        const A u = wrong(l, t);
        const A scale = balance(t, o) * power(l, t, u, o.p[GAMMA]);
        A ratio;
        if (t == A(0))
            ratio = l.sigmoid_neg;
        else if (t == A(1))
            ratio = -l.sigmoid;
        else
            ratio = l.sigmoid * l.sigmoid_neg * (A(1) - A(2) * t) / u;
        const A slope = no * l.sigmoid - t * l.sigmoid_neg;
        return {times(scale, ce), scale * fma_(o.p[GAMMA], times(ratio, ce), slope)};
    }

    template <class A> __device__ __forceinline__ static A by_target(A x, A t, A, const TermParameters<A> &o) {
        const Logit<A> l(x);
        const A ce = times(t, l.softplus_neg) + times(A(1) - t, l.softplus);
        const A u = wrong(l, t);
        const A raised = power(l, t, u, o.p[GAMMA]);
        const A a = balance(t, o);
        const A a_slope = o.p[POSITIVE] - o.p[NEGATIVE];
        // ce / u tends to 1 where both underflow, that is where the label is right
        const A per_wrong = u == A(0) ? A(1) : ce / u;
        const A u_slope = l.sigmoid_neg - l.sigmoid;
        const A slope = times(o.p[GAMMA] * raised * u_slope, per_wrong) - times(raised, x);
        return times(a_slope * raised, ce) + times(a, slope);
    }
};

// |x - t|. The derivatives are signs, 0 where x = t; NaN where the difference is NaN.
struct L1 {
    static constexpr bool PROBABILITIES = false;

    template <class A> __device__ __forceinline__ static Value<A> at(A x, A t, A, const TermParameters<A> &) {
        const A difference = x - t;
        return {abs_(difference), difference > A(0) ? A(1) : difference < A(0) ? A(-1) : difference};
    }

    template <class A> __device__ __forceinline__ static A by_target(A x, A t, A p, const TermParameters<A> &o) {
        return -at(x, t, p, o).grad;
    }
};

// TERM(type), in the order of the numbers that src/elementwise/problem.rs has as well.
#define FOR_EACH_TERM(TERM) TERM(Bce) TERM(BceWithLogits) TERM(Focal) TERM(L1)

// The terms that have dense kernels: DENSE(type, kernel of the loss, of the loss with its gradient, of the gradient).
// The names are those of src/elementwise/problem.rs.
#define FOR_EACH_DENSE_TERM(DENSE)                                                                            \
    DENSE(Bce, loss_bce_dense, fused_bce_dense, grad_bce_dense)                                               \
    DENSE(BceWithLogits, loss_bce_with_logits_dense, fused_bce_with_logits_dense, grad_bce_with_logits_dense) \
    DENSE(Focal, loss_focal_dense, fused_focal_dense, grad_focal_dense)

// A term that is not a template parameter.
#define TERM_NUMBER(Term) Term,
enum class TermNumber : int { FOR_EACH_TERM(TERM_NUMBER) };
#undef TERM_NUMBER

// Calls f with a value of the type that `number` names, so that a generic lambda is compiled once for each term. The
// branch is the same in all threads of a launch.
#define TERM_CASE(Term) \
    case TermNumber::Term: return f(Term{});
template <class F> __device__ __forceinline__ void with_term(TermNumber number, F f) {
    switch (number) { FOR_EACH_TERM(TERM_CASE) }
}
#undef TERM_CASE

} // namespace fused_loss
