// A matrix times numbers in device memory, rounded once: sums that become gradients, rows without those that don't
// count.
#include "../common.cuh"

namespace fused_loss {

constexpr int SCALE_THREADS = 256;

// `ScaleParams` of src/cuda/scale.rs.
struct ScaleParams {
    int64_t rows, columns;
    DType from, to; // the same, or `from` is the arithmetic type of `to`
};

// What the elements are multiplied by; null: 1.
template <class A> struct Factors {
    const A *all, *rows;
    const uint8_t *mask; // of the rows: where it is 0, the result is 0, whatever the row holds
};

// The elements from `begin` to `end`, N at a time; all N are in one row if the rows have numbers.
template <int N, class From, class To>
__device__ __forceinline__ void scale_span(const ScaleParams &p, const From *from, To *to, const Factors<Acc<To>> &f,
                                           int64_t begin, int64_t end) {
    using A = Acc<To>;
    // packs that a thread loads before it uses the first
    constexpr int U = 2;
    const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * N;
    const A all = f.all ? *f.all : A(1);
    int64_t at = begin + (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
    for (; at < end; at += U * step) {
        Pack<From, N> in[U];
#pragma unroll
        for (int u = 0; u < U; u++) {
            if (at + u * step < end) in[u] = Pack<From, N>::load(from + at + u * step);
        }
#pragma unroll
        for (int u = 0; u < U; u++) {
            const int64_t first = at + u * step;
            if (first >= end) continue;
            const int64_t row = f.rows || f.mask ? first / p.columns : 0;
            const A of_row = f.rows ? f.rows[row] : A(1);
            const bool counts = !f.mask || f.mask[row] != 0;
            Pack<To, N> out;
#pragma unroll
            for (int k = 0; k < N; k++) out.at[k] = narrow<To>(counts ? widen<A>(in[u].at[k]) * of_row * all : A(0));
            out.store(to + first);
        }
    }
}

template <class From, class To>
__device__ __forceinline__ void scale(const ScaleParams &p, const void *from, void *to, const void *all,
                                      const void *rows, const uint8_t *mask) {
    constexpr int N = LANES_16B<To>;
    const auto *x = static_cast<const From *>(from ? from : to);
    auto *y = static_cast<To *>(to);
    const Factors<Acc<To>> f = {static_cast<const Acc<To> *>(all), static_cast<const Acc<To> *>(rows), mask};
    const bool aligned = phase_of<uint8_t, 16>(reinterpret_cast<const uint8_t *>(x)) == 0 && phase_of<To, N>(y) == 0;
    const bool wide = aligned && ((!rows && !mask) || p.columns % N == 0);
    const int64_t count = p.rows * p.columns, packed = wide ? count / N * N : 0;
    scale_span<N>(p, x, y, f, 0, packed);
    scale_span<1>(p, x, y, f, packed, count);
}

template <class To>
__device__ __forceinline__ void scale_to(const ScaleParams &p, const void *from, void *to, const void *all,
                                         const void *rows, const uint8_t *mask) {
    if (p.from == p.to) return scale<To, To>(p, from, to, all, rows, mask);
    scale<Acc<To>, To>(p, from, to, all, rows, mask);
}

// Reads and writes each element once. In place without `from`. Four blocks of a multiprocessor have 64 KB of loads in
// flight; for more of them the compiler would spill on sm_86.
extern "C" __global__ void __launch_bounds__(SCALE_THREADS, 4)
    scale_rows(const ScaleParams p, const void *from, void *to, const void *all, const void *rows,
               const uint8_t *mask) {
    switch (p.to) {
    case DType::F16: return scale_to<f16>(p, from, to, all, rows, mask);
    case DType::BF16: return scale_to<bf16>(p, from, to, all, rows, mask);
    case DType::F32: return scale<float, float>(p, from, to, all, rows, mask);
    case DType::F64: return scale<double, double>(p, from, to, all, rows, mask);
    case DType::U8:
    case DType::U32:
    case DType::I16:
    case DType::I32:
    case DType::I64: return; // no matrices of sums
    }
}

} // namespace fused_loss
