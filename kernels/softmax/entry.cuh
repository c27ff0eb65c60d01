// The kernels of the softmax family for one dtype, in modules so that a program loads only what it uses. Such a file defines
// LOGIT, the dtype's C++ type, one of PLAIN_MODULE, UNIFORM_MODULE and GENERAL_MODULE and, for doubles, DOUBLE_LOGITS, and
// includes this.
//
//   softmax_<pass>_<plain|uniform|general>_<rows|tile|strided|cluster|registers_n>
//
// softmax_uniform_<dtype>.cu: one number q for all classes beside the class indices. Where q = 0 its kernels are the plain ones
// but for a fused multiply-add in place of a multiplication, and serve class indices alone too.
// softmax_<dtype>.cu: class indices alone, where the uniform kernels' further numbers would take time: forwards, and loss and
// gradient, of adjacent classes. And log-softmax.
// softmax_general_<dtype>.cu: all else, and all of doubles. The arithmetic is the limit there, so there are no tiles, registers
// and clusters, which save memory traffic.
//
// Launch shapes are chosen in src/softmax/cuda/plan.rs.
#include "registers.cuh"
#include "rows.cuh"
#include "strided.cuh"
#include "tile.cuh"

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
constexpr int STRIDED_BLOCKS = sizeof(A) == 4 ? 5 : 2;
#elif defined(UNIFORM_MODULE)
constexpr int FUSED_TILE_BLOCKS = TILE_BLOCKS_OF[UNIFORM], STRIDED_BLOCKS = 5;
#else
constexpr int FUSED_TILE_BLOCKS = 0, STRIDED_BLOCKS = 0;
#endif

// A forward, with where its results go.
#define REDUCE_AS(NAME, FORM, BOUNDS, BODY)                                                                                    \
    extern "C" __global__ void __launch_bounds__ BOUNDS                                                                        \
        softmax_reduce_##NAME##_##FORM(const Problem p, const X *x, const void *t, const A *weight, A *splits, A *loss,        \
                                       A *statistics, double2 *partials, unsigned *ticket, A *result, A *denominator) {        \
        const Outputs<A> out = {loss, statistics, partials, ticket, result, denominator};                                      \
        BODY;                                                                                                                  \
    }
#define REDUCE_ROWS(NAME, D)                                                                                                   \
    REDUCE_AS(NAME, rows, (ROWS_THREADS, BLOCKS_OF[D]), (reduce_rows<D>(p, x, t, weight, splits, out)))
#define REDUCE_STRIDED(NAME, D)                                                                                                \
    REDUCE_AS(NAME, strided, (STRIDED_THREADS, STRIDED_BLOCKS), (reduce_strided<D>(p, x, t, weight, out)))
#define REDUCE_TILE(NAME, D)                                                                                                   \
    REDUCE_AS(NAME, tile, (TILE_THREADS, TILE_BLOCKS_OF[D]), (reduce_tiles<D>(p, x, t, weight, out)))
#define MERGE(NAME, D)                                                                                                         \
    extern "C" __global__ void __launch_bounds__(ROWS_THREADS)                                                                 \
        softmax_merge_##NAME(const Problem p, const X *x, const void *t, const A *weight, const A *splits, int count, A *loss, \
                             A *statistics, A *result, A *denominator) {                                                       \
        merge_splits<D>(p, x, t, weight, splits, count, {loss, statistics, nullptr, nullptr, result, denominator});            \
    }

// The backward: see `emit_rows` and `UniformGradient`.
#define EMIT_AS(NAME, FORM, BOUNDS, BODY)                                                                                      \
    extern "C" __global__ void __launch_bounds__ BOUNDS                                                                        \
        softmax_emit_##NAME##_##FORM(const Problem p, const X *x, const void *t, const A *weight, const A *statistics,         \
                                     const A *denominator, const A *upstream, X *out) {                                        \
        BODY(p, x, t, weight, statistics, denominator, upstream, out);                                                         \
    }
#define EMIT_ROWS(NAME, RULE) EMIT_AS(NAME, rows, (ROWS_THREADS, BLOCKS_OF[RULE::DETAIL]), emit_rows<RULE>)
#define EMIT_STRIDED(NAME, RULE) EMIT_AS(NAME, strided, (STRIDED_THREADS, STRIDED_BLOCKS), emit_strided<RULE>)
#define EMIT_TILE(NAME, RULE) EMIT_AS(NAME, tile, (TILE_THREADS), emit_tiles<RULE>)

// Loss and gradient in one pass.
#define FUSED_AS(NAME, FORM, BOUNDS, BODY)                                                                                     \
    extern "C" __global__ void __launch_bounds__ BOUNDS                                                                        \
        softmax_fused_##NAME##_##FORM(const Problem p, const X *x, X *out, const void *t, const A *weight,                     \
                                      const double *counts, A *loss, double2 *partials, unsigned *ticket, A *result) {         \
        const Outputs<A> left = {loss, nullptr, partials, ticket, result, nullptr};                                            \
        BODY;                                                                                                                  \
    }
#define FUSED_ROWS(NAME, RULE)                                                                                                 \
    FUSED_AS(NAME, rows, (ROWS_THREADS, BLOCKS_OF[RULE::DETAIL]), (fused_rows<RULE, false>(p, x, out, t, weight, counts, left)))
#define FUSED_STRIDED(NAME, RULE)                                                                                              \
    FUSED_AS(NAME, strided, (STRIDED_THREADS, STRIDED_BLOCKS), (fused_strided<RULE>(p, x, out, t, weight, counts, left)))
#define FUSED_TILE(NAME, RULE)                                                                                                 \
    FUSED_AS(NAME, tile, (TILE_THREADS, FUSED_TILE_BLOCKS), (fused_tiles<RULE>(p, x, out, t, weight, counts, left)))

// A row over the blocks of a cluster, whose size the launch says.
#if __CUDA_ARCH__ >= 900
#define FUSED_CLUSTER(NAME, RULE)                                                                                              \
    FUSED_AS(NAME, cluster, (ROWS_THREADS, BLOCKS_OF[RULE::DETAIL]), (fused_rows<RULE, true>(p, x, out, t, weight, counts, left)))
#else
#define FUSED_CLUSTER(NAME, RULE)
#endif

// Rows in registers, W windows a thread: blocks of 256 threads that a multiprocessor has room for, with and without something
// written for each class. As in src/softmax/cuda/plan.rs, but on sm_75 and, for one kernel, on sm_100, whose code takes more registers
// than those leave.
constexpr int REGISTERS_WRITING = ARCH < 800 ? 1 : 2;
constexpr int registers_reading(Detail detail, int w) {
    if (ARCH < 800 || (ARCH >= 1000 && detail == UNIFORM && w == 16 && sizeof(X) == 4)) return 1;
    return w == 4 ? 3 : 2;
}

#define REGISTERS(NAME, RULE, W)                                                                                               \
    REDUCE_AS(NAME, registers_##W, (ROWS_THREADS, registers_reading(RULE::DETAIL, W)),                                         \
              (reduce_registers<RULE::DETAIL, W>(p, x, t, weight, out)))                                                       \
    FUSED_AS(NAME, registers_##W, (ROWS_THREADS, REGISTERS_WRITING), (fused_registers<RULE, W>(p, x, out, t, weight, counts, left)))

#define LOG_SOFTMAX_REGISTERS(W)                                                                                               \
    extern "C" __global__ void __launch_bounds__(ROWS_THREADS, REGISTERS_WRITING)                                              \
        softmax_log_softmax_registers_##W(const Problem p, const X *x, X *out) {                                               \
        log_softmax_registers<W>(p, x, out);                                                                                   \
    }

#if defined(GENERAL_MODULE)

REDUCE_ROWS(general, GENERAL)
REDUCE_STRIDED(general, GENERAL)
MERGE(general, GENERAL)
EMIT_ROWS(general, GeneralGradient)
EMIT_STRIDED(general, GeneralGradient)
FUSED_ROWS(general, GeneralGradient)
FUSED_STRIDED(general, GeneralGradient)

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

REDUCE_ROWS(uniform, UNIFORM)
REDUCE_STRIDED(uniform, UNIFORM)
REDUCE_TILE(uniform, UNIFORM)
MERGE(uniform, UNIFORM)
EMIT_ROWS(uniform, UniformGradient)
EMIT_STRIDED(uniform, UniformGradient)
EMIT_TILE(uniform, UniformGradient)
FUSED_ROWS(uniform, UniformGradient)
FUSED_STRIDED(uniform, UniformGradient)
FUSED_TILE(uniform, UniformGradient)
FUSED_CLUSTER(uniform, UniformGradient)
REGISTERS(uniform, UniformGradient, 4)
REGISTERS(uniform, UniformGradient, 8)
REGISTERS(uniform, UniformGradient, 16)

#else

#ifndef DOUBLE_LOGITS
REDUCE_ROWS(plain, PLAIN)
REDUCE_TILE(plain, PLAIN)
FUSED_ROWS(plain, PlainGradient)
FUSED_TILE(plain, PlainGradient)
FUSED_CLUSTER(plain, PlainGradient)
REGISTERS(plain, PlainGradient, 4)
REGISTERS(plain, PlainGradient, 8)
REGISTERS(plain, PlainGradient, 16)

LOG_SOFTMAX_REGISTERS(4)
LOG_SOFTMAX_REGISTERS(8)
LOG_SOFTMAX_REGISTERS(16)
extern "C" __global__ void __launch_bounds__(TILE_THREADS) softmax_log_softmax_tile(const Problem p, const X *x, X *out) {
    log_softmax_tiles(p, x, out);
}
#endif

extern "C" __global__ void __launch_bounds__(ROWS_THREADS, BLOCKS_OF[PLAIN])
    softmax_log_softmax_rows(const Problem p, const X *x, X *out) {
    log_softmax_rows(p, x, out);
}

extern "C" __global__ void __launch_bounds__(STRIDED_THREADS) softmax_log_softmax_strided(const Problem p, const X *x, X *out) {
    log_softmax_strided(p, x, out);
}

extern "C" __global__ void __launch_bounds__(STRIDED_THREADS)
    softmax_log_softmax_backward(const Problem p, const X *y, const X *g, X *out) {
    log_softmax_backward(p, y, g, out);
}

#endif

} // namespace softmax
} // namespace fused_loss
