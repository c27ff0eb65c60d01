// Negative log-likelihood: the loss of a row is -w[t] x[t], one number of the row, and its gradient is -w[t] at the own
// class and 0 elsewhere. No other log-probabilities are read: a forward moves one sector a row, and a gradient moves
// only the bytes that it writes. One kernel therefore serves all dtypes with the same arithmetic.
#pragma once

#include "targets.cuh"

namespace fused_loss {
namespace nll {

// The log-probabilities and the order of the gradient: mirrored by `NllParams` in src/nll/cuda.rs.
struct Params : RowParams {
    Strides x;
    DType dtype;       // of the log-probabilities and their gradient
    int upstream_rows; // whether the upstream gradient has a number for each row, or one for all
    int class_last;    // the gradient is written in the order (outer, inner, class), else (outer, class, inner)
};

// Calls f with a log-probability of the dtype, one of those whose arithmetic is A. The branch is the same in all
// threads.
template <class A, class F> __device__ __forceinline__ void with_logits(DType dtype, F f) {
    if constexpr (sizeof(A) == sizeof(double)) {
        f(0.0);
    } else {
        switch (dtype) {
        case DType::F16: return f(f16());
        case DType::BF16: return f(bf16());
        case DType::F32: return f(0.0f);
        case DType::U8:
        case DType::U32:
        case DType::I16:
        case DType::I32:
        case DType::I64:
        case DType::F64: return; // not the log-probabilities of these kernels
        }
    }
}

// The losses of all rows, a thread a row. All threads of the block call it.
template <class T>
__device__ __forceinline__ void losses(const Params &p, const T *x, const Targets<Acc<T>> &targets,
                                       const Outputs<Acc<T>> &out) {
    using A = Acc<T>;
    __shared__ double scratch[WARP];
    double2 total = {0, 0};
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t row = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; row < p.rows; row += step) {
        const Target<A> target = read_target(p, targets, row);
        A loss = target.kind == Kind::BAD ? quiet_nan<A>() : A(0);
        if (target.kind == Kind::LIVE && target.own != A(0)) {
            loss = -target.own * widen<A>(x[p.x.start(row) + target.index * p.x.class_stride]);
            loss = times_row_weight(p, targets, row, loss);
        }
        if (out.loss) out.loss[row] = loss;
        total.x += static_cast<double>(loss), total.y += static_cast<double>(target.weight);
    }
    finish_block(p, targets, out, total.x, total.y, scratch, blockIdx.x, gridDim.x);
}

// The gradient at one class of a row; `factor` is the upstream gradient over the denominator.
template <class A> __device__ __forceinline__ A value_at(const Target<A> &target, int c, A factor) {
    if (target.kind == Kind::BAD) return quiet_nan<A>();
    return c == target.index ? -(target.own * factor) : A(0);
}

// The gradient, `out` being aligned to 16 bytes: neighbouring threads write neighbouring windows of it.
template <class T>
__device__ __forceinline__ void gradient(const Params &p, const Targets<Acc<T>> &targets, Acc<T> denominator,
                                         const Acc<T> *upstream, T *out) {
    using A = Acc<T>;
    constexpr int N = LANES_16B<T>;
    // (outer, inner, class), or (outer, class, inner)
    const int64_t inner = p.class_last ? 1 : p.x.inner, classes = p.classes;
    const int64_t elements = p.rows * classes, step = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t window = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; window * N < elements;
         window += step) {
        Pack<T, N> pack;
        int64_t column = window * N % inner, line = window * N / inner;
        int64_t outer = line / classes;
        int c = static_cast<int>(line % classes);
        int64_t read = -1;
        Target<A> target = {};
        A factor = A(0);
#pragma unroll
        for (int k = 0; k < N; k++) {
            const int64_t row = outer * inner + column;
            if (row < p.rows && row != read) {
                target = read_target(p, targets, row);
                factor = over(upstream ? upstream[p.upstream_rows ? row : 0] : A(p.grad_scale), denominator);
                factor = times_row_weight(p, targets, row, factor);
                read = row;
            }
            pack.at[k] = narrow<T>(value_at(target, c, factor));
            if (++column == inner) column = 0, c++;
            if (c == p.classes) c = 0, outer++;
        }
        if (window * N + N <= elements) {
            pack.store(out + window * N);
        } else {
            for (int k = 0; window * N + k < elements; k++) out[window * N + k] = pack.at[k];
        }
    }
}

} // namespace nll
} // namespace fused_loss
