// The base of every kernel of this crate: dtypes, 16-byte packs, reductions in a fixed order.
//
// Conventions
// - `In` is a storage type (f16, bf16, f32, f64), `Acc<In>` the type of its arithmetic, of sums and of losses: float
//   for the first three, double for the last.
// - Offsets into tensors are 64-bit. Indices inside a block are int.
// - The order of every sum depends only on the launch's shape. There are no float atomics: the same call gives the same
//   bits.
// - Comments at a function say which threads must call it and in which of them its result is valid.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

namespace fused_loss {

// ---------------------------------------------------------------------------------------------------------------------
// Types

using f16 = __half;
using bf16 = __nv_bfloat16;

#ifdef __CUDA_ARCH__
constexpr int ARCH = __CUDA_ARCH__;
#else
constexpr int ARCH = 0;
#endif
constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

// The dtype of an operand that is not a template parameter. `Tag` in src/cuda/launch.rs has the same numbers.
enum class DType : int { U8 = 0, U32 = 1, I32 = 2, I64 = 3, F16 = 4, BF16 = 5, F32 = 6, F64 = 7, I16 = 8 };

// The dtype of the elements at a pointer.
__device__ constexpr DType dtype_of(const f16 *) { return DType::F16; }
__device__ constexpr DType dtype_of(const bf16 *) { return DType::BF16; }
__device__ constexpr DType dtype_of(const float *) { return DType::F32; }
__device__ constexpr DType dtype_of(const double *) { return DType::F64; }

template <class In> struct Arithmetic {
    using type = float;
};
template <> struct Arithmetic<double> {
    using type = double;
};
template <class In> using Acc = typename Arithmetic<In>::type;

// To the arithmetic type. From a 64-bit integer to float it rounds.
template <class A, class T> __device__ __forceinline__ A widen(T v) { return static_cast<A>(v); }
template <> __device__ __forceinline__ float widen<float, f16>(f16 v) { return __half2float(v); }
template <> __device__ __forceinline__ float widen<float, bf16>(bf16 v) { return __bfloat162float(v); }
template <> __device__ __forceinline__ double widen<double, f16>(f16 v) { return __half2float(v); }
template <> __device__ __forceinline__ double widen<double, bf16>(bf16 v) { return __bfloat162float(v); }

// To the storage type, rounding once, to nearest even.
template <class T, class A> __device__ __forceinline__ T narrow(A v) { return static_cast<T>(v); }
template <> __device__ __forceinline__ f16 narrow<f16, float>(float v) { return __float2half_rn(v); }
template <> __device__ __forceinline__ bf16 narrow<bf16, float>(float v) { return __float2bfloat16_rn(v); }

template <class A> __device__ __forceinline__ A infinity();
template <> __device__ __forceinline__ float infinity<float>() { return __int_as_float(0x7f800000); }
template <> __device__ __forceinline__ double infinity<double>() { return __longlong_as_double(0x7ff0000000000000ll); }
template <class A> __device__ __forceinline__ A quiet_nan();
template <> __device__ __forceinline__ float quiet_nan<float>() { return __int_as_float(0x7fc00000); }
template <> __device__ __forceinline__ double quiet_nan<double>() { return __longlong_as_double(0x7ff8000000000000ll); }

// ---------------------------------------------------------------------------------------------------------------------
// Packs: several neighbouring elements moved by one instruction

// Elements of `T` in 16 bytes, the widest access there is.
template <class T> constexpr int LANES_16B = 16 / sizeof(T);

template <int BYTES> struct Word;
template <> struct Word<1> {
    using type = uint8_t;
};
template <> struct Word<2> {
    using type = uint16_t;
};
template <> struct Word<4> {
    using type = uint32_t;
};
template <> struct Word<8> {
    using type = uint2;
};
template <> struct Word<16> {
    using type = uint4;
};

// N neighbouring elements of T in registers. `load` and `store` make as few accesses as possible, of at most 16 bytes
// each, and need an address that is a multiple of `ALIGN`.
template <class T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
    static constexpr int BYTES = sizeof(T) * N;
    static constexpr int ALIGN = BYTES < 16 ? BYTES : 16;
    using Access = typename Word<ALIGN>::type;

    T at[N];

    __device__ __forceinline__ static Pack load(const T *p) {
        Pack pack;
#pragma unroll
        for (int i = 0; i < BYTES / ALIGN; i++) {
            reinterpret_cast<Access *>(pack.at)[i] = reinterpret_cast<const Access *>(p)[i];
        }
        return pack;
    }

    // As `load`, through the read-only cache: only for memory that no thread of this launch writes.
    __device__ __forceinline__ static Pack load_const(const T *p) {
        Pack pack;
#pragma unroll
        for (int i = 0; i < BYTES / ALIGN; i++) {
            reinterpret_cast<Access *>(pack.at)[i] = __ldg(reinterpret_cast<const Access *>(p) + i);
        }
        return pack;
    }

    __device__ __forceinline__ void store(T *p) const {
#pragma unroll
        for (int i = 0; i < BYTES / ALIGN; i++) {
            reinterpret_cast<Access *>(p)[i] = reinterpret_cast<const Access *>(at)[i];
        }
    }
};

// The number of elements between p and the last multiple of N elements of T before it, so that an aligned window of N
// elements begins at p - phase.
template <class T, int N> __device__ __forceinline__ int phase_of(const T *p) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(T) % N);
}

// Calls f with a null pointer of the type that `dtype` names, so that a generic lambda is compiled once for each dtype.
// The branch is the same in all threads of a launch.
template <class F> __device__ __forceinline__ void with_dtype(DType dtype, F f) {
    switch (dtype) {
    case DType::U8: return f(static_cast<const uint8_t *>(nullptr));
    case DType::U32: return f(static_cast<const uint32_t *>(nullptr));
    case DType::I16: return f(static_cast<const int16_t *>(nullptr));
    case DType::I32: return f(static_cast<const int32_t *>(nullptr));
    case DType::I64: return f(static_cast<const int64_t *>(nullptr));
    case DType::F16: return f(static_cast<const f16 *>(nullptr));
    case DType::BF16: return f(static_cast<const bf16 *>(nullptr));
    case DType::F32: return f(static_cast<const float *>(nullptr));
    case DType::F64: return f(static_cast<const double *>(nullptr));
    }
}

// A class index of any integer dtype, range-checked by the caller before it is narrowed.
__device__ __forceinline__ int64_t load_index(const void *p, DType dtype, int64_t i) {
    switch (dtype) {
    case DType::U8: return static_cast<const uint8_t *>(p)[i];
    case DType::U32: return static_cast<const uint32_t *>(p)[i];
    case DType::I16: return static_cast<const int16_t *>(p)[i];
    case DType::I32: return static_cast<const int32_t *>(p)[i];
    case DType::I64: return static_cast<const int64_t *>(p)[i];
    case DType::F16:
    case DType::BF16:
    case DType::F32:
    case DType::F64: break; // no class indices
    }
    return -1;
}

// ---------------------------------------------------------------------------------------------------------------------
// Elementary functions by one name for float and double.

__device__ __forceinline__ float exp_(float x) { return expf(x); }
__device__ __forceinline__ double exp_(double x) { return exp(x); }
__device__ __forceinline__ float log_(float x) { return logf(x); }
__device__ __forceinline__ double log_(double x) { return log(x); }
__device__ __forceinline__ float log1p_(float x) { return log1pf(x); }
__device__ __forceinline__ double log1p_(double x) { return log1p(x); }
__device__ __forceinline__ float expm1_(float x) { return expm1f(x); }
__device__ __forceinline__ double expm1_(double x) { return expm1(x); }
__device__ __forceinline__ float pow_(float x, float y) { return powf(x, y); }
__device__ __forceinline__ double pow_(double x, double y) { return pow(x, y); }
__device__ __forceinline__ bool is_nan(float x) { return x != x; }
__device__ __forceinline__ bool is_nan(double x) { return x != x; }
__device__ __forceinline__ float abs_(float x) { return fabsf(x); }
__device__ __forceinline__ double abs_(double x) { return fabs(x); }
// The larger of two numbers; of a number and a NaN, the number.
__device__ __forceinline__ float max_(float a, float b) { return fmaxf(a, b); }
__device__ __forceinline__ double max_(double a, double b) { return fmax(a, b); }
__device__ __forceinline__ float fma_(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fma_(double a, double b, double c) { return fma(a, b, c); }

// ---------------------------------------------------------------------------------------------------------------------
// Reductions

struct Sum {
    template <class A> __device__ __forceinline__ static A identity() { return A(0); }
    template <class A> __device__ __forceinline__ static A combine(A a, A b) { return a + b; }
};

struct Max {
    template <class A> __device__ __forceinline__ static A combine(A a, A b) { return max_(a, b); }
};
struct Min {
    __device__ __forceinline__ static int combine(int a, int b) { return min(a, b); }
};

// Over `width` neighbouring lanes, a power of two up to 32: all lanes of the warp call it, all get their group's
// result. A butterfly: each lane adds the same numbers in the same tree, so all lanes hold the same bits.
template <class Op, class A> __device__ __forceinline__ A lanes_reduce(A v, int width) {
    for (int step = width / 2; step > 0; step /= 2) v = Op::combine(v, __shfl_xor_sync(ALL_LANES, v, step));
    return v;
}

// As `lanes_reduce` over the whole warp.
template <class Op, class A> __device__ __forceinline__ A warp_reduce(A v) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) v = Op::combine(v, __shfl_xor_sync(ALL_LANES, v, step));
    return v;
}

// Over a team of `team` neighbouring threads of a block, a power of two that divides the block, which has whole warps:
// all threads of the block call it, all get their team's result. Teams of more than a warp exchange through `scratch`,
// 32 values in shared memory that may be used again at once.
template <class Op, class A> __device__ __forceinline__ A team_reduce(A v, int team, A *scratch) {
    if (team <= WARP) return lanes_reduce<Op>(v, team);
    const int thread = threadIdx.x + blockDim.x * threadIdx.y;
    const int warps = team / WARP;
    const int first_warp = thread / team * warps;
    v = warp_reduce<Op>(v);
    if (thread % WARP == 0) scratch[thread / WARP] = v;
    __syncthreads();
    const int lane = thread % WARP;
    v = lane < warps ? scratch[first_warp + lane] : Op::template identity<A>();
    v = warp_reduce<Op>(v);
    __syncthreads();
    return v;
}

// Over the whole block, which is a power of two of warps: as `team_reduce` with one team.
template <class Op, class A> __device__ __forceinline__ A block_reduce(A v, A *scratch) {
    return team_reduce<Op>(v, blockDim.x * blockDim.y, scratch);
}

// ---------------------------------------------------------------------------------------------------------------------
// A second stage without a second launch

// Whether this block is the last of `count` blocks to arrive. The last one sees everything that thread 0 of each of
// them wrote before its call. All threads of the block call it. `ticket` counts arrivals. It is 0 before and after each
// launch, and no two launches that may run at the same time share one (`Tickets` in src/cuda/gpu.rs). The order of
// arrival decides only which block adds the partial results.
__device__ __forceinline__ bool is_last_block(unsigned *ticket, unsigned count) {
    __shared__ bool last;
    if (threadIdx.x + threadIdx.y == 0) {
        __threadfence();
        last = atomicInc(ticket, count - 1) == count - 1;
    }
    __syncthreads();
    if (last) __threadfence();
    return last;
}

// ---------------------------------------------------------------------------------------------------------------------
// Launches that overlap: `Grid::overlaps` of src/cuda/grid.rs

// Lets a launch that is allowed to overlap with this one begin, once all blocks have come here or ended.
__device__ __forceinline__ void let_next_launch_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Waits until the launch that this one may overlap with has ended and its results are visible.
__device__ __forceinline__ void wait_for_last_launch() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

} // namespace fused_loss
