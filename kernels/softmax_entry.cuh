// The kernels of the softmax family for one dtype, in modules so that a device compiles only what it uses: softmax_<dtype>.cu
// has those for class indices without options, softmax_uniform_<dtype>.cu those for one number q for all classes (not for
// doubles), softmax_general_<dtype>.cu those for all else. Such a file defines LOGIT, the dtype's C++ type, one of PLAIN_MODULE,
// UNIFORM_MODULE and GENERAL_MODULE and, for doubles, DOUBLE_LOGITS, and includes this.
//
//   softmax_<pass>_<plain|uniform|general>_<rows|tile|strided|cluster_n|registers_n>
//
// Launch shapes are chosen in src/plan/softmax.rs.
#include "softmax_registers.cuh"
#include "softmax_rows.cuh"
#include "softmax_strided.cuh"
#include "softmax_tile.cuh"

namespace fused_loss {
namespace softmax {

using X = LOGIT;
using A = Acc<X>;

constexpr int ROWS_THREADS = 256;
#ifdef __CUDA_ARCH__
constexpr int ARCH = __CUDA_ARCH__;
#else
constexpr int ARCH = 0;
#endif
// Blocks that a multiprocessor has room for, which limits the registers of a thread: 768 threads have 96 KB of loads in
// flight. The general kernels compute more than they load, and a double takes two registers. The code for sm_75, without
// minima of pairs and NaN, takes more of them, as does that for sm_120 of one kernel for f32; two blocks have loads enough.
constexpr int BLOCKS_OF[] = {ARCH < 800 || sizeof(A) == 8 ? 2 : 3, ARCH < 800 || (ARCH >= 1200 && sizeof(X) == 4) ? 2 : 3, 2, 2};
// The same for a forward over tiles, for a fused pass over tiles and for strided rows. 0: as many as the compiler likes, which
// for the general kernels is more than there are registers for.
constexpr int TILE_BLOCKS_OF[] = {sizeof(A) == 4 ? 8 : 4, 5, sizeof(A) == 4 ? 4 : 3};
#if defined(GENERAL_MODULE)
constexpr int FUSED_TILE_BLOCKS = TILE_BLOCKS_OF[GENERAL], STRIDED_BLOCKS = sizeof(A) == 4 ? 5 : 2;
#elif defined(UNIFORM_MODULE)
constexpr int FUSED_TILE_BLOCKS = TILE_BLOCKS_OF[UNIFORM], STRIDED_BLOCKS = 5;
#else
constexpr int FUSED_TILE_BLOCKS = 0, STRIDED_BLOCKS = 0;
#endif

#define REDUCE(NAME, DETAIL)                                                                                                   \
    extern "C" __global__ void __launch_bounds__(ROWS_THREADS, BLOCKS_OF[DETAIL])                                              \
        softmax_reduce_##NAME##_rows(const Problem p, const X *x, const void *t, const A *weight, A *splits, A *loss,          \
                                     A *statistics, double2 *partials, A *result, A *denominator) {                            \
        reduce_rows<DETAIL>(p, x, t, weight, splits, {loss, statistics, partials, result, denominator});                       \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(STRIDED_THREADS, STRIDED_BLOCKS)                                              \
        softmax_reduce_##NAME##_strided(const Problem p, const X *x, const void *t, const A *weight, A *, A *loss,             \
                                        A *statistics, double2 *partials, A *result, A *denominator) {                         \
        reduce_strided<DETAIL>(p, x, t, weight, {loss, statistics, partials, result, denominator});                            \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS, TILE_BLOCKS_OF[DETAIL])                                          \
        softmax_reduce_##NAME##_tile(const Problem p, const X *x, const void *t, const A *weight, A *, A *loss,                \
                                        A *statistics, double2 *partials, A *result, A *denominator) {                         \
        reduce_tiles<DETAIL>(p, x, t, weight, {loss, statistics, partials, result, denominator});                              \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(ROWS_THREADS)                                                                 \
        softmax_merge_##NAME(const Problem p, const X *x, const void *t, const A *weight, const A *splits, int count, A *loss, \
                             A *statistics, A *result, A *denominator) {                                                       \
        merge_splits<DETAIL>(p, x, t, weight, splits, count, {loss, statistics, nullptr, result, denominator});                \
    }

// The backward: see `emit_rows` and `PlainGradient`.
#define EMIT(NAME, RULE)                                                                                                       \
    extern "C" __global__ void __launch_bounds__(ROWS_THREADS, BLOCKS_OF[RULE::DETAIL])                                        \
        softmax_emit_##NAME##_rows(const Problem p, const X *x, const void *t, const A *weight, const A *statistics,           \
                                   const A *denominator, const A *upstream, X *out) {                                          \
        emit_rows<RULE>(p, x, t, weight, statistics, denominator, upstream, out);                                              \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(STRIDED_THREADS, STRIDED_BLOCKS)                                              \
        softmax_emit_##NAME##_strided(const Problem p, const X *x, const void *t, const A *weight, const A *statistics,        \
                                      const A *denominator, const A *upstream, X *out) {                                       \
        emit_strided<RULE>(p, x, t, weight, statistics, denominator, upstream, out);                                           \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS)                                                                 \
        softmax_emit_##NAME##_tile(const Problem p, const X *x, const void *t, const A *weight, const A *statistics,           \
                                      const A *denominator, const A *upstream, X *out) {                                       \
        emit_tiles<RULE>(p, x, t, weight, statistics, denominator, upstream, out);                                             \
    }

// Loss and gradient in one pass.
#define FUSED(NAME, RULE)                                                                                                      \
    extern "C" __global__ void __launch_bounds__(ROWS_THREADS, BLOCKS_OF[RULE::DETAIL])                                        \
        softmax_fused_##NAME##_rows(const Problem p, const X *x, X *out, const void *t, const A *weight, const double *counts, \
                                    A *loss, A *statistics, double2 *partials, A *result) {                                    \
        fused_rows<RULE, 1>(p, x, out, t, weight, counts, {loss, statistics, partials, result, nullptr});                      \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(STRIDED_THREADS, STRIDED_BLOCKS)                                              \
        softmax_fused_##NAME##_strided(const Problem p, const X *x, X *out, const void *t, const A *weight,                    \
                                       const double *counts, A *loss, A *statistics, double2 *partials, A *result) {           \
        fused_strided<RULE>(p, x, out, t, weight, counts, {loss, statistics, partials, result, nullptr});                      \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(TILE_THREADS, FUSED_TILE_BLOCKS)                                              \
        softmax_fused_##NAME##_tile(const Problem p, const X *x, X *out, const void *t, const A *weight,                       \
                                       const double *counts, A *loss, A *statistics, double2 *partials, A *result) {           \
        fused_tiles<RULE>(p, x, out, t, weight, counts, {loss, statistics, partials, result, nullptr});                        \
    }

#define FUSED_CLUSTER(NAME, RULE, N)                                                                                           \
    extern "C" __global__ void __cluster_dims__(N, 1, 1) __launch_bounds__(ROWS_THREADS, BLOCKS_OF[RULE::DETAIL])              \
        softmax_fused_##NAME##_cluster_##N(const Problem p, const X *x, X *out, const void *t, const A *weight,                \
                                           const double *counts, A *loss, A *statistics, double2 *partials, A *result) {       \
        fused_rows<RULE, N>(p, x, out, t, weight, counts, {loss, statistics, partials, result, nullptr});                      \
    }

#if __CUDA_ARCH__ >= 900
#define FUSED_CLUSTERS(NAME, RULE)                                                                                             \
    FUSED_CLUSTER(NAME, RULE, 2)                                                                                               \
    FUSED_CLUSTER(NAME, RULE, 4)                                                                                               \
    FUSED_CLUSTER(NAME, RULE, 8)                                                                                               \
    FUSED_CLUSTER(NAME, RULE, 16)
#else
#define FUSED_CLUSTERS(NAME, RULE)
#endif

// Rows in registers, W windows a thread: blocks of 256 threads that a multiprocessor has room for, with and without something
// written for each class. As in src/plan/softmax.rs, but on sm_75 and, for one kernel, on sm_100, whose code takes more registers
// than those leave.
constexpr int REGISTERS_WRITING = ARCH < 800 ? 1 : 2;
constexpr int registers_reading(Detail detail, int w) {
    if (ARCH < 800 || (ARCH >= 1000 && detail == UNIFORM && w == 16 && sizeof(X) == 4)) return 1;
    return w == 4 ? 3 : 2;
}

#define REGISTERS(NAME, RULE, W)                                                                                               \
    extern "C" __global__ void __launch_bounds__(ROWS_THREADS, registers_reading(RULE::DETAIL, W))                             \
        softmax_reduce_##NAME##_registers_##W(const Problem p, const X *x, const void *t, const A *weight, A *, A *loss,       \
                                              A *statistics, double2 *partials, A *result, A *denominator) {                   \
        reduce_registers<RULE::DETAIL, W>(p, x, t, weight, {loss, statistics, partials, result, denominator});                 \
    }                                                                                                                          \
    extern "C" __global__ void __launch_bounds__(ROWS_THREADS, REGISTERS_WRITING)                                              \
        softmax_fused_##NAME##_registers_##W(const Problem p, const X *x, X *out, const void *t, const A *weight,              \
                                             const double *counts, A *loss, A *statistics, double2 *partials, A *result) {     \
        fused_registers<RULE, W>(p, x, out, t, weight, counts, {loss, statistics, partials, result, nullptr});                 \
    }

#define LOG_SOFTMAX_REGISTERS(W)                                                                                               \
    extern "C" __global__ void __launch_bounds__(ROWS_THREADS, REGISTERS_WRITING)                                              \
        softmax_log_softmax_registers_##W(const Problem p, const X *x, X *out) {                                               \
        log_softmax_registers<W>(p, x, out);                                                                                   \
    }

// All passes of one detail but for rows in registers.
#define PASSES(NAME, RULE)                                                                                                     \
    REDUCE(NAME, RULE::DETAIL)                                                                                                 \
    EMIT(NAME, RULE)                                                                                                           \
    FUSED(NAME, RULE)                                                                                                          \
    FUSED_CLUSTERS(NAME, RULE)

#if defined(GENERAL_MODULE)

PASSES(general, GeneralGradient)

extern "C" __global__ void __launch_bounds__(ROWS_THREADS, BLOCKS_OF[STATISTICS])
    softmax_statistics_rows(const Problem p, const X *x, const void *t, const A *weight, A *loss, A *lse, A *z_loss, A *entropy,
                            uint32_t *argmax, uint8_t *correct) {
    statistics_rows(p, x, t, weight, {loss, lse, z_loss, entropy, argmax, correct});
}

extern "C" __global__ void __launch_bounds__(STRIDED_THREADS, STRIDED_BLOCKS)
    softmax_statistics_strided(const Problem p, const X *x, const void *t, const A *weight, A *loss, A *lse, A *z_loss, A *entropy,
                               uint32_t *argmax, uint8_t *correct) {
    statistics_strided(p, x, t, weight, {loss, lse, z_loss, entropy, argmax, correct});
}

extern "C" __global__ void __launch_bounds__(STRIDED_THREADS)
    softmax_target_gradient(const Problem p, const X *x, const A *weight, const A *statistics, const A *denominator,
                            const A *upstream, A *out) {
    target_gradient(p, x, weight, statistics, denominator, upstream, out);
}

#elif defined(UNIFORM_MODULE)

PASSES(uniform, UniformGradient)
REGISTERS(uniform, UniformGradient, 4)
REGISTERS(uniform, UniformGradient, 8)
REGISTERS(uniform, UniformGradient, 16)

#else

PASSES(plain, PlainGradient)
#ifndef DOUBLE_LOGITS
REGISTERS(plain, PlainGradient, 4)
REGISTERS(plain, PlainGradient, 8)
REGISTERS(plain, PlainGradient, 16)
LOG_SOFTMAX_REGISTERS(4)
LOG_SOFTMAX_REGISTERS(8)
LOG_SOFTMAX_REGISTERS(16)
#endif

extern "C" __global__ void __launch_bounds__(ROWS_THREADS, BLOCKS_OF[PLAIN])
    softmax_log_softmax_rows(const Problem p, const X *x, X *out) {
    log_softmax_rows(p, x, out);
}

extern "C" __global__ void __launch_bounds__(STRIDED_THREADS) softmax_log_softmax_strided(const Problem p, const X *x, X *out) {
    log_softmax_strided(p, x, out);
}

extern "C" __global__ void __launch_bounds__(TILE_THREADS) softmax_log_softmax_tile(const Problem p, const X *x, X *out) {
    log_softmax_tiles(p, x, out);
}

extern "C" __global__ void __launch_bounds__(STRIDED_THREADS)
    softmax_log_softmax_backward(const Problem p, const X *y, const X *g, X *out) {
    log_softmax_backward(p, y, g, out);
}

#endif

extern "C" __global__ void __launch_bounds__(1024) softmax_count(const Problem p, const void *t, const A *weight, double *counts) {
    count(p, t, weight, counts);
}

} // namespace softmax
} // namespace fused_loss
